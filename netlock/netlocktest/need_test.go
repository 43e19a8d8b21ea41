package netlocktest

import "testing"

// verdict is a testing.TB that notes how a test ended instead of ending it.
type verdict struct {
	testing.TB
	skipped, failed bool
}

func (v *verdict) Helper()               {}
func (v *verdict) Skipf(string, ...any)  { v.skipped = true }
func (v *verdict) Fatalf(string, ...any) { v.failed = true }

func TestNeed(t *testing.T) {
	for ci, want := range map[string]verdict{"": {skipped: true}, "true": {failed: true}} {
		t.Setenv("CI", ci)
		v := verdict{}
		if Need(&v, "no-such-tool"); v != want {
			t.Errorf("CI=%q: %+v", ci, v)
		}
	}
}

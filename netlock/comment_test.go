package netlock

import (
	"os"
	"strings"
	"testing"
	"time"
)

func TestCommentRoundTrip(t *testing.T) {
	now := time.Date(2026, 11, 23, 15, 13, 55, 999, time.UTC)
	for _, name := range []string{"criu", "", "a b", "x\"; accept\n", strings.Repeat("n", 40), "naïve", "$(id)"} {
		text := Comment(now, Caller{PID: 42, Name: name})
		if len(text) > 127 {
			t.Errorf("%q: %d bytes, nft's limit is 127", text, len(text))
		}
		if strings.ContainsAny(text, "\"\n\\") {
			t.Errorf("%q would end nft's string", text)
		}
		since, c, err := ParseComment(text)
		if err != nil || !since.Equal(now.Truncate(time.Second)) || c.PID != 42 || c.Name != cleanName(name) {
			t.Errorf("%q reads back as %v %v %v", text, since, c, err)
		}
	}
	whole := Caller{PID: 1 << 22, Name: strings.Repeat("n", 15), Start: 1<<64 - 1, Task: 1 << 22, TaskStart: 1<<64 - 1, Boot: "0123abcd"}
	if text := Comment(now, whole); len(text) > 127 {
		t.Errorf("%q: %d bytes, nft's limit is 127", text, len(text))
	} else if _, c, err := ParseComment(text); err != nil || c != whole {
		t.Errorf("%q reads back as %+v, %v", text, c, err)
	}
	for _, bad := range []string{"", "criu-netlock", "criu-netlock 2 2026-11-23T15:13:55Z 1 criu", "criu-netlock 1 yesterday 1 criu",
		"criu-netlock 1 2026-11-23T15:13:55Z x criu", "criu-netlock 1 2026-11-23T15:13:55Z 1 a\"b", "criu-netlock 1 2026-11-23T15:13:55Z 1 criu more",
		"criu-netlock 1 2026-11-23T15:13:55Z 1 criu x 1 1 b", "criu-netlock 1 2026-11-23T15:13:55Z 1 criu 1 x 1 b",
		"criu-netlock 1 2026-11-23T15:13:55Z 1 criu 1 1 -1 b", "criu-netlock 1 2026-11-23T15:13:55Z 1 criu 1 1 1 a(b", "criu-netlock 1 2026-11-23T15:13:55Z 1 criu 1 1 1"} {
		if _, _, err := ParseComment(bad); err == nil {
			t.Errorf("%q passes for our metadata", bad)
		}
	}
}

func TestCommentNames(t *testing.T) {
	for name, want := range map[string]string{
		"criu": "criu", "": "-", "a b\"c\nCOMMIT": "a_b_c_COMMIT", "much-too-long-a-name": "much-too-long-a", "é": "__",
	} {
		if _, c, err := ParseComment(Comment(time.Now(), Caller{Name: name})); err != nil || c.Name != want {
			t.Errorf("%q became %q, %v", name, c.Name, err)
		}
	}
}

// The caller and its task are known again by their start times, not by their pids alone.
func TestCallerOf(t *testing.T) {
	c := CallerOf(os.Getpid()).For(os.Getppid())
	if c.PID != os.Getpid() || c.Name == "" || c.Start == 0 || len(c.Boot) != bootDigits || c.Task != os.Getppid() || c.TaskStart == 0 {
		t.Errorf("%+v", c)
	}
}

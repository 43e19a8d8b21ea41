package setup

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What somebody else writes between the look and the change is not lost.
func TestChangedMeanwhile(t *testing.T) {
	for name, there := range map[string]bool{"a file": true, "no file yet": false} {
		path := filepath.Join(t.TempDir(), "runc.conf")
		if there {
			if err := os.WriteFile(path, []byte("mine\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		f, err := ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("theirs\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := f.Write("ours\n"); err == nil || !strings.Contains(err.Error(), "changed meanwhile") {
			t.Errorf("%s: written: %v", name, err)
		}
		if err := f.Delete(Made{}); err == nil {
			t.Errorf("%s: deleted", name)
		}
		if b, _ := os.ReadFile(path); string(b) != "theirs\n" {
			t.Errorf("%s: %q", name, b)
		}
		if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 1 {
			t.Errorf("%s: left: %v", name, left)
		}
	}
}

func TestOneSetupAtATime(t *testing.T) {
	f, err := ReadFile(filepath.Join(t.TempDir(), "runc.conf"))
	if err != nil {
		t.Fatal(err)
	}
	done, err := f.hold()
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Write("x\n"); err == nil || !strings.Contains(err.Error(), "another setup") {
		t.Errorf("two at a time: %v", err)
	}
	done()
	if err := f.Write("x\n"); err != nil {
		t.Errorf("after the other one: %v", err)
	}
}

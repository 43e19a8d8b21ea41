package testbed

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestMirror(t *testing.T) {
	for _, tc := range []struct {
		name  string
		files map[string]string
		want  string
	}{
		{"one line", map[string]string{"sources.list": "# a comment\ndeb http://one.example/debian/ trixie main contrib # why\n"}, "http://one.example/debian"},
		{"options", map[string]string{"sources.list": "deb [arch=amd64 signed-by=/usr/share/keyrings/x.gpg] https://two.example/debian sid main\n"}, "https://two.example/debian"},
		{"source packages only", map[string]string{"sources.list": "deb-src http://one.example/debian sid main\n"}, ""},
		{"deb822", map[string]string{"sources.list.d/debian.sources": "Types: deb deb-src\n# where\nURIs: http://three.example/debian\nSuites: bookworm bookworm-updates\nComponents: main\n"}, "http://three.example/debian"},
		{"folded", map[string]string{"sources.list.d/debian.sources": "types: deb\nURIs:\n http://four.example/debian\nSuites:\n stable\nComponents:\n main\n contrib\n"}, "http://four.example/debian"},
		{"disabled", map[string]string{"sources.list.d/debian.sources": "Enabled: no\nTypes: deb\nURIs: http://no.example/debian\nSuites: stable\nComponents: main\n"}, ""},
		{"security and others are passed over", map[string]string{
			"sources.list.d/a.list":         "deb https://vendor.example/apt tool-bookworm main\n",
			"sources.list.d/debian.sources": "Types: deb\nURIs: http://sec.example/debian-security\nSuites: bookworm-security\nComponents: main\n\nTypes: deb\nURIs: cdrom:x http://five.example/debian\nSuites: bookworm\nComponents: main\n",
			"sources.list.d/old.save":       "deb http://no.example/debian sid main\n",
		}, "http://five.example/debian"},
		{"nothing", nil, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			etc := t.TempDir()
			for name, text := range tc.files {
				f := filepath.Join(etc, name)
				if err := os.MkdirAll(filepath.Dir(f), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(f, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got, err := mirrorIn(etc)
			if got != tc.want || (err != nil) != (tc.want == "") {
				t.Errorf("got %q, %v; want %q", got, err, tc.want)
			}
		})
	}
}

// A folder that the user names may hold something else: it is not replaced.
func TestEnsureSparesWhatIsNotOurs(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "precious")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv(EnvDir, dir)
	if _, err := Default().Ensure(t.Context(), nil); err == nil || !strings.Contains(err.Error(), EnvDir) {
		t.Errorf("Ensure: %v", err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}

func TestCheck(t *testing.T) {
	r, dir := Default(), t.TempDir()
	if err := r.check(t.Context(), dir); err == nil || !strings.Contains(err.Error(), "no finished root") {
		t.Errorf("an empty folder: %v", err)
	}
	put := func(text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(dir, "etc"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, stamp), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put("0123\n")
	if err := r.check(t.Context(), dir); err == nil || !strings.Contains(err.Error(), "another recipe") {
		t.Errorf("another recipe's root: %v", err)
	}
	put(r.hash() + "\n")
	if err := r.check(t.Context(), dir); err == nil {
		t.Error("a stamp without a root passes for a root")
	}
	if err := r.ours(dir); err != nil {
		t.Errorf("a broken root may be replaced: %v", err)
	}
}

func TestLockFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	unlock, err := lockFile(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := lockFile(ctx, name); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second holder: %v", err)
	}
	unlock()
	if unlock, err = lockFile(t.Context(), name); err != nil {
		t.Errorf("after the first: %v", err)
	} else {
		unlock()
	}
}

// The two roots are beside each other, wherever the user wants them.
func TestRecipeDir(t *testing.T) {
	for _, env := range []string{"", filepath.Join(t.TempDir(), "root")} {
		t.Setenv(EnvDir, env)
		if a, b := Default().Dir(), Engines().Dir(); a == b || filepath.Dir(a) != filepath.Dir(b) {
			t.Errorf("%s=%s: the default root is in %s, the engines' in %s", EnvDir, env, a, b)
		}
	}
}

func TestRecipeHash(t *testing.T) {
	a, b := Default(), Default()
	b.Packages = append(b.Packages, "lxc")
	if a.hash() != Default().hash() || a.hash() == b.hash() {
		t.Errorf("the hash must follow the recipe and nothing else: %s, %s", a.hash(), b.hash())
	}
	c, d := Engines(), Engines()
	d.Files["etc/lxc/lxc.conf"] += "# changed\n"
	if c.hash() == d.hash() {
		t.Error("a changed file makes no other root")
	}
}

package testbed

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
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

// A root that no longer works is made anew, one that does is left alone. debootstrap's part
// is played by a script: the real one takes minutes.
func TestEnsureRebuilds(t *testing.T) {
	if os.Geteuid() != 0 {
		netlocktest.CannotRun(t, "not root")
	}
	bin := t.TempDir()
	source := filepath.Join(bin, "check.go")
	if err := os.WriteFile(source, []byte("package main\n\nfunc main() {}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-o", filepath.Join(bin, "check"), source)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	script := `#!/bin/sh
set -e
bin=` + bin + `
echo made >>$bin/made
shift 3
cd "$1"
mkdir -p bin proc sys dev run tmp root etc
cp "$bin/check" bin/check
for program in umount cat; do # which entering needs
	file=$(command -v $program)
	cp -L "$file" bin/
	cp -L --parents $(ldd "$file" | grep -o '/[^ ]*') .
done
`
	if err := os.WriteFile(filepath.Join(bin, "debootstrap"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	dir := filepath.Join(t.TempDir(), "root")
	t.Setenv(EnvDir, dir)
	r := Recipe{Suite: "none", Checks: [][]string{{"/bin/check"}}}
	for i, spoil := range []func() error{
		func() error { return nil },
		func() error { return nil }, // whole
		func() error { return os.WriteFile(filepath.Join(dir, "bin/check"), []byte("spoilt"), 0o755) },
		func() error { return os.Remove(filepath.Join(dir, "bin/check")) },
		func() error { return os.WriteFile(filepath.Join(dir, stamp), []byte("0123\n"), 0o644) },
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Ensure(t.Context(), nil); err != nil {
			t.Fatalf("%d: %v", i, err)
		}
		made, err := os.ReadFile(filepath.Join(bin, "made"))
		if want := max(1, i); err != nil || strings.Count(string(made), "made") != want {
			t.Errorf("%d: made %d times, want %d: %v", i, strings.Count(string(made), "made"), want, err)
		}
	}
	if left, _ := filepath.Glob(dir + ".new-*"); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

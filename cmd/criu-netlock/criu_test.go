package main

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early/link"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// The real criu is the next one in PATH behind this program, and never this program.
func TestRealCRIU(t *testing.T) {
	dir := t.TempDir()
	make := func(name string, f func(string) error) string {
		d := filepath.Join(dir, name)
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := f(filepath.Join(d, "criu")); err != nil {
			t.Fatal(err)
		}
		return d
	}
	real := func(p string) error { return os.WriteFile(p, []byte("#!/bin/sh\n"), 0o755) }
	self := func(p string) error { return os.Symlink("/proc/self/exe", p) }
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	a, b := make("a", real), make("b", real)
	us, again := make("us", self), make("again", func(p string) error { return os.Symlink(exe, p) })
	folder := make("folder", func(p string) error { return os.Mkdir(p, 0o755) })
	plain := make("plain", func(p string) error { return os.WriteFile(p, nil, 0o644) })
	for _, c := range []struct {
		path []string
		want string
	}{
		{[]string{a, b}, a}, {[]string{us, a, b}, a}, {[]string{a, us, b}, b}, {[]string{us, a, again, b}, b},
		{[]string{us, folder, plain, dir + "/none", b}, b}, {[]string{us, again}, ""}, {[]string{a, us}, ""}, {nil, ""},
	} {
		got, err := realCRIU("", strings.Join(c.path, ":"))
		if want := filepath.Join(c.want, "criu"); c.want != "" && (got != want || err != nil) || c.want == "" && err == nil {
			t.Errorf("%q: %q, %v", c.path, got, err)
		}
	}
	if got, err := realCRIU(b+"/criu", a); got != b+"/criu" || err != nil {
		t.Errorf("configured: %q, %v", got, err)
	}
	for _, bad := range []string{us + "/criu", exe, dir + "/none"} {
		if got, err := realCRIU(bad, a); err == nil {
			t.Errorf("configured as %q: %q", bad, got)
		}
	}
	for _, c := range []struct {
		args []string
		want string
		is   bool
	}{
		{[]string{"criu", "dump", "-t", "1"}, "dump -t 1", true}, {[]string{"/x/criu"}, "", true},
		{[]string{"/x/criu-netlock", "criu", "swrk", "3"}, "swrk 3", true}, {[]string{"criu-netlock"}, "", false}, {[]string{"criu-netlock", "list", "criu"}, "", false},
	} {
		if got, is := asCRIU(c.args); strings.Join(got, " ") != c.want || is != c.is {
			t.Errorf("%q: %q, %v", c.args, got, is)
		}
	}
}

// criuScript makes a criu of a shell script, and a PATH that has it.
func criuScript(t *testing.T, script string) (path, env string) {
	t.Helper()
	dir := t.TempDir()
	path = filepath.Join(dir, "criu")
	writeScript(t, path, script)
	return path, "PATH=" + dir + ":/usr/sbin:/usr/bin:/sbin:/bin"
}

// asLink is the program by the name of criu, outside PATH.
func asLink(t *testing.T) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "criu")
	if err := os.Symlink(program, p); err != nil {
		t.Fatal(err)
	}
	return p
}

// What the real criu has from its parent it has as if we were not there: signals ignored and
// blocked, the signal for the parent's end, closed descriptors.
func TestCRIUAsStarted(t *testing.T) {
	if link.Flag == "" {
		t.Skip("Go's runtime comes first")
	}
	netlocktest.Need(t, "sh", "env", "grep", "setpriv", "ls")
	criu, env := criuScript(t, `exec "$@"`) // what it starts would have the shell's
	us := [][]string{{asLink(t)}, {program, "criu"}}
	var all []string
	for sig := 1; sig <= 64; sig++ {
		if sig != 9 && sig != 19 && sig != 32 && sig != 33 { // the kernel's, and the C library's
			all = append(all, strconv.Itoa(sig))
		}
	}
	signals, fds := []string{"grep", "-E", "^(Sig[^Q]|Shd)", "/proc/self/status"}, []string{"ls", "/proc/self/fd"}
	for _, c := range []struct{ parent, look []string }{
		{[]string{"env"}, signals},
		{[]string{"env", "--ignore-signal=PIPE"}, signals}, // as systemd does
		{[]string{"env", "--ignore-signal=HUP,INT,TERM,CHLD,URG,PROF,SEGV,USR1", "--block-signal=TERM,CHLD,PROF,BUS,USR2,RTMIN,RTMAX"}, signals},
		{[]string{"env", "--ignore-signal=" + strings.Join(all, ",")}, signals},
		{[]string{"env", "--block-signal=" + strings.Join(all, ",")}, signals},
		{[]string{"setpriv", "--pdeathsig", "TERM"}, []string{"setpriv", "--dump"}},
		{[]string{"sh", "-c", `exec "$@" <&- 2>&-`, "sh"}, fds},
		{[]string{"sh", "-c", `exec "$@" 9</dev/null`, "sh"}, fds},
		{[]string{"sh", "-c", `ulimit -S -n 100 && exec "$@"`, "sh"}, []string{"grep", "files", "/proc/self/limits"}},
	} {
		by := func(criu ...string) result {
			return execute(t, []string{env}, slices.Concat(c.parent, criu, c.look)...).want(t, 0)
		}
		want := by(criu)
		for _, us := range us {
			if got := by(us...); got.stdout != want.stdout || want.stdout == "" {
				t.Errorf("%q, by %q:\n%v\nwithout us:\n%v", c, us, got, want)
			}
		}
	}
}

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
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

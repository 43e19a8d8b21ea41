package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early/link"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// The real criu is the next one in PATH behind this program, or else one before, and never this program.
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
		path, tried []string
		want        string
		again       bool
	}{
		{[]string{a, b}, nil, a, true}, {[]string{us, a, b}, nil, a, false}, {[]string{a, us, b}, nil, b, false}, {[]string{us, a, again, b}, nil, b, false},
		{[]string{us, folder, plain, dir + "/none", b}, nil, b, false}, {[]string{us, again}, nil, "", false}, {nil, nil, "", false},
		// Before us, where nothing is behind.
		{[]string{a, us}, nil, a, true}, {[]string{a, b, us, plain}, nil, a, true}, {[]string{us, a, again}, nil, a, true}, {[]string{us, a, b, again, us}, nil, a, true},
		// What was tried leads back.
		{[]string{a, us}, []string{a}, "", false}, {[]string{a, b, us}, []string{a}, b, true}, {[]string{a, b}, []string{a, b}, "", false}, {[]string{us, a, b}, []string{a}, b, false},
	} {
		var tried []string
		for _, dir := range c.tried {
			tried = append(tried, filepath.Join(dir, "criu"))
		}
		got, again, err := realCRIU("", strings.Join(c.path, ":"), tried)
		if want := filepath.Join(c.want, "criu"); c.want != "" && (got != want || again != c.again || err != nil) || c.want == "" && err == nil {
			t.Errorf("%q, tried %q: %q, %v, %v", c.path, c.tried, got, again, err)
		}
	}
	if got, _, err := realCRIU(b+"/criu", a, nil); got != b+"/criu" || err != nil {
		t.Errorf("configured: %q, %v", got, err)
	}
	for path, want := range map[string]string{"": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", a: a} {
		t.Setenv("PATH", path)
		if got := searchPath(); got != want {
			t.Errorf("PATH %q: %q", path, got)
		}
	}
	for _, bad := range []string{us + "/criu", exe, dir + "/none"} {
		if got, _, err := realCRIU(bad, a, nil); err == nil {
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

// Copies of the program, and a script that calls it, do not go on by turns; what the real criu
// finds in its environment is of no account to what it starts.
func TestRealCRIUByTurns(t *testing.T) {
	netlocktest.Need(t, "cp", "sh", "env", "grep")
	dir := t.TempDir()
	place := func(name, script string) string {
		d := filepath.Join(dir, name)
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if script != "" {
			writeScript(t, d+"/criu", script)
		} else if out, err := exec.Command("cp", program, d+"/criu").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return d
	}
	a, b := place("a", ""), place("b", "")
	real := place("real", `[ "$1" != again ] || exec "$2" x; [ "$1" != another ] || { "$2" x; exit; }; echo "real $*"; env | grep -c '^CRIU_NETLOCK_TRIED='; true`)
	wrapper := place("wrapper", `exec `+program+` criu "$@"`)
	const tools = "/usr/bin:/bin"
	for _, c := range []struct {
		path []string
		argv []string
		want string // nothing: there is none
	}{
		{[]string{a, real}, []string{a + "/criu", "x"}, "real x\n0\n"},
		{[]string{a, b, real}, []string{a + "/criu", "x"}, "real x\n0\n"},
		{[]string{real, a, b}, []string{b + "/criu", "x"}, "real x\n1\n"},
		{[]string{a, real, b}, []string{b + "/criu", "x"}, "real x\n1\n"},
		{[]string{a, b}, []string{a + "/criu", "x"}, ""},
		{[]string{a, b}, []string{b + "/criu", "x"}, ""},
		{[]string{a, b}, []string{program, "criu", "x"}, ""},
		{[]string{a, b, a, b}, []string{a + "/criu", "x"}, ""},
		{[]string{wrapper, real}, []string{wrapper + "/criu", "x"}, "real x\n1\n"},
		{[]string{wrapper}, []string{wrapper + "/criu", "x"}, ""},
		{[]string{wrapper, a, b, real}, []string{program, "criu", "x"}, "real x\n1\n"},
		// The same process, and another one.
		{[]string{real, a}, []string{a + "/criu", "again", a + "/criu"}, ""},
		{[]string{real, a}, []string{a + "/criu", "another", a + "/criu"}, "real x\n1\n"},
	} {
		r := execute(t, []string{"PATH=" + strings.Join(append(c.path, tools), ":")}, c.argv...)
		if want := map[bool]int{true: 0, false: 1}[c.want != ""]; r.code != want || r.stdout != c.want || c.want == "" && !strings.Contains(r.stderr, "no criu in PATH") {
			t.Errorf("%q in %q: %v", c.argv, c.path, r)
		}
	}
}

// What the real criu has from its parent it has as if we were not there: signals ignored and
// blocked, the signal for the parent's end, closed descriptors.
func TestCRIUAsStarted(t *testing.T) {
	if link.Flag == "" {
		netlocktest.CannotRun(t, "Go's runtime comes first on this architecture")
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

// swrk starts a criu swrk, with files from descriptor 3 on and the client's connection behind
// them, and returns the client's side of that.
func swrk(t *testing.T, env []string, files []*os.File, argv ...string) (cmd *exec.Cmd, client int) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	limit := unix.NsecToTimeval(patience.Nanoseconds())
	if err := unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "criu")
	defer theirs.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	cmd = command(ctx, env, append(argv, "swrk", strconv.Itoa(3+len(files)))...)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = append(slices.Clone(files), theirs)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Close(pair[0])
		cancel()
		_ = cmd.Wait() // the test has, if all was well
	})
	return cmd, pair[0]
}

// ends checks that nothing more comes.
func ends(t *testing.T, what string, fd int) {
	t.Helper()
	n, err := unix.Read(fd, make([]byte, 100))
	for err == unix.EINTR { // with a time limit the kernel never restarts it
		n, err = unix.Read(fd, make([]byte, 100))
	}
	if n != 0 || err != nil {
		t.Errorf("%s has not ended: %d bytes, %v", what, n, err)
	}
}

// The exit status of criu swrk is CRIU's own, and so is the signal that ended it.
func TestSwrkExit(t *testing.T) {
	netlocktest.Need(t, "sh")
	for script, want := range map[string]string{"exit 0": "exit status 0", "exit 3": "exit status 3", "kill -TERM $$": "signal: terminated"} {
		_, env := criuScript(t, script)
		for _, argv := range [][]string{{asLink(t)}, {program, "criu"}} {
			cmd, client := swrk(t, []string{env}, nil, argv...)
			_ = cmd.Wait() // its state tells
			if got := cmd.ProcessState.String(); got != want {
				t.Errorf("%s, by %q: %s", script, argv, got)
			}
			ends(t, "the client's connection", client)
		}
	}
}

// The process in between has the client's connection and no other descriptor of CRIU's, whatever
// their numbers, and wherever the verb is: it closes it at a message that is none of CRIU's,
// and the client sees that while CRIU goes on.
func TestSwrkDescriptors(t *testing.T) {
	netlocktest.Need(t, "sh", "sleep")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	us := asLink(t)
	for _, c := range []struct {
		files     int
		env, argv []string
	}{
		{0, nil, []string{us}}, {1, nil, []string{us}}, {2, nil, []string{us}}, {5, nil, []string{program, "criu"}}, {2, nil, []string{us, "-v4", "--tcp-established"}},
		{5, []string{envRefuse + "=close_range-missing"}, []string{self, us}},
	} {
		t.Run(fmt.Sprint(c.files, len(c.env), len(c.argv)), func(t *testing.T) {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			var files []*os.File
			script := ""
			for fd := range c.files {
				files = append(files, w)
				script += fmt.Sprintf("exec %d>&-\n", 3+fd)
			}
			_, env := criuScript(t, fmt.Sprintf(`%sprintf '\377\377\377' >&%d; exec sleep 600`, script, 3+c.files))
			cmd, client := swrk(t, append(c.env, env), files, c.argv...)
			w.Close()
			ends(t, "the client's connection", client)
			if err := r.SetReadDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			if _, err := r.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("another descriptor of CRIU's: %v", err)
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Errorf("CRIU has not gone on: %v", err)
			}
			_ = cmd.Wait()
		})
	}
}

// Exec is the main thread's, which alone has the signal for the parent's end: also of many at
// once, where goroutines go from thread to thread.
func TestCRIUMainThread(t *testing.T) {
	netlocktest.Need(t, "sh", "setpriv")
	_, env := criuScript(t, `exec "$@"`)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 20 {
				out, err := command(t.Context(), []string{env}, "setpriv", "--pdeathsig", "TERM", program, "criu", "setpriv", "--dump").CombinedOutput()
				if err != nil || !strings.Contains(string(out), "Parent death signal: TERM\n") {
					t.Errorf("%v\n%s", err, out)
				}
			}
		})
	}
	all.Wait()
}

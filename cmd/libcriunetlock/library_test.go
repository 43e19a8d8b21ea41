package main

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft"
)

// host is the program of testdata, linked with the library or loading it.
var host = map[string]string{}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "libcriunetlock-")
	if err == nil {
		err = build(dir)
	}
	if err != nil {
		buildErr = err
	}
	code := netlocktest.HostUntouched(m)
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

var buildErr error

func build(dir string) error {
	if _, err := exec.LookPath("gcc"); err != nil {
		return err
	}
	run := func(argv ...string) error {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return errors.New(strings.Join(argv, " ") + ": " + string(out))
		}
		return nil
	}
	// As a user builds it.
	if err := run("make", "--no-print-directory", "-C", "../..", "lib", "LIBDIR="+dir); err != nil {
		return err
	}
	for name, more := range map[string][]string{"linked": {"-DLINKED", "-L" + dir, "-lcriunetlock"}, "loaded": {"-ldl"}} {
		host[name] = filepath.Join(dir, name)
		argv := append([]string{"gcc", "-Wall", "-Wextra", "-Werror", "-pthread", "-I" + dir, "-o", host[name], "testdata/host.c", "-Wl,-rpath," + dir}, more...)
		if err := run(argv...); err != nil {
			return err
		}
	}
	return nil
}

func need(t *testing.T) {
	t.Helper()
	netlocktest.Need(t, "gcc", "make")
	if buildErr != nil {
		t.Fatal(buildErr)
	}
}

func command(t *testing.T, how string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return exec.CommandContext(ctx, host[how], args...)
}

// The program keeps its signals: dispositions, flags, masks, stacks. None comes to a
// thread of the library's, all come to the program's own handlers.
func TestProgramKeepsItsSignals(t *testing.T) {
	need(t)
	pid, _ := netlocktest.NewTask(t)
	for how := range host {
		t.Run(how, func(t *testing.T) {
			if out, err := command(t, how, "quiet", strconv.Itoa(pid)).CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

// A program that has used the library dies by a signal as any other does.
func TestProgramDiesOfItsSignals(t *testing.T) {
	need(t)
	pid, _ := netlocktest.NewTask(t)
	for how := range host {
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGPIPE, syscall.SIGSEGV, syscall.SIGABRT, syscall.SIGHUP, syscall.SIGBUS, syscall.SIGALRM} {
			t.Run(how+"/"+sig.String(), func(t *testing.T) {
				cmd := command(t, how, "die", strconv.Itoa(int(sig)), strconv.Itoa(pid))
				cmd.Dir = t.TempDir() // for a core
				out, err := cmd.CombinedOutput()
				st, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
				if !ok || !st.Signaled() || st.Signal() != sig || len(out) != 0 {
					t.Errorf("%v\n%s", err, out)
				}
			})
		}
	}
}

func state(t *testing.T, pid int) netlock.State {
	t.Helper()
	ns, err := netlock.FromPID(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	st, err := netlock.New(nft.New()).State(t.Context(), ns)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestLocksAndUnlocks(t *testing.T) {
	need(t)
	pid, _ := netlocktest.NewTask(t)
	cmd := command(t, "linked", "hold", strconv.Itoa(pid))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "locked\n" {
		t.Fatalf("%q, %v", line, err)
	}
	if st := state(t, pid); !st.Locked || !st.Intact {
		t.Errorf("%+v", st)
	}
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if st := state(t, pid); st.Found {
		t.Errorf("%+v", st)
	}
}

// What CRIU could not unlock close does.
func TestCloseAfterAFailure(t *testing.T) {
	need(t)
	pid, _ := netlocktest.NewTask(t)
	if out, err := command(t, "linked", "leave", strconv.Itoa(pid)).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if st := state(t, pid); st.Found {
		t.Errorf("%+v", st)
	}
}

func TestUse(t *testing.T) {
	need(t)
	one, _ := netlocktest.NewTask(t)
	two, _ := netlocktest.NewTask(t)
	for how := range host {
		for _, mode := range []string{"misuse", "threads", "fork"} {
			t.Run(how+"/"+mode, func(t *testing.T) {
				if out, err := command(t, how, mode, strconv.Itoa(one), strconv.Itoa(two)).CombinedOutput(); err != nil {
					t.Errorf("%v\n%s", err, out)
				}
			})
		}
	}
}

// The header's functions are the library's only names.
func TestExports(t *testing.T) {
	need(t)
	netlocktest.Need(t, "nm")
	out, err := exec.Command("nm", "-D", "--defined-only", filepath.Join(filepath.Dir(host["linked"]), "libcriunetlock.so")).Output()
	if err != nil {
		t.Fatal(err)
	}
	header, err := os.ReadFile("criu_netlock.h")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		name := f[len(f)-1]
		if n++; !strings.Contains(string(header), name+"(") {
			t.Errorf("%s is not in the header", name)
		}
	}
	if n != 5 {
		t.Errorf("%d names", n)
	}
}

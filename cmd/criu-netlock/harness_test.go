package main

// Runs the program as CRIU and a shell would, in throwaway network namespaces.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early/link"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// program is the built program.
var program string

func TestMain(m *testing.M) {
	if spec := os.Getenv(envFUSE); spec != "" {
		runFUSE(spec)
		os.Exit(0)
	}
	if names := os.Getenv(envRefuse); names != "" {
		runRefused(names)
	}
	dir, err := os.MkdirTemp("", "criu-netlock-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	program = filepath.Join(dir, "criu-netlock")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-X main.version=v0-test "+link.Flag, "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	code := 1
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
	} else {
		code = netlocktest.HostUntouched(m)
	}
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// patience bounds every run and every wait.
const patience = 20 * time.Second

// result is how a run of the program ended.
type result struct {
	code           int
	stdout, stderr string
	took           time.Duration
}

func (r result) String() string {
	return fmt.Sprintf("exit %d after %v\nstdout: %s\nstderr: %s", r.code, r.took, r.stdout, r.stderr)
}

// command is a run of the program, in an environment that has nothing of ours but
// what the test says, and no configuration.
func command(ctx context.Context, env []string, argv ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/nonexistent", "CRIU_NETLOCK_CONFIG=/dev/null"}, env...)
	cmd.WaitDelay = time.Second
	return cmd
}

// execute runs any program.
func execute(t *testing.T, env []string, argv ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := command(ctx, env, argv...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	err := cmd.Run()
	var exit *exec.ExitError
	if ctx.Err() != nil || err != nil && !errors.As(err, &exit) {
		t.Fatalf("%q: %v, %v", argv, err, ctx.Err())
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String(), time.Since(start)}
}

// run runs the program as a command.
func run(t *testing.T, args ...string) result {
	t.Helper()
	return execute(t, nil, append([]string{program}, args...)...)
}

// hook runs the program as CRIU does.
func hook(t *testing.T, action, pid string, env ...string) result {
	t.Helper()
	return execute(t, append(hookEnv(action, pid), env...), program)
}

func hookEnv(action, pid string) []string {
	return []string{"CRTOOLS_SCRIPT_ACTION=" + action, "CRTOOLS_INIT_PID=" + pid, "CRTOOLS_IMAGE_DIR=/proc/1/fd/9"}
}

// want checks the exit code.
func (r result) want(t *testing.T, code int, says ...string) result {
	t.Helper()
	if r.code != code {
		t.Errorf("exit %d is wanted: %v", code, r)
	}
	for _, s := range says {
		if !strings.Contains(r.stdout+r.stderr, s) {
			t.Errorf("%q is wanted: %v", s, r)
		}
	}
	return r
}

// oneError checks that the run failed with exactly one line on stderr.
func (r result) oneError(t *testing.T, code int, says ...string) {
	t.Helper()
	r.want(t, code, says...)
	if !isOneLine(r.stderr) || r.stdout != "" {
		t.Errorf("one line on stderr and nothing else is wanted: %v", r)
	}
}

func isOneLine(s string) bool { return len(s) > 1 && strings.Index(s, "\n") == len(s)-1 }

// space is a network namespace with one task in it.
type space struct {
	task *exec.Cmd
	pid  string
}

func newSpace(t *testing.T) *space {
	t.Helper()
	netlocktest.Need(t, "nft", "nsenter")
	s := &space{task: exec.Command("sleep", "600")}
	s.task.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := s.task.Start(); err != nil {
		t.Fatal(err)
	}
	s.pid = strconv.Itoa(s.task.Process.Pid)
	t.Cleanup(func() {
		_ = s.task.Process.Kill() // it may be dead by the test's wish
		_ = s.task.Wait()
	})
	s.nft(t, "add table ip foreign { chain c { type filter hook input priority 0; counter; }; }")
	return s
}

// inside runs a program in the namespace.
func (s *space) inside(t *testing.T, argv ...string) string {
	t.Helper()
	r := execute(t, nil, append([]string{"nsenter", "-t", s.pid, "-n"}, argv...)...)
	if r.code != 0 {
		t.Fatalf("%q: %v", argv, r)
	}
	return r.stdout
}

func (s *space) nft(t *testing.T, script string) { t.Helper(); s.inside(t, "nft", script) }

// rules is everything that nft lists in the namespace, handles included, so that a
// table removed and made again does not look untouched.
func (s *space) rules(t *testing.T) string {
	t.Helper()
	return s.inside(t, "nft", "-a", "list", "ruleset")
}

func (s *space) isLocked(t *testing.T) bool {
	t.Helper()
	return strings.Contains(s.rules(t), "table inet criu-netlock")
}

func (s *space) wantLocked(t *testing.T, want bool) {
	t.Helper()
	if got := s.isLocked(t); got != want {
		t.Errorf("locked: %v; %v is wanted", got, want)
	}
}

// untouched checks that f changes no rule of the namespaces.
func untouched(t *testing.T, f func(), spaces ...*space) {
	t.Helper()
	var before []string
	for _, s := range spaces {
		before = append(before, s.rules(t))
	}
	f()
	for i, s := range spaces {
		if after := s.rules(t); after != before[i] {
			t.Errorf("rules were changed:\n%s\nto\n%s", before[i], after)
		}
	}
}

// eventually polls for a condition.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never happened: %s", what)
		}
	}
}

// zombie is a dead task that nobody has waited for.
func zombie(t *testing.T) string {
	t.Helper()
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Wait() })
	pid := strconv.Itoa(cmd.Process.Pid)
	eventually(t, "a zombie", func() bool {
		b, err := os.ReadFile("/proc/" + pid + "/stat")
		return err == nil && strings.Contains(string(b), ") Z ")
	})
	return pid
}

// dead is the pid of a task that is gone.
func dead(t *testing.T) string {
	t.Helper()
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	return strconv.Itoa(cmd.Process.Pid)
}

// thread is a thread of ours that leads no thread group.
func thread(t *testing.T) string {
	t.Helper()
	var tid string
	eventually(t, "a second thread", func() bool {
		entries, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.Name() != strconv.Itoa(os.Getpid()) {
				tid = e.Name()
			}
		}
		return tid != ""
	})
	return tid
}

// file writes a file for a test.
func file(t *testing.T, name, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(p, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return p
}

// name makes a name for the namespace, as ip netns has them.
func (s *space) name(t *testing.T) string {
	t.Helper()
	netlocktest.Need(t, "ip")
	n := "cn-test-" + s.pid
	if r := execute(t, nil, "ip", "netns", "attach", n, s.pid); r.code != 0 {
		t.Fatal(r)
	}
	t.Cleanup(func() {
		if r := execute(t, nil, "ip", "netns", "del", n); r.code != 0 {
			t.Error(r)
		}
	})
	return n
}

// inode is the namespace's inode number.
func (s *space) inode(t *testing.T) uint64 {
	t.Helper()
	ns, err := netlock.FromPID(s.task.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	return ns.Inode()
}

// own takes both of our names in the namespace with tables of a live process.
func (s *space) own(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*patience)
	cmd := command(ctx, nil, "nsenter", "-t", s.pid, "-n", "nft", "-i")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		cancel()
		_ = cmd.Wait()
	})
	fmt.Fprintln(in, "add table inet criu-netlock { flags owner; }")
	fmt.Fprintln(in, "add table inet criu-netlock-2 { flags owner; }")
	eventually(t, "owned tables", func() bool { return strings.Count(s.rules(t), "flags owner") == 2 })
}

func writeScript(t *testing.T, path, body string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

func writePlain(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
}

package main

// The program as CRIU's action script.

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early/link"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// hookLine is what a hook writes to CRIU's log.
var hookLine = regexp.MustCompile(`^time=\S+Z level=(INFO|WARN) msg=("[^"]+"|\S+) action=(\S+) pid=(\d+) netns=(\d+) backend=(\S+) result=("[^"]+"|\S+) duration_us=(\d+)\n$`)

// wantHook checks a hook that succeeded, and its line.
func wantHook(t *testing.T, r result, level, action, pid string, inode uint64, backend, says string) {
	t.Helper()
	r.want(t, 0)
	m := hookLine.FindStringSubmatch(r.stderr)
	if m == nil || r.stdout != "" {
		t.Errorf("not one line of a hook: %v", r)
		return
	}
	got := fmt.Sprint(m[1], m[3], m[4], m[5], m[6], strings.Trim(m[7], `"`))
	if want := fmt.Sprint(level, action, pid, strconv.FormatUint(inode, 10), backend, says); got != want {
		t.Errorf("%s\nis wanted: %s", want, r.stderr)
	}
	if us, err := strconv.Atoi(m[8]); err != nil || us <= 0 || us > int(r.took/time.Microsecond) {
		t.Errorf("duration_us=%s of %v", m[8], r.took)
	}
}

// Every hook, in the order of a dump with --leave-running and of a restore.
func TestHooks(t *testing.T) {
	s := newSpace(t)
	before, inode := s.rules(t), s.inode(t)
	for i, c := range []struct {
		action, level, backend, says string
		locked                       bool
	}{
		{"pre-dump", "INFO", "nft", "possible", false},
		{"network-lock", "INFO", "nft", "locked", true},
		{"network-lock", "INFO", "nft", "already locked", true}, // the script named twice
		{"network-unlock", "INFO", "nft", "unlocked", false},
		{"network-unlock", "INFO", `""`, "not locked", false},
		{"setup-namespaces", "INFO", "nft", "locked", true},
		{"post-setup-namespaces", "INFO", "nft", "already locked", true},
		{"post-restore", "INFO", "nft", "already locked", true},
		{"network-unlock", "INFO", "nft", "unlocked", false},
		{"post-resume", "INFO", `""`, "not locked", false},
		{"post-restore", "WARN", "nft", "the lock had been removed; locked again", true},
		{"post-resume", "WARN", "nft", "a lock was left after network-unlock; removed", false},
	} {
		t.Run(fmt.Sprint(i, c.action), func(t *testing.T) {
			wantHook(t, hook(t, c.action, s.pid), c.level, c.action, s.pid, inode, c.backend, c.says)
			s.wantLocked(t, c.locked)
			if after := s.rules(t); !c.locked && after != before {
				t.Errorf("this is left:\n%s", after)
			}
		})
	}
	t.Run("pre-restore", func(t *testing.T) {
		untouched(t, func() {
			wantHook(t, execute(t, []string{"CRTOOLS_SCRIPT_ACTION=pre-restore"}, program), "INFO", "pre-restore", "0", 0, "nft", "possible")
		}, s)
	})
}

// What has nothing to do says nothing, reads nothing and succeeds, whatever is wrong.
func TestHooksWithNothingToDo(t *testing.T) {
	s := newSpace(t)
	hook(t, "network-lock", s.pid).want(t, 0)
	untouched(t, func() {
		for _, a := range []string{"post-dump", "pre-resume", "pre-stream", "orphan-pts-master", "status-ready", "query-ext-files", "of-the-future", "NETWORK-LOCK", "network-lock ", "\n"} {
			for _, pid := range []string{s.pid, "x", ""} {
				r := hook(t, a, pid, "CRIU_NETLOCK_CONFIG="+t.TempDir()).want(t, 0)
				if r.stdout+r.stderr != "" {
					t.Error(r)
				}
			}
		}
	}, s)
}

// Only without arguments is the program a hook.
func TestHookOrCommand(t *testing.T) {
	s := newSpace(t)
	execute(t, hookEnv("network-lock", s.pid), program, "version").want(t, 0, "v0-test")
	s.wantLocked(t, false)
}

func TestLogLevel(t *testing.T) {
	s := newSpace(t)
	for level, lines := range map[string]map[string]int{
		"debug": {"network-lock": 1, "post-resume": 1, "network-unlock": 1},
		"info":  {"network-lock": 1, "post-resume": 1, "network-unlock": 1},
		"warn":  {"network-lock": 0, "post-resume": 1, "network-unlock": 0},
		"error": {"network-lock": 0, "post-resume": 0, "network-unlock": 0},
	} {
		env := "CRIU_NETLOCK_CONFIG=" + file(t, "c", "log-level = \""+level+"\"")
		for _, a := range []string{"network-lock", "post-resume", "network-unlock"} {
			r := hook(t, a, s.pid, env).want(t, 0)
			if got := strings.Count(r.stderr, "\n"); got != lines[a] {
				t.Errorf("%s, %s: %d lines are wanted: %v", level, a, lines[a], r)
			}
		}
		hook(t, "network-lock", "0", env).oneError(t, 2)
	}
}

// CRIU closes stdin and ignores SIGPIPE, and its log may be anything: no hook fails or
// hangs for it.
func TestHookStreams(t *testing.T) {
	netlocktest.Need(t, "sh", "env")
	s := newSpace(t)
	for _, redirect := range []string{"<&-", "<&- >&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"} {
		for _, a := range []struct {
			action string
			locked bool
		}{{"network-lock", true}, {"network-unlock", false}} {
			execute(t, hookEnv(a.action, s.pid), "sh", "-c", `exec "$0" `+redirect, program).want(t, 0)
			s.wantLocked(t, a.locked)
		}
		execute(t, hookEnv("network-lock", "0"), "sh", "-c", `exec "$0" `+redirect, program).want(t, 2)
	}
	for _, c := range []struct {
		name string
		pipe func(t *testing.T) *os.File
	}{{"a full pipe", fullPipe}, {"a pipe without a reader", brokenPipe}} {
		for _, sigpipe := range []string{"--default-signal=PIPE", "--ignore-signal=PIPE"} {
			t.Run(c.name+sigpipe, func(t *testing.T) {
				for _, a := range []struct {
					action, pid string
					code        int
				}{{"network-lock", s.pid, 0}, {"network-unlock", s.pid, 0}, {"network-lock", "0", 2}} {
					ctx, cancel := context.WithTimeout(context.Background(), patience)
					defer cancel()
					cmd := command(ctx, hookEnv(a.action, a.pid), "env", sigpipe, program)
					cmd.Stderr = c.pipe(t)
					start := time.Now()
					_ = cmd.Run() // the exit code tells
					if code, took := cmd.ProcessState.ExitCode(), time.Since(start); code != a.code || took > 5*time.Second {
						t.Errorf("%s: exit %d after %v: %v", a.action, code, took, cmd.ProcessState)
					}
					s.wantLocked(t, a.action == "network-lock" && a.code == 0)
				}
			})
		}
	}
}

func fullPipe(t *testing.T) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	fd := int(w.Fd()) // blocking from here on, as CRIU's is
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	for page := make([]byte, 4096); err == nil; {
		_, err = unix.Write(fd, page)
	}
	if err != unix.EAGAIN {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
	return w
}

func brokenPipe(t *testing.T) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	t.Cleanup(func() { w.Close() })
	return w
}

// The lock of a container that died is nobody's business, and its namespace's.
func TestHookKilled(t *testing.T) {
	netlocktest.Need(t, "strace")
	s := newSpace(t)
	// Killed when it sends the batch, and once more after: the next unlock clears it.
	for when := 1; when <= 3; when++ {
		before := s.rules(t)
		r := execute(t, hookEnv("network-lock", s.pid), "strace", "-f", "-o", "/dev/null", "-e", "trace=sendto",
			"-e", fmt.Sprintf("inject=sendto:signal=SIGKILL:when=%d", when), program)
		if r.code == 0 {
			s.wantLocked(t, true)
		}
		hook(t, "network-unlock", s.pid).want(t, 0)
		if after := s.rules(t); after != before {
			t.Errorf("killed at sendto %d, this is left:\n%s", when, after)
		}
	}
}

// The caller is recorded: the parent, as CRIU is.
func TestHookCaller(t *testing.T) {
	s := newSpace(t)
	hook(t, "network-lock", s.pid).want(t, 0)
	b, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	run(t, "status", "--pid", s.pid).want(t, 0, fmt.Sprintf("%s, pid %d\n", strings.TrimSpace(string(b)), os.Getpid()))
}

// Twenty hooks side by side leave one lock, and then none.
func TestHooksAtOnce(t *testing.T) {
	s := newSpace(t)
	before := s.rules(t)
	for _, action := range []string{"network-lock", "network-unlock"} {
		var cmds []*exec.Cmd
		for range 20 {
			cmd := command(context.Background(), hookEnv(action, s.pid), program)
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			cmds = append(cmds, cmd)
		}
		for _, cmd := range cmds {
			if err := cmd.Wait(); err != nil {
				t.Errorf("%s: %v", action, err)
			}
		}
		if n := strings.Count(s.rules(t), "table inet criu-netlock"); action == "network-lock" && n != 1 {
			t.Errorf("%d locks:\n%s", n, s.rules(t))
		}
	}
	if after := s.rules(t); after != before {
		t.Errorf("this is left:\n%s", after)
	}
}

// A hook with nothing to do ends before Go's runtime has begun: with its first system call.
// Linked without the flag it ends before what the others need is initialised.
func TestEarly(t *testing.T) {
	if link.Flag != "" {
		netlocktest.Need(t, "strace")
		r := execute(t, hookEnv("pre-resume", "1"), "strace", "-f", "-e", "quiet=all", program).want(t, 0)
		if calls := strings.Split(strings.TrimSpace(r.stderr), "\n"); len(calls) != 2 || !strings.HasPrefix(calls[0], "execve(") || !strings.HasPrefix(calls[1], "exit_group(0)") {
			t.Errorf("it made more than its execve and its exit_group:\n%s", r.stderr)
		}
	}
	plain := filepath.Join(t.TempDir(), "criu-netlock")
	build := exec.Command("go", "build", "-o", plain, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	r := execute(t, append(hookEnv("pre-resume", "1"), "GODEBUG=inittrace=1"), plain).want(t, 0, "init runtime ")
	for _, late := range []string{"unicode", "reflect", "encoding/json", "log", "net", "os ", "github.com/", "golang.org/"} {
		if strings.Contains(r.stderr, "init "+late) {
			t.Errorf("%s was initialised:\n%s", late, r.stderr)
		}
	}
}

// What runs before Go's runtime has no heap.
func TestEarlyAllocatesNothing(t *testing.T) {
	out, err := exec.Command("go", "build", "-gcflags=-m", "./early").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "can inline") {
		t.Fatalf("%v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "escapes to heap") && !strings.Contains(line, "does not") || strings.Contains(line, "moved to heap") {
			t.Error(line)
		}
	}
}

// The Makefile links the program as the tests do.
func TestMakefileLinks(t *testing.T) {
	netlocktest.Need(t, "make")
	out, err := exec.Command("make", "-C", "../..", "-n", "build").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "-s -w ") || !strings.Contains(string(out), link.Flag) {
		t.Errorf("%v: want %q in\n%s", err, link.Flag, out)
	}
}

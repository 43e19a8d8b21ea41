package faults

// Tasks that die under a hook, and pids that come again.

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// task is one in a network namespace of its own, or in ours.
func task(own bool) (*exec.Cmd, error) {
	cmd := exec.Command("sleep", "600")
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if own {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNET
	}
	return cmd, cmd.Start()
}

func stop(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// TestTaskDies kills the task, and its namespace with it, at each system call of a hook.
func TestTaskDies(t *testing.T) {
	eachBackend(t, func(t *testing.T, l *lab) {
		for _, h := range hookCases {
			points, err := clean(func(tr *trace) error { return l.orphaned(h, tr) })
			if err != nil {
				t.Fatalf("%s: %v", h.action, err)
			}
			c := theTable.class("namespace deleted under a hook, " + l.backend)
			defer c.wantPoints(t, c.points)
			for _, p := range choose(points, 6) {
				if noise(p.nr) {
					continue
				}
				tr, err := atOrNext(p, points, func(tr *trace) error { return l.orphaned(h, tr) })
				c.at(t, tr, err, "%s, at %s %d", h.action, callName(p.nr), tr.point.nth)
			}
		}
	})
}

// orphaned runs a hook whose task dies.
func (l *lab) orphaned(h hookCase, tr *trace) error {
	victim, err := task(true)
	if err != nil {
		return err
	}
	defer stop(victim)
	pid := l.pid
	defer func() { l.pid = pid }()
	l.pid = strconv.Itoa(victim.Process.Pid)
	c := l.newCRIU()
	defer c.die()
	if h.before {
		if err := l.hookOK(c, "network-lock"); err != nil {
			return err
		}
	}
	if tr.point.nr != 0 || tr.point.nth != 0 {
		tr.instead = func() { stop(victim) }
	}
	r, err := l.hook(c, h.action, tr)
	if err = errors.Join(err, tr.wait()); err != nil {
		return err
	}
	if r.code > 9 || r.took > hang || strings.Contains(r.log, "\n") || r.code != 0 && !tr.hit {
		return unexpected(h.action, r, nil)
	}
	c.die()
	return errors.Join(quiet(tools), quiet(guards))
}

// reborn starts a process that gets a pid of which the bearer is dead.
func reborn(pid int, start func() *exec.Cmd) (*exec.Cmd, error) {
	const tries = 200
	for range tries {
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0); err != nil {
			return nil, err
		}
		cmd := start()
		if cmd.Process.Pid == pid {
			return cmd, nil
		}
		stop(cmd)
	}
	return nil, fmt.Errorf("pid %d does not come again", pid)
}

func times() int {
	if *all {
		return 100
	}
	return 5
}

// The pids of a checkpoint that is over come again, as those of another one at work. Its
// lock is that one's: neither gc nor the guard of the first touches it.
func TestPIDsComeAgain(t *testing.T) {
	eachBackend(t, func(t *testing.T, l *lab) {
		mine := l.pid
		for range times() {
			l.pid = mine
			l.configure(l.config + "guard = false\n")
			theTable.class("pid reused: CRIU's").tried(t, "gc", l.criuComesAgain())
			theTable.class("pid reused: the task's").tried(t, "hooks", l.taskComesAgain())
			l.configure(l.config)
			theTable.class("pid reused: both").tried(t, "guard and gc", l.checkpointComesAgain())
		}
	})
}

// criuComesAgain: the dead CRIU's pid is some process's, the task runs. gc unlocks.
func (l *lab) criuComesAgain() error {
	l.unlocked()
	c := l.newCRIU()
	defer c.die()
	if err := errors.Join(l.hookOK(c, "network-lock"), l.is(true)); err != nil {
		return err
	}
	// What tells two bearers of a pid is when they started, in hundredths of a second.
	start := netlock.CallerOf(c.Process.Pid).Start
	c.die()
	if err := netlocktest.Until(func() (bool, error) {
		var now unix.Timespec
		err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now)
		return now.Nano() > int64(start+1)*10e6, err
	}); err != nil {
		return err
	}
	other, err := reborn(c.Process.Pid, l.sleeps(false))
	if err != nil {
		return err
	}
	defer stop(other)
	if out, err := l.command("gc"); err != nil || !strings.Contains(out, "stale, unlocked") {
		return wrong(err, "gc: %s", out)
	}
	return l.is(false)
}

func (l *lab) sleeps(own bool) func() *exec.Cmd {
	return func() *exec.Cmd {
		cmd, err := task(own)
		if err != nil {
			l.t.Fatal(err)
		}
		return cmd
	}
}

// taskComesAgain: the task's pid is a process's in our own namespace, which no hook locks
// or unlocks.
func (l *lab) taskComesAgain() error {
	first, err := task(true)
	if err != nil {
		return err
	}
	l.pid = strconv.Itoa(first.Process.Pid)
	c := l.newCRIU()
	defer c.die()
	err = l.hookOK(c, "network-lock")
	stop(first)
	if err != nil {
		return err
	}
	second, err := reborn(first.Process.Pid, l.sleeps(false))
	if err != nil {
		return err
	}
	defer stop(second)
	return errors.Join(l.hookOK(c, "network-unlock", 4), l.hookOK(c, "network-lock", 4), l.hookOK(c, "setup-namespaces", 0))
}

// checkpointComesAgain: CRIU's pid is another CRIU's, and the task's another task's, whose
// namespace that CRIU has locked. The first guard wakes up only then.
func (l *lab) checkpointComesAgain() error {
	first, err := task(true)
	if err != nil {
		return err
	}
	defer stop(first)
	l.pid = strconv.Itoa(first.Process.Pid)
	c := l.newCRIU()
	defer c.die()
	if err := errors.Join(l.hookOK(c, "pre-dump"), l.hookOK(c, "network-lock")); err != nil {
		return err
	}
	old := processes(guards)
	if len(old) != 1 {
		return fmt.Errorf("guards: %v", old)
	}
	if err := halt(old[0]); err != nil {
		return fmt.Errorf("stop the first guard: %w", err)
	}
	goOn := func() { _ = unix.Kill(old[0], unix.SIGCONT) }
	defer goOn()
	c.die()
	stop(first)
	second, err := reborn(first.Process.Pid, l.sleeps(true))
	if err != nil {
		return err
	}
	defer stop(second)
	var d *criu
	if _, err := reborn(c.Process.Pid, func() *exec.Cmd { d = l.newCRIU(); return d.Cmd }); err != nil {
		return err
	}
	defer d.die()
	if err := errors.Join(l.hookOK(d, "pre-dump"), l.hookOK(d, "network-lock")); err != nil {
		return err
	}
	ns, err := netlock.FromPID(second.Process.Pid)
	if err != nil {
		return err
	}
	defer ns.Close()
	locked := func(when string) error {
		st, err := l.look.State(l.t.Context(), ns)
		if err != nil || !st.Intact || !st.Locked {
			return wrong(err, "%s: %+v", when, st)
		}
		return nil
	}
	if err := locked("before"); err != nil {
		return err
	}
	goOn()
	if err := gone(old[0]); err != nil {
		return fmt.Errorf("the first guard: %w", err)
	}
	if err := locked("after the first guard"); err != nil {
		return err
	}
	if out, err := l.command("gc"); err != nil || !strings.Contains(out, "in use, left alone") {
		return wrong(err, "gc: %s", out)
	}
	if err := locked("after gc"); err != nil {
		return err
	}
	err = l.hookOK(d, "network-unlock")
	d.die()
	return errors.Join(err, quiet(guards))
}

// halt stops a process with SIGSTOP, and waits until none of its threads runs: until then it may
// do what it likes, or end, and soon its pid is somebody else's.
func halt(pid int) error {
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		return err
	}
	return netlocktest.Until(func() (bool, error) {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil || len(threads) == 0 {
			return false, wrong(err, "%d is gone", pid)
		}
		for _, path := range threads {
			b, err := os.ReadFile(path)
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
				return false, nil // another look
			}
			if err != nil || !strings.Contains(string(b), ") T ") {
				return false, err
			}
		}
		return true, nil
	})
}

// gone waits until a process is dead.
func gone(pid int) error {
	return netlocktest.Until(func() (bool, error) { return !slices.Contains(processes(guards), pid), nil })
}

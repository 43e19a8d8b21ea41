package criurpc

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// fake is a Backend that keeps its locks in memory.
type fake struct {
	mu     sync.Mutex
	locked map[uint64]netlock.Caller // by the namespace's inode
	calls  []string
	err    map[string]error
	block  chan struct{} // if set, Lock waits for its end, whatever its context says
	slow   atomic.Int32  // so many unlocks end with their time
	log    func(Entry)
}

func newFake() *fake { return &fake{locked: map[uint64]netlock.Caller{}, err: map[string]error{}} }

func (f *fake) Name() string { return "fake" }

func (f *fake) call(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, name)
	return f.err[name]
}

func (f *fake) seen() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

func (f *fake) is(ino uint64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, ok := f.locked[ino]
	return ok
}

func (f *fake) Lock(_ context.Context, ns *netlock.Namespace, o netlock.Options) (netlock.Result, error) {
	if err := f.call("lock"); err != nil {
		return netlock.Result{}, err
	}
	if f.block != nil {
		<-f.block
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	_, already := f.locked[ns.Inode()]
	f.locked[ns.Inode()] = o.Caller
	return netlock.Result{Backend: "fake", Already: already}, nil
}

func (f *fake) Unlock(ctx context.Context, ns *netlock.Namespace, _ netlock.Options) (netlock.State, error) {
	if err := f.call("unlock"); err != nil {
		return netlock.State{}, err
	}
	if f.slow.Add(-1) >= 0 {
		<-ctx.Done()
		return netlock.State{}, ctx.Err()
	}
	st, _ := f.state(ns)
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.locked, ns.Inode())
	return st, nil
}

func (f *fake) State(_ context.Context, ns *netlock.Namespace, _ netlock.Options) (netlock.State, error) {
	if err := f.call("state"); err != nil {
		return netlock.State{}, err
	}
	return f.state(ns)
}

func (f *fake) state(ns *netlock.Namespace) (netlock.State, error) {
	is := f.is(ns.Inode())
	return netlock.State{Locked: is, Found: is, Intact: is, Backend: "fake"}, nil
}

func (f *fake) options() Options {
	return Options{Locker: netlock.New(f), Timeout: 10 * time.Second, Guard: NoGuard, Log: f.log}
}

// sleeper is a task in a network namespace of its own.
type sleeper struct {
	id   int
	kill func()
	ino  uint64
}

func (s *sleeper) pid() int { return s.id }

func newSleeper(t testing.TB) *sleeper {
	t.Helper()
	s := &sleeper{}
	s.id, s.kill = netlocktest.NewTask(t)
	ns, err := netlock.FromPID(s.pid())
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	s.ino = ns.Inode()
	return s
}

var (
	bg        = context.Background()
	errBroken = errors.New("broken")
)

func handle(t *testing.T, c *Checkpoint, pid int, names ...action.Name) {
	t.Helper()
	for _, n := range names {
		p := 0
		if n == action.SetupNamespaces || n == action.PostRestore { // where CRIU sends it
			p = pid
		}
		if _, err := c.Handle(bg, n, p); err != nil {
			t.Fatalf("%s: %v", n, err)
		}
	}
}

var (
	dumpHooks    = []action.Name{action.PreDump, action.NetworkLock, action.QueryExtFiles, action.PostDump}
	restoreHooks = []action.Name{action.PreRestore, action.SetupNamespaces, action.PostSetupNamespaces, action.PostRestore}
)

// What is in force after every end that a checkpoint can have.
func TestEnd(t *testing.T) {
	unlock := []action.Name{action.NetworkUnlock}
	for name, c := range map[string]struct {
		before  bool // locked before
		restore bool
		leave   bool
		hooks   []action.Name
		policy  guard.Policy
		dead    bool
		err     error
		want    bool // locked
	}{
		"dump that kills":                          {hooks: dumpHooks, want: true, dead: true},
		"dump that leaves stopped":                 {hooks: dumpHooks, want: true},
		"dump, left running":                       {hooks: slices.Concat(dumpHooks, unlock), leave: true},
		"dump, left running, no unlock came":       {hooks: dumpHooks, leave: true},
		"dump fails before it locks":               {hooks: dumpHooks[:1], err: errBroken},
		"dump fails before it locks, was locked":   {hooks: dumpHooks[:1], err: errBroken, before: true, want: true},
		"dump fails":                               {hooks: dumpHooks, err: errBroken},
		"dump fails after unlock":                  {hooks: slices.Concat(dumpHooks, unlock), err: errBroken},
		"dump fails, dead":                         {hooks: dumpHooks, err: errBroken, dead: true, want: true},
		"restore":                                  {restore: true, hooks: slices.Concat(restoreHooks, unlock, []action.Name{action.PostResume})},
		"restore, no unlock came":                  {restore: true, hooks: restoreHooks},
		"restore fails":                            {restore: true, hooks: restoreHooks[:3], err: errBroken, dead: true},
		"restore fails, was locked":                {restore: true, hooks: restoreHooks[:3], err: errBroken, dead: true, before: true, want: true},
		"restore fails, was locked, half restored": {restore: true, hooks: restoreHooks[:3], err: errBroken, before: true, want: true},
		"restore fails, keep":                      {restore: true, hooks: restoreHooks[:3], policy: guard.Keep, err: errBroken, dead: true, want: true},
		"restore fails, unlock":                    {restore: true, hooks: restoreHooks[:3], policy: guard.Unlock, err: errBroken, dead: true, before: true},
		"restore fails late, dead":                 {restore: true, hooks: restoreHooks, err: errBroken, dead: true, before: true, want: true},
		"restore fails late, runs":                 {restore: true, hooks: restoreHooks, err: errBroken, before: true},
		"restore fails before it locks":            {restore: true, hooks: restoreHooks[:1], err: errBroken},
	} {
		t.Run(name, func(t *testing.T) {
			s, f := newSleeper(t), newFake()
			if c.before {
				f.locked[s.ino] = netlock.Caller{}
			}
			o := f.options()
			o.OnFailedRestore = c.policy
			cp := NewDump(s.pid(), c.leave, o)
			if c.restore {
				cp = NewRestore(o)
			}
			handle(t, cp, s.pid(), c.hooks...)
			if c.dead {
				s.kill()
			}
			if err := cp.End(c.err); !errors.Is(err, c.err) || c.err == nil && err != nil {
				t.Errorf("End: %v", err)
			}
			if got := f.is(s.ino); got != c.want {
				t.Errorf("locked: %v, want %v", got, c.want)
			}
			// Once is enough.
			calls := len(f.seen())
			if err := cp.End(nil); err != nil || len(f.seen()) != calls {
				t.Errorf("a second End: %v, %q", err, f.seen()[calls:])
			}
			if _, err := cp.Handle(bg, action.NetworkLock, s.pid()); netlock.KindOf(err) != netlock.KindInput {
				t.Errorf("a lock after the end: %v", err)
			}
		})
	}
}

// A task that has been killed but is not dead yet does not count as alive, nor does one
// count before its tracer has let go.
func TestSettled(t *testing.T) {
	const status = "Name:\tx\nState:\tS (sleeping)\nPid:\t7\nTracerPid:\t0\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000000\n"
	if !settled(status) {
		t.Error("a task that sleeps")
	}
	for from, to := range map[string]string{
		"TracerPid:\t0": "TracerPid:\t12", "S (sleeping)": "Z (zombie)", "SigPnd:\t0000000000000000": "SigPnd:\t0000000000000100",
		"ShdPnd:\t0000000000000000": "ShdPnd:\t0000000000000100", "TracerPid": "Other", "ShdPnd:\t0": "ShdPnd:\tx",
	} {
		if s := strings.Replace(status, from, to, 1); s == status || settled(s) {
			t.Errorf("%q", to)
		}
	}
	if !settled(strings.Replace(status, "SigPnd:\t0000000000000000", "SigPnd:\t0000000000020000", 1)) {
		t.Error("another signal than SIGKILL")
	}
}

// A pid is known from the request or from the notification that brings it, and stays.
func TestPID(t *testing.T) {
	s, f := newSleeper(t), newFake()
	var log []Entry
	o := f.options()
	o.Log = func(e Entry) { log = append(log, e) }
	c := NewRestore(o)
	c.SetCRIU(os.Getppid())
	if _, err := c.Handle(bg, action.NetworkUnlock, 0); netlock.KindOf(err) != netlock.KindInput {
		t.Errorf("without a pid: %v", err)
	}
	handle(t, c, s.pid(), restoreHooks...)
	if got := f.locked[s.ino]; got.Task != s.pid() || got.PID != os.Getppid() {
		t.Errorf("locked for %+v", got)
	}
	if _, err := c.Handle(bg, action.PostRestore, os.Getpid()); netlock.KindOf(err) != netlock.KindInput {
		t.Errorf("another pid: %v", err)
	}
	handle(t, c, 0, action.NetworkUnlock)
	if f.is(s.ino) {
		t.Error("still locked")
	}
	if err := c.End(nil); err != nil {
		t.Error(err)
	}
	if len(log) != 7 || log[1].Event.Action != action.PreRestore || log[6].Report.Result != "unlocked" || log[6].Event.PID != s.pid() {
		t.Errorf("log: %+v", log)
	}
	if c := NewDump(0, false, f.options()); c.pid != os.Getpid() {
		t.Errorf("a dump without a pid is of %d", c.pid)
	}
}

// The order of the callbacks, which the package's comment promises.
func TestOrder(t *testing.T) {
	for name, want := range map[action.Name]string{
		action.PreDump: "theirs, ours", action.NetworkLock: "theirs, ours", action.PostDump: "theirs",
		action.PreRestore: "theirs, ours", action.SetupNamespaces: "ours, theirs, ours", action.PostSetupNamespaces: "theirs, ours",
		action.PostRestore: "theirs, ours", action.NetworkUnlock: "ours, theirs", action.PostResume: "ours, theirs",
		action.PreResume: "theirs", "of-the-future": "theirs",
	} {
		for _, fails := range []string{"", "theirs", "ours"} {
			s, f := newSleeper(t), newFake()
			var got []string
			o := f.options()
			o.Log = func(Entry) { got = append(got, "ours") }
			c := NewDump(s.pid(), false, o)
			if fails == "ours" {
				for _, call := range []string{"lock", "unlock", "state"} {
					f.err[call] = errBroken
				}
			}
			ours, theirs := c.step(bg, name, 0, func() error {
				got = append(got, "theirs")
				if fails == "theirs" {
					return errBroken
				}
				return nil
			})
			way := want
			switch {
			case fails == "theirs" && strings.HasSuffix(want, "theirs, ours"):
				way = strings.TrimSuffix(want, ", ours")
			case fails == "ours" && want == "ours, theirs, ours":
				way = "ours"
			}
			if strings.Join(got, ", ") != way || (theirs != nil) != (fails == "theirs") || (ours != nil) != (fails == "ours" && strings.Contains(want, "ours")) {
				t.Errorf("%s, failing %q: %q, %v, %v; want %q", name, fails, got, ours, theirs, way)
			}
			_ = c.End(errBroken)
		}
	}
}

// A system call that does not end: CRIU is answered in time, and the lock that comes of it
// in the end is taken off.
func TestGivesUp(t *testing.T) {
	s, f := newSleeper(t), newFake()
	f.block = make(chan struct{})
	o := f.options()
	o.Timeout = time.Second
	c := NewDump(s.pid(), false, o)
	start := time.Now()
	_, err := c.Handle(bg, action.NetworkLock, 0)
	if took := time.Since(start); netlock.KindOf(err) != netlock.KindDeadline || took > 5*time.Second {
		t.Fatalf("%v after %v", err, took)
	}
	if err := c.End(errBroken); netlock.KindOf(err) != netlock.KindDeadline || !errors.Is(err, errBroken) {
		t.Errorf("the end in spite of it: %v", err)
	}
	close(f.block)
	if err := c.End(errBroken); !errors.Is(err, errBroken) || f.is(s.ino) {
		t.Errorf("%v, locked: %v", err, f.is(s.ino))
	}
}

// tooLate is a dump whose lock does not come in time, nor what End would do.
func tooLate(t *testing.T, s *sleeper, f *fake, leavesRunning bool, result error) *Checkpoint {
	t.Helper()
	f.block = make(chan struct{})
	o := f.options()
	o.Timeout = 200 * time.Millisecond
	c := NewDump(s.pid(), leavesRunning, o)
	_, err := c.Handle(bg, action.NetworkLock, 0)
	for _, err := range []error{err, c.End(result)} {
		if netlock.KindOf(err) != netlock.KindDeadline {
			t.Fatal(err)
		}
	}
	return c
}

// The same where nobody asks again: what End had no time for is done all the same.
func TestGivesUpForGood(t *testing.T) {
	s, f := newSleeper(t), newFake()
	tooLate(t, s, f, false, errBroken)
	close(f.block)
	if err := netlocktest.Until(func() (bool, error) { return slices.Contains(f.seen(), "unlock") && !f.is(s.ino), nil }); err != nil {
		t.Errorf("locked: %v, %v", f.is(s.ino), err)
	}
}

// Nor does that meet a checkpoint that has begun since.
func TestGivesUpBehindAnother(t *testing.T) {
	s, f := newSleeper(t), newFake()
	c := tooLate(t, s, f, true, nil)
	f2 := newFake()
	next := NewDump(s.pid(), true, f2.options())
	if _, err := next.Handle(bg, action.NetworkLock, 0); err != nil {
		t.Fatal(err)
	}
	close(f.block)
	if err := netlocktest.Until(func() (bool, error) {
		c.turn <- struct{}{}
		defer c.done()
		return c.over, nil
	}); err != nil || slices.Contains(f.seen(), "unlock") {
		t.Errorf("%q, %v", f.seen(), err)
	}
	if err := next.End(nil); err != nil || f2.is(s.ino) {
		t.Errorf("the second: %v, locked: %v", err, f2.is(s.ino))
	}
}

// An unlock of End's own that takes all the time there is is done once more, where no guard does it.
func TestUnlocksLate(t *testing.T) {
	s, f := newSleeper(t), newFake()
	o := f.options()
	o.Timeout = 200 * time.Millisecond
	c := NewDump(s.pid(), true, o)
	if _, err := c.Handle(bg, action.NetworkLock, 0); err != nil {
		t.Fatal(err)
	}
	f.slow.Store(1)
	_ = c.End(nil) // it may have returned before the second
	if err := netlocktest.Until(func() (bool, error) { return !f.is(s.ino), nil }); err != nil {
		t.Errorf("%q, %v", f.seen(), err)
	}
}

// An unlock that fails is tried again at the end, and said if it fails there too.
func TestUnlockFails(t *testing.T) {
	for _, stays := range []bool{false, true} {
		s, f := newSleeper(t), newFake()
		n := newNotify(NewDump(s.pid(), true, f.options()), nil)
		for _, step := range []func() error{n.PreDump, n.NetworkLock, n.PostDump} {
			if err := step(); err != nil {
				t.Fatal(err)
			}
		}
		f.err["unlock"] = errBroken
		if err := n.NetworkUnlock(); err != nil {
			t.Errorf("go-criu would close the connection: %v", err)
		}
		if !stays {
			delete(f.err, "unlock")
		}
		if err := n.Done(nil); (err != nil) != stays || f.is(s.ino) != stays {
			t.Errorf("%v, locked: %v", err, f.is(s.ino))
		}
	}
}

// What works for a checkpoint ends with it.
func TestEndsWorking(t *testing.T) {
	s, f := newSleeper(t), newFake()
	before := runtime.NumGoroutine()
	for range 20 {
		c := NewDump(s.pid(), true, f.options())
		handle(t, c, 0, action.PreDump, action.NetworkLock, action.PostDump, action.NetworkUnlock)
		for range 2 {
			if err := c.End(nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := netlocktest.Until(func() (bool, error) { return runtime.NumGoroutine() <= before, nil }); err != nil {
		t.Errorf("%d goroutines, before %d: %v", runtime.NumGoroutine(), before, err)
	}
}

// A callback that panics does not leave a lock either.
func TestPanic(t *testing.T) {
	s, f := newSleeper(t), newFake()
	n := newNotify(NewDump(s.pid(), false, f.options()), nil)
	func() {
		defer func() { _ = recover() }()
		_ = n.end(func() error {
			if err := n.NetworkLock(); err != nil || !f.is(s.ino) {
				t.Errorf("%v, locked: %v", err, f.is(s.ino))
			}
			panic("on purpose")
		})
	}()
	if f.is(s.ino) {
		t.Error("locked")
	}
}

// While CRIU traces a task its sockets may be half taken apart: the unlock waits, but not
// for ever.
func TestEndWaitsForTracer(t *testing.T) {
	s, f := newSleeper(t), newFake()
	o := f.options()
	o.Timeout = 2 * time.Second
	c := NewDump(s.pid(), false, o)
	handle(t, c, 0, action.NetworkLock)
	// A tracer is a thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(s.pid()), 0, 0, 0, 0); errno != 0 {
		t.Fatal(errno)
	}
	start := time.Now()
	err := c.End(errBroken)
	if took := time.Since(start); took < time.Second {
		t.Errorf("unlocked after %v, and still traced", took)
	}
	if !errors.Is(err, errBroken) || f.is(s.ino) {
		t.Errorf("%v, locked: %v", err, f.is(s.ino))
	}
	// It lets go with the task: Go has no PTRACE_DETACH for one that is not stopped.
}

// A task that goes into another namespace between pre-dump and the freeze is locked where
// it is.
func TestTaskMoves(t *testing.T) {
	netlocktest.Need(t, "unshare")
	cmd := exec.Command("sh", "-c", "read x; exec unshare --net sleep 600")
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	pid := cmd.Process.Pid
	f := newFake()
	c := NewDump(pid, false, f.options())
	handle(t, c, 0, action.PreDump)
	old := c.ns.Inode()
	if _, err := io.WriteString(in, "go\n"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(bg, 10*time.Second)
	defer cancel()
	now := old
	for now == old && ctx.Err() == nil {
		ns, err := netlock.FromPID(pid)
		if err != nil {
			t.Fatal(err)
		}
		now = ns.Inode()
		ns.Close()
	}
	handle(t, c, 0, action.NetworkLock)
	if f.is(old) || !f.is(now) || now == old {
		t.Errorf("locked: %v, where it is: %v", f.is(old), f.is(now))
	}
	if err := c.End(errBroken); !errors.Is(err, errBroken) || f.is(now) {
		t.Errorf("%v; still locked: %v", err, f.is(now))
	}
}

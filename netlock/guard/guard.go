// Package guard watches one checkpoint, so that a lock does not outlive it.
//
// CRIU calls no unlock hook after a failed restore, after a callback of its client
// failed, or after it was killed. The guard is a resident process of our own program,
// started by the hook before the freeze (pre-dump) or with the first lock of a restore
// (setup-namespaces). It holds a pidfd of CRIU and one of the root task, and when CRIU
// is gone and the lock is still there it does what decide says.
//
// It also serves the hooks of its checkpoint: it stays when the hook exits, and so it is
// the one that waits for the kernel's clean-up after an unlock. A hook that gets no
// answer does the work itself, and takes hardly longer: most of a hook's time is the
// start of its process.
//
// Nothing is kept in files. The sockets in Dir say which guards there are; whether a
// namespace is locked is asked of the kernel.
package guard

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/internal/proc"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// Phase is what CRIU is about.
type Phase string

// The phases.
const (
	Dump    Phase = "dump"
	Restore Phase = "restore"
)

// Policy says what becomes of a lock after a restore that failed.
type Policy string

// The policies; Previous is the default.
const (
	// Previous goes back to what the namespace was before the restore.
	Previous Policy = "previous"
	// Keep leaves it locked: no peer is reset before another restore, or an unlock.
	Keep Policy = "keep"
	// Unlock unlocks it.
	Unlock Policy = "unlock"
)

// Fallback is what the policy says of a lock that a restore makes: nothing, if there was one.
func (p Policy) Fallback(wasLocked bool) netlock.Fallback {
	switch {
	case wasLocked:
		return ""
	case p == Keep:
		return netlock.FallbackKeep
	}
	return netlock.FallbackUnlock
}

// Locker is what a Guard needs of netlock.Locker.
type Locker interface {
	Unlock(context.Context, *netlock.Namespace) (netlock.State, error)
	State(context.Context, *netlock.Namespace) (netlock.State, error)
}

// Checkpoint is what a guard watches.
type Checkpoint struct {
	Phase Phase
	NS    *netlock.Namespace
	// CRIU and Task are pids, and pidfds that the guard owns. CRIU is 0 where its client
	// does not know it, and its pidfd -1.
	CRIU, Task     int
	CRIUfd, TaskFD int
	// Client is the program that locks for CRIU, by RPC; 0 and -1 where CRIU's hooks do.
	// While it lives it says itself how the checkpoint has ended.
	Client, ClientFD int
	// Policy is what the client wants; empty for the guard's own.
	Policy Policy
	// WasLocked: the namespace was locked before this restore began.
	WasLocked bool
	// WasFrozen: the task was frozen or stopped before this dump began, by somebody
	// else and on purpose.
	WasFrozen bool
	// Queue is what who starts the guard has bound for the lock; nil without mode hold.
	Queue *nfnl.Queue
	// board is a client's.
	board *board
}

// Guard watches a Checkpoint.
type Guard struct {
	Checkpoint
	Locker   Locker
	Default  Policy        // where the Checkpoint has none
	Deadline time.Duration // how long an unlock that fails is tried again
	// Awake, if set, is called when the guard is in its place; what it returns is called when CRIU is
	// gone, or else when the guard ends. See StayAwake.
	Awake func() (end func())
	// Hook does what a hook asks for.
	Hook func(Request) Answer
	// GiveUp makes a lock of mode hold one of mode drop, where nobody is left to deliver to.
	GiveUp func(context.Context) error
	// Ready is called when the guard is in its place.
	Ready func()
	// Log writes to the system's log: there is no other place once CRIU is gone.
	Log func(format string, args ...any)
	// Words, if set, are what the client says.
	Words <-chan Word
	// Quit, if set, has a word when somebody wants this process to end. While CRIU lives it
	// does not: the container would stay locked.
	Quit <-chan os.Signal
	// Dir is for tests; empty means the Dir of the package.
	Dir string

	place *server
	debt  debt
	// client: the client has said that all is over, but for an unlock.
	client atomic.Bool
	// shared: there is, or was, another checkpoint in the namespace.
	shared atomic.Bool
	// boardless: the client is gone, and what it has left on its board says nothing.
	boardless atomic.Bool
	gone      time.Time // when CRIU, or its client, was gone
	// working: what once waited for was a CRIU that is not known, or the task.
	working bool
	// looked: once has looked at the task.
	looked bool
	// restored: post-restore has succeeded, after which CRIU lets the tasks go.
	restored atomic.Bool
}

// verdict is what is to be done when CRIU is gone.
type verdict int

const (
	over    verdict = iota // nothing of ours is there
	keep                   // the tasks are dead: their peers must not be reset
	release                // unlock
	wait                   // look again when the task goes on, or dies
)

func (v verdict) String() string { return [...]string{"over", "keep", "release", "wait"}[v] }

// facts are what decide decides by.
type facts struct {
	phase     Phase
	found     bool // something of ours is in the namespace
	alive     bool // the root task
	stopped   bool // by a signal
	frozen    bool // by a cgroup
	wasFrozen bool
	wasLocked bool
	policy    Policy
	// abandoned: the client is gone, who would have said that a restored task lives.
	abandoned bool
	// letGo: CRIU had restored the task and let it go, without network-unlock.
	letGo bool
	// working: CRIU is not known, and may be at work on the task; or it is gone, and the task has not
	// gone on to where it was stopped before.
	working bool
	// owed: CRIU has called for an unlock, which failed.
	owed bool
}

// decide says what becomes of a lock whose CRIU is gone without unlocking.
func decide(f facts) verdict {
	switch {
	case !f.found:
		return over
	case f.alive && f.working:
		return wait
	case f.alive && f.owed:
		return release
	case f.phase == Restore && f.alive && (f.abandoned || f.letGo):
		return release
	case f.phase == Restore:
		// Tasks that are still there are half restored and wait for CRIU for ever.
		if f.policy == Keep || f.policy == Previous && f.wasLocked {
			return keep
		}
		return release
	case !f.alive:
		return keep
	case f.stopped, f.frozen && f.wasFrozen:
		// criu dump --leave-stopped, or a container that was paused before. A freeze that
		// came with the dump is CRIU's own, which ends by itself or is nobody's purpose.
		return wait
	}
	return release
}

// Serve takes the guard's place in Dir, calls Ready, and watches until nothing is left
// to guard. An error of ErrTaken means that another guard is there.
func (g *Guard) Serve() error {
	s, err := listen(g.dir(), nameOf(g.NS.Inode(), g.id()))
	if err != nil {
		return err
	}
	g.place = s
	g.debt = debt{at: Watches, wake: make(chan struct{}, 1)}
	if g.Phase == Restore && g.Client == 0 {
		// The hook that has started us has locked; when, is not known so well. On a busy machine all
		// may be over by now.
		if g.found() {
			g.debt.locks(false, monotonic())
		}
	}
	defer s.close()
	done := make(chan struct{}, 1)
	go s.serve(g.hook, func() {
		select {
		case done <- struct{}{}:
		default:
		}
	})
	anyOf(placesBeside(g.dir(), g.NS.Inode(), g.id()), func(path string) bool {
		_, err := ask(path, besideTime, Request{Action: askShared})
		if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOENT) { // it is alive, if slow
			g.share()
		}
		return false // all are to know
	})
	rest := func() {}
	if g.Awake != nil {
		rest = g.Awake()
	}
	defer func() { rest() }()
	g.Ready()
	gone, taskGone := make(chan struct{}), make(chan struct{})
	go g.waitFor(gone, taskGone)
	for watching := true; watching; {
		select {
		case <-done:
			g.linger()
			return nil
		case w := <-g.Words:
			if w != Unpaid {
				g.linger()
				return nil
			}
			g.client.Store(true)
			g.debt.make(time.Now())
		case <-g.debt.wake:
			if g.payOff(gone) {
				g.linger()
				return nil
			}
		case <-taskGone:
			if taskGone = nil; !g.found() {
				return nil // dumped and dead it would be locked
			}
		case <-gone:
			watching = false
		}
	}
	rest()
	g.gone = time.Now()
	if g.debt.get() == Locks {
		g.debt.set(Watches) // what there is to wait for now is no reason for others to leave a lock
	}
	g.boardless.Store(true)
	return g.settle(done)
}

// lingerTime is how long the tasks of a dump have the processors to themselves.
var lingerTime = 30 * time.Millisecond

// linger puts off the end of this process, and with it of all that it has in the kernel, which takes
// a processor's time when the tasks have just gone on and have to catch up. Its place is free meanwhile.
// A namespace whose tasks are dead is not kept by it, nor one that a restore has made, which may fail yet.
func (g *Guard) linger() {
	if g.Phase == Dump {
		g.place.close()
		waitPidfd(g.TaskFD, int(lingerTime.Milliseconds()))
	}
}

// waitFor closes one when CRIU, or its client, is dead, and the other one when the task is.
func (g *Guard) waitFor(gone, taskGone chan<- struct{}) {
	fd := g.CRIUfd
	if fd < 0 {
		fd = g.ClientFD
	}
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(g.TaskFD), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(p, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if p[1].Revents != 0 {
			p[1].Fd = -1 // once is enough
			close(taskGone)
		}
		if p[0].Revents != 0 || err != nil {
			close(gone)
			return
		}
	}
}

// id is what a guard is known by beside its namespace. A client whose CRIU is not known may have
// several tasks at once.
func (c *Checkpoint) id() int {
	if c.CRIU != 0 {
		return c.CRIU
	}
	return c.Task
}

// who is gone.
func (c *Checkpoint) who() string {
	if c.CRIU != 0 {
		return fmt.Sprintf("CRIU, pid %d,", c.CRIU)
	}
	return fmt.Sprintf("CRIU's client, pid %d,", c.Client)
}

func (g *Guard) dir() string {
	if g.Dir != "" {
		return g.Dir
	}
	return Dir
}

// hook does a hook's work in its turn.
func (g *Guard) hook(r Request) Answer {
	switch r.Action {
	case askWatch:
		w, since := g.watch()
		return Answer{Line: fmt.Sprint(int(w), " ", since)}
	case askShared:
		g.share()
		return Answer{}
	case askOwe:
		if r.PID == strconv.Itoa(g.Task) {
			g.debt.make(time.Now().Add(time.Duration(r.Sent - monotonic())))
		}
		return Answer{}
	case askLocked:
		if r.PID == strconv.Itoa(g.Task) {
			g.debt.locks(r.ImageDir == madeAnew, r.Sent)
			g.worked(r.Config)
		}
		return Answer{}
	case askUnlocked:
		if r.PID != strconv.Itoa(g.Task) || r.expired() && g.found() { // locked again since
			return Answer{}
		}
		g.debt.unlocked(r.Sent)
		return Answer{over: g.ends(r.ImageDir)}
	}
	if r.expired() {
		return Answer{Code: notDone}
	}
	t, err := takeTurn(g.dir(), g.NS.Inode(), time.Now().Add(turnTime))
	if err != nil {
		return Answer{Code: notDone}
	}
	defer t.done()
	r.Orphan = g.CRIUfd >= 0 && waitPidfd(g.CRIUfd, 0)
	ours := r.PID == strconv.Itoa(g.Task)
	if ours && r.unlocks() {
		r.Leave = g.locksElsewhere()
	}
	a := g.Hook(r)
	if !ours {
		return a
	}
	g.after(r, a)
	if a.Code == 0 {
		g.worked(r.Action)
	}
	a.over = a.Code == 0 && g.ends(r.Action)
	return a
}

// worked notes what a hook has been good for.
func (g *Guard) worked(action string) {
	if action == "post-restore" {
		g.restored.Store(true)
	}
}

// share notes, and tells the client, that there is another checkpoint in the namespace.
func (g *Guard) share() {
	g.shared.Store(true)
	if g.board != nil {
		g.board.shared.Store(true)
	}
}

// found tells whether something of ours is in the namespace, as far as is known.
func (g *Guard) found() bool {
	ctx, cancel := context.WithTimeout(context.Background(), unlockTime)
	defer cancel()
	st, err := g.Locker.State(ctx, g.NS)
	return err != nil || st.Found
}

// ends tells whether the checkpoint is over after a hook that worked: a dump after its unlock, a
// restore when post-resume has looked, or when CRIU goes.
func (g *Guard) ends(action string) bool {
	return action == "network-unlock" && g.Phase == Dump || action == "post-resume"
}

// Poll times of settle.
const (
	firstPoll = 50 * time.Millisecond
	lastPoll  = time.Second
)

// settle does what decide says until it is done.
func (g *Guard) settle(done <-chan struct{}) error {
	poll := firstPoll
	var failing time.Time // since when an unlock fails
	for {
		v, err := g.once()
		switch {
		case err == nil && v != wait:
			return nil
		case err == nil:
			failing = time.Time{}
		case failing.IsZero():
			failing = time.Now()
			g.Log("%v; trying again for %v", err, g.Deadline)
		case time.Since(failing) > g.Deadline:
			g.Log("%v; gave up after %v: run criu-netlock unlock", err, g.Deadline)
			return err
		}
		select {
		case <-done:
			return nil
		case w := <-g.Words:
			if w != Unpaid {
				return nil
			}
			g.debt.make(time.Now())
		case <-g.quit(v == wait && err == nil && !g.working):
			g.Log("the guard is told to end, and %s stays locked: see criu-netlock list", g.NS)
			return nil
		case <-time.After(poll):
		}
		poll = min(2*poll, lastPoll)
	}
}

// quit is where the guard is told to end, if nothing but a stopped task keeps it, which can last.
func (g *Guard) quit(idle bool) <-chan os.Signal {
	if !idle {
		return nil
	}
	return g.Quit
}

// once looks and acts in its turn: a checkpoint that begins meanwhile has its guard in
// Dir before it locks, and then the lock is that one's.
func (g *Guard) once() (verdict, error) {
	t, err := takeTurn(g.dir(), g.NS.Inode(), time.Now().Add(turnTime))
	if err != nil {
		return wait, err
	}
	defer t.done()
	if wantedElsewhere(g.dir(), g.NS.Inode(), g.id()) {
		g.place.close() // before the turn ends, or the other one leaves it to us
		return over, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), unlockTime)
	defer cancel()
	st, err := g.Locker.State(ctx, g.NS)
	if err != nil {
		return wait, err
	}
	f := facts{phase: g.Phase, found: st.Found, wasFrozen: g.WasFrozen, wasLocked: g.WasLocked, policy: g.Policy, owed: g.owes(st)}
	if f.policy == "" {
		f.policy = g.Default
	}
	f.abandoned = g.ClientFD >= 0 && waitPidfd(g.ClientFD, 0)
	// A task that CRIU has just killed takes a moment to be dead.
	f.alive, g.working = !waitPidfd(g.TaskFD, int(dyingTime.Milliseconds())), false
	if f.alive {
		f.stopped, f.frozen = Stopped(g.Task), Frozen(g.Task)
		f.working = g.CRIU == 0 && (g.Phase == Dump && traced(g.Task) || g.Phase == Restore && time.Since(g.gone) < restoreTime) ||
			g.WasFrozen && !f.stopped && !f.frozen && !g.looked
		g.working, g.looked = f.working, true
		f.letGo = f.found && g.Phase == Restore && g.restored.Load() && !f.working && letGo(g.Task, g.TaskFD)
	}
	v := decide(f)
	switch v {
	case keep:
		if st.Mode == netlock.Hold && g.GiveUp != nil {
			if err := g.GiveUp(ctx); err != nil {
				return wait, err
			}
		}
		g.Log("%s is gone and %s is still locked: kept for a restore", g.who(), g.NS)
	case release:
		if err := g.unlock(ctx, "%s was gone without unlocking %s: unlocked", g.who(), g.NS); err != nil {
			return wait, err
		}
	}
	return v, nil
}

// unlock unlocks and says what it has done.
func (g *Guard) unlock(ctx context.Context, format string, args ...any) error {
	st, err := g.Locker.Unlock(ctx, g.NS)
	if err != nil && netlock.KindOf(err) != netlock.KindTampered {
		return err
	}
	said := ""
	if err != nil {
		said = "; " + err.Error()
	}
	if w := st.HoldWarning(); w != "" {
		said += "; " + w
	}
	g.Log(format+"%s", append(args, said)...)
	return nil
}

// Bounds of what a guard waits for.
const (
	turnTime   = time.Second
	unlockTime = 5 * time.Second
	dyingTime  = 50 * time.Millisecond
	// restoreTime is how long a CRIU that is not known may take to kill the tasks of a
	// restore whose client has gone, or to let them run.
	restoreTime = 10 * time.Second
)

// waitPidfd waits until the task of a pidfd is dead, a zombie included; for ever if
// ms is -1. It tells whether it is.
func waitPidfd(fd, ms int) bool {
	for {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, ms)
		if !errors.Is(err, unix.EINTR) {
			return n > 0
		}
	}
}

// Stopped tells whether a signal has stopped the task.
func Stopped(pid int) bool {
	st, err := proc.StatOf(pid)
	return err == nil && st.State == 'T'
}

// traced tells whether somebody traces the task, as CRIU does until it has put back what
// it has taken apart.
func traced(pid int) bool {
	s, err := proc.Read("/proc/" + strconv.Itoa(pid) + "/status")
	_, rest, ok := strings.Cut(s, "\nTracerPid:")
	return err == nil && ok && !strings.HasPrefix(strings.TrimSpace(rest), "0\n")
}

// Open makes a Checkpoint of CRIU's pid and pidfd, which it duplicates, and the task's pid. The
// namespace stays the caller's.
func Open(phase Phase, ns *netlock.Namespace, criu, criuFD, task int) (Checkpoint, error) {
	c, err := OpenFor(0, phase, ns, 0, task)
	if err != nil {
		return c, err
	}
	c.CRIU = criu
	if c.CRIUfd, err = unix.FcntlInt(uintptr(criuFD), unix.F_DUPFD_CLOEXEC, 3); err != nil {
		c.Close()
		return c, fmt.Errorf("keep CRIU's pidfd: %w", err)
	}
	return c, nil
}

// OpenFor is Open for a client that locks for CRIU. Where it does not know CRIU's pid, that is 0.
func OpenFor(client int, phase Phase, ns *netlock.Namespace, criu, task int) (c Checkpoint, err error) {
	c = Checkpoint{Phase: phase, NS: ns, CRIU: criu, Task: task, Client: client, CRIUfd: -1, TaskFD: -1, ClientFD: -1}
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	for _, p := range []struct {
		of  string
		pid int
		fd  *int
	}{{"CRIU", criu, &c.CRIUfd}, {"the client", client, &c.ClientFD}, {"the task", task, &c.TaskFD}} {
		if p.pid == 0 {
			continue
		}
		if *p.fd, err = unix.PidfdOpen(p.pid, 0); err != nil {
			return c, fmt.Errorf("pidfd_open of %s, pid %d: %w", p.of, p.pid, err)
		}
	}
	c.WasFrozen = phase == Dump && (Stopped(task) || Frozen(task))
	return c, nil
}

// Close closes the pidfds.
func (c *Checkpoint) Close() {
	for _, fd := range []int{c.CRIUfd, c.TaskFD, c.ClientFD} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

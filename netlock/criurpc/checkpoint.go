package criurpc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
	"github.com/criu-netlock/criu-netlock/netlock/internal/proc"
)

// Checkpoint is one dump or one restore: it does what CRIU notifies, and remembers what
// CRIU tells only once. Its methods may be called from any goroutine; they wait for one
// another.
type Checkpoint struct {
	o     Options
	phase guard.Phase
	// leavesRunning: the tasks live on after a dump that succeeded.
	leavesRunning bool

	turn chan struct{} // held by whoever works

	// What follows belongs to the holder of turn.
	handler *action.Handler
	locker  *netlock.Locker // the handler's
	op      action.Op       // what the handler is doing
	pid     int             // the root task's, when it is known
	criu    int             // CRIU's, 0 if unknown
	ns      *netlock.Namespace
	task    int  // a pidfd of the root task, -1 if there is none
	sure    bool // ns has just been seen to be the task's
	// open: something of ours may be in force, and nobody has taken it off.
	open      bool
	locked    bool  // this checkpoint has been here before, so a lock is its own
	wasLocked bool  // before the restore
	restored  bool  // post-restore has succeeded: CRIU does not kill the tasks any more
	failed    error // the last unlock
	tampered  error // what an unlock found
	over      bool
	link      *guard.Link // to the guard; nil without one
	warm      *netlock.Namespace
	// work is done by one goroutine until the end: a new one for each notification takes some 60 µs
	// of the freeze, most of them because its stack has to grow.
	work chan func()
	// passing, if set, is called when packets pass again, before the unlock has made sure of all else.
	passing func()
}

// NewDump begins a dump of the task with that pid; 0 is our own, as in a request that
// names none. leavesRunning is the request's leave_running.
func NewDump(pid int, leavesRunning bool, o Options) *Checkpoint {
	if pid == 0 {
		pid = os.Getpid()
	}
	c := newCheckpoint(guard.Dump, o)
	c.pid, c.leavesRunning = pid, leavesRunning
	return c
}

// NewRestore begins a restore. Whom of, CRIU says at setup-namespaces.
func NewRestore(o Options) *Checkpoint { return newCheckpoint(guard.Restore, o) }

func newCheckpoint(phase guard.Phase, o Options) *Checkpoint {
	return &Checkpoint{o: o, phase: phase, turn: make(chan struct{}, 1), task: -1}
}

// SetCRIU names CRIU's pid, which a lock bears and which tells later whether its
// checkpoint is over.
func (c *Checkpoint) SetCRIU(pid int) {
	c.turn <- struct{}{}
	defer c.done()
	c.criu, c.handler = pid, nil
}

func (c *Checkpoint) done() { <-c.turn }

// byTable is what the table of package action says.
func (c *Checkpoint) byTable(ctx context.Context, ev action.Event) (action.Report, error) {
	if c.handler == nil {
		l := *c.o.Locker
		l.Options.Terse = true
		theirs := l.Options.Passing
		l.Options.Passing = func() {
			for _, f := range []func(){c.passing, theirs} {
				if f != nil {
					f()
				}
			}
		}
		if l.Options.Caller == (netlock.Caller{}) {
			l.Options.Caller = ev.Caller
		}
		c.locker = &l
		c.handler = &action.Handler{
			Locker: &l, Open: c.openHeld,
			Trial:  func(ctx context.Context) (netlock.Result, error) { return netlock.Trial(ctx, &l) },
			Turn:   c.inTurn,
			Locked: func(fresh bool) { c.link.Locks(fresh) },
			Leave:  func(*netlock.Namespace) bool { return c.link.Leaves() },
			Found:  func(was bool) { l.Options.Caller.Fallback = c.o.OnFailedRestore.Fallback(was) },
		}
	}
	c.op = action.OpOf(ev.Action)
	if c.o.Mode == nil {
		return c.handler.Handle(ctx, ev)
	}
	var notHeld error
	c.locker.Options.Mode, notHeld = c.o.Mode(c.phase, c.leavesRunning)
	rep, err := c.handler.Handle(ctx, ev)
	if rep.Mode == netlock.Drop && rep.NotHeld == nil && action.OpOf(ev.Action) != action.Unlock {
		rep.NotHeld = notHeld
	}
	return rep, err
}

// Handle does what the notification called name is for. pid is what CRIU has sent with
// it, 0 for none. An error is to be answered with notify_success=false. It returns
// within Options.Timeout, and when ctx ends.
func (c *Checkpoint) Handle(ctx context.Context, name action.Name, pid int) (action.Report, error) {
	return c.handle(ctx, name, pid, nil)
}

// handle also calls passing, which may be nil, as soon as an unlock lets packets pass.
func (c *Checkpoint) handle(ctx context.Context, name action.Name, pid int, passing func()) (action.Report, error) {
	start := time.Now()
	op := action.OpOf(name)
	if op == action.Nothing {
		return action.Report{Result: "nothing to do"}, nil
	}
	type done struct {
		ev        action.Event
		rep       action.Report
		unguarded error
	}
	d, err := within(ctx, c, start, string(name), func(ctx context.Context) (d done, err error) {
		d.ev = action.Event{Action: name}
		c.passing = passing
		defer func() { c.passing = nil }()
		if err = c.prepare(op, &d.ev, pid); err != nil {
			return d, err
		}
		d.rep, err = c.byTable(ctx, d.ev)
		if err == nil && (op == action.CheckTask || op == action.CheckHost) {
			c.warmUp(ctx)
		}
		if l, ok := c.locker.Options.Holder.(looker); ok && err == nil && op == action.CheckTask && c.locker.Options.Mode == netlock.Hold && c.ns != nil {
			_ = l.Look(ctx, c.ns) // Bind looks where this could not
		}
		c.learn(op, name, d.rep, err)
		if err == nil {
			d.unguarded = c.guardFrom(name, d.rep)
		}
		return d, err
	})
	if c.o.Log != nil {
		d.ev.Action = name // it may have been given up
		c.o.Log(Entry{Event: d.ev, Report: d.rep, Err: err, Took: time.Since(start), Unguarded: d.unguarded})
	}
	return d.rep, err
}

// inTurn does what changes the lock in its turn among the checkpoints in the namespace.
func (c *Checkpoint) inTurn(_ *netlock.Namespace, f func() error) (err error) {
	c.link.InTurn(time.Now().Add(c.o.timeout()/2), func() {
		err = f()
		if c.op == action.Unlock || c.op == action.Sweep {
			c.link.Unlocks()
		}
	})
	return err
}

// looker is a Holder that can look before the freeze for what it must know to bind.
type looker interface {
	Look(ctx context.Context, ns *netlock.Namespace) error
}

// prepare completes an event by what is known of the checkpoint.
func (c *Checkpoint) prepare(op action.Op, ev *action.Event, pid int) error {
	bad := func(format string, a ...any) error {
		return &netlock.Error{Kind: netlock.KindInput, Op: string(ev.Action), Err: fmt.Errorf(format, a...)}
	}
	switch {
	case c.over:
		return bad("the %s is over", c.phase)
	case c.o.Refuse != nil && op != action.Unlock && op != action.Sweep:
		return c.o.Refuse
	case !op.NeedsPID():
		return nil
	case pid != 0 && c.pid != 0 && pid != c.pid:
		return bad("CRIU has named pid %d, and now %d", c.pid, pid)
	case pid != 0:
		c.pid = pid
	case c.pid == 0:
		return bad("CRIU has named no pid")
	}
	ev.PID = c.pid
	c.hold()
	if c.handler == nil {
		ev.Caller = c.caller()
	}
	return nil
}

// learn remembers what the end of the checkpoint will depend on.
func (c *Checkpoint) learn(op action.Op, name action.Name, rep action.Report, err error) {
	if name == action.SetupNamespaces && !c.locked {
		c.wasLocked = rep.WasLocked
	}
	switch op {
	case action.CheckHost:
		c.handler = nil // it knows of no task
	case action.Unlock, action.Sweep:
		if err != nil && netlock.KindOf(err) == netlock.KindTampered {
			c.tampered, err = err, nil
		}
		c.failed, c.open = err, err != nil && c.open
	case action.Lock, action.Ensure, action.EnsureRemovable:
		// A backend that fails has left nothing behind, unless its time was too short.
		if c.ns != nil && (err == nil || netlock.KindOf(err) == netlock.KindDeadline || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)) {
			c.open, c.locked = true, true
		}
		c.restored = c.restored || name == action.PostRestore && err == nil
	}
}

// hold keeps the task and its namespace, so that the end of the checkpoint is about them
// and not about a task that got the pid later. Where it cannot, the work itself will say
// why; a task in our own namespace has nothing to hold.
func (c *Checkpoint) hold() {
	if c.ns != nil && c.open {
		return
	}
	if c.sure = c.holds(); c.sure {
		return
	}
	c.letGo() // a task can go into another namespace before it is frozen
	fd, err := unix.PidfdOpen(c.pid, 0)
	if err != nil {
		return
	}
	ns, err := netlock.FromPID(c.pid)
	if err != nil {
		unix.Close(fd)
		return
	}
	ns.KeepSockets()
	c.ns, c.task, c.sure = ns, fd, true
	newest.Store(ns.Inode(), c)
}

// holds tells whether what is held is still the task's namespace.
func (c *Checkpoint) holds() bool {
	return c.ns != nil && c.ns.IsOf(c.pid, c.task)
}

// openHeld saves opening it anew, which costs a tenth of a millisecond.
func (c *Checkpoint) openHeld(pid int) (*netlock.Namespace, func(), error) {
	if c.sure || c.open && c.phase == guard.Dump || c.holds() { // a frozen task goes nowhere
		c.sure = false
		return c.ns, func() {}, nil
	}
	ns, err := netlock.FromPID(pid)
	if err != nil {
		return nil, nil, err
	}
	return ns, func() { ns.Close() }, nil
}

func (c *Checkpoint) caller() netlock.Caller {
	criu := c.criu
	if criu == 0 {
		criu = os.Getpid()
	}
	return netlock.CallerOf(criu).For(c.pid)
}

// within runs f when it is c's turn, with a context that ends early enough for undoing
// what f began, and returns before the timeout has passed since start whatever f does: it
// may be in a system call that ends when it likes. What comes next waits for it.
func within[T any](ctx context.Context, c *Checkpoint, start time.Time, op string, f func(context.Context) (T, error)) (T, error) {
	type answer struct {
		v   T
		err error
	}
	timeout := c.o.timeout()
	undo := min(netlock.UndoTime, timeout/2)
	ctx, cancel := context.WithDeadline(ctx, start.Add(timeout-undo))
	defer cancel()
	gaveUp := func() (none T, err error) {
		return none, &netlock.Error{Kind: netlock.KindDeadline, Op: op, Err: context.Cause(ctx), Hint: "criu-netlock status tells what is there now"}
	}
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return gaveUp()
	}
	out := make(chan answer, 1)
	if c.work == nil {
		c.work = make(chan func())
		go func(work <-chan func()) {
			for f := range work {
				f()
			}
		}(c.work)
	}
	c.work <- func() {
		defer c.done()
		v, err := f(ctx)
		if c.over {
			close(c.work)
			c.work = nil
		}
		out <- answer{v, err}
	}
	select {
	case a := <-out:
		if a.err != nil && errors.Is(a.err, context.DeadlineExceeded) && netlock.KindOf(a.err) == netlock.KindOther {
			a.err = &netlock.Error{Kind: netlock.KindDeadline, Op: op, Err: a.err}
		}
		return a.v, a.err
	case <-ctx.Done():
	}
	// Undoing is worth its time even for a caller who is in a hurry.
	t := time.NewTimer(undo)
	defer t.Stop()
	select {
	case a := <-out:
		return a.v, a.err
	case <-t.C:
		return gaveUp()
	}
}

// step runs theirs, the caller's callback, and ours in the order that the package's
// comment gives, and returns what both have to say. theirs may be nil.
func (c *Checkpoint) step(ctx context.Context, name action.Name, pid int, theirs func() error) (ourErr, theirErr error) {
	ours := func() error {
		_, err := c.Handle(ctx, name, pid)
		return err
	}
	if theirs == nil {
		return ours(), nil
	}
	switch op := action.OpOf(name); {
	case op == action.Unlock || op == action.Sweep:
		ourErr = ours()
		return ourErr, theirs()
	case name == action.SetupNamespaces:
		if err := ours(); err != nil {
			return err, nil
		}
	}
	if err := theirs(); err != nil {
		return nil, err
	}
	return ours(), nil
}

// End says that the dump or restore is over, and how: err is what it returned, nil for
// success. It must be called, and not before CRIU has ended its work or lost its
// connection. What CRIU could not unlock is unlocked now, if the tasks live on. It
// returns err and what went wrong beside it. A second call returns err.
func (c *Checkpoint) End(err error) error {
	_, e := within(context.Background(), c, time.Now(), string(EndOf(c.phase)), func(ctx context.Context) (struct{}, error) {
		if c.over {
			return struct{}{}, nil
		}
		return struct{}{}, c.end(ctx, err)
	})
	if netlock.KindOf(e) == netlock.KindDeadline {
		go c.abandon(err)
	}
	return errors.Join(err, e)
}

func (c *Checkpoint) end(ctx context.Context, err error) error {
	c.over = true
	word := guard.Done
	defer func() { c.drop(word) }()
	switch {
	case !c.open:
	case c.toUnlock(ctx, err):
		c.op = action.Unlock
		if c.failed = c.inTurn(c.ns, func() error { return c.unlock(ctx) }); c.failed != nil && netlock.KindOf(c.failed) != netlock.KindTampered {
			word = guard.Unpaid
			if ctx.Err() != nil {
				c.unlockLate()
			}
		}
	default:
		c.failed = c.giveUp(ctx)
	}
	return errors.Join(c.failed, c.tampered)
}

// abandon leaves what End had no time for to the guard, when whoever still works has come back, and
// does it where there is none.
func (c *Checkpoint) abandon(err error) {
	c.turn <- struct{}{}
	defer c.done()
	if c.over {
		return
	}
	c.over = true
	word := guard.Done
	ctx, cancel := c.late()
	defer cancel()
	if c.open && c.toUnlock(ctx, err) {
		word = guard.Unpaid
		c.link.Unlocks()
		c.unlockLate()
	}
	c.drop(word)
	if c.work != nil {
		close(c.work)
		c.work = nil
	}
}

// unlockLate unlocks when End has returned, or is about to, where no guard does. A checkpoint that has begun since
// is not to suffer by it.
func (c *Checkpoint) unlockLate() {
	if last, ok := newest.Load(c.ns.Inode()); c.link != nil || ok && last != c {
		return
	}
	ctx, cancel := c.late()
	defer cancel()
	c.failed = c.unlock(ctx) // the log has it
}

// late is the time for what End had none for.
func (c *Checkpoint) late() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), c.o.timeout())
}

// newest has of each namespace, by inode, which of this process's checkpoints has come to it last.
var newest sync.Map

// unlock is the last one, of what CRIU has not unlocked.
func (c *Checkpoint) unlock(ctx context.Context) error {
	if c.link.Leaves() {
		return nil
	}
	start := time.Now()
	st, err := c.o.Locker.Unlock(ctx, c.ns)
	if c.o.Log != nil && (st.Found || err != nil) {
		rep := action.Report{Netns: c.ns.Inode(), Backend: st.Backend, Mode: st.Mode, Queue: st.Queue, NotDelivered: st.NotDelivered, Loud: true}
		if st.Found {
			rep.Result = "unlocked"
		}
		c.o.Log(Entry{Event: action.Event{Action: EndOf(c.phase), PID: c.pid}, Report: rep, Err: err, Took: time.Since(start)})
	}
	return err
}

// EndOf is the Action of the Entry that tells of an unlock by End.
func EndOf(phase guard.Phase) action.Name { return action.Name("end of the " + string(phase)) }

// giveUp makes a lock of mode hold one of mode drop: nobody is left to deliver to.
func (c *Checkpoint) giveUp(ctx context.Context) error {
	if c.locker == nil || c.locker.Options.Mode != netlock.Hold {
		return nil
	}
	l := *c.locker
	l.Options.Mode = netlock.Drop
	_, err := l.Lock(ctx, c.ns)
	if l.Options.Holder != nil {
		l.Options.Holder.Drop(c.ns)
	}
	return err
}

// warmUp keeps nf_tables' hooks in use on this machine until the checkpoint is over: the
// first and the last base chain of any namespace patch the kernel, 200 µs each. Nothing is
// frozen yet.
func (c *Checkpoint) warmUp(ctx context.Context) {
	if c.warm != nil {
		return
	}
	ns, err := netlock.NewThrowaway()
	if err != nil {
		return // it was for speed alone
	}
	l := *c.locker
	l.Options.Mode, l.Options.Holder = netlock.Drop, nil
	for range 2 { // the second time it reads what is there, as an unlock does
		if _, err := l.Lock(ctx, ns); err != nil {
			ns.Close()
			return
		}
	}
	c.warm = ns
}

func (c *Checkpoint) drop(word guard.Word) {
	c.link.Over(word)
	if c.warm != nil {
		c.warm.Close()
	}
	c.letGo()
}

func (c *Checkpoint) letGo() {
	if c.ns != nil {
		newest.CompareAndDelete(c.ns.Inode(), c)
		c.ns.Close()
	}
	if c.task >= 0 {
		unix.Close(c.task)
	}
	c.ns, c.task, c.sure = nil, -1, false
}

// toUnlock decides what becomes of a lock that is there when all is over.
func (c *Checkpoint) toUnlock(ctx context.Context, err error) bool {
	switch {
	case err == nil && c.phase == guard.Dump && !c.leavesRunning:
		return false // dumped and dead, or left stopped: locked until the restore
	case err == nil:
		return true // network-unlock has failed, or did not come
	case c.phase == guard.Dump:
		return c.lives(ctx)
	case c.restored && c.lives(ctx):
		return true
	}
	switch c.o.OnFailedRestore {
	case guard.Keep:
		return false
	case guard.Unlock:
		return true
	}
	return !c.wasLocked
}

// lives tells whether the root task is there once CRIU has let go of it: while CRIU
// traces it, its sockets may be half taken apart, and a task that was killed takes its
// time to be dead. One that is neither dead nor let go in time is taken for alive: a
// container without a network is the greater evil.
func (c *Checkpoint) lives(ctx context.Context) bool {
	if c.task < 0 {
		return false
	}
	const pfExiting = 0x4 // PF_EXITING of linux/sched.h
	const poll = 2 * time.Millisecond
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		if netlock.Dead(c.task) {
			return false
		}
		st, err := proc.StatOf(c.pid)
		if err == nil && st.Flags&pfExiting == 0 {
			if s, err := proc.Read("/proc/" + strconv.Itoa(c.pid) + "/status"); err == nil && settled(s) {
				return true
			}
		}
		select {
		// A part of the time is the unlock's.
		case <-tick.C:
			if d, ok := ctx.Deadline(); ok && time.Until(d) < c.o.timeout()/4 {
				return true
			}
		case <-ctx.Done():
			return true
		}
	}
}

package criurpc

import (
	"context"
	"errors"

	criu "github.com/checkpoint-restore/go-criu/v8"
	"github.com/checkpoint-restore/go-criu/v8/rpc"

	"github.com/criu-netlock/criu-netlock/netlock/action"
)

// Notify is a go-criu Notify that locks and unlocks, around another one. It is good for
// one dump or restore, whose outcome Done has to be told.
//
// go-criu closes the connection when a callback fails, and CRIU then ends a dump or
// kills the tasks of a restore. An unlock that fails is no reason for that: it is not
// returned by NetworkUnlock and PostResume, but by Done, if that fails too.
type Notify struct {
	theirs criu.Notify
	c      *Checkpoint
}

var _ criu.Notify = (*Notify)(nil)

// NotifyDump is for criu.Criu's Dump with the same options. theirs may be nil.
func NotifyDump(opts *rpc.CriuOpts, theirs criu.Notify, o Options) *Notify {
	return newNotify(NewDump(int(opts.GetPid()), opts.GetLeaveRunning(), o), theirs)
}

// NotifyRestore is for criu.Criu's Restore. theirs may be nil.
func NotifyRestore(theirs criu.Notify, o Options) *Notify {
	return newNotify(NewRestore(o), theirs)
}

func newNotify(c *Checkpoint, theirs criu.Notify) *Notify {
	return &Notify{theirs, c}
}

// Dump is c.Dump with the lock, and with theirs, which may be nil. A c that was Prepared
// keeps its connection when a callback fails, and CRIU waits for ever: then use NotifyDump,
// and Done after c.Cleanup.
func Dump(c *criu.Criu, opts *rpc.CriuOpts, theirs criu.Notify, o Options) error {
	n := NotifyDump(opts, theirs, o)
	return n.end(func() error { return c.Dump(opts, n) })
}

// Restore is c.Restore with the lock, and with theirs, which may be nil. What Dump says of
// a Prepared c goes for this too.
func Restore(c *criu.Criu, opts *rpc.CriuOpts, theirs criu.Notify, o Options) error {
	n := NotifyRestore(theirs, o)
	return n.end(func() error { return c.Restore(opts, n) })
}

// end calls Done even if a callback panics.
func (n *Notify) end(f func() error) (err error) {
	err = errors.New("a callback has panicked")
	defer func() { err = n.Done(err) }()
	err = f()
	return err
}

// Done takes the error with which Dump or Restore has returned, nil too, when CRIU has
// gone or lost its connection. If the tasks live on and are still locked, it unlocks
// them. It returns err and what went wrong beside it.
func (n *Notify) Done(err error) error { return n.c.End(err) }

func (n *Notify) step(name action.Name, pid int32, call func(criu.Notify) error) error {
	var theirs func() error
	if n.theirs != nil {
		theirs = func() error { return call(n.theirs) }
	}
	ours, err := n.c.step(context.Background(), name, int(pid), theirs)
	if op := action.OpOf(name); op == action.Unlock || op == action.Sweep {
		return err // ours is Done's to try again and to return
	}
	return errors.Join(err, ours)
}

// PreDump checks that a lock is possible.
func (n *Notify) PreDump() error { return n.step(action.PreDump, 0, criu.Notify.PreDump) }

// PostDump has nothing to do.
func (n *Notify) PostDump() error { return n.step(action.PostDump, 0, criu.Notify.PostDump) }

// PreRestore checks that this host can lock.
func (n *Notify) PreRestore() error { return n.step(action.PreRestore, 0, criu.Notify.PreRestore) }

// PostRestore makes sure of the lock for the last time.
func (n *Notify) PostRestore(pid int32) error {
	return n.step(action.PostRestore, pid, func(t criu.Notify) error { return t.PostRestore(pid) })
}

// NetworkLock locks.
func (n *Notify) NetworkLock() error { return n.step(action.NetworkLock, 0, criu.Notify.NetworkLock) }

// NetworkUnlock unlocks.
func (n *Notify) NetworkUnlock() error {
	return n.step(action.NetworkUnlock, 0, criu.Notify.NetworkUnlock)
}

// SetupNamespaces locks before and after the other one's.
func (n *Notify) SetupNamespaces(pid int32) error {
	return n.step(action.SetupNamespaces, pid, func(t criu.Notify) error { return t.SetupNamespaces(pid) })
}

// PostSetupNamespaces makes sure of the lock.
func (n *Notify) PostSetupNamespaces() error {
	return n.step(action.PostSetupNamespaces, 0, criu.Notify.PostSetupNamespaces)
}

// PostResume removes what is left.
func (n *Notify) PostResume() error { return n.step(action.PostResume, 0, criu.Notify.PostResume) }

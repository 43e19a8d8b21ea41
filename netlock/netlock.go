// Package netlock locks a network namespace for a checkpoint or a restore: no
// packet reaches the sockets in it until it is unlocked.
//
// It is the policy and imports no backend. A Namespace is an open handle on a
// network namespace; a Backend puts a lock there and takes it off; a Locker
// chooses among backends and cleans up after all of them. What CRIU's hooks do
// with a Locker stands in package action.
//
//	ns, err := netlock.FromPID(pid)
//	if err != nil { … }
//	defer ns.Close()
//	l := netlock.New(nft.New(), iptables.New(iptables.Legacy))
//	res, err := l.Lock(ctx, ns)
//	…
//	st, err := l.Unlock(ctx, ns)
//
// The state is in the kernel, in the rule set itself; nothing is kept in files.
package netlock

import (
	"context"
	"errors"
	"slices"
	"time"
)

// Options is what a lock is made from.
type Options struct {
	// Allow is what passes in spite of the lock, answers included.
	Allow []Rule
	// Caller is recorded in the lock. It decides nothing.
	Caller Caller
	// Mode is what becomes of what comes in; Holder keeps it in mode Hold. A Locker without
	// one takes what lock there is, and makes one that drops.
	Mode   Mode
	Holder Holder
	// Terse says that nobody wants to know of an Unlock who had locked, since when, and how
	// many packets were dropped: with a container frozen it does not stop to read that.
	Terse bool
	// Passing, if set, is called by a Locker's Unlock, one time at most, when an intact lock has gone and
	// nothing has failed, before it looks whether further backends have left something. Mostly they
	// have not, and packets pass already.
	Passing func()
}

// Result says what Lock found and did.
type Result struct {
	// Backend and variant that hold the lock: "nft", "iptables-legacy", "iptables-nft".
	Backend string
	// Already is true if an intact lock was there and was left alone.
	Already bool
	// New is true if nothing of ours was there before.
	New bool
	// Mode is the lock's. NotHeld says why it is Drop where Hold was asked for.
	Mode    Mode
	NotHeld error
}

// State is what a backend sees of its lock in a namespace.
type State struct {
	// Locked: packets are being dropped by a lock of ours.
	Locked bool
	// Intact: there is exactly one lock, and its rules are exactly ours.
	Intact bool
	// Found: something is there under our name, whether or not it locks.
	Found bool
	// Backend and variant, as in Result.
	Backend string
	// Since is when the lock was put on, to the second; zero if unknown.
	Since time.Time
	// DroppedIn and DroppedOut count packets.
	DroppedIn, DroppedOut uint64
	Caller                Caller
	// Why says in words what keeps the lock from being intact.
	Why string
	// Held: live processes own tables under all of our names, and Lock would fail with
	// KindHeld.
	Held bool
	// Mode is the lock's, "" where there is none; Queue is that of mode Hold. What Unlock
	// returns tells what it delivered, or why it did not.
	Mode         Mode
	Queue        Queue
	NotDelivered error
}

// Backend is one way to lock. All methods are idempotent and safe side by side
// with themselves, in this process and in others.
type Backend interface {
	// Name is the backend's name: "nft", "iptables".
	Name() string
	// Lock makes sure that exactly one lock, exactly ours, is in force in ns.
	// An error means that this call left no lock behind that was not there before.
	Lock(ctx context.Context, ns *Namespace, o Options) (Result, error)
	// Unlock removes every lock of this backend and returns what it found.
	// No lock is no error. Options are needed to tell whether it was intact.
	Unlock(ctx context.Context, ns *Namespace, o Options) (State, error)
	// State reads and changes nothing.
	State(ctx context.Context, ns *Namespace, o Options) (State, error)
}

// Locker puts locks on with the first of its backends that the host supports,
// and takes them off with all of them.
type Locker struct {
	// Backends in order of preference. Lock goes on to the next one only where
	// one answers ErrUnsupported: never after EPERM, never after a deadline.
	Backends []Backend
	// Cleaners also take part in Unlock and State, and in removing another
	// backend's leftovers after a Lock, but never lock. An explicit choice of
	// one backend puts the others here.
	Cleaners []Backend
	Options  Options
}

// New returns a Locker over backends, best first.
func New(backends ...Backend) *Locker { return &Locker{Backends: backends} }

func (l *Locker) all() []Backend {
	return slices.Concat(l.Backends, l.Cleaners)
}

// Lock makes sure that ns is locked by exactly one lock. When it returns nil no
// packet passes, but for what Options.Allow lists, CRIU's own marked packets on
// lo and IPv6 neighbour discovery, until Unlock.
func (l *Locker) Lock(ctx context.Context, ns *Namespace) (Result, error) {
	var unsupported []error
	for _, b := range l.Backends {
		res, err := b.Lock(ctx, ns, l.Options)
		if errors.Is(err, ErrUnsupported) {
			unsupported = append(unsupported, err)
			continue
		}
		if err != nil {
			return Result{}, err
		}
		if res.Mode == "" { // a backend that knows no other
			res.Mode = Drop
			if l.Options.Mode == Hold {
				res.NotHeld = errors.New(res.Backend + " cannot hold")
			}
		}
		// The new lock is in force: only now may the others' be removed.
		for _, other := range l.all() {
			if other == b {
				continue
			}
			st, err := other.Unlock(ctx, ns, l.Options)
			if err != nil && !errors.Is(err, ErrUnsupported) {
				return res, l.undo(ctx, ns, b, res, err)
			}
			res.New = res.New && !st.Found
		}
		return res, nil
	}
	return Result{}, &Error{
		Kind: KindNoBackend, Op: "lock", Namespace: ns.String(),
		Err:  errors.Join(append([]error{ErrUnsupported}, unsupported...)...),
		Hint: "run criu-netlock check",
	}
}

// undo takes back a lock that was just made, because a leftover of another
// backend could not be removed.
func (l *Locker) undo(ctx context.Context, ns *Namespace, b Backend, res Result, cause error) error {
	if res.Already {
		return cause
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), UndoTime)
	defer cancel()
	_, err := b.Unlock(ctx, ns, l.Options)
	return errors.Join(cause, err)
}

// UndoTime is how long a roll-back may take after a deadline has passed.
const UndoTime = 500 * time.Millisecond

// Unlock removes every lock of ours, whichever backend put it there, and
// reports what it found. When the error is nil, or of KindTampered, nothing of
// ours is left.
func (l *Locker) Unlock(ctx context.Context, ns *Namespace) (State, error) {
	// The preferred backend goes last: after a delete in nf_tables, closing any
	// netlink socket of the namespace waits for an RCU grace period, the one with
	// which another backend merely looks too. Where sockets are kept it goes first, and what the
	// kernel says to it others need not ask.
	order := l.all()
	if !ns.KeepsSockets() {
		slices.Reverse(order)
	}
	passing := l.Options.Passing
	st, err := each(order, func(b Backend) (State, error) {
		st, err := b.Unlock(ctx, ns, l.Options)
		switch {
		case errors.Is(err, ErrUnsupported) || passing == nil:
		case err != nil:
			passing = nil
		case st.Locked && st.Intact:
			passing()
			passing = nil
		}
		return st, err
	})
	if err == nil && st.Found && !st.Intact {
		err = &Error{
			Kind: KindTampered, Op: "unlock", Namespace: ns.String(), Backend: st.Backend,
			Err: errors.New("unlocked, but the lock had been tampered with: " + st.Why),
		}
	}
	return st, err
}

// State reads what is locked and changes nothing.
func (l *Locker) State(ctx context.Context, ns *Namespace) (State, error) {
	return each(l.all(), func(b Backend) (State, error) { return b.State(ctx, ns, l.Options) })
}

// each asks all backends and merges what they see into one State: two locks,
// even two intact ones, are not an intact one.
func each(backends []Backend, f func(Backend) (State, error)) (State, error) {
	var (
		sum  State
		errs []error
	)
	for _, b := range backends {
		st, err := f(b)
		if errors.Is(err, ErrUnsupported) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
		}
		if st.Locked && st.Mode == "" { // a backend that knows no other
			st.Mode = Drop
		}
		held := sum.Held || st.Held
		switch {
		case !st.Found:
		case !sum.Found:
			sum = st
		default:
			sum.Locked = sum.Locked || st.Locked
			sum.Intact = false
			sum.Why = "a lock of " + sum.Backend + " and one of " + st.Backend + " are there together"
			sum.DroppedIn += st.DroppedIn
			sum.DroppedOut += st.DroppedOut
			if st.Mode == Hold { // the other one drops, and so nothing comes to this one's queue
				sum.Queue = st.Queue
			}
			sum.Mode = Drop
		}
		sum.Held = held
	}
	return sum, errors.Join(errs...)
}

// Package action knows CRIU's hooks: their names, their environment, and the one
// table that says what each of them does. Every interface of CRIU goes through it.
package action

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/internal/proc"
)

// Name is the name of a hook, as CRTOOLS_SCRIPT_ACTION and the RPC messages have it.
type Name string

// The hooks of CRIU 4.2. https://criu.org/Action_scripts
const (
	PreStream           Name = "pre-stream"
	PreDump             Name = "pre-dump"
	PostDump            Name = "post-dump"
	PreRestore          Name = "pre-restore"
	PostRestore         Name = "post-restore"
	NetworkLock         Name = "network-lock"
	NetworkUnlock       Name = "network-unlock"
	SetupNamespaces     Name = "setup-namespaces"
	PostSetupNamespaces Name = "post-setup-namespaces"
	PreResume           Name = "pre-resume"
	PostResume          Name = "post-resume"
	OrphanPtsMaster     Name = "orphan-pts-master"
	StatusReady         Name = "status-ready"
	QueryExtFiles       Name = "query-ext-files"
)

// Op is what a hook does.
type Op int

// What hooks do.
const (
	// Nothing: the hook returns before anything is set up.
	Nothing Op = iota
	// CheckTask: can a lock be taken in the task's namespace?
	CheckTask
	// CheckHost: can a lock be taken on this host?
	CheckHost
	// Lock the task's namespace.
	Lock
	// Ensure that exactly one lock, ours, is in force in the task's namespace.
	Ensure
	// EnsureRemovable is Ensure, loud if the lock had gone, and the lock can be taken
	// off again: one that reads as intact has no owner but the namespace, and reading it
	// takes the privilege that deleting takes.
	EnsureRemovable
	// Unlock the task's namespace.
	Unlock
	// Sweep: nothing of ours is left, or it is removed and said loudly.
	Sweep
)

// table is what every hook does; the reasons stand in the README. What is not in
// it, and a hook that does not exist yet, does nothing.
var table = map[Name]Op{
	PreDump:             CheckTask,
	NetworkLock:         Lock,
	NetworkUnlock:       Unlock,
	PreRestore:          CheckHost,
	SetupNamespaces:     Ensure,
	PostSetupNamespaces: Ensure,
	PostRestore:         EnsureRemovable,
	PostResume:          Sweep,
}

// OpOf says what a hook does.
func OpOf(n Name) Op { return table[n] }

// NeedsPID tells whether the operation is about a task.
func (o Op) NeedsPID() bool { return o != Nothing && o != CheckHost }

// Event is one call of a hook.
type Event struct {
	Action Name
	// PID is the root task's, in our pid namespace; 0 at hooks that bring none.
	PID int
	// ImageDir is where the images are; CRIU's descriptor, dead at post-resume.
	ImageDir string
	// Caller is CRIU.
	Caller netlock.Caller
}

// The environment of an action script.
const (
	EnvAction   = "CRTOOLS_SCRIPT_ACTION"
	EnvInitPID  = "CRTOOLS_INIT_PID"
	EnvImageDir = "CRTOOLS_IMAGE_DIR"
)

// FromEnv reads an Event from the environment that CRIU gives an action script.
// The pid is read only where the hook needs one: at the others nothing may fail.
func FromEnv(lookup func(string) (string, bool)) (Event, error) {
	name, _ := lookup(EnvAction)
	if name == "" {
		return Event{}, input("read "+EnvAction, errors.New("unset or empty"))
	}
	ev := Event{Action: Name(name)}
	ev.ImageDir, _ = lookup(EnvImageDir)
	if !OpOf(ev.Action).NeedsPID() {
		return ev, nil
	}
	s, ok := lookup(EnvInitPID)
	if !ok {
		return ev, input("read "+EnvInitPID, errors.New("unset, but "+name+" needs it"))
	}
	pid, err := ParsePID(s)
	if err != nil {
		return ev, input("read "+EnvInitPID, err)
	}
	ev.PID = pid
	return ev, nil
}

func input(op string, err error) error {
	return &netlock.Error{Kind: netlock.KindInput, Op: op, Err: err}
}

// ParsePID accepts what the kernel could have printed as a pid, and nothing else.
func ParsePID(s string) (int, error) {
	bad := func(why string) (int, error) {
		if len(s) > 32 {
			s = s[:32] + "…"
		}
		return 0, fmt.Errorf("%q is not a pid: %s", s, why)
	}
	if s == "" {
		return bad("empty")
	}
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return bad("want decimal digits only")
		}
	}
	if s[0] == '0' {
		return bad("0 and leading zeros are none")
	}
	n, err := strconv.Atoi(s)
	if limit := pidMax(); err != nil || n > limit {
		return bad("above pid_max, " + strconv.Itoa(limit))
	}
	return n, nil
}

// pidMax is kernel.pid_max, or the highest value it can have.
func pidMax() int {
	s, err := proc.Read("/proc/sys/kernel/pid_max")
	if n, e := strconv.Atoi(strings.TrimSpace(s)); err == nil && e == nil && n > 0 {
		return n
	}
	return 4 << 20
}

// Locker is what a Handler needs of netlock.Locker.
type Locker interface {
	Lock(context.Context, *netlock.Namespace) (netlock.Result, error)
	Unlock(context.Context, *netlock.Namespace) (netlock.State, error)
	State(context.Context, *netlock.Namespace) (netlock.State, error)
}

// Handler does what the table says.
type Handler struct {
	Locker Locker
	// Trial takes a lock in a throwaway namespace, to see that this host can.
	Trial func(context.Context) (netlock.Result, error)
	// Open, if set, opens the namespace of a task in place of netlock.FromPID, for a caller
	// who holds it; release is called when the work is done.
	Open func(pid int) (ns *netlock.Namespace, release func(), err error)
	// Turn, if set, calls what changes a lock when it is its turn among those that work
	// on the namespace.
	Turn func(*netlock.Namespace, func() error) error
	// Wanted, if set, returns why a lock would be nobody's any more, before and after it is
	// taken: who would end it is gone.
	Wanted func() error
	// Leave: what an unlock would take off is left to another checkpoint in the namespace.
	Leave func(*netlock.Namespace) bool
	// Locked, if set, is told that the namespace is locked, in its turn, and whether nothing of
	// ours was there.
	Locked func(fresh bool)
	// Found, if set, is told at setup-namespaces whether the namespace was locked before this
	// restore, before it is locked.
	Found func(wasLocked bool)
	// Entered, if set, is called in the namespace before its lock is looked at or changed, by
	// a caller who enters no other.
	Entered func()
}

// Left is the Result of an unlock that was left to another checkpoint in the namespace.
const Left = "left to another checkpoint"

// Report is what a hook did, for the log.
type Report struct {
	Netns   uint64 // inode; 0 where no namespace was looked at
	Backend string
	// Result in a word or two: "locked", "already locked", "unlocked", "not locked",
	// "possible", "own namespace".
	Result string
	// Loud: the result is nothing to be quiet about, though the hook succeeded.
	Loud bool
	// WasLocked tells, at setup-namespaces, whether the namespace was locked before this
	// restore: a lock of the same CRIU is of the same hook, which runs twice where it is
	// configured twice, and that of a restore which has failed is still to be taken off.
	WasLocked bool
	// Mode is the lock's; empty where none was made or found. NotHeld is why it drops where
	// it was to hold. Queue is what an unlock delivered, NotDelivered why it did not.
	Mode         netlock.Mode
	NotHeld      error
	Queue        netlock.Queue
	NotDelivered error
}

// Handle does what the event's hook is for.
func (h *Handler) Handle(ctx context.Context, ev Event) (rep Report, err error) {
	op := OpOf(ev.Action)
	switch op {
	case Nothing:
		return Report{Result: "nothing to do"}, nil
	case CheckHost:
		res, err := h.Trial(ctx)
		return Report{Backend: res.Backend, Result: "possible"}, err
	}
	ns, release, err := h.open(ev.PID)
	if err != nil {
		// CRIU runs network-lock and network-unlock only where the task has a
		// network namespace of its own, the other hooks always: there a task in
		// CRIU's own namespace has nothing for us to do.
		if errors.Is(err, netlock.ErrOwnNamespace) && op != Lock && op != Unlock {
			return Report{Result: "own namespace, nothing to lock"}, nil
		}
		return rep, err
	}
	defer release()
	rep.Netns = ns.Inode()
	switch op {
	case CheckTask:
		err = h.check(ctx, ns, &rep)
	case Lock, Ensure, EnsureRemovable:
		err = h.turn(ns, func() error { return h.inside(ns, func() error { return h.lock(ctx, ns, ev, &rep) }) })
	case Unlock, Sweep:
		err = h.turn(ns, func() error { return h.inside(ns, func() error { return h.unlock(ctx, ns, op, &rep) }) })
	default:
		err = fmt.Errorf("action %s: operation %d has no code", ev.Action, op)
	}
	return rep, err
}

// inside makes one way into the namespace do for all that is done there, unless there may
// be no need to enter it at all.
func (h *Handler) inside(ns *netlock.Namespace, f func() error) error {
	if ns.KeepsSockets() {
		return f()
	}
	return ns.Do(func() error {
		if h.Entered != nil {
			h.Entered()
		}
		return f()
	})
}

func (h *Handler) open(pid int) (*netlock.Namespace, func(), error) {
	if h.Open != nil {
		return h.Open(pid)
	}
	ns, err := netlock.FromPID(pid)
	if err != nil {
		return nil, nil, err
	}
	return ns, func() { ns.Close() }, nil
}

func (h *Handler) turn(ns *netlock.Namespace, f func() error) error {
	if h.Turn == nil {
		return f()
	}
	return h.Turn(ns, f)
}

func (h *Handler) check(ctx context.Context, ns *netlock.Namespace, rep *Report) error {
	res, err := h.Trial(ctx)
	if err != nil {
		return err
	}
	st, err := h.Locker.State(ctx, ns)
	if err != nil {
		return err
	}
	if st.Held {
		return netlock.HeldError(ns, res.Backend)
	}
	rep.Backend, rep.Result = res.Backend, "possible"
	return nil
}

func (h *Handler) lock(ctx context.Context, ns *netlock.Namespace, ev Event, rep *Report) error {
	if err := h.wanted(ns); err != nil {
		return err
	}
	was := true // something of ours was there, as far as is known
	switch {
	case ev.Action == NetworkLock:
		was = false // the tasks live, whatever was there
	case ev.Action == SetupNamespaces || OpOf(ev.Action) == EnsureRemovable:
		st, err := h.Locker.State(ctx, ns)
		if err != nil {
			return err
		}
		was = st.Locked
		if ev.Action == SetupNamespaces {
			// What another one is at work on was not like that before, and will not be.
			rep.WasLocked = st.Locked && !st.Caller.Is(ev.Caller) && !st.Caller.Failed() && !st.Caller.Works()
			if h.Found != nil {
				h.Found(rep.WasLocked)
			}
		} else {
			// After the sockets are there a lock that had been taken away is worth a word.
			rep.Loud = !st.Locked
		}
	}
	res, err := h.Locker.Lock(ctx, ns)
	if err != nil {
		return err
	}
	if err := h.wanted(ns); err != nil && !was && !res.Already {
		_, undo := h.Locker.Unlock(ctx, ns)
		return errors.Join(err, undo)
	}
	if h.Locked != nil {
		h.Locked(res.New)
	}
	rep.Backend, rep.Mode, rep.NotHeld = res.Backend, res.Mode, res.NotHeld
	switch {
	case rep.Loud:
		rep.Result = "the lock had been removed; locked again"
	case res.Already:
		rep.Result = "already locked"
	default:
		rep.Result = "locked"
	}
	return nil
}

func (h *Handler) wanted(ns *netlock.Namespace) error {
	if h.Wanted == nil {
		return nil
	}
	if err := h.Wanted(); err != nil {
		return &netlock.Error{Kind: netlock.KindOther, Op: "lock", Namespace: ns.String(), Err: err}
	}
	return nil
}

// unlock reports what was found beside the error that tells of tampering.
func (h *Handler) unlock(ctx context.Context, ns *netlock.Namespace, op Op, rep *Report) error {
	if h.Leave != nil && h.Leave(ns) {
		rep.Result = Left
		return nil
	}
	st, err := h.Locker.Unlock(ctx, ns)
	if err != nil && netlock.KindOf(err) != netlock.KindTampered {
		return err
	}
	rep.Backend, rep.Mode, rep.Queue, rep.NotDelivered = st.Backend, st.Mode, st.Queue, st.NotDelivered
	switch {
	case !st.Found:
		rep.Result = "not locked"
	case op == Sweep:
		rep.Result, rep.Loud = "a lock was left after network-unlock; removed", true
	default:
		rep.Result = "unlocked"
	}
	return err
}

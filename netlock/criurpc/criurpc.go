// Package criurpc puts the lock on from inside a program that drives CRIU over RPC: no
// hook process is started, and the lock is in force before CRIU goes on.
//
// There are four ways in:
//
//   - Programs that use go-criu call Dump and Restore of this package in place of those
//     of criu.Criu, or give go-criu a Notify and tell it the outcome with Done.
//   - Session is a connection of our own to CRIU, for what go-criu lacks: the socket of
//     criu service, contexts, messages of any size, file descriptors, answers.
//   - Proxy stands between CRIU and a client that knows nothing of it, as criu-netlock does
//     under the name of criu.
//   - Checkpoint is what all of them stand on: it takes CRIU's notifications of one dump or
//     restore and does what the table of package action says. Whoever speaks the
//     protocol himself gives it what CRIU notifies, and ends it.
//
// Through a Proxy a client hears of everything while the network is locked: ours runs first
// on the way in, and after the client's answer on the way out. Otherwise the
// caller's own callbacks still run, while the network is unlocked where there is a
// choice: before ours on the way in (pre-dump, network-lock, pre-restore,
// post-setup-namespaces, post-restore), and if one fails there, ours is not run; after
// ours on the way out (network-unlock, post-resume), whether or not ours has failed. At
// setup-namespaces, where a container is plugged in, ours runs on both sides of it: what is
// plugged in is locked already, and the lock that CRIU goes on with is checked after it.
//
// CRIU cannot call network-unlock once its client has gone, or has failed in a callback
// as go-criu does, without an answer. So whoever locks here must say how it ended: Done,
// End, or Dump and Restore, which do it. A task that lives on is unlocked then; one that is
// dumped and dead stays locked until it is restored.
//
// A program that takes a checkpoint of a task tree, which lives on, with go-criu:
//
//	package main
//
//	import (
//		"log"
//		"os"
//		"strconv"
//
//		criu "github.com/checkpoint-restore/go-criu/v8"
//		"github.com/checkpoint-restore/go-criu/v8/rpc"
//
//		"github.com/criu-netlock/criu-netlock/netlock"
//		"github.com/criu-netlock/criu-netlock/netlock/criurpc"
//		"github.com/criu-netlock/criu-netlock/nft"
//	)
//
//	// checkpoint PID DIRECTORY
//	func main() {
//		pid, err := strconv.Atoi(os.Args[1])
//		if err != nil {
//			log.Fatal(err)
//		}
//		images, err := os.Open(os.Args[2])
//		if err != nil {
//			log.Fatal(err)
//		}
//		defer images.Close()
//
//		task, dir, yes, skip := int32(pid), int32(images.Fd()), true, rpc.CriuNetworkLockMethod_SKIP
//		opts := &rpc.CriuOpts{Pid: &task, ImagesDirFd: &dir, TcpEstablished: &yes, LeaveRunning: &yes, NetworkLock: &skip}
//		// The program's own callbacks, a criu.Notify, would stand in the place of nil.
//		err = criurpc.Dump(criu.MakeCriu(), opts, nil, criurpc.Options{
//			Locker: netlock.New(nft.New()),
//			Log:    func(e criurpc.Entry) { log.Print(e.Event.Action, ": ", e.Report.Result) },
//		})
//		if err != nil {
//			log.Fatal(err)
//		}
//	}
//
// Be aware:
//   - A program that is killed says nothing: see Options.Guard.
//   - CRIU's pids must be pids here too: CRIU has to run in our pid namespace.
//   - CRIU ignores what becomes of network-unlock. An unlock that fails is tried again by
//     Done or End, which return the error of the last try.
//   - The first lock of a process is its slowest. A Locker is meant to be kept.
package criurpc

import (
	"time"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
)

// Options say how to lock. The zero value, but for the Locker, is what most programs want.
type Options struct {
	// Locker locks, over the backends that the program chooses. If its Options name no
	// Caller, each lock bears CRIU's pid, or the program's where CRIU's is not known.
	Locker *netlock.Locker
	// Timeout bounds what is done at one notification, while CRIU waits; 0 means 5 s.
	Timeout time.Duration
	// OnFailedRestore says what becomes of the lock when a restore fails: by default what
	// it was before.
	OnFailedRestore guard.Policy
	// Guard is the program criu-netlock, which is started as the guard of each checkpoint: a
	// process that unlocks what lives should this one be killed. Empty means the one in PATH
	// or /usr/local/sbin, NoGuard none. Where it cannot be had, the Log is told why, and
	// the checkpoint goes on.
	Guard string
	// Mode, if set, says which mode the lock of a dump or a restore is to have, in place of
	// that of the Locker's Options, and why it is not to hold where that is asked for.
	// For mode hold the Locker's Options need a Holder, which this process is then: it has
	// to live until the end of the checkpoint.
	Mode func(phase guard.Phase, leavesRunning bool) (mode netlock.Mode, notHeld error)
	// Refuse, if set, is why nothing can be locked. Unlocking goes on all the same.
	Refuse error
	// Log, if set, is told of every notification that does something; by a Proxy once
	// CRIU or the client goes on.
	Log func(Entry)
}

// Entry is one notification, or, with EndOf's Action, what End has unlocked in CRIU's place, for a
// log.
type Entry struct {
	Event  action.Event
	Report action.Report
	Err    error
	Took   time.Duration
	// Unguarded is why the checkpoint has got no guard with this notification.
	Unguarded error
}

// later keeps what is to be logged until CRIU goes on.
type later struct {
	log    func(Entry)
	unsaid []Entry
}

// put takes the place of the log.
func (l *later) put(log *func(Entry)) {
	if l.log = *log; l.log != nil {
		*log = func(e Entry) { l.unsaid = append(l.unsaid, e) }
	}
}

func (l *later) say() {
	for _, e := range l.unsaid {
		l.log(e)
	}
	l.unsaid = nil
}

// DefaultTimeout is Options.Timeout where none is given.
const DefaultTimeout = 5 * time.Second

func (o Options) timeout() time.Duration {
	if o.Timeout > 0 {
		return o.Timeout
	}
	return DefaultTimeout
}

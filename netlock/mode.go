package netlock

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Mode is what a lock does with the packets that come in. What goes out is dropped in
// either: the namespace's own kernel sends it again.
type Mode string

// The modes.
const (
	// Drop drops them; the peers send them again when their time-outs end. It is what an
	// empty Mode means.
	Drop Mode = "drop"
	// Hold keeps them in an NFQUEUE until the unlock and delivers them then, in order. With
	// nobody left who keeps them, or with the queue full, they are dropped, never passed.
	Hold Mode = "hold"
)

// Holder keeps what locks of mode hold send to queues. It has to outlive the lock: what
// a queue holds is dropped with the process that bound it.
type Holder interface {
	// Bind takes a queue that nobody in the namespace uses, and says which; for a
	// namespace that it holds already, the one it has, which is not fresh. An error means
	// that this Holder cannot hold there, and the lock is to drop.
	Bind(ctx context.Context, ns *Namespace) (queue uint16, fresh bool, err error)
	// Release delivers what a queue holds by a verdict, whoever bound it, and gives it up. It
	// calls open, which makes the lock let in what comes and tells how many packets the lock has
	// sent to the queue, 0 for not known, when nothing is left in the queue, and delivers what came
	// meanwhile before it returns. The namespace can send by then.
	Release(ctx context.Context, ns *Namespace, queue uint16, v Verdict, open func() (sent uint64, err error)) (Queue, error)
	// Drop gives up what Bind has taken, and all that it holds.
	Drop(ns *Namespace)
}

// Verdict is how what a queue holds is delivered.
type Verdict int

// The verdicts.
const (
	// Accept: past the chains of the hook that the lock's rule is in. That suits a lock with
	// base chains of its own.
	Accept Verdict = iota
	// Repeat: through that hook once more, whose chains have other rules behind the lock's,
	// with CRIU's mark. The lock lets through what has it by then.
	Repeat
)

// ErrNotHolding is a Holder's answer where nobody would stay to hold.
var ErrNotHolding = errors.New("no resident process holds for this one")

// Queue is what is known of the queue of a lock of mode hold, most of it by the kernel.
type Queue struct {
	// Number is the queue's; with Bound false nobody holds, and all is dropped.
	Number uint16
	Bound  bool
	// Held are the packets in it now, Delivered those that an unlock delivered, Overflowed those
	// that found it full. Lost were held, and dropped by the kernel when a base chain of
	// somebody else's in the namespace, or a network device, was removed.
	Held, Delivered, Overflowed, Lost uint64
}

// Warning says in words which packets were not kept; it is empty if all were.
func (q Queue) Warning() string {
	var words []string
	if q.Overflowed > 0 {
		words = append(words, fmt.Sprintf("%s dropped: the queue was full", packets(q.Overflowed)))
	}
	if q.Lost > 0 {
		words = append(words, fmt.Sprintf("%s held and lost: somebody removed a base chain or a device, or a processor was taken away for long", packets(q.Lost)))
	}
	return strings.Join(words, "; ")
}

func packets(n uint64) string {
	if n == 1 {
		return "1 packet was"
	}
	return fmt.Sprintf("%d packets were", n)
}

// HoldWarning says in words what an Unlock that returned st has not delivered of what came in
// under a lock of mode hold; it is empty if that is nothing.
func (st State) HoldWarning() string {
	words := st.Queue.Warning()
	if st.NotDelivered != nil {
		why := "what was held was dropped: " + st.NotDelivered.Error()
		if st.Queue.Held > 0 {
			why = packets(st.Queue.Held) + " held and then dropped: " + st.NotDelivered.Error()
		}
		if words != "" {
			why += "; " + words
		}
		words = why
	}
	return words
}

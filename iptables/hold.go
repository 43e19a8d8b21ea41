package iptables

// The lock of mode hold: what comes in goes to a queue instead of being dropped.
//
// What a queue delivers goes on behind the chain of the hook that sent it there. Other rules of
// that chain would be passed by, a firewall's in table filter; so what is held is sent
// through the chain once more, with CRIU's mark, by which ours then tells it from what
// comes.

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/hold"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// queueTarget has no --queue-bypass: a packet that finds no holder, or no room, is dropped.
const queueTarget = "NFQUEUE"

// queue is a queue's number, or the lack of one.
type queue string

func queueOf(num uint16) queue { return queue(strconv.Itoa(int(num))) }

func (q queue) num() uint16 {
	n, _ := strconv.ParseUint(string(q), 10, 16) // isQueue has looked
	return uint16(n)
}

func (q queue) mode() netlock.Mode {
	if q != "" {
		return netlock.Hold
	}
	return netlock.Drop
}

// isQueue tells whether a rule that is bare of its comment sends all to one queue.
func (m match) isQueue() bool {
	_, err := strconv.ParseUint(m.queue, 10, 16)
	return err == nil && m == match{target: queueTarget, queue: m.queue}
}

// lastSpec is the last rule of a chain of ours.
func lastSpec(chain string, q queue, comment string) string {
	if q == "" || chain != chainIn {
		return dropSpec(comment)
	}
	return `-m comment --comment "` + comment + `" -j ` + queueTarget + " --queue-num " + string(q)
}

// passInput lets the namespace send, and what bears CRIU's mark come in: the rest waits
// in the queue. Unless that is to keep it, the mark is taken off. The comment stays, for whoever
// finds this after we were killed.
func (t table) passInput(v6 bool, lo string, allow []netlock.Rule, q queue, keep bool, comment string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "*%s\n:%s - [0:0]\n:%s - [0:0]\n", t.name, chainIn, chainOut)
	for _, s := range specs(chainIn, lo, v6, allow) {
		fmt.Fprintf(&b, "-A %s %s\n", chainIn, s)
	}
	fmt.Fprintf(&b, "-A %s -m mark ! --mark %s %s\n", chainIn, criuMark, lastSpec(chainIn, q, comment))
	b.WriteString(unmark(keep))
	return b.String() + "COMMIT\n"
}

// openInput lets everything in.
func (t table) openInput(keep bool, comment string) string {
	return fmt.Sprintf("*%s\n:%[2]s - [0:0]\n%s-A %[2]s -m comment --comment \"%[4]s\" -j RETURN\nCOMMIT\n", t.name, chainIn, unmark(keep), comment)
}

func unmark(keep bool) string {
	if keep {
		return ""
	}
	return "-A " + chainIn + " -m mark --mark " + criuMark + " -j MARK --set-mark 0\n"
}

// asWanted tells whether an intact lock is of the mode that was asked for, or as near to
// it as we can come.
func (s *session) asWanted(q queue) bool {
	switch {
	case s.o.Mode != netlock.Hold:
		return q == ""
	case s.o.Holder == nil || s.notHeld != nil:
		return true // both drop, if it comes to that
	case q == "":
		return false
	}
	_, bound, err := nfnl.ReadQueue(q.num())
	return err == nil && bound
}

// bind takes a queue for the lock that is about to be made, if it is to hold.
func (s *session) bind() {
	if s.o.Mode != netlock.Hold || s.queue != "" || s.notHeld != nil {
		return
	}
	if s.o.Holder == nil {
		s.notHeld = netlock.ErrNotHolding
		return
	}
	num, fresh, err := s.o.Holder.Bind(s.ctx, s.ns)
	if err != nil {
		s.notHeld = err
		return
	}
	s.queue, s.fresh = queueOf(num), fresh
}

// unbind gives back what bind took, unless the Holder had it before.
func (s *session) unbind() {
	if s.queue != "" && s.fresh {
		s.o.Holder.Drop(s.ns)
	}
	s.queue = ""
}

// holdTries is how often a lock of mode hold is tried.
const holdTries = 4

// dropInstead makes the lock one that drops, for a reason.
func (s *session) dropInstead(cause error) {
	s.notHeld = fmt.Errorf("no lock with the target %s: %w", queueTarget, cause)
	s.unbind()
}

// count says what of the packets of a lock was dropped.
func (s *session) count(st *netlock.State, q queue) {
	st.Queue, st.DroppedIn = hold.Count(s.ctx, s.ns, q.num(), st.DroppedIn, s.o.Holder)
}

// deliver lets the namespace send again, has what is held delivered, and lets in what
// comes. It tells whether anything was changed.
func (s *session) deliver(ps []place, st *netlock.State) (changed bool) {
	ps = slices.DeleteFunc(slices.Clone(ps), func(p place) bool { return p.queue == "" || !p.locks })
	if len(ps) == 0 || s.o.Holder == nil {
		return false
	}
	keep := hold.CRIULocked(s.ctx)
	each := func(input func(p place) string) error {
		for _, p := range ps {
			if err := s.restore(p.spot, "deliver", input(p)); err != nil {
				return err
			}
		}
		return nil
	}
	q := ps[0].queue
	err := each(func(p place) string {
		return p.passInput(families()[p.fam].v6, s.lo, s.o.Allow, p.queue, keep, cmp.Or(p.comment, s.comment))
	})
	if err == nil {
		var held netlock.Queue
		held, err = s.o.Holder.Release(s.ctx, s.ns, q.num(), netlock.Repeat, func() (uint64, error) {
			return 0, each(func(p place) string { return p.openInput(keep, cmp.Or(p.comment, s.comment)) })
		})
		if err == nil {
			st.Queue = held
		}
	}
	if err != nil { // the lock goes all the same, and what is held with it
		st.NotDelivered = err
		s.o.Holder.Drop(s.ns)
	}
	return true
}

// queueIn is the queue of places, if they have one.
func queueIn(ps []place) (q queue) {
	for _, p := range ps {
		q = cmp.Or(q, p.queue)
	}
	return q
}

package nft

// The lock of mode hold: what comes in goes to a queue instead of to the policy.

import (
	"fmt"

	"github.com/google/nftables"

	"github.com/criu-netlock/criu-netlock/netlock"
)

func (v view) mode() netlock.Mode {
	if v.queue != nil {
		return netlock.Hold
	}
	return netlock.Drop
}

// asWanted tells whether an intact lock is of the mode that was asked for, or as near to
// it as we can come, and of a checkpoint that goes on.
func (s *session) asWanted(v view) bool {
	switch {
	case v.caller.Over():
		return false
	case s.o.Mode != netlock.Hold:
		return v.queue == nil
	case s.o.Holder == nil || s.notHeld != nil:
		return true // both drop, if it comes to that
	}
	return v.queue != nil && v.held.Bound
}

// bind takes a queue for the lock that is about to be made, if it is to hold.
func (s *session) bind() {
	if s.o.Mode != netlock.Hold || s.queue != nil || s.notHeld != nil {
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
	s.fresh = fresh
	s.queue = &queue{num: num, compat: s.b.kernel.noQueue.Load()}
}

// unbind gives back what bind took, unless the Holder had it before.
func (s *session) unbind() {
	if s.queue != nil && s.fresh {
		s.o.Holder.Drop(s.ns)
	}
	s.queue = nil
}

// noExpr goes on to the next way of queueing after the kernel has said that it does not
// know the one that was tried.
func (s *session) noExpr() {
	if !s.queue.compat {
		s.b.kernel.noQueue.Store(true)
		s.queue.compat = true
		return
	}
	s.notHeld = fmt.Errorf("%w: the kernel has neither nft_queue nor nft_compat with xt_NFQUEUE", netlock.ErrUnsupported)
	s.unbind()
}

// deliver lets the namespace send again, has what is held delivered, and lets what comes
// in. In this order: the answers to what is delivered are to get out, and when a base
// chain is removed, ours or another, the kernel drops all that is held.
func (s *session) deliver(v view, st *netlock.State) {
	open := func(c chain) error {
		return s.batch(s.ctx, 0, func(b *nftables.Conn) { addOpening(b, v.name, c.name) })
	}
	cs := chains()
	err := open(cs[1])
	if err == nil {
		var q netlock.Queue
		if q, err = s.o.Holder.Release(s.ctx, s.ns, v.queue.num, netlock.Accept, func() (uint64, error) {
			if err := open(cs[0]); err != nil {
				return 0, err
			}
			return s.sent(v, cs[0]), nil
		}); err == nil {
			st.Queue = q
		}
	}
	if err != nil { // the table goes all the same, and what is held with it
		st.NotDelivered = err
		s.o.Holder.Drop(s.ns)
	}
}

// sent is how many packets the lock has sent to its queue, as its own rule has counted them; 0 if that
// cannot be read.
func (s *session) sent(v view, c chain) (packets uint64) {
	ans, err := s.conn.Ask(s.ctx, getRule(v.name, c, v.sender))
	if err != nil {
		return 0
	}
	for _, o := range ans[0].Objects {
		packets, _ = firstCounter(o)
	}
	return packets
}

// Package hold keeps, for locks of mode hold, the packets that come into a namespace, in
// the kernel, and delivers them at the unlock.
//
// A Holder binds an NFQUEUE of the namespace (nft/nfnl has the socket); the lock's rules
// send there what comes in. The packets stay in the kernel: all that is read of one is
// its length and its first byte, without which the kernel does not tell the length. When
// the process ends the socket is closed, and the kernel drops what was held and all that
// follows: a lock without its holder is one of mode drop.
package hold

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// The bounds of what a namespace's queue holds. A small packet takes about 1.5 KiB of
// the kernel's memory, one of 1,500 bytes 2.5 KiB.
const (
	DefaultPackets = 16384
	DefaultBytes   = 64 << 20
)

// The queues that we take: from CRIU's mark on, where nobody else is likely to be.
const (
	firstQueue = 0xC114
	queues     = 256
)

// Holder is a netlock.Holder for as long as the process lives. The zero value holds up
// to the defaults.
type Holder struct {
	// Packets and Bytes bound what is held in one namespace; 0 means the default. At
	// either bound what comes is dropped. Bytes is exceeded by less than one packet, unless one
	// comes that is longer than 1,500 bytes and than all before: then by what comes until the
	// holder has read of it.
	Packets uint32
	Bytes   uint64

	mu    sync.Mutex
	holds map[uint64]*held // by the namespace's inode
	// looked are the queues that Look has found, likewise.
	looked map[uint64]spans
}

var (
	_ netlock.Holder = (*Holder)(nil)
	_ Teller         = (*Holder)(nil)
)

// held is one bound queue, and who reads its socket: unread, it would fill.
type held struct {
	*nfnl.Queue
	packets uint32
	bytes   uint64
	limit   uint32 // what the kernel keeps by now
	// before are packets of which it is not known how long they are. Those in past, of what Seen
	// tells, are not there any more, or among these.
	before, past, pastSize uint64
	// delivered by a Release that failed later.
	delivered uint64
	stopFD    int
	done      chan struct{}
}

// start begins to read.
func (k *held) start() error {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	k.stopFD, k.done = fd, make(chan struct{})
	k.bound()
	go k.read()
	return nil
}

// read keeps the socket empty, and the kernel's bound where the bytes have it.
func (k *held) read() {
	defer close(k.done)
	for {
		stopped, err := k.Wait(k.stopFD)
		if stopped || err != nil {
			return
		}
		k.bound()
	}
}

// usual is as long as a packet is taken to be until a longer one has come.
const usual = 1500

// begin takes what is in the queue for all that there has been. It is called in the namespace.
func (k *held) begin() error {
	st, _, err := nfnl.ReadQueue(k.Number())
	k.before = st.Held
	k.past, k.pastSize, _ = k.Seen()
	return err
}

// bound has the kernel, which counts packets, keep as many more as fit into the bytes that are
// left, were all as long as those before; in the last quarter, as the longest of them. Where that is
// none, one more is kept: so no less than the bytes are held, and no more than one packet above,
// unless longer ones than any before come faster than they are read of.
func (k *held) bound() {
	n, size, _ := k.Seen()
	n += k.before - k.past
	size += k.before*usual - k.pastSize
	limit := uint64(1) // those that are there, and no more
	if size < k.bytes {
		left, long := k.bytes-size, size/max(1, n)
		if left < k.bytes/4 {
			long = k.Longest()
		}
		limit = n + max(1, left/max(usual, long))
	}
	if l := uint32(min(limit, uint64(k.packets))); l != k.limit && k.SetMaxLen(l) == nil {
		k.limit = l
	}
}

// stop ends read.
func (k *held) stop() {
	_, _ = unix.Write(k.stopFD, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // it cannot fail: the count is 0
	<-k.done
	unix.Close(k.stopFD)
}

// Look is for who has time for it before the container is frozen: which queues the rules of the
// namespace name Bind then need not find out. What has changed by then it does not see.
// Nor does it see what takes too long to read, and Bind will not try again.
func (h *Holder) Look(ctx context.Context, ns *netlock.Namespace) error {
	ctx, cancel := context.WithTimeout(ctx, calmTime)
	defer cancel()
	var theirs spans
	err := ns.Do(func() error {
		theirs = named(ctx)
		return ctx.Err()
	})
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.looked == nil {
		h.looked = map[uint64]spans{}
	}
	h.looked[ns.Inode()] = theirs
	if err != nil {
		return failure("look for queues", ns, err)
	}
	return nil
}

// Bind takes a queue of the namespace that nobody listens on, and that no rule of somebody else's
// names as far as lookTime, or Look, sufficed to tell.
func (h *Holder) Bind(ctx context.Context, ns *netlock.Namespace) (num uint16, fresh bool, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if k := h.holds[ns.Inode()]; k != nil {
		return k.Number(), false, nil
	}
	theirs, looked := h.looked[ns.Inode()]
	delete(h.looked, ns.Inode())
	var q *nfnl.Queue
	err = ns.Do(func() error {
		if !looked {
			looking, cancel := context.WithTimeout(ctx, lookTime)
			defer cancel()
			theirs = named(looking)
		}
		q, err = bind(ctx, h.packets(), theirs)
		return err
	})
	if err != nil {
		return 0, false, failure("bind a queue", ns, err)
	}
	return q.Number(), true, h.add(ns, &held{Queue: q, limit: h.packets()})
}

// bind takes the first queue that is free and not theirs.
func bind(ctx context.Context, packets uint32, theirs spans) (q *nfnl.Queue, err error) {
	for num := uint16(firstQueue); num < firstQueue+queues; num++ {
		if theirs.has(num) {
			err = nfnl.ErrQueueTaken
			continue
		}
		if _, there, e := nfnl.ReadQueue(num); e != nil || there {
			err = errors.Join(e, nfnl.ErrQueueTaken)
			continue
		}
		if q, err = nfnl.BindQueue(ctx, num, packets); !errors.Is(err, nfnl.ErrQueueTaken) {
			return q, err
		}
	}
	return nil, err
}

func (h *Holder) add(ns *netlock.Namespace, k *held) error {
	k.packets, k.bytes = h.packets(), h.Bytes
	if k.bytes == 0 {
		k.bytes = DefaultBytes
	}
	if err := k.start(); err != nil {
		k.Close()
		return failure("hold", ns, err)
	}
	if h.holds == nil {
		h.holds = map[uint64]*held{}
	}
	h.holds[ns.Inode()] = k
	return nil
}

func (h *Holder) packets() uint32 {
	if h.Packets == 0 {
		return DefaultPackets
	}
	return h.Packets
}

// take returns the hold of a namespace, which is no longer the Holder's.
func (h *Holder) take(ns *netlock.Namespace, num int) *held {
	h.mu.Lock()
	defer h.mu.Unlock()
	k := h.holds[ns.Inode()]
	if k == nil || num >= 0 && int(k.Number()) != num {
		return nil
	}
	delete(h.holds, ns.Inode())
	return k
}

// Drop gives up what is held in a namespace.
func (h *Holder) Drop(ns *netlock.Namespace) {
	if k := h.take(ns, -1); k != nil {
		k.stop()
		k.Close()
	}
}

// Close gives up everything.
func (h *Holder) Close() {
	h.mu.Lock()
	all := h.holds
	h.holds = nil
	h.mu.Unlock()
	for _, k := range all {
		k.stop()
		k.Close()
	}
}

// Release delivers what a queue of ours holds. What it cannot deliver it goes on holding.
func (h *Holder) Release(ctx context.Context, ns *netlock.Namespace, num uint16, v netlock.Verdict, open func() (sent uint64, err error)) (out netlock.Queue, err error) {
	k := h.take(ns, int(num))
	if k == nil {
		return out, failure("deliver", ns, netlock.ErrNotHolding)
	}
	k.stop()
	err = ns.Do(func() error {
		if v == netlock.Repeat {
			deliver := func(last uint32) error { return k.Repeat(last, CRIUsMark) }
			out, err = k.release(ctx, deliver, func() (sent uint64, err error) {
				err = whileEmptied(k.Queue, deliver, func() error {
					sent, err = open()
					return err
				})
				return sent, err
			})
			return err
		}
		mark := uint32(0) // a container's rules may go by marks
		if CRIULocked(ctx) {
			mark = CRIUsMark
		}
		out, err = k.release(ctx, func(last uint32) error { return k.Accept(last, mark) }, open)
		return err
	})
	if err != nil {
		h.mu.Lock()
		defer h.mu.Unlock()
		k.delivered = out.Delivered
		_ = ns.Do(k.begin) // what is not known of the bounds is no reason to drop what is held
		return out, failure("deliver", ns, errors.Join(err, h.add(ns, k)))
	}
	go k.Close() // which may wait for an RCU grace period
	return out, nil
}

// Count says what became of the in packets that a lock has sent to a queue of the calling
// thread's namespace. Whatever was neither held nor delivered was dropped.
//
// What is in the queue no more was lost, unless a delivery began and failed, or goes on: who holds
// knows that, the kernel does not.
func Count(ctx context.Context, ns *netlock.Namespace, num uint16, in uint64, holder netlock.Holder) (q netlock.Queue, dropped uint64) {
	q = netlock.Queue{Number: num}
	st, there, err := nfnl.ReadQueue(num)
	if err != nil || !there {
		return q, in
	}
	gone := uint64(0)
	if st.Counted > st.Held+st.Unread {
		if gone, err = lost(num, func() {}); err != nil {
			return q, in
		}
	}
	if teller, ok := holder.(Teller); ok && gone > 0 {
		delivered, known := teller.Delivered(ctx, ns, num)
		q.Delivered = min(gone, delivered)
		if !known { // the delivery is over by now, perhaps, and the queue is gone
			if st, there, err = nfnl.ReadQueue(num); err != nil || !there {
				return q, in
			}
		}
	}
	q.Bound = true
	q.Held, q.Overflowed, q.Lost = st.Held, st.Full+st.Unread, gone-q.Delivered
	return q, in - min(in, q.Held+q.Delivered)
}

// Teller is a Holder that can tell what it has delivered of a queue that it goes on holding; it
// does not know while it delivers.
type Teller interface {
	Delivered(ctx context.Context, ns *netlock.Namespace, queue uint16) (packets uint64, known bool)
}

// Delivered is what a Release that failed has delivered.
func (h *Holder) Delivered(_ context.Context, ns *netlock.Namespace, queue uint16) (uint64, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if k := h.holds[ns.Inode()]; k != nil && k.Number() == queue {
		return k.delivered, true
	}
	return 0, false
}

// Adopt makes a queue of the namespace, which another process has bound, the Holder's.
func (h *Holder) Adopt(ns *netlock.Namespace, q *nfnl.Queue) error {
	k := &held{Queue: q}
	if err := ns.Do(k.begin); err != nil {
		q.Close()
		return failure("hold", ns, err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.add(ns, k)
}

// Queue is what Bind has bound in the namespace; nil if it has not. It stays the Holder's.
func (h *Holder) Queue(ns *netlock.Namespace) *nfnl.Queue {
	h.mu.Lock()
	defer h.mu.Unlock()
	if k := h.holds[ns.Inode()]; k != nil {
		return k.Queue
	}
	return nil
}

// release delivers until nothing is left, has the lock opened, and delivers what came
// between. All that is in the queue goes through one verdict after the other, so nothing
// of it overtakes anything. What came while the lock was opened waits for some ten
// microseconds in which another packet can come past the queue: no message of the
// kernel's opens a rule and empties a queue at once. (A second thread that delivers
// without a pause makes that time shorter, and on a busy machine takes the processor from
// the one that opens: the container waited up to 300 ms for it.)
func (k *held) release(ctx context.Context, deliver func(last uint32) error, open func() (uint64, error)) (out netlock.Queue, err error) {
	out = netlock.Queue{Number: k.Number(), Bound: true}
	gone, err := lost(k.Number(), func() {
		if k.limit != 0 {
			_ = k.SetMaxLen(k.limit) // in its turn behind what is being put into the queue
		}
	})
	if err != nil {
		return out, err
	}
	out.Lost = gone - min(gone, k.delivered)
	st, err := drain(ctx, k.Queue, deliver, rushes)
	sent := uint64(0)
	if err == nil {
		sent, err = open()
	}
	missing := uint64(0)
	if err == nil {
		st, missing, err = rest(ctx, k.Queue, deliver, sent)
	}
	out.Overflowed = st.Full + st.Unread
	if in := st.Counted - st.Unread; in > out.Lost+st.Held {
		out.Delivered = in - out.Lost - st.Held
	}
	out.Lost += missing
	return out, err
}

// whileEmptied delivers what comes while f runs. A lock whose rules are changed by programs takes
// milliseconds to open, and what was left in the queue for so long would come behind what
// passes.
func whileEmptied(q *nfnl.Queue, deliver func(last uint32) error, f func() error) error {
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	defer unix.Close(stop)
	done := make(chan error, 1)
	go func() {
		for {
			stopped, err := q.Wait(stop)
			if err == nil && !stopped {
				_, _, last := q.Seen()
				err = deliver(last)
				time.Sleep(breath)
			}
			if stopped || err != nil {
				done <- err
				return
			}
		}
	}()
	err = f()
	_, _ = unix.Write(stop, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // it cannot fail: the count is 0
	return errors.Join(err, <-done)
}

// breath is what whileEmptied leaves to others: under a flood it would take a processor.
const breath = 100 * time.Microsecond

// rushes bounds how often the queue is emptied while packets still come to it: they may
// come faster than it empties.
const rushes = 100

// drain delivers until the queue is empty; with a bound other than 0 no more often.
func drain(ctx context.Context, q *nfnl.Queue, deliver func(last uint32) error, bound int) (st nfnl.QueueStat, err error) {
	for n := 1; ; n++ {
		_, _, last := q.Seen()
		if err := deliver(last); err != nil {
			return st, fmt.Errorf("verdict: %w", err)
		}
		if st, _, err = nfnl.ReadQueue(q.Number()); err != nil || st.Held == 0 || n == bound {
			return st, err
		}
		if err := ctx.Err(); err != nil {
			return st, err
		}
	}
}

// rest delivers what is left of the sent packets once nothing more is sent. One that the lock has
// counted can be on its way to the queue for as long as its processor is taken away, by an interrupt or
// by the host of a virtual machine; when the lock's chains go first the kernel drops it. (Of 2,000
// unlocks under a flood, on two busy processors, 6 met one, which came up to 5 ms later.) One that the
// rule was about to count is not known, and is lost. missing are those that have not come.
func rest(ctx context.Context, q *nfnl.Queue, deliver func(last uint32) error, sent uint64) (st nfnl.QueueStat, missing uint64, err error) {
	until := time.Now().Add(lateTime)
	for {
		late := time.Now().After(until)
		if st, err = drain(ctx, q, deliver, 0); err != nil {
			return st, 0, err
		}
		if sent <= st.Counted+st.Full {
			break
		}
		if late {
			return st, sent - (st.Counted + st.Full), nil
		}
		time.Sleep(breath)
	}
	// The last may have been counted and not been there yet.
	st, err = drain(ctx, q, deliver, 0)
	return st, 0, err
}

// lateTime bounds how long the tasks wait for a packet that is on its way: the kernel may have had no
// memory for it.
var lateTime = 20 * time.Millisecond

// lost is what came into a queue and is not there, before anything is delivered. The
// kernel does not read its numbers at one moment, and counts a packet before it has it:
// under a flood some may not be noticed, and one that is on its way must not be taken for
// lost, which the next look shows. Whoever has bound the queue can wait until it is in there.
func lost(num uint16, wait func()) (gone uint64, err error) {
	before, _, err := nfnl.ReadQueue(num)
	gone = before.Counted
	for n := 0; err == nil && gone > 0 && n < looks; n++ {
		if n > 1 {
			time.Sleep(breath)
		}
		wait()
		var now nfnl.QueueStat
		now, _, err = nfnl.ReadQueue(num)
		gone = min(gone, before.Counted-min(before.Counted, now.Held+now.Unread))
	}
	return gone, err
}

// looks bounds how often lost looks before it believes that packets are lost.
const looks = 5

// failure words an error.
func failure(op string, ns *netlock.Namespace, err error) error {
	e := &netlock.Error{Kind: netlock.KindOther, Op: op, Namespace: ns.String(), Backend: "nfqueue", Err: err}
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT):
		e.Kind, e.Hint = netlock.KindNoBackend, "the kernel lacks nfnetlink_queue; use mode drop"
		e.Err = fmt.Errorf("%w: %w", netlock.ErrUnsupported, err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		e.Kind, e.Hint = netlock.KindDeadline, "raise the timeout"
	case errors.Is(err, unix.EPERM):
		e.Kind, e.Hint = netlock.KindPrivilege, netlock.MissingCapability(unix.CAP_NET_ADMIN)
	}
	return e
}

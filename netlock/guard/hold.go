package guard

// The guard as the holder of a lock of mode hold: it stays, and so does what it holds.
// Others that unlock, a command or a hook whose guard did not answer, ask it to deliver.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/hold"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// Holder is a netlock.Holder that has others deliver what they hold, and is asked by
// others.
type Holder struct {
	hold.Holder
	// Stays: this process outlives the lock. Otherwise it binds nothing.
	Stays bool
	// HandsOn: what this process binds another one adopts, and that is the one to be asked.
	HandsOn bool
	// Dir is for tests; empty means the Dir of the package.
	Dir string

	answering sync.Mutex // while somebody else's question is answered

	mu      sync.Mutex
	serving map[uint64]*server // where others ask, by the namespace's inode
}

var (
	_ netlock.Holder = (*Holder)(nil)
	_ hold.Teller    = (*Holder)(nil)
)

func (h *Holder) dir() string {
	if h.Dir != "" {
		return h.Dir
	}
	return Dir
}

func holdName(netns uint64, queue uint16) string { return fmt.Sprintf("hold-%d-%d", netns, queue) }

// Bind takes a queue, and lets others ask for what comes into it.
func (h *Holder) Bind(ctx context.Context, ns *netlock.Namespace) (uint16, bool, error) {
	if !h.Stays {
		return 0, false, netlock.ErrNotHolding
	}
	num, fresh, err := h.Holder.Bind(ctx, ns)
	if err == nil && fresh && !h.HandsOn {
		if err = h.serve(ns, num); err != nil {
			h.Holder.Drop(ns)
		}
	}
	return num, fresh, err
}

// Adopt is Bind for a queue that another process has bound.
func (h *Holder) Adopt(ns *netlock.Namespace, q *nfnl.Queue) error {
	if err := h.Holder.Adopt(ns, q); err != nil {
		return err
	}
	return h.serve(ns, q.Number())
}

// Drop gives up what is held.
func (h *Holder) Drop(ns *netlock.Namespace) {
	h.Holder.Drop(ns)
	h.leave(ns)
}

// Release delivers what is held here, or has it delivered by who holds it.
func (h *Holder) Release(ctx context.Context, ns *netlock.Namespace, queue uint16, v netlock.Verdict, open func() (sent uint64, err error)) (netlock.Queue, error) {
	q, err := h.Holder.Release(ctx, ns, queue, v, open)
	switch {
	case err == nil:
		h.leave(ns)
	case errors.Is(err, netlock.ErrNotHolding):
		q, err = h.ask(ctx, ns, queue, v, open)
	}
	return q, err
}

// Delivered tells what was delivered, here or by who holds, of a queue that is still held.
func (h *Holder) Delivered(ctx context.Context, ns *netlock.Namespace, queue uint16) (packets uint64, known bool) {
	if packets, known = h.Holder.Delivered(ctx, ns, queue); known {
		return packets, true
	}
	c, err := h.dial(ns, queue, tellTime)
	if err != nil {
		return 0, false
	}
	defer c.Close()
	if say(c, sayTell) != nil {
		return 0, false
	}
	text, err := read(c)
	if err != nil {
		return 0, false
	}
	n, _ := fmt.Sscanf(text, sayDone+" %d", &packets)
	return packets, n == 1
}

func (h *Holder) serve(ns *netlock.Namespace, num uint16) error {
	own, err := ns.Dup()
	if err != nil {
		return err
	}
	s, err := listen(h.dir(), holdName(ns.Inode(), num))
	if err != nil {
		own.Close()
		return fmt.Errorf("hold: %w", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.serving == nil {
		h.serving = map[uint64]*server{}
	}
	h.serving[ns.Inode()] = s
	go func() {
		defer own.Close()
		s.accept(func(c *net.UnixConn) { // one after the other
			defer c.Close()
			h.answering.Lock()
			defer h.answering.Unlock()
			h.answer(c, own, num)
		})
	}()
	return nil
}

func (h *Holder) leave(ns *netlock.Namespace) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s := h.serving[ns.Inode()]; s != nil {
		s.close()
		delete(h.serving, ns.Inode())
	}
}

// What the two sides say to each other, one packet each.
const (
	sayRelease = "release " + Version
	sayRepeat  = "repeat " + Version
	sayTell    = "tell " + Version
	sayOpen    = "open"
	sayOpened  = "opened"
	sayDone    = "done"
)

// releaseTime bounds a delivery for somebody else; when it fails they unlock without.
const releaseTime = 2 * time.Second

// tellTime bounds a question that somebody else's delivery may keep from being answered.
const tellTime = 200 * time.Millisecond

func (h *Holder) answer(c *net.UnixConn, ns *netlock.Namespace, num uint16) {
	ctx, cancel := context.WithTimeout(context.Background(), releaseTime)
	defer cancel()
	until, _ := ctx.Deadline()
	if c.SetDeadline(until) != nil {
		return
	}
	v := netlock.Accept
	switch text, err := read(c); {
	case err == nil && text == sayRepeat:
		v = netlock.Repeat
	case err == nil && text == sayTell:
		if n, known := h.Holder.Delivered(ctx, ns, num); known {
			_ = say(c, fmt.Sprint(sayDone, " ", n)) // who asked may have gone
		}
		return
	case err != nil || text != sayRelease:
		return
	}
	q, err := h.Holder.Release(ctx, ns, num, v, func() (sent uint64, err error) {
		if err := say(c, sayOpen); err != nil {
			return 0, err
		}
		text, err := read(c)
		if err != nil {
			return 0, err
		}
		if n, _ := fmt.Sscanf(text, sayOpened+" %d", &sent); n != 1 {
			return 0, errors.New(text)
		}
		return sent, nil
	})
	if err != nil {
		_ = say(c, err.Error()) // who asked may have gone
		return
	}
	h.leave(ns)
	_ = say(c, fmt.Sprint(sayDone, " ", q.Delivered, " ", q.Overflowed, " ", q.Lost))
}

// ask has a holder in another process deliver.
func (h *Holder) ask(ctx context.Context, ns *netlock.Namespace, num uint16, v netlock.Verdict, open func() (sent uint64, err error)) (q netlock.Queue, err error) {
	fail := func(err error) (netlock.Queue, error) {
		return q, fmt.Errorf("%w: nobody delivers what is held: %w", netlock.ErrNotHolding, err)
	}
	wait := releaseTime
	if d, ok := ctx.Deadline(); ok && time.Until(d) < wait {
		wait = time.Until(d) / 2 // the rest is for the unlock
	}
	c, err := h.dial(ns, num, wait)
	if err != nil {
		return fail(err)
	}
	defer c.Close()
	how := sayRelease
	if v == netlock.Repeat {
		how = sayRepeat
	}
	if err := say(c, how); err != nil {
		return fail(err)
	}
	if err := hear(c, sayOpen); err != nil {
		return fail(err)
	}
	sent, err := open()
	if err != nil {
		return q, err
	}
	if err := say(c, fmt.Sprint(sayOpened, " ", sent)); err != nil {
		return fail(err)
	}
	text, err := read(c)
	if err != nil {
		return fail(err)
	}
	q = netlock.Queue{Number: num, Bound: true}
	if n, _ := fmt.Sscanf(text, sayDone+" %d %d %d", &q.Delivered, &q.Overflowed, &q.Lost); n != 3 {
		return fail(errors.New(text))
	}
	return q, nil
}

// dial reaches who holds, for so long.
func (h *Holder) dial(ns *netlock.Namespace, queue uint16, wait time.Duration) (*net.UnixConn, error) {
	if err := trusted(h.dir()); err != nil {
		return nil, err
	}
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: filepath.Join(h.dir(), holdName(ns.Inode(), queue)), Net: "unixpacket"})
	if err == nil {
		err = c.SetDeadline(time.Now().Add(wait))
	}
	return c, err
}

func say(c *net.UnixConn, text string) error {
	_, err := c.Write([]byte(text))
	return err
}

func read(c *net.UnixConn) (string, error) {
	b := make([]byte, maxMessage)
	n, err := c.Read(b)
	return strings.ToValidUTF8(string(b[:n]), ""), err
}

func hear(c *net.UnixConn, want string) error {
	got, err := read(c)
	if err == nil && got != want {
		err = errors.New(got)
	}
	return err
}

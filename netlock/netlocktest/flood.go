package netlocktest

// Numbered packets without a pause through thousands of locks: none comes through a
// lock, none is lost without one.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
)

// Flood runs FloodFunc with a backend.
func Flood(t *testing.T, newBackend func() netlock.Backend, cycles int) {
	t.Helper()
	p := NewPair(t)
	b, ns := bind(newBackend)(), p.Inside.Netns()
	FloodFunc(t, p,
		func() error { _, err := b.Lock(t.Context(), ns, caller); return err },
		func() error { _, err := b.Unlock(t.Context(), ns, caller); return err },
		cycles)
}

// The phases of a cycle. A packet belongs to one if the phase was the same before
// and after it was sent; those sent while the lock changes may go either way.
const (
	phaseOpen = iota
	phaseLocking
	phaseLocked
	phaseUnlocking
	phases
)

// perPhase is how many packets at least are sent in every open and locked phase.
const perPhase = 250

// FloodRepair floods a lock whose rules get doubled, as by the restore of an image,
// and are replaced by another Lock, so many times a cycle: between the two there is no gap
// either.
func FloodRepair(t *testing.T, c Config, cycles, repairs int) {
	t.Helper()
	p := NewPair(t)
	s := c.on(t, p.Inside)
	flood{
		lock: func() error { s.lock(); return nil },
		locked: func() error {
			for range repairs {
				c.Replay(p.Inside)
				if res := s.lock(); res.Already {
					return errors.New("doubled rules were left alone")
				}
			}
			return nil
		},
		unlock: func() error { s.unlock(); return nil },
		cycles: cycles, wait: untilTime,
	}.check(t, p)
}

// FloodFunc floods Inside from Peer while lock and unlock take turns.
func FloodFunc(t *testing.T, p *Pair, lock, unlock func() error, cycles int) {
	t.Helper()
	flood{lock: lock, locked: func() error { return nil }, unlock: unlock, cycles: cycles, wait: untilTime}.check(t, p)
}

// flood is what goes on under the packets.
type flood struct {
	// locked is done between lock and unlock.
	lock, locked, unlock func() error
	cycles               int
	// wait is how long a packet that nothing stops may take.
	wait time.Duration
}

// tally is what came of a flood.
type tally struct {
	sent         [phases + 1]int
	leaked, lost int
	overflow     uint32
}

func (f flood) check(t *testing.T, p *Pair) {
	t.Helper()
	c, err := f.run(t, p)
	t.Logf("%d cycles: %d packets while locked, %d came; %d while open, %d lost; %d meanwhile",
		f.cycles, c.sent[phaseLocked], c.leaked, c.sent[phaseOpen], c.lost, c.sent[phaseLocking]+c.sent[phaseUnlocking]+c.sent[changing])
	if err == nil {
		err = c.fault(f.cycles)
	}
	if err != nil {
		t.Error(err)
	}
}

// fault is what is wrong with a tally.
func (c tally) fault(cycles int) error {
	switch {
	case c.leaked > 0 || c.lost > 0:
		return fmt.Errorf("%d packets came through a lock, %d were lost without one", c.leaked, c.lost)
	case c.overflow != 0:
		return fmt.Errorf("the receiver itself lost %d packets: nothing is shown", c.overflow)
	case c.sent[phaseLocked] < perPhase*cycles || c.sent[phaseOpen] < perPhase*cycles:
		return fmt.Errorf("too few packets: %v", c.sent)
	}
	return nil
}

// run returns the tally of what was sent until then beside an error, too.
func (f flood) run(t *testing.T, p *Pair) (tally, error) {
	t.Helper()
	in := newFloodReceiver(t, p.Inside)
	out := newFloodSender(t, p.Peer)
	err := f.cycle(in, out)
	class := out.halt()
	if err == nil {
		err = in.await(out.lastOpen(), f.wait)
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	c := tally{overflow: in.overflow}
	for seq, phase := range class {
		c.sent[phase]++
		switch came := in.came[uint64(seq)]; {
		case phase == phaseLocked && came:
			c.leaked++
		case phase == phaseOpen && !came:
			c.lost++
		}
	}
	return c, err
}

func (f flood) cycle(in *floodReceiver, out *floodSender) error {
	for range f.cycles {
		if err := out.await(perPhase); err != nil {
			return fmt.Errorf("open: %w", err)
		}
		out.phase.Add(1)
		// What was sent in the open has to be in before the lock is asked for: a packet
		// still on its way would be dropped rightly. The flood goes on meanwhile.
		if err := in.await(out.lastOpen(), f.wait); err != nil {
			return err
		}
		if err := f.lock(); err != nil {
			return fmt.Errorf("lock: %w", err)
		}
		out.phase.Add(1)
		if err := out.await(perPhase); err != nil {
			return fmt.Errorf("locked: %w", err)
		}
		if err := f.locked(); err != nil {
			return fmt.Errorf("locked: %w", err)
		}
		out.phase.Add(1)
		if err := f.unlock(); err != nil {
			return fmt.Errorf("unlock: %w", err)
		}
		out.phase.Add(1)
	}
	if err := out.await(perPhase); err != nil {
		return fmt.Errorf("open: %w", err)
	}
	return nil
}

// changing is the class of the packets that belong to no phase.
const changing = phases

type floodSender struct {
	phase atomic.Uint32
	stop  atomic.Bool
	done  chan struct{}

	mu    sync.Mutex
	moved *sync.Cond
	class []uint8
	// run counts the packets of the present phase.
	run      int
	runPhase uint32
	open     span // the packets of the last open phase
	err      error
}

func newFloodSender(t *testing.T, n *NS) *floodSender {
	t.Helper()
	fd := -1
	n.do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Connect(fd, &unix.SockaddrInet4{Port: udpPort, Addr: [4]byte(net.ParseIP(InsideV4).To4())})
	})
	s := &floodSender{done: make(chan struct{})}
	s.moved = sync.NewCond(&s.mu)
	t.Cleanup(func() { s.halt(); unix.Close(fd) })
	go func() {
		defer close(s.done)
		b := make([]byte, 8)
		// While the lock changes, which it mostly waits for, the packets count for nothing:
		// a few will do, and leave the processor to others.
		pace := time.NewTicker(20 * time.Microsecond)
		defer pace.Stop()
		for seq := 0; !s.stop.Load(); seq++ {
			binary.BigEndian.PutUint64(b, uint64(seq))
			if p := s.phase.Load() % phases; p == phaseLocking || p == phaseUnlocking {
				<-pace.C
			}
			before := s.phase.Load()
			_, err := unix.Write(fd, b)
			s.sent(before, err)
			// Or who waits for the phase's packets waits for the end of our time slice.
			runtime.Gosched()
		}
	}()
	return s
}

func (s *floodSender) sent(phase uint32, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := uint8(changing)
	// Read with the lock held: what is not in lastOpen by now was not sent in the open.
	if err == nil && phase == s.phase.Load() {
		c = uint8(phase % phases)
		if s.run == 0 || phase != s.runPhase {
			s.run, s.runPhase = 0, phase
			if c == phaseOpen {
				s.open.first = len(s.class)
			}
		}
		s.run++
		if c == phaseOpen {
			s.open.last = len(s.class)
		}
	}
	if err != nil {
		s.err = err
	}
	s.class = append(s.class, c)
	s.moved.Broadcast()
}

// await returns when k packets were sent in the present phase.
func (s *floodSender) await(k int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.runPhase != s.phase.Load() || s.run < k {
		if s.err != nil {
			return s.err
		}
		if s.stop.Load() {
			return errors.New("stopped")
		}
		s.moved.Wait()
	}
	return nil
}

// lastOpen are the packets of the last open phase. The one being sent while the
// phase changed belongs to none, so they stay the last.
func (s *floodSender) lastOpen() span {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open
}

func (s *floodSender) halt() []uint8 {
	s.stop.Store(true)
	<-s.done
	return s.class
}

// span is the packets from first to last, of which those sent meanwhile count for
// nothing.
type span struct{ first, last int }

type floodReceiver struct {
	mu       sync.Mutex
	moved    *sync.Cond
	came     map[uint64]bool
	overflow uint32
	expired  bool
}

func newFloodReceiver(t *testing.T, n *NS) *floodReceiver {
	t.Helper()
	r := &floodReceiver{came: map[uint64]bool{}}
	r.moved = sync.NewCond(&r.mu)
	var c *net.UDPConn
	n.do(func() (err error) {
		c, err = net.ListenUDP("udp4", &net.UDPAddr{Port: udpPort})
		return err
	})
	t.Cleanup(func() { c.Close() })
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	e := raw.Control(func(fd uintptr) {
		// A buffer for the longest time that this process may be kept from reading, and the
		// kernel's word that it was enough.
		err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 256<<20),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1))
	})
	if err = errors.Join(e, err); err != nil {
		t.Fatal(err)
	}
	go func() {
		b, oob := make([]byte, 64), make([]byte, 64)
		for {
			k, o, _, _, err := c.ReadMsgUDPAddrPort(b, oob)
			if err != nil {
				return
			}
			r.took(b[:k], oob[:o])
		}
	}()
	return r
}

func (r *floodReceiver) took(b, oob []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(b) == 8 {
		r.came[binary.BigEndian.Uint64(b)] = true
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	for _, m := range msgs {
		if err == nil && m.Header.Type == unix.SO_RXQ_OVFL && len(m.Data) >= 4 {
			r.overflow = binary.NativeEndian.Uint32(m.Data)
		}
	}
	r.moved.Broadcast()
}

// await returns when all of some packets have come; two processors can deliver them
// out of order.
func (r *floodReceiver) await(ps span, wait time.Duration) error {
	timer := time.AfterFunc(wait, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.expired = true
		r.moved.Broadcast()
	})
	defer timer.Stop()
	r.mu.Lock()
	defer r.mu.Unlock()
	for seq := ps.first; seq <= ps.last; seq++ {
		for !r.came[uint64(seq)] {
			if r.expired {
				return fmt.Errorf("packet %d of %d to %d, sent without a lock, has not come", seq, ps.first, ps.last)
			}
			r.moved.Wait()
		}
	}
	return nil
}

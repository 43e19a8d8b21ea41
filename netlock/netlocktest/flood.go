package netlocktest

// Numbered packets without a pause through thousands of locks: none comes through a
// lock, none is lost without one.

import (
	"encoding/binary"
	"errors"
	"net"
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
	b, ns := newBackend(), p.Inside.Netns()
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
const perPhase = 4

// FloodRepair floods a lock whose rules get doubled, as by the restore of an image,
// and are replaced by another Lock: between the two there is no gap either.
func FloodRepair(t *testing.T, c Config, cycles int) {
	t.Helper()
	p := NewPair(t)
	s := c.on(t, p.Inside)
	flood(t, p,
		func() error { s.lock(); return nil },
		func() error {
			c.Replay(p.Inside)
			if res := s.lock(); res.Already {
				return errors.New("doubled rules were left alone")
			}
			return nil
		},
		func() error { s.unlock(); return nil },
		cycles)
}

// FloodFunc floods Inside from Peer while lock and unlock take turns.
func FloodFunc(t *testing.T, p *Pair, lock, unlock func() error, cycles int) {
	t.Helper()
	flood(t, p, lock, func() error { return nil }, unlock, cycles)
}

func flood(t *testing.T, p *Pair, lock, locked, unlock func() error, cycles int) {
	t.Helper()
	in := newFloodReceiver(t, p.Inside)
	out := newFloodSender(t, p.Peer)
	fail := func(what string, err error) {
		if err != nil {
			out.halt()
			t.Fatalf("%s: %v", what, err)
		}
	}
	for range cycles {
		fail("open", out.await(perPhase))
		out.phase.Add(1)
		// What was sent in the open has to be in before the lock is asked for: a packet
		// still on its way would be dropped rightly. The flood goes on meanwhile.
		fail("packets sent without a lock", in.await(out.lastOpen()))
		fail("lock", lock())
		out.phase.Add(1)
		fail("locked", out.await(perPhase))
		fail("locked", locked())
		out.phase.Add(1)
		fail("unlock", unlock())
		out.phase.Add(1)
	}
	fail("open", out.await(perPhase))
	class := out.halt()
	last := out.lastOpen()
	fail("the last packet", in.await(last)) // all before it have come or never will
	in.mu.Lock()
	defer in.mu.Unlock()
	var sent [phases + 1]int
	leaked, lost := 0, 0
	for seq, c := range class {
		sent[c]++
		switch came := in.came[uint64(seq)]; {
		case c == phaseLocked && came:
			leaked++
		case c == phaseOpen && !came:
			lost++
		}
	}
	t.Logf("%d cycles: %d packets while locked, %d came; %d while open, %d lost; %d meanwhile",
		cycles, sent[phaseLocked], leaked, sent[phaseOpen], lost, len(class)-sent[phaseLocked]-sent[phaseOpen])
	switch {
	case in.overflow != 0:
		t.Errorf("the receiver itself lost %d packets: nothing is shown", in.overflow)
	case sent[phaseLocked] < perPhase*cycles || sent[phaseOpen] < perPhase*cycles:
		t.Errorf("too few packets: %v", sent)
	}
	if leaked > 0 || lost > 0 {
		t.Errorf("%d packets came through a lock, %d were lost without one", leaked, lost)
	}
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
	open     int // the last packet sent in the open, -1 if none
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
	s := &floodSender{done: make(chan struct{}), open: -1}
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
			s.sent(before, s.phase.Load(), err)
		}
	}()
	return s
}

func (s *floodSender) sent(before, after uint32, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := uint8(changing)
	if before == after {
		c = uint8(before % phases)
		if before != s.runPhase {
			s.run, s.runPhase = 0, before
		}
		s.run++
		if c == phaseOpen && err == nil {
			s.open = len(s.class)
		}
	}
	if err != nil {
		s.err = err
		c = changing
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

// lastOpen is the last packet sent in the open. The one being sent while the phase
// changed belongs to none, so it stays the last.
func (s *floodSender) lastOpen() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return uint64(s.open)
}

func (s *floodSender) halt() []uint8 {
	s.stop.Store(true)
	<-s.done
	return s.class
}

type floodReceiver struct {
	mu       sync.Mutex
	moved    *sync.Cond
	came     map[uint64]bool
	highest  uint64
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
		seq := binary.BigEndian.Uint64(b)
		r.came[seq] = true
		r.highest = max(r.highest, seq)
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	for _, m := range msgs {
		if err == nil && m.Header.Type == unix.SO_RXQ_OVFL && len(m.Data) >= 4 {
			r.overflow = binary.NativeEndian.Uint32(m.Data)
		}
	}
	r.moved.Broadcast()
}

// await returns when a packet has come.
func (r *floodReceiver) await(seq uint64) error {
	timer := time.AfterFunc(untilTime, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.expired = true
		r.moved.Broadcast()
	})
	defer timer.Stop()
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.highest < seq {
		if r.expired {
			return errors.New("have not come")
		}
		r.moved.Wait()
	}
	return nil
}

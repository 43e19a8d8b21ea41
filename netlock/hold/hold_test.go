package hold_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/iptables"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/hold"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

const (
	helperPID     = "HOLD_TEST_PID"
	helperBackend = "HOLD_TEST_BACKEND"
)

// backends are all that can hold.
func backends() map[string]func() netlock.Backend {
	return map[string]func() netlock.Backend{
		"nft":             func() netlock.Backend { return nft.New() },
		"iptables-legacy": func() netlock.Backend { return iptables.New(iptables.Legacy) },
		"iptables-nft":    func() netlock.Backend { return iptables.New(iptables.NFT) },
	}
}

// bounds are a Holder's; 0 means the default.
type bounds struct {
	packets uint32
	bytes   uint64
}

// each runs a test with every backend, in a pair of its own.
func each(t *testing.T, h bounds, f func(t *testing.T, l *lab)) {
	for name := range backends() {
		t.Run(name, func(t *testing.T) {
			f(t, newLab(t, name, &hold.Holder{Packets: h.packets, Bytes: h.bytes}))
		})
	}
}

// TestMain makes the test binary a holder, for the test that kills it.
func TestMain(m *testing.M) {
	if pid, err := strconv.Atoi(os.Getenv(helperPID)); err == nil {
		os.Exit(helper(pid))
	}
	os.Exit(netlocktest.HostUntouched(m))
}

// helper locks and holds until it is killed, or its standard input ends.
func helper(pid int) int {
	ns, err := netlock.FromPID(pid)
	if err == nil {
		var res netlock.Result
		res, err = backends()[os.Getenv(helperBackend)]().Lock(context.Background(), ns, options(&hold.Holder{}))
		if err == nil && res.Mode != netlock.Hold {
			err = res.NotHeld
		}
	}
	fmt.Println(err)
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

func options(h netlock.Holder) netlock.Options {
	// What IPv6 sends by itself is not to be counted.
	return netlock.Options{Mode: netlock.Hold, Holder: h, Allow: []netlock.Rule{{Proto: "icmpv6"}}, Caller: netlock.Caller{PID: 4711, Name: "criu"}}
}

// lab is a pair, and a backend that locks its inside in mode hold.
type lab struct {
	*netlocktest.Pair
	netlocktest.Config
	t       *testing.T
	backend string
	b       netlock.Backend
	h       *hold.Holder
	o       netlock.Options
}

func newLab(t *testing.T, backend string, h *hold.Holder) *lab {
	l := &lab{Pair: netlocktest.NewPair(t), t: t, backend: backend, b: backends()[backend](), h: h}
	if variant, ok := strings.CutPrefix(backend, "iptables-"); ok {
		l.Config = netlocktest.IPTables(t, variant, backends()[backend])
	} else {
		l.Config = netlocktest.NFT(t, backends()[backend])
	}
	l.o = options(h)
	t.Cleanup(func() {
		h.Close()
		if b, ok := l.b.(interface{ Wait() }); ok {
			b.Wait()
		}
	})
	return l
}

// rounds is how often something is repeated: with processes it takes longer.
func (l *lab) rounds(n int) int {
	if l.backend != "nft" {
		n /= 5
	}
	return n
}

func (l *lab) lock() {
	l.t.Helper()
	res, err := l.b.Lock(l.t.Context(), l.Inside.Netns(), l.o)
	if err != nil || res.Mode != netlock.Hold || res.NotHeld != nil {
		l.t.Fatalf("lock: %+v, %v", res, err)
	}
}

func (l *lab) unlock() netlock.State {
	l.t.Helper()
	st, err := l.b.Unlock(l.t.Context(), l.Inside.Netns(), l.o)
	if err != nil {
		l.t.Fatal(err)
	}
	return st
}

// unbound waits until the queues of earlier locks have gone, which an unlock does not wait for.
func (l *lab) unbound() {
	l.t.Helper()
	if err := netlocktest.Until(func() (gone bool, err error) {
		err = l.Inside.Do(func() error {
			b, err := os.ReadFile("/proc/thread-self/net/netfilter/nfnetlink_queue")
			gone = len(b) == 0
			return err
		})
		return gone, err
	}); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) state() netlock.State {
	l.t.Helper()
	st, err := l.b.State(l.t.Context(), l.Inside.Netns(), l.o)
	if err != nil {
		l.t.Fatal(err)
	}
	return st
}

// waitHeld waits until so many packets are held.
func (l *lab) waitHeld(n uint64) {
	l.t.Helper()
	if err := netlocktest.Until(func() (bool, error) { return l.state().Queue.Held >= n, nil }); err != nil {
		l.t.Fatalf("held %d, want %d: %v", l.state().Queue.Held, n, err)
	}
}

const port = 7801

// flow sends numbered datagrams to the inside and reads them there.
type flow struct {
	t    *testing.T
	in   *net.UDPConn
	out  *net.UDPConn
	next uint64
}

func (l *lab) flow(network, addr string, rcvbuf int) *flow {
	l.t.Helper()
	f := &flow{t: l.t}
	to := net.JoinHostPort(addr, strconv.Itoa(port))
	err := l.Inside.Do(func() error {
		c, err := net.ListenPacket(network, to)
		if err == nil {
			f.in = c.(*net.UDPConn)
			err = netlocktest.ForceReadBuffer(f.in, rcvbuf)
		}
		return err
	})
	if err == nil {
		err = l.Peer.Do(func() error {
			c, err := net.Dial(network, to)
			if err == nil {
				f.out = c.(*net.UDPConn)
			}
			return err
		})
	}
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { f.in.Close(); f.out.Close() })
	return f
}

func (f *flow) send(n int) {
	f.t.Helper()
	for range n {
		f.next++
		if _, err := f.out.Write(binary.BigEndian.AppendUint64(nil, f.next)); err != nil {
			f.t.Fatal(err)
		}
	}
}

// expect reads all numbers from one on, in order, up to another.
func (f *flow) expect(from, to uint64) {
	f.t.Helper()
	f.in.SetReadDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, 16)
	for want := from; want <= to; want++ {
		n, err := f.in.Read(b)
		if err != nil || n != 8 {
			f.t.Fatalf("waiting for %d: %d bytes, %v", want, n, err)
		}
		if got := binary.BigEndian.Uint64(b); got != want {
			f.t.Fatalf("got %d, want %d", got, want)
		}
	}
}

// nothing reads nothing.
func (f *flow) nothing() {
	f.t.Helper()
	f.in.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	b := make([]byte, 16)
	if n, err := f.in.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		f.t.Fatalf("%d bytes came, %v", n, err)
	}
}

// What is held arrives whole and in order at the unlock, and nothing before; the
// namespace is then as it was.
func TestHold(t *testing.T) {
	each(t, bounds{}, func(t *testing.T, l *lab) {
		before := l.Ruleset(l.Inside)
		for _, f := range []*flow{l.flow("udp4", netlocktest.InsideV4, 1<<20), l.flow("udp6", netlocktest.InsideV6, 1<<20)} {
			f.send(3)
			f.expect(1, 3)
			l.lock()
			st := l.state()
			if !st.Locked || !st.Intact || st.Mode != netlock.Hold || !st.Queue.Bound {
				t.Fatalf("locked: %+v", st)
			}
			f.send(200)
			l.waitHeld(200)
			f.nothing()
			if st := l.state(); st.Queue.Held != 200 || st.DroppedIn != 0 || st.Queue.Overflowed != 0 {
				t.Errorf("with 200 held: %+v", st)
			}
			st = l.unlock()
			if st.NotDelivered != nil || st.Queue.Delivered != 200 || st.Queue.Held+st.Queue.Lost+st.Queue.Overflowed != 0 {
				t.Errorf("unlocked: %+v", st)
			}
			f.send(3)
			f.expect(4, 206)
			if after := l.Ruleset(l.Inside); after != before {
				t.Errorf("the rules are now\n%s\nand were\n%s", after, before)
			}
			if q := l.queues(); q != "" {
				t.Errorf("left behind: queue %s", q)
			}
		}
	})
}

// queues are those of the namespace, once the closes that run on are over.
func (l *lab) queues() (text string) {
	l.t.Helper()
	_ = netlocktest.Until(func() (bool, error) {
		b, err := "", error(nil)
		err = l.Inside.Do(func() error {
			raw, err := os.ReadFile("/proc/thread-self/net/netfilter/nfnetlink_queue")
			b = strings.TrimSpace(string(raw))
			return err
		})
		text = b
		return b == "", err
	})
	return text
}

// last is the number that ends a flow.
const last = ^uint64(0)

func (f *flow) end() {
	f.t.Helper()
	if _, err := f.out.Write(binary.BigEndian.AppendUint64(nil, last)); err != nil {
		f.t.Fatal(err)
	}
	f.in.SetReadDeadline(time.Now().Add(10 * time.Second))
}

// read reads until the flow ends: nothing may come twice, nor may what was held overtake
// anything. Late are those that were overtaken. A few may be overtaken by late ones: those that
// were kept from the queue, when their processor was taken away, while others were held.
func (f *flow) read(came func()) (late uint64, err error) {
	const few = 10
	b := make([]byte, 16)
	var most, behind, crossed uint64
	seen := map[uint64]bool{}
	for {
		n, err := f.in.Read(b)
		if err != nil || n != 8 {
			return late, fmt.Errorf("after %d: %d bytes, %w", most, n, err)
		}
		v := binary.BigEndian.Uint64(b)
		switch {
		case v == last:
			return late, nil
		case seen[v]:
			return late, fmt.Errorf("%d came twice", v)
		case v > most:
			most = v
		default:
			late++
			if v < behind {
				crossed++
			}
			if crossed > few {
				return late, fmt.Errorf("%d came after %d, and both had been held", v, behind)
			}
			behind = max(behind, v)
		}
		seen[v] = true
		came()
	}
}

// flood sends and reads as fast as both go, until the function that it returns is
// called: it tells what was sent, how much of it did not come, and how much came out of turn.
func (f *flow) flood() (end func() (sent, lost, late uint64)) {
	var (
		stop  atomic.Bool
		came  atomic.Uint64
		count = make(chan uint64)
		done  = make(chan error)
		late  uint64
	)
	go func() {
		n := uint64(0)
		for !stop.Load() {
			if n-came.Load() > 30_000 { // the kernel keeps no more than 65,536 in a queue
				time.Sleep(100 * time.Microsecond)
				continue
			}
			if _, err := f.out.Write(binary.BigEndian.AppendUint64(nil, n+1)); err == nil {
				n++
			}
		}
		count <- n
	}()
	go func() {
		var err error
		late, err = f.read(func() { came.Add(1) })
		done <- err
	}()
	return func() (uint64, uint64, uint64) {
		f.t.Helper()
		stop.Store(true)
		n := <-count
		// What ends the flow may come by another processor, and sooner.
		_ = netlocktest.Until(func() (bool, error) { return came.Load() == n, nil })
		f.end()
		if err := <-done; err != nil {
			f.t.Fatal(err)
		}
		if got := came.Load(); got > n {
			f.t.Fatalf("%d sent, %d came", n, got)
		}
		return n, n - came.Load(), late
	}
}

// A flood goes on through lock after lock: nothing of it that was held is lost or comes twice, or
// overtakes anything. What comes at the very moment of the unlock may overtake the last few that
// were held, or be lost: a packet that the rule has yet to count, when its processor is taken away.
// (Without the second delivery, or the wait of TestOnItsWay, more are.)
func TestFlood(t *testing.T) {
	each(t, bounds{packets: 65_000, bytes: 1 << 30}, func(t *testing.T, l *lab) {
		end := l.flow("udp4", netlocktest.InsideV4, 512<<20).flood()
		rounds := l.rounds(50)
		delivered, told := uint64(0), uint64(0)
		for range rounds {
			l.lock()
			l.waitHeld(l.state().Queue.Held + 50)
			st := l.unlock()
			if st.NotDelivered != nil || st.Queue.Overflowed != 0 {
				t.Fatalf("%+v", st)
			}
			delivered += st.Queue.Delivered
			told += st.Queue.Lost
		}
		sent, lost, late := end()
		t.Logf("%d sent, %d of them held, %d out of turn, %d lost, %d of those told of", sent, delivered, late, lost, told)
		if lost > uint64(rounds/10) || told > lost {
			t.Errorf("%d of %d lost in %d unlocks, %d told of", lost, sent, rounds, told)
		}
	})
}

// A packet that the lock has sent and that is not in the queue yet is waited for; one that never comes,
// not for long.
func TestOnItsWay(t *testing.T) {
	defer hold.SetLateTime(500 * time.Millisecond)() // of a busy machine
	each(t, bounds{}, func(t *testing.T, l *lab) {
		f := l.flow("udp4", netlocktest.InsideV4, 1<<20)
		for missing := range uint64(2) {
			l.lock()
			f.send(5)
			l.waitHeld(5)
			came := make(chan struct{})
			start := time.Now()
			// The lock stays closed, and goes on sending to the queue.
			q, err := l.h.Release(t.Context(), l.Inside.Netns(), l.state().Queue.Number, netlock.Accept, func() (uint64, error) {
				go func() {
					defer close(came)
					time.Sleep(3 * time.Millisecond)
					f.send(1)
				}()
				return 6 + missing, nil
			})
			took := time.Since(start)
			if <-came; err != nil || q.Delivered != 6 || q.Held != 0 || q.Lost != missing || took > 2*time.Second {
				t.Errorf("%d never come: %+v after %v, %v", missing, q, took, err)
			}
			f.expect(f.next-5, f.next)
			l.unlock()
		}
	})
}

// A stream with gaps of a millisecond arrives whole, nothing of it twice, and in order but
// for what a busy machine lets come between an unlock's two halves: far less than was held.
func TestStream(t *testing.T) {
	each(t, bounds{}, func(t *testing.T, l *lab) {
		f := l.flow("udp4", netlocktest.InsideV4, 64<<20)
		stop, stopped := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(stopped)
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond): // never two at once, as a ticker has them
					f.next++
					_, _ = f.out.Write(binary.BigEndian.AppendUint64(nil, f.next))
				}
			}
		}()
		const rounds, most = 20, 40 // without the first delivery some 65, with iptables
		longest := time.Duration(0)
		for range rounds {
			l.lock()
			l.waitHeld(l.state().Queue.Held + 10)
			start := time.Now()
			st := l.unlock()
			longest = max(longest, time.Since(start))
			if st.NotDelivered != nil || st.Queue.Delivered < 10 {
				t.Fatalf("%+v", st)
			}
		}
		close(stop)
		<-stopped
		f.end()
		came := uint64(0)
		late, err := f.read(func() { came++ })
		// All that comes while an unlock has its processor taken away between its halves is late.
		if err != nil || came != f.next || late > most+uint64(longest.Milliseconds()) {
			t.Errorf("%d sent, %d came, %d out of turn, the longest unlock took %v: %v", f.next, came, late, longest, err)
		}
		t.Logf("%d sent, %d out of turn", f.next, late)
	})
}

// Beyond its bounds the queue drops what comes; what it holds it delivers.
func TestBounds(t *testing.T) {
	each(t, bounds{packets: 50}, func(t *testing.T, l *lab) {
		f := l.flow("udp4", netlocktest.InsideV4, 1<<20)
		l.lock()
		f.send(120)
		if st := l.state(); st.Queue.Held != 50 || st.Queue.Overflowed != 70 || st.DroppedIn != 70 {
			t.Errorf("after 120 packets: %+v", st)
		}
		if st := l.unlock(); st.Queue.Delivered != 50 || st.Queue.Overflowed != 70 || !strings.HasPrefix(st.HoldWarning(), "70 packets were dropped") {
			t.Errorf("unlocked: %+v", st)
		}
		f.expect(1, 50)
		f.nothing()
	})
	// Whatever comes, and however fast, the bytes are exceeded by less than one packet.
	t.Run("bytes", func(t *testing.T) {
		const bound = 65536
		for _, size := range []int{1000, 1400, 100} {
			l := newLab(t, "nft", &hold.Holder{Bytes: bound})
			f := l.flow("udp4", netlocktest.InsideV4, 4<<20)
			l.lock()
			n := uint64(0)
			send := func(packets int) {
				for range packets {
					if _, err := f.out.Write(make([]byte, size)); err != nil {
						t.Fatal(err)
					}
					n++
				}
			}
			length := uint64(size + 28) // of headers
			least := (bound + length - 1) / length
			send(2 * bound / size)
			// What finds a bound that was to be raised is dropped; of what comes then, enough fits.
			err := netlocktest.Until(func() (bool, error) {
				if l.state().Queue.Held >= least {
					return true, nil
				}
				send(1)
				return false, nil
			})
			send(100)
			st := l.state()
			if err != nil || st.Queue.Held != least || st.Queue.Held+st.Queue.Overflowed != n {
				t.Errorf("after %d packets of %d bytes: %+v, %v; %d are to be held", n, length, st.Queue, err, least)
			}
			if un := l.unlock(); un.Queue.Delivered != st.Queue.Held {
				t.Errorf("unlocked: %+v", un)
			}
		}
	})
	// Whoever takes the queue over does not know how long those in it are.
	t.Run("adopted", func(t *testing.T) {
		const bound, size, sent = 65536, 1000, 30
		first, second := &hold.Holder{Bytes: bound}, &hold.Holder{Bytes: bound}
		l := newLab(t, "nft", first)
		t.Cleanup(second.Close)
		f := l.flow("udp4", netlocktest.InsideV4, 4<<20)
		l.lock()
		send := func() {
			t.Helper()
			if _, err := f.out.Write(make([]byte, size)); err != nil {
				t.Fatal(err)
			}
		}
		for range sent {
			send()
		}
		l.waitHeld(sent)
		q := first.Queue(l.Inside.Netns())
		fd, err := unix.FcntlInt(uintptr(q.FD()), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		num := q.Number()
		first.Drop(l.Inside.Netns())
		if err := second.Adopt(l.Inside.Netns(), nfnl.InheritQueue(fd, num)); err != nil {
			t.Fatal(err)
		}
		l.o.Holder = second
		const least = sent + (bound-sent*1500)/(size+28)
		err = netlocktest.Until(func() (bool, error) {
			send()
			return l.state().Queue.Held >= least, nil
		})
		for range 100 {
			send()
		}
		if st := l.unlock(); err != nil || st.Queue.Delivered > bound/(size+28)+1 {
			t.Errorf("unlocked: %+v, %v", st, err)
		}
	})
	// As small ones come, more of them are let in than would fit if they were long.
	t.Run("small", func(t *testing.T) {
		const bound, packets = 1 << 20, 4000
		l := newLab(t, "nft", &hold.Holder{Bytes: bound})
		f := l.flow("udp4", netlocktest.InsideV4, 4<<20)
		l.lock()
		err := netlocktest.Until(func() (bool, error) { // as many of 1,500 bytes are 699
			f.send(200) // 36 bytes each
			return l.state().Queue.Held >= packets, nil
		})
		if st := l.unlock(); err != nil || st.Queue.Delivered < packets {
			t.Errorf("unlocked: %+v, %v", st, err)
		}
	})
}

// Without a holder nothing passes, neither what was held nor what comes.
func (l *lab) expectGone(f *flow) {
	l.t.Helper()
	f.send(10)
	f.nothing()
	st := l.state()
	if !st.Locked || !st.Intact || st.Mode != netlock.Hold || st.Queue.Bound || st.DroppedIn < 20 {
		l.t.Errorf("without a holder: %+v", st)
	}
	if st := l.unlock(); st.NotDelivered == nil || !strings.HasPrefix(st.HoldWarning(), "what was held was dropped: ") {
		l.t.Errorf("unlocked without a holder: %+v", st)
	}
	f.nothing()
	f.send(1)
	f.expect(f.next, f.next)
}

func TestHolderGone(t *testing.T) {
	each(t, bounds{}, func(t *testing.T, l *lab) {
		f := l.flow("udp4", netlocktest.InsideV4, 1<<20)
		l.lock()
		f.send(10)
		l.waitHeld(10)
		l.h.Drop(l.Inside.Netns())
		l.expectGone(f)
	})
}

func TestHolderKilled(t *testing.T) {
	each(t, bounds{}, func(t *testing.T, l *lab) {
		f := l.flow("udp4", netlocktest.InsideV4, 1<<20)
		c := exec.Command(os.Args[0])
		c.Env = append(os.Environ(), helperPID+"="+strconv.Itoa(l.Inside.PID()), helperBackend+"="+l.backend)
		stdin, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		defer stdin.Close()
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		defer c.Wait()
		if line, _ := bufio.NewReader(out).ReadString('\n'); line != "<nil>\n" {
			t.Fatalf("the holder says %q", line)
		}
		f.send(10)
		l.waitHeld(10)
		if err := c.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = c.Wait()
		l.expectGone(f)
	})
}

// Somebody else's queue, and what is in it, are not touched.
func TestOtherQueue(t *testing.T) {
	each(t, bounds{}, func(t *testing.T, l *lab) {
		f := l.flow("udp4", netlocktest.InsideV4, 1<<20)
		var theirs *nfnl.Queue
		err := l.Inside.Do(func() (err error) {
			theirs, err = nfnl.BindQueue(t.Context(), 0xC114, 100)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer theirs.Close()
		l.Inside.Run("", "iptables-legacy", "-I", "INPUT", "-p", "udp", "--dport", strconv.Itoa(port), "-j", "NFQUEUE", "--queue-num", strconv.Itoa(0xC114))
		stat := func() (st nfnl.QueueStat) {
			_ = l.Inside.Do(func() (err error) {
				st, _, err = nfnl.ReadQueue(0xC114)
				return err
			})
			return st
		}
		l.lock()
		f.send(10)
		l.waitHeld(10)
		if st := l.state(); st.Queue.Number == 0xC114 || stat().Held != 0 {
			t.Errorf("locked: %+v; their queue: %+v", st, stat())
		}
		if st := l.unlock(); st.Queue.Delivered != 10 {
			t.Errorf("unlocked: %+v", st)
		}
		// Ours are now theirs. Where the unlock removes base chains the kernel drops what is in their
		// queue with these. What comes from now on is theirs.
		f.nothing()
		f.send(5)
		first := uint64(1)
		if l.backend == "nft" {
			first = 11
		}
		if st := stat(); st.Held != 16-first {
			t.Errorf("their queue: %+v", st)
		}
		_, _, last := theirs.Seen()
		if err := theirs.Accept(last, 0); err != nil {
			t.Fatal(err)
		}
		f.expect(first, 15)
	})
}

// A queue that somebody else's rule names is theirs, though nobody listens there just now; one of
// our own rules is ours.
func TestNamedQueue(t *testing.T) {
	ways := map[string][]string{
		"ip6tables-legacy": {"ip6tables-legacy", "-t", "mangle", "-A", "FORWARD", "-j", "NFQUEUE", "--queue-num", "49428"},
	}
	for _, tool := range []string{"iptables-legacy", "iptables-nft"} {
		ways[tool] = []string{tool, "-A", "FORWARD", "-p", "udp", "-j", "NFQUEUE", "--queue-num", "49428", "--queue-bypass"}
		ways[tool+", several"] = []string{tool, "-t", "mangle", "-A", "OUTPUT", "-j", "NFQUEUE", "--queue-balance", "49000:49428"}
	}
	for name, args := range ways {
		t.Run(name, func(t *testing.T) {
			each(t, bounds{}, func(t *testing.T, l *lab) {
				l.Inside.Run("", args[0], args[1:]...)
				n := uint16(0)
				for range 3 { // a lock does not look for long, and a busy machine may take all of that
					l.unbound()
					l.lock()
					if n = l.state().Queue.Number; n == 49429 {
						break
					}
					l.unlock()
				}
				if n != 49429 {
					t.Fatalf("queue %d", n)
				}
				if st := l.unlock(); !st.Intact {
					t.Errorf("unlocked: %+v", st)
				}
				// Who has looked before knows, and does not look again but for the next lock.
				err := l.h.Look(t.Context(), l.Inside.Netns())
				for range 2 { // it does not look for long either
					if errors.Is(err, context.DeadlineExceeded) {
						err = l.h.Look(t.Context(), l.Inside.Netns())
					}
				}
				if err != nil {
					t.Fatal(err)
				}
				l.Inside.Run("", args[0], slices.Replace(slices.Clone(args[1:]), slices.Index(args, "-A")-1, slices.Index(args, "-A"), "-D")...)
				for _, want := range []uint16{49429, 49428} {
					l.unbound()
					l.lock()
					if n := l.state().Queue.Number; n != want {
						t.Errorf("queue %d, not %d, after a look", n, want)
					}
					l.unlock()
				}
			})
		})
	}
	t.Run("ours", func(t *testing.T) {
		each(t, bounds{}, func(t *testing.T, l *lab) {
			l.lock()
			l.h.Drop(l.Inside.Netns())
			l.lock()
			if st := l.state(); st.Queue.Number != 49428 || !st.Queue.Bound || !st.Intact {
				t.Errorf("locked again: %+v", st)
			}
			l.unlock()
		})
	})
}

// A base chain of somebody else's that is removed takes what is held along, and the
// unlock says so.
func TestBaseChainRemoved(t *testing.T) {
	each(t, bounds{}, func(t *testing.T, l *lab) {
		f := l.flow("udp4", netlocktest.InsideV4, 1<<20)
		l.Inside.Run("table ip theirs { chain c { type filter hook postrouting priority 0; }; }\n", "nft", "-f", "-")
		l.lock()
		f.send(10)
		l.waitHeld(10)
		l.Inside.Run("", "nft", "delete", "table", "ip", "theirs")
		f.send(5)
		l.waitHeld(5)
		if q := l.state().Queue; q.Lost != 10 || q.Delivered != 0 || q.Held != 5 {
			t.Errorf("before the unlock: %+v", q)
		}
		if st := l.unlock(); st.Queue.Lost != 10 || st.Queue.Delivered != 5 || !strings.HasPrefix(st.HoldWarning(), "10 packets were held and lost") {
			t.Errorf("unlocked: %+v", st)
		}
		f.expect(11, 15)
	})
}

// Beside CRIU's own lock what is delivered has CRIU's mark; without it, no mark.
func TestMark(t *testing.T) {
	seen := "table inet seen { chain c { type filter hook prerouting priority -200; udp dport 7801 meta mark 0xc114 counter; }; }\n"
	for name, theirs := range map[string][]string{
		"none":            nil,
		"nftables":        {"nft", "add table inet CRIU-1; add chain inet CRIU-1 input { type filter hook input priority 0; policy drop; }; add rule inet CRIU-1 input meta mark 0xc114 accept"},
		"iptables-legacy": {"sh", "-c", "iptables-legacy -N CRIU && iptables-legacy -I INPUT -j CRIU && iptables-legacy -A CRIU -m mark --mark 0xc114 -j ACCEPT && iptables-legacy -A CRIU -j DROP"},
		"iptables-nft":    {"sh", "-c", "iptables-nft -N CRIU && iptables-nft -I INPUT -j CRIU && iptables-nft -A CRIU -m mark --mark 0xc114 -j ACCEPT && iptables-nft -A CRIU -j DROP"},
	} {
		t.Run(name, func(t *testing.T) {
			each(t, bounds{}, func(t *testing.T, l *lab) {
				f := l.flow("udp4", netlocktest.InsideV4, 1<<20)
				l.Inside.Run(seen, "nft", "-f", "-")
				if theirs != nil {
					l.Inside.Run("", theirs[0], theirs[1:]...)
				}
				l.lock()
				f.send(10)
				l.waitHeld(10)
				if st := l.unlock(); st.Queue.Delivered != 10 {
					t.Errorf("unlocked: %+v", st)
				}
				f.expect(1, 10)
				marked := strings.Contains(l.Inside.Run("", "nft", "list", "table", "inet", "seen"), "packets 10 ")
				if marked != (theirs != nil) {
					t.Errorf("what was delivered has CRIU's mark: %v", marked)
				}
			})
		})
	}
}

// A connection that begins under the lock waits for its end, not for the next SYN; one
// that is there goes on then, not after the retransmission's time-out. No peer has to
// send anything twice.
func TestTCP(t *testing.T) {
	each(t, bounds{}, func(t *testing.T, l *lab) {
		addr := net.JoinHostPort(netlocktest.InsideV4, strconv.Itoa(port))
		var listener net.Listener
		err := l.Inside.Do(func() (err error) {
			var c net.ListenConfig
			c.SetMultipathTCP(false)
			listener, err = c.Listen(t.Context(), "tcp", addr)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		go func() {
			for {
				c, err := listener.Accept()
				if err != nil {
					return
				}
				go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
			}
		}()
		dial := func() (c net.Conn, err error) {
			err = l.Peer.Do(func() error {
				c, err = net.DialTimeout("tcp", addr, 10*time.Second)
				return err
			})
			return c, err
		}
		// Getting ready to unlock may take longer than the least time-out of a retransmission.
		l.Peer.Run("", "ip", "route", "replace", "10.77.0.0/24", "dev", "inside", "rto_min", "5s")
		old, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		defer old.Close()
		answer := func(c net.Conn) error {
			if _, err := c.Write([]byte("x")); err != nil {
				return err
			}
			_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
			_, err := io.ReadFull(c, make([]byte, 1))
			return err
		}
		if err := answer(old); err != nil {
			t.Fatal(err)
		}
		l.lock()
		type result struct {
			c   net.Conn
			err error
			at  time.Time
		}
		fresh, goneOn := make(chan result, 1), make(chan result, 1)
		go func() {
			c, err := dial()
			fresh <- result{c, err, time.Now()}
		}()
		go func() {
			err := answer(old)
			goneOn <- result{old, err, time.Now()}
		}()
		l.waitHeld(2)
		start := time.Now()
		if st := l.unlock(); st.Queue.Delivered < 2 {
			t.Errorf("unlocked: %+v", st)
		}
		for name, ch := range map[string]chan result{"a new connection": fresh, "the old connection": goneOn} {
			r := <-ch
			if r.err != nil {
				t.Fatalf("%s: %v", name, r.err)
			}
			defer r.c.Close()
			raw, err := r.c.(*net.TCPConn).SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			var info *unix.TCPInfo
			if e := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }); err != nil || e != nil {
				t.Fatal(err, e)
			}
			t.Logf("%s: %v after the unlock began, %d segments sent twice", name, r.at.Sub(start), info.Total_retrans)
			if info.Total_retrans != 0 {
				t.Errorf("%s sent %d segments twice", name, info.Total_retrans)
			}
		}
	})
}

// One lock becomes another of the other mode without a gap, and with the Holder gone
// from it the queue is given up.
func TestModes(t *testing.T) {
	each(t, bounds{}, func(t *testing.T, l *lab) {
		end := l.flow("udp4", netlocktest.InsideV4, 512<<20)
		drop := l.o
		drop.Mode, drop.Holder = netlock.Drop, nil
		lock := func(o netlock.Options, want netlock.Mode, already bool) {
			t.Helper()
			res, err := l.b.Lock(t.Context(), l.Inside.Netns(), o)
			if err != nil || res.Mode != want || res.Already != already {
				t.Fatalf("%+v, %v; want mode %s, already %v", res, err, want, already)
			}
			st := l.state()
			if st.Mode != want || !st.Intact {
				t.Fatalf("%+v; want mode %s", st, want)
			}
		}
		without := l.o
		without.Holder = nil
		for range l.rounds(20) {
			lock(drop, netlock.Drop, false)
			lock(without, netlock.Drop, true)
			lock(l.o, netlock.Hold, false)
			lock(without, netlock.Hold, true)
			lock(l.o, netlock.Hold, true)
			end.send(3)
			lock(drop, netlock.Drop, false)
			l.h.Drop(l.Inside.Netns())
			lock(without, netlock.Drop, true)
			if st := l.unlock(); !st.Intact || st.Mode != netlock.Drop {
				t.Fatalf("%+v", st)
			}
		}
		end.nothing()
		end.send(1)
		end.expect(end.next, end.next)
	})
}

// The queue dies with its namespace even while it holds.
func TestNamespaceGone(t *testing.T) {
	each(t, bounds{}, func(t *testing.T, l *lab) {
		f := l.flow("udp4", netlocktest.InsideV4, 1<<20)
		l.lock()
		f.send(100)
		l.waitHeld(100)
		l.Inside.Run("", "ip", "link", "delete", "peer")
		// The kernel drops what has come in by a device that is gone.
		if err := netlocktest.Until(func() (bool, error) { return l.state().Queue.Held == 0, nil }); err != nil {
			t.Errorf("%+v: %v", l.state(), err)
		}
		if st := l.unlock(); st.Queue.Lost < 100 || st.Queue.Delivered != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// What 50,000 held packets cost.
func TestMany(t *testing.T) {
	const n = 50_000
	each(t, bounds{packets: n, bytes: 1 << 30}, func(t *testing.T, l *lab) {
		f := l.flow("udp4", netlocktest.InsideV4, 512<<20)
		l.lock()
		before := slab(t)
		f.send(n)
		l.waitHeld(n)
		used := slab(t) - before
		start := time.Now()
		st := l.unlock()
		took := time.Since(start)
		if st.Queue.Delivered != n || st.Queue.Overflowed != 0 {
			t.Errorf("unlocked: %+v", st)
		}
		f.expect(1, n)
		t.Logf("%d held: %d bytes of memory each, delivered in %v", n, used/n, took)
		if used > n*2048 || took > 2*time.Second {
			t.Errorf("%d bytes of memory, %v", used, took)
		}
	})
}

// slab is what the kernel of this machine has taken for itself, in bytes.
func slab(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[0] == "SUnreclaim:" {
			kb, err := strconv.Atoi(f[1])
			if err != nil {
				t.Fatal(err)
			}
			return kb << 10
		}
	}
	t.Fatal("no SUnreclaim in /proc/meminfo")
	return 0
}

package iptables

// What netlock/hold does not ask of every backend that holds.

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/hold"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// fakeHolder has one queue that nobody has bound, or an error.
type fakeHolder struct {
	err            error
	bound, dropped int
}

func (h *fakeHolder) Bind(context.Context, *netlock.Namespace) (uint16, bool, error) {
	h.bound++
	return 0xC114, h.bound == 1, h.err
}

func (h *fakeHolder) Release(_ context.Context, _ *netlock.Namespace, num uint16, _ netlock.Verdict, open func() (uint64, error)) (netlock.Queue, error) {
	_, err := open()
	return netlock.Queue{Number: num, Delivered: 7}, errors.Join(h.err, err)
}

func (h *fakeHolder) Drop(*netlock.Namespace) { h.dropped++ }

// holding is a pair whose inside is locked in mode hold, and two flows into it.
type holding struct {
	*netlocktest.Pair
	t    *testing.T
	b    *Backend
	o    netlock.Options
	in   [2]net.PacketConn
	out  [2]net.Conn
	sent [2]int
}

func newHolding(t *testing.T, b *Backend) *holding {
	h := &hold.Holder{}
	l := &holding{Pair: netlocktest.NewPair(t), t: t, b: b, o: options}
	// What IPv6 sends by itself is not to be counted.
	l.o.Mode, l.o.Holder, l.o.Allow = netlock.Hold, h, []netlock.Rule{{Proto: "icmpv6"}}
	t.Cleanup(h.Close)
	for i, addr := range [2]string{"10.77.0.1:7801", "10.77.0.1:7802"} {
		err := l.Inside.Do(func() (err error) { l.in[i], err = net.ListenPacket("udp4", addr); return err })
		if err == nil {
			err = l.Peer.Do(func() (err error) { l.out[i], err = net.Dial("udp4", addr); return err })
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.in[i].Close(); l.out[i].Close() })
	}
	return l
}

func (l *holding) lock() {
	l.t.Helper()
	res, err := l.b.Lock(within(l.t, 20*time.Second), l.Inside.Netns(), l.o)
	if err != nil || res.Mode != netlock.Hold || res.NotHeld != nil {
		l.t.Fatalf("lock: %+v, %v", res, err)
	}
}

func (l *holding) state() netlock.State {
	l.t.Helper()
	st, err := l.b.State(l.t.Context(), l.Inside.Netns(), l.o)
	if err != nil {
		l.t.Fatal(err)
	}
	return st
}

// send sends to both ports and waits until it is held.
func (l *holding) send(n int) {
	l.t.Helper()
	want := l.state().Queue.Held + uint64(2*n)
	for range n {
		for i, c := range l.out {
			l.sent[i]++
			if _, err := c.Write([]byte{byte(l.sent[i])}); err != nil {
				l.t.Fatal(err)
			}
		}
	}
	if err := netlocktest.Until(func() (bool, error) { return l.state().Queue.Held == want, nil }); err != nil {
		l.t.Fatalf("%+v: %v", l.state(), err)
	}
}

// expect reads what was sent to a port, in order, and nothing else.
func (l *holding) expect(i, from, to int) {
	l.t.Helper()
	b := make([]byte, 8)
	for want := from; want <= to; want++ {
		_ = l.in[i].SetReadDeadline(time.Now().Add(answer))
		if n, _, err := l.in[i].ReadFrom(b); err != nil || n != 1 || int(b[0]) != want {
			l.t.Fatalf("port %d: got %v, %v; want %d", i, b[:n], err, want)
		}
	}
	_ = l.in[i].SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, _, err := l.in[i].ReadFrom(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		l.t.Fatalf("port %d: %v came, %v", i, b[:n], err)
	}
}

// What is delivered goes by the container's own rules behind the lock's jump, as what
// comes does, and without a mark.
func TestHoldOwnRules(t *testing.T) {
	for _, v := range variants {
		for name, b := range map[string]*Backend{"raw": New(v), "filter": noRaw(New(v))} {
			t.Run(string(v)+"/"+name, func(t *testing.T) {
				l := newHolding(t, b)
				restore(l.Inside, v, "ip", "*"+name+"\n-A "+hooks(name)[0][0]+" -p udp -m udp --dport 7802 -j DROP\n-A "+hooks(name)[0][0]+" -m mark ! --mark 0 -j DROP\nCOMMIT\n")
				before := save(l.Inside, v)
				l.lock()
				l.send(10)
				l.expect(0, 1, 0)
				st, err := l.b.Unlock(within(t, 20*time.Second), l.Inside.Netns(), l.o)
				if err != nil || st.NotDelivered != nil || st.Queue.Delivered != 20 || !st.Intact {
					t.Errorf("unlock: %+v, %v", st, err)
				}
				l.expect(0, 1, 10)
				l.expect(1, 1, 0)
				if after := save(l.Inside, v); !strings.HasPrefix(before, "ip *"+name) || strings.Count(after, "--dport 7802") != 1 {
					t.Errorf("the rules are now\n%s\nand were\n%s", after, before)
				}
				wantNothing(t, l.Inside)
			})
		}
	}
}

// Rules that are put in once more, as a restore from an image does, cost nothing of what
// is held.
func TestHoldReplay(t *testing.T) {
	each(t, func(t *testing.T, _ *netlocktest.NS, v Variant) {
		l := newHolding(t, New(v))
		l.lock()
		l.send(5)
		for _, f := range families() {
			restore(l.Inside, v, f.name, l.Inside.Run("", f.prefix+"-"+string(v)+"-save"))
		}
		if st := l.state(); !st.Locked || st.Intact || st.Mode != netlock.Hold {
			t.Errorf("replayed: %+v", st)
		}
		l.lock()
		if st := l.state(); !st.Intact || st.Mode != netlock.Hold || st.Queue.Held != 10 {
			t.Errorf("locked once more: %+v", st)
		}
		if st, err := l.b.Unlock(within(t, 20*time.Second), l.Inside.Netns(), l.o); err != nil || st.Queue.Delivered != 10 {
			t.Errorf("unlock: %+v, %v", st, err)
		}
		l.expect(0, 1, 5)
		wantNothing(t, l.Inside)
	})
}

// One family holds and the other drops, as a Lock leaves it that is killed in between.
func TestHoldHalf(t *testing.T) {
	each(t, func(t *testing.T, _ *netlocktest.NS, v Variant) {
		l := newHolding(t, New(v))
		drop := l.o
		drop.Mode, drop.Holder = netlock.Drop, nil
		if _, err := l.b.Lock(within(t, 20*time.Second), l.Inside.Netns(), drop); err != nil {
			t.Fatal(err)
		}
		tab := parseSave(l.Inside.Run("", "iptables-"+string(v)+"-save", "-t", "raw"))[0]
		restore(l.Inside, v, "ip", tab.lockInput(false, "lo", l.o.Allow, "7", netlock.Comment(moment, options.Caller)))
		if st := l.state(); !st.Locked || st.Intact || st.Mode != netlock.Drop {
			t.Errorf("half of it: %+v", st)
		}
		l.lock()
		if st := l.state(); !st.Intact || st.Mode != netlock.Hold {
			t.Errorf("locked: %+v", st)
		}
		if _, err := l.b.Lock(within(t, 20*time.Second), l.Inside.Netns(), drop); err != nil {
			t.Fatal(err)
		}
		if st := l.state(); !st.Intact || st.Mode != netlock.Drop {
			t.Errorf("locked in mode drop: %+v", st)
		}
		unlock(t, l.b, l.Inside)
		wantNothing(t, l.Inside)
	})
}

// failing makes a backend's commits fail that say something.
func failing(b *Backend, word string, err func(path string) error) *Backend {
	run := b.run
	b.run = func(ctx context.Context, path, stdin string, args ...string) (string, error) {
		if strings.Contains(stdin, word) {
			return "", err(path)
		}
		return run(ctx, path, stdin, args...)
	}
	return b
}

// A kernel without the target: the lock drops, and says why.
func TestHoldFallback(t *testing.T) {
	each(t, func(t *testing.T, n *netlocktest.NS, v Variant) {
		b := failing(New(v), queueTarget, func(path string) error {
			text := "Warning: Extension NFQUEUE revision 0 not supported, missing kernel module?\niptables-restore: line 4 failed\n"
			if v == NFT {
				text = "Warning: Extension NFQUEUE revision 0 not supported, missing kernel module?\niptables-nft-restore v1.8.9 (nf_tables): \nline 3: RULE_APPEND failed (No such file or directory): rule in chain X\n"
			}
			return &toolError{tool: filepath.Base(path), code: 1, text: text}
		})
		h := &fakeHolder{}
		o := options
		o.Mode, o.Holder = netlock.Hold, h
		res, err := b.Lock(within(t, 20*time.Second), n.Netns(), o)
		if err != nil || res.Mode != netlock.Drop || !errors.Is(res.NotHeld, netlock.ErrUnsupported) || h.dropped != 1 {
			t.Errorf("%+v, %v, %+v", res, err, h)
		}
		wantIntact(t, n, v)
		for name, h := range map[string]netlock.Holder{"none": nil, "one that cannot": &fakeHolder{err: netlock.ErrNotHolding}} {
			o.Holder = h
			if res, err := New(v).Lock(within(t, 20*time.Second), n.Netns(), o); err != nil || !res.Already || res.Mode != netlock.Drop || !errors.Is(res.NotHeld, netlock.ErrNotHolding) && h != nil {
				t.Errorf("holder %s: %+v, %v", name, res, err)
			}
		}
		unlock(t, b, n)
		wantNothing(t, n)
	})
}

// Where a step of the delivery fails the unlock unlocks, and says what it did not deliver.
func TestHoldNotDelivered(t *testing.T) {
	each(t, func(t *testing.T, _ *netlocktest.NS, v Variant) {
		for name, word := range map[string]string{"pass": "! --mark " + criuMark, "open": "*raw\n:" + chainIn + " - [0:0]\n-A " + chainIn + " -m mark --mark " + criuMark + " -j MARK"} {
			t.Run(name, func(t *testing.T) {
				broken := errors.New("broken on purpose")
				l := newHolding(t, failing(New(v), word, func(string) error { return broken }))
				l.lock()
				l.send(5)
				st, err := l.b.Unlock(within(t, 20*time.Second), l.Inside.Netns(), l.o)
				if err != nil || !errors.Is(st.NotDelivered, broken) {
					t.Errorf("%+v, %v", st, err)
				}
				if name == "pass" {
					l.expect(0, 1, 0)
				}
				wantNothing(t, l.Inside)
			})
		}
	})
}

// A lock whose queue lets packets pass where nobody holds is none.
func TestHoldFailsOpen(t *testing.T) {
	each(t, func(t *testing.T, _ *netlocktest.NS, v Variant) {
		l := newHolding(t, New(v))
		l.lock()
		for _, f := range families() {
			text := l.Inside.Run("", f.prefix+"-"+string(v)+"-save", "-t", "raw")
			for _, line := range strings.Split(text, "\n") {
				if strings.Contains(line, queueTarget) {
					spec := strings.TrimPrefix(line, "-A "+chainIn+" ")
					restore(l.Inside, v, f.name, "*raw\n-A "+chainIn+" "+spec+" --queue-bypass\n-D "+chainIn+" "+spec+"\nCOMMIT\n")
				}
			}
		}
		if st := l.state(); st.Locked || st.Intact {
			t.Errorf("with --queue-bypass: %+v", st)
		}
		l.lock()
		if st := l.state(); !st.Intact || st.Mode != netlock.Hold {
			t.Errorf("locked once more: %+v", st)
		}
		unlock(t, l.b, l.Inside)
	})
}

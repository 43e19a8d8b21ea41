package nft_test

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft"
)

// fakeHolder has one queue that nobody has bound, or an error.
type fakeHolder struct {
	err           error
	bound, opened int
	dropped       int
	sent          uint64 // what the lock said when it was opened
}

func (h *fakeHolder) Bind(context.Context, *netlock.Namespace) (uint16, bool, error) {
	h.bound++
	return 0xC114, h.bound == 1, h.err
}

func (h *fakeHolder) Release(_ context.Context, _ *netlock.Namespace, num uint16, _ netlock.Verdict, open func() (uint64, error)) (netlock.Queue, error) {
	h.opened++
	sent, err := open()
	h.sent = sent
	return netlock.Queue{Number: num, Delivered: 7}, errors.Join(h.err, err)
}

func (h *fakeHolder) Drop(*netlock.Namespace) { h.dropped++ }

// The lock of mode hold as nft prints it. It prints the target that stands in for the
// queue expression in iptables' words.
func TestHoldGolden(t *testing.T) {
	s, b := newSpace(t), nft.New()
	defer b.Wait()
	h := &fakeHolder{}
	o := options
	o.Mode, o.Holder = netlock.Hold, h
	if res := s.lock(b, o); res.Mode != netlock.Hold || res.NotHeld != nil || res.Already {
		t.Fatalf("%+v", res)
	}
	golden(t, "hold", strings.Replace(s.nft("", "list", "ruleset"), "queue num ", "queue to ", 1))
	st := s.state(b, options)
	if !st.Intact || !st.Locked || st.Mode != netlock.Hold || st.Queue != (netlock.Queue{Number: 0xC114}) {
		t.Errorf("locked: %+v", st)
	}
	// Whoever cannot hold leaves it as it is.
	for _, holder := range []netlock.Holder{nil, &fakeHolder{err: netlock.ErrNotHolding}} {
		o.Holder = holder
		if res := s.lock(b, o); !res.Already || res.Mode != netlock.Hold {
			t.Errorf("once more, with %+v: %+v", holder, res)
		}
	}
	o.Holder = h
	st, err := b.Unlock(t.Context(), s.ns, o)
	if err != nil || !st.Intact || st.Queue.Delivered != 7 || h.opened != 1 || st.NotDelivered != nil {
		t.Errorf("unlock: %+v, %v, %+v", st, err, h)
	}
	if left := s.nft("", "list", "ruleset"); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
}

// Who delivers is told how many packets the lock has sent, whatever is in its chain before.
func TestHoldSent(t *testing.T) {
	for _, allow := range [][]netlock.Rule{nil, {{Proto: "tcp", Dport: 22}, {Proto: "icmpv6"}}} {
		p, b, h := netlocktest.NewPair(t), nft.New(), &fakeHolder{}
		defer b.Wait()
		// What IPv6 sends by itself could come between the two counts.
		if err := p.Peer.Do(func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0) }); err != nil {
			t.Fatal(err)
		}
		o := options
		o.Mode, o.Holder, o.Allow = netlock.Hold, h, allow
		if _, err := b.Lock(t.Context(), p.Inside.Netns(), o); err != nil {
			t.Fatal(err)
		}
		before, err := b.State(t.Context(), p.Inside.Netns(), o)
		if err != nil {
			t.Fatal(err)
		}
		err = p.Peer.Do(func() error {
			c, err := net.Dial("udp4", netlocktest.InsideV4+":7801")
			if err != nil {
				return err
			}
			defer c.Close()
			for range 3 {
				if _, err := c.Write([]byte("x")); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		st, err := b.Unlock(t.Context(), p.Inside.Netns(), o)
		if err != nil || h.sent != st.DroppedIn || h.sent < before.DroppedIn+3 {
			t.Errorf("%d were sent; unlock: %+v, %v", h.sent, st, err)
		}
	}
}

// Where nothing can be held the lock drops, and says why; and where nothing can be
// delivered the unlock unlocks.
func TestHoldFallback(t *testing.T) {
	s, b := newSpace(t), nft.New()
	defer b.Wait()
	o := options
	o.Mode = netlock.Hold
	for name, h := range map[string]netlock.Holder{"none": nil, "one that cannot": &fakeHolder{err: netlock.ErrNotHolding}} {
		o.Holder = h
		res := s.lock(b, o)
		if res.Mode != netlock.Drop || !errors.Is(res.NotHeld, netlock.ErrNotHolding) {
			t.Errorf("holder %s: %+v", name, res)
		}
		if res := s.lock(b, o); !res.Already {
			t.Errorf("holder %s, once more: %+v", name, res)
		}
		if st, err := b.Unlock(t.Context(), s.ns, o); err != nil || st.Mode != netlock.Drop {
			t.Errorf("unlock: %+v, %v", st, err)
		}
	}
	h := &fakeHolder{}
	o.Holder = h
	s.lock(b, o)
	h.err = errors.New("no")
	if st, err := b.Unlock(t.Context(), s.ns, o); err != nil || !errors.Is(st.NotDelivered, h.err) {
		t.Errorf("unlock: %+v, %v", st, err)
	}
	if left := s.nft("", "list", "ruleset"); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
}

// A lock of mode hold with a rule of somebody else's in it is replaced by one that has none.
func TestHoldForeignRule(t *testing.T) {
	s, b := newSpace(t), nft.New()
	defer b.Wait()
	o := options
	o.Mode, o.Holder = netlock.Hold, &fakeHolder{}
	s.lock(b, o)
	s.nft("insert rule inet criu-netlock ingress counter\n", "-f", "-")
	if st := s.state(b, o); st.Locked || st.Intact {
		t.Errorf("with a foreign rule: %+v", st)
	}
	s.lock(b, o)
	if st := s.state(b, o); !st.Intact {
		t.Errorf("replaced: %+v", st)
	}
	if _, err := b.Unlock(t.Context(), s.ns, o); err != nil {
		t.Error(err)
	}
}

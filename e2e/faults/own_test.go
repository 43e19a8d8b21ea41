package faults

// What the other tests look with sees what it is to see.

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// A lock, none, and everything in between are told apart.
func TestWires(t *testing.T) {
	onItsHost(t, func(t *testing.T) {
		probes := []string{"udp4-in", "udp6-in", "udp4-out", "udp6-out", "tcp4-in", "tcp6-out"}
		l := newLab(t, "nft", backends[0].config)
		rules := func(family, hook, what string) {
			l.Inside.Run("", "nft", fmt.Sprintf("add table %s half { chain c { type filter hook %s priority -400; %s drop; }; }", family, hook, what))
			t.Cleanup(func() { l.Inside.Run("", "nft", "flush ruleset") })
		}
		for i, family := range []string{"ip", "ip6"} {
			w := l.wires[i]
			if open, err := w.open(); err != nil || !open {
				t.Fatalf("%s, without rules: %t, %v", family, open, err)
			}
			for _, hook := range []string{"prerouting", "output"} {
				rules(family, hook, "udp dport 7790")
				if open, err := w.open(); err == nil {
					t.Errorf("%s, a drop at %s alone: %t", family, hook, open)
				}
				if other, err := l.wires[1-i].open(); err != nil || !other {
					t.Errorf("%s, a drop at %s: the other family: %t, %v", family, hook, other, err)
				}
				if _, _, err := l.holds(); err == nil {
					t.Errorf("%s, a drop at %s alone is taken for a lock or for none", family, hook)
				}
				l.Inside.Run("", "nft", "flush ruleset")
			}
		}
		if out, err := l.command("lock", "--pid", l.pid); err != nil {
			t.Fatal(out, err)
		}
		if err := errors.Join(l.is(true), l.is(false)); err == nil || l.is(true) != nil {
			t.Errorf("a lock: %v", err)
		}
		l.Expect(t, true, probes...)
		// A lock that reads as one, through which packets pass, is none.
		l.Inside.Run("", "nft", "add table inet criu-netlock { flags dormant; }")
		if st, _, err := l.holds(); err != nil || st.Locked {
			t.Errorf("made dormant: %+v, %v", st, err)
		}
		l.unlocked()
		if err := l.is(false); err != nil {
			t.Error(err)
		}
		l.Expect(t, false, probes...)
	})
}

// The tracer kills and refuses where it is told to.
func TestTracer(t *testing.T) {
	onItsHost(t, func(t *testing.T) {
		l := newLab(t, "nft", backends[0].config)
		for _, c := range []struct {
			p      point
			code   int
			locked bool
		}{
			{point{nr: unix.SYS_SENDTO, nth: 2}, 137, false},
			{point{nr: unix.SYS_SENDTO, nth: 2, done: true}, 137, true},
			{point{nr: unix.SYS_SOCKET, nth: 1, errno: unix.EMFILE}, 1, false},
			{point{nr: unix.SYS_SETNS, nth: 1, errno: unix.EPERM}, 5, false},
			{point{nr: unix.SYS_SENDTO, nth: 1000}, 0, true},
		} {
			l.unlocked()
			cr, tr := l.newCRIU(), trace{point: c.p}
			r, err := l.hook(cr, "network-lock", &tr)
			cr.die()
			if err = errors.Join(err, tr.wait()); err != nil || r.code != c.code || tr.hit != (c.p.nth < 1000) {
				t.Errorf("%v: %v, hit: %t, %v", c.p, r, tr.hit, err)
			}
			if err := l.is(c.locked); err != nil {
				t.Errorf("%v: %v", c.p, err)
			}
		}
	})
}

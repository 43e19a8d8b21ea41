package nft

import (
	"context"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// An unlock does without looking where nothing has changed since the lock, and nowhere
// else.
func TestUnlockNoted(t *testing.T) {
	netlocktest.Need(t, "nft", "ip")
	n := netlocktest.NewNS(t)
	n.Run("", "ip", "link", "set", "lo", "up")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	caller := netlock.Caller{PID: 4711, Name: "criu"}
	rule, err := netlock.ParseRule("tcp dport 22")
	if err != nil {
		t.Fatal(err)
	}
	nft := func(commands string) func() {
		return func() { n.Run(commands, "nft", "-f", "-") }
	}
	for _, c := range []struct {
		name   string
		lock   func(*Backend) *Backend // by another Backend than the one that unlocks
		change func()
		locked []netlock.Rule // the lock's allow list
		allow  []netlock.Rule // the unlock's
		noted  bool
		intact bool
	}{
		{name: "nothing", noted: true, intact: true},
		{name: "the lock was there", lock: func(*Backend) *Backend { return New() }, noted: true, intact: true},
		{name: "with an allow list", locked: []netlock.Rule{rule}, allow: []netlock.Rule{rule}, noted: true, intact: true},
		{name: "another table", change: nft("table ip other { }"), intact: true},
		{name: "a rule that accepts", change: nft("insert rule inet criu-netlock ingress accept")},
		{name: "another table of ours", change: nft("table ip criu-netlock { }")},
		{name: "the lock is gone and there again", change: nft("delete table inet criu-netlock; table inet criu-netlock { }")},
		{name: "another allow list", allow: []netlock.Rule{rule}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := New()
			defer b.Wait()
			if c.lock != nil {
				if _, err := c.lock(b).Lock(ctx, n.Netns(), netlock.Options{Caller: caller, Allow: c.locked}); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := b.Lock(ctx, n.Netns(), netlock.Options{Caller: caller, Allow: c.locked}); err != nil {
				t.Fatal(err)
			}
			_ = n.Do(func() error { // is dropped, and counted
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				_ = unix.Sendto(fd, []byte("x"), 0, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{127, 0, 0, 1}})
				return nil
			})
			want, err := b.State(ctx, n.Netns(), netlock.Options{Allow: c.allow})
			if err != nil || want.DroppedOut == 0 {
				t.Fatalf("%+v, %v", want, err)
			}
			if c.change != nil {
				c.change()
			}
			o := netlock.Options{Allow: c.allow}
			var (
				st   netlock.State
				done bool
			)
			if err := b.in(ctx, n.Netns(), o, func(s *session) error { st, done = s.unlockNoted(); return nil }); err != nil {
				t.Fatal(err)
			}
			if done != c.noted || done && st != want {
				t.Errorf("done without looking: %v, want %v: %+v, want %+v", done, c.noted, st, want)
			}
			if !done {
				if st, err = b.Unlock(ctx, n.Netns(), o); err != nil || !st.Found || st.Intact != c.intact {
					t.Errorf("unlock: %+v, %v; want intact %v", st, err, c.intact)
				}
			}
			if st, err := b.Unlock(ctx, n.Netns(), o); err != nil || st.Found {
				t.Errorf("left: %+v, %v", st, err)
			}
			n.Run("flush ruleset", "nft", "-f", "-")
		})
	}
}

// A Backend that unlocks nothing that it locks keeps no note of it for ever.
func TestNotesAreBounded(t *testing.T) {
	var n notes
	for i := range uint64(3 * maxNotes) {
		n.put(i, note{})
	}
	if len(n.of) > maxNotes {
		t.Errorf("%d notes", len(n.of))
	}
	if _, ok := n.take(3*maxNotes - 1); !ok {
		t.Error("the last one is not there")
	}
	if _, ok := n.take(3*maxNotes - 1); ok {
		t.Error("it is there twice")
	}
}

// A Backend that has looked and found nothing locks without another look, unless something
// has come since; and what it built for one lock it makes another's own.
func TestLockNoted(t *testing.T) {
	netlocktest.Need(t, "nft")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	b := New()
	defer b.Wait()
	for i, come := range []string{"", "table ip criu-netlock { }", "table inet criu-netlock { chain ingress { }; }"} {
		n := netlocktest.NewNS(t)
		if st, err := b.State(ctx, n.Netns(), netlock.Options{}); err != nil || st.Found {
			t.Fatalf("%+v, %v", st, err)
		}
		n.Run(come, "nft", "-f", "-")
		o := netlock.Options{Caller: netlock.Caller{PID: 4710 + i, Name: "criu"}}
		if _, err := b.Lock(ctx, n.Netns(), o); err != nil {
			t.Fatal(err)
		}
		if st, err := b.State(ctx, n.Netns(), o); err != nil || !st.Intact || st.Caller != o.Caller {
			t.Errorf("after %q: %+v, %v; want the lock of %+v", come, st, err, o.Caller)
		}
	}
}

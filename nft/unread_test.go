package nft_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// openTable stands under our first name and lets everything pass.
const openTable = `table inet criu-netlock {
	chain ingress { type filter hook prerouting priority raw; policy accept; }
	chain egress { type filter hook output priority raw; policy accept; }
}
`

// unreadable puts a table under our first name that is too long to be read before the
// rule set changes, and changes the rule set until the test is over.
func (s *space) unreadable() {
	s.t.Helper()
	var b strings.Builder
	b.WriteString("table inet criu-netlock {\n\tchain ingress {\n\t\ttype filter hook prerouting priority raw; policy accept;\n")
	for range 50000 {
		b.WriteString("\t\taccept\n")
	}
	b.WriteString("\t}\n}\n")
	s.nft(b.String(), "-f", "-")
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	s.t.Cleanup(func() { stop(); <-done })
	go func() {
		defer close(done)
		// Slower than a batch takes, or nobody else would ever get one through.
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			conn, err := nftables.New(nftables.WithNetNSFd(s.ns.FD()))
			if err != nil {
				s.t.Error(err)
				return
			}
			other := &nftables.Table{Name: "other", Family: nftables.TableFamilyINet}
			if conn.AddTable(other); i%2 == 1 {
				conn.DelTable(other)
			}
			if err := conn.Flush(); err != nil {
				s.t.Error(err)
				return
			}
		}
	}()
}

// What cannot be read goes all the same, in time, and nobody says that it had been
// tampered with.
func TestUnlockUnread(t *testing.T) {
	b := nft.New()
	defer b.Wait()
	var (
		s   *space
		ctx context.Context
		st  netlock.State
		err error
	)
	for range 3 { // it is read all the same where the machine gives the changes a pause
		s = newSpace(t)
		s.unreadable()
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(t.Context(), 4*time.Second) // reading may take three of them
		defer cancel()
		if st, err = netlock.New(b).Unlock(ctx, s.ns); netlock.KindOf(err) != netlock.KindTampered {
			break
		}
	}
	if err == nil || netlock.KindOf(err) != netlock.KindOther || !strings.Contains(err.Error(), "could not be read") {
		t.Errorf("unlock: %+v, %v", st, err)
	}
	if !st.Found || st.Intact {
		t.Errorf("unlock found %+v", st)
	}
	if ctx.Err() != nil {
		t.Error("it took all the time there was")
	}
	if left := s.nft("", "list", "tables"); strings.Contains(left, "criu-netlock") {
		t.Errorf("left:\n%s", left)
	}
}

// A lock goes in beside what cannot be read, which goes then.
func TestLockUnread(t *testing.T) {
	s, b := newSpace(t), nft.New()
	defer b.Wait()
	s.unreadable()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second) // reading may take three of them
	defer cancel()
	res, err := b.Lock(ctx, s.ns, options)
	if err != nil || res.Already {
		t.Fatalf("lock: %+v, %v", res, err)
	}
	if st := s.state(b, options); !st.Locked || !st.Intact {
		t.Errorf("locked, and not locked: %+v", st)
	}
}

// together runs f k times at once and waits.
func together(k int, f func(i int)) {
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range k {
		wg.Go(func() {
			<-start
			f(i)
		})
	}
	close(start)
	wg.Wait()
}

// Locks that replace the same foreign table side by side: each puts its own in first,
// and what then takes the others for leftovers must leave one.
func TestLockTogether(t *testing.T) {
	s, b := newSpace(t), nft.New()
	defer b.Wait()
	for round := range 150 {
		s.nft(openTable, "-f", "-")
		together(6, func(int) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			if _, err := b.Lock(ctx, s.ns, options); err != nil {
				t.Errorf("round %d: lock: %v", round, err)
			} else if st, err := b.State(ctx, s.ns, options); err != nil || !st.Locked {
				t.Errorf("round %d: locked, and not locked: %+v, %v", round, st, err)
			}
		})
		if st := s.state(b, options); !st.Intact {
			t.Errorf("round %d: %+v", round, st)
		}
		if _, err := b.Unlock(t.Context(), s.ns, options); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			return
		}
	}
}

// What comes between a lock's look and its batch is looked at too.
func TestLockLate(t *testing.T) {
	netlocktest.Need(t, "strace")
	s, b := newSpace(t), nft.New()
	defer b.Wait()
	const look, batch = "sendto(", "2"
	t.Setenv(helperTime, "15s")
	code, hit, stderr := s.inject("lock", fault{"sendto", "delay_enter=2000000"}, batch, func(trace string) {
		if err := netlocktest.Until(func() (bool, error) {
			log, err := os.ReadFile(trace)
			if errors.Is(err, os.ErrNotExist) {
				err = nil
			}
			return bytes.Contains(log, []byte(look)), err
		}); err != nil {
			t.Error(err)
			return
		}
		s.nft(strings.ReplaceAll(openTable, "criu-netlock", "criu-netlock-2"), "-f", "-")
	})
	if !hit || code != 0 {
		t.Errorf("exit %d, %s", code, stderr)
	}
	if st := s.state(b, options); !st.Locked || !st.Intact {
		t.Errorf("locked, and not locked: %+v", st)
	}
	if _, err := b.Unlock(t.Context(), s.ns, options); err != nil {
		t.Fatal(err)
	}
}

// Unlocks side by side: a lock that another one is taking away has not been tampered
// with.
func TestUnlockTogether(t *testing.T) {
	s, b := newSpace(t), nft.New()
	defer b.Wait()
	for round := range 300 {
		s.lock(b, options)
		together(6, func(int) {
			if _, err := netlock.New(b).Unlock(t.Context(), s.ns); err != nil {
				t.Errorf("round %d: %v", round, err)
			}
		})
		if left := s.state(b, options); left.Found {
			t.Fatalf("round %d: left: %+v", round, left)
		}
		if t.Failed() {
			return
		}
	}
}

// Faults that do not pass: an unlock takes the lock off all the same, and none of
// them is called tampering; a lock leaves nothing.
func TestLastingFaults(t *testing.T) {
	netlocktest.Need(t, "strace")
	for _, op := range []string{"lock", "unlock"} {
		for _, errno := range []string{"ENOBUFS", "ENOMEM"} {
			t.Run(op+" "+errno, func(t *testing.T) {
				t.Parallel() // it is mostly waiting
				s, b := newSpace(t), nft.New()
				defer b.Wait()
				k := 1
				for again := 0; ; k++ {
					if op == "unlock" {
						s.lock(b, options)
					}
					code, hit, stderr := s.inject(op, fault{"recvmsg", "error=" + errno}, fmt.Sprintf("%d+", k))
					if !hit {
						break
					}
					at := fmt.Sprintf("from recvmsg %d on: exit %d, %s", k, code, strings.TrimSpace(stderr))
					switch st := s.state(b, options); {
					case st.Found && code == int(netlock.KindDeadline) && again < 3:
						again++ // reading leaves a quarter of a second, which a busy machine may take away
						k--
					case st.Found:
						t.Errorf("%s: a lock is left", at)
					}
					if code == 0 || code == int(netlock.KindTampered) {
						t.Error(at)
					}
					if _, err := b.Unlock(t.Context(), s.ns, options); err != nil {
						t.Fatal(err)
					}
				}
				if k < 3 {
					t.Error("no faults")
				}
			})
		}
	}
}

// A container that changes its rules as fast as it can delays a lock, and no more: it
// goes in at the generation at which its maker looked, and so does the unlock.
func TestBusyRuleSet(t *testing.T) {
	s, b := newSpace(t), nft.New()
	defer b.Wait()
	var msgs []netlink.Message
	c, err := nftables.New(nftables.WithTestDial(func(req []netlink.Message) ([]netlink.Message, error) {
		msgs = append(msgs, req...)
		return nil, io.EOF
	}))
	if err != nil {
		t.Fatal(err)
	}
	other := &nftables.Table{Name: "other", Family: nftables.TableFamilyINet}
	c.AddTable(other)
	c.DelTable(other)
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	busy := make(chan error, 1)
	ctx, stop := context.WithCancel(t.Context())
	first := make(chan struct{})
	go func() {
		busy <- s.ns.Do(func() error {
			conn, err := nfnl.Dial()
			if err != nil {
				return err
			}
			defer conn.Close()
			for i := 0; ctx.Err() == nil; i++ {
				if err := conn.Batch(context.Background(), msgs); err != nil {
					return err
				}
				if i == 0 {
					close(first)
				}
			}
			return nil
		})
	}()
	select {
	case <-first:
	case err := <-busy:
		t.Fatal(err)
	}
	for range 10 {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		if _, err := b.Lock(ctx, s.ns, options); err != nil {
			t.Error(err)
		}
		if st, err := b.Unlock(ctx, s.ns, options); err != nil || !st.Intact {
			t.Errorf("unlock: %+v, %v", st, err)
		}
		cancel()
	}
	stop()
	if err := <-busy; err != nil {
		t.Error(err)
	}
}

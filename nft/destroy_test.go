package nft

// Kernels before 6.3 do not know "destroy": there a table is made and deleted in the
// batch that replaces it.

import (
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

func TestNoDestroy(t *testing.T) {
	netlocktest.Need(t, "nft")
	n := netlocktest.NewNS(t)
	b := New()
	defer b.Wait()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	text := netlock.Comment(b.now(), netlock.Caller{PID: 4711, Name: "criu"})
	for _, there := range []string{
		"",
		"table inet criu-netlock { chain x { type filter hook input priority 0; policy accept; }; set s { type ipv4_addr; }; }",
		"table inet criu-netlock { chain x { type filter hook input priority 0; policy accept; }; }; table inet criu-netlock-2 { flags dormant; }; table ip criu-netlock { }",
	} {
		if there != "" {
			n.Run(there, "nft", "-f", "-")
		}
		err := b.in(ctx, n.Netns(), netlock.Options{}, func(s *session) error {
			// What such a kernel says, after which the lock is tried again, and not as it was.
			refused := &nfnl.BatchError{Index: 1, Cmd: 26, Errno: unix.EINVAL}
			if created, err := s.settle(refused, tableNames[0], text); created || err != nil || !s.noDestroy {
				t.Errorf("settle: %v, %v; destroy is done without: %v", created, err, s.noDestroy)
			}
			if created, err := s.settle(refused, tableNames[0], text); created || !errors.Is(err, unix.EINVAL) {
				t.Errorf("settle without destroy: %v, %v", created, err)
			}
			already, err := s.lock(text)
			if already {
				t.Errorf("%q passes for a lock", there)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		st, err := b.Unlock(ctx, n.Netns(), netlock.Options{})
		if err != nil || !st.Intact {
			t.Errorf("over %q: %+v, %v", there, st, err)
		}
		if rules := n.Run("", "nft", "list", "ruleset"); rules != "" {
			t.Errorf("left:\n%s", rules)
		}
	}
}

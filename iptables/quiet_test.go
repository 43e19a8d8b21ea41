package iptables

import (
	"context"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft"
)

// A handle that keeps sockets tells without a look that there is still nothing of ours,
// and never that there is nothing when there is something.
func TestQuiet(t *testing.T) {
	netlocktest.Need(t, "nft", "iptables-legacy", "iptables-nft")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	none := func(*netlocktest.NS) {}
	lock := func(b netlock.Backend) func(*netlocktest.NS) {
		return func(n *netlocktest.NS) {
			if _, err := b.Lock(ctx, n.Netns(), netlock.Options{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	other := func(n *netlocktest.NS) *netlock.Namespace {
		ns, err := netlock.FromPID(n.PID())
		if err != nil {
			t.Fatal(err)
		}
		return ns
	}
	elsewhere := func(v Variant) func(*netlocktest.NS) {
		return func(n *netlocktest.NS) {
			ns := other(n)
			defer ns.Close()
			if _, err := New(v).Lock(ctx, ns, netlock.Options{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	run := func(stdin, tool string, args ...string) func(*netlocktest.NS) {
		return func(n *netlocktest.NS) { n.Run(stdin, tool, args...) }
	}
	nb := nft.New()
	defer nb.Wait()
	locked := func(n *netlocktest.NS) { // by one that has looked before, as a checkpoint does
		if _, err := nb.State(ctx, n.Netns(), netlock.Options{}); err != nil {
			t.Fatal(err)
		}
		lock(nb)(n)
	}
	for _, c := range []struct {
		name   string
		change func(*netlocktest.NS)
		quiet  bool
		found  bool
	}{
		{"nothing", none, true, false},
		{"a lock of nft's", locked, true, false},
		// The kernel's word is of the moment of the first one.
		{"a lock of nft's, and then one of the nft variant", func(n *netlocktest.NS) { locked(n); elsewhere(NFT)(n) }, false, true},
		{"a table of nft's", run("table ip other { }", "nft", "-f", "-"), false, false},
		{"a legacy table", run("", "iptables-legacy", "-t", "raw", "-A", "PREROUTING", "-j", "ACCEPT"), false, false},
		{"a lock of the nft variant", elsewhere(NFT), false, true},
		{"a legacy lock", elsewhere(Legacy), false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			n, b := netlocktest.NewNS(t), New(Legacy)
			n.Netns().KeepSockets()
			if quiet, _ := stillQuiet(ctx, n.Netns()); quiet {
				t.Fatal("quiet before anybody looked")
			}
			for range 2 {
				if st, err := b.Unlock(ctx, n.Netns(), netlock.Options{}); err != nil || st.Found {
					t.Fatalf("%+v, %v", st, err)
				}
			}
			c.change(n)
			quiet, conn := stillQuiet(ctx, n.Netns())
			if quiet != c.quiet || quiet != (conn == nil) {
				t.Errorf("quiet: %v, %v", quiet, conn)
			}
			if conn != nil {
				conn.Close()
			}
			for range 2 {
				st, err := b.Unlock(ctx, n.Netns(), netlock.Options{})
				if err != nil || st.Found != c.found {
					t.Errorf("unlock: %+v, %v", st, err)
				}
				c.found = false
			}
			ns := other(n)
			defer ns.Close()
			if st, err := b.State(ctx, ns, netlock.Options{}); err != nil || st.Found {
				t.Errorf("left: %+v, %v", st, err)
			}
		})
	}
}

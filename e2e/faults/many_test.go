package faults

// Many at a time, and many times.

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft"
)

// many is n for the whole set, and short otherwise.
func many(n, short int) int {
	if *all {
		return n
	}
	return short
}

// bare runs one hook whose CRIU is this process.
func (l *lab) bare(action string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program)
	cmd.Env = []string{"CRTOOLS_SCRIPT_ACTION=" + action, "CRTOOLS_INIT_PID=" + l.pid, "CRIU_NETLOCK_CONFIG=" + l.dir + "/netlock.toml"}
	start := time.Now()
	out, err := cmd.CombinedOutput()
	if took := time.Since(start); err != nil || took > hang {
		return wrong(err, "%s after %v: %s", action, took, out)
	}
	return nil
}

// TestHooksAtOnce runs four rows of hooks side by side on one namespace: first hooks that
// all lock, then any, then hooks that all unlock.
func TestHooksAtOnce(t *testing.T) {
	eachBackend(t, func(t *testing.T, l *lab) {
		count := theTable.class("4 rows of hooks on one namespace, " + l.backend)
		rows := func(n int, actions ...string) {
			var wg sync.WaitGroup
			var mu sync.Mutex
			for range 4 {
				wg.Go(func() {
					for range n {
						action := actions[rand.IntN(len(actions))]
						err := l.bare(action)
						if tampered(err) && l.backend != "nft" {
							err = nil // it saw a lock of which another one had taken off the half
						}
						mu.Lock()
						count.tried(t, action, err)
						mu.Unlock()
					}
				})
			}
			wg.Wait()
		}
		n := many(250, 10)
		rows(n/5, "network-lock", "setup-namespaces", "post-restore")
		if err := l.is(true); err != nil {
			t.Errorf("after hooks that lock: %v", err)
		}
		rows(n-2*(n/5), "network-lock", "network-unlock", "post-setup-namespaces", "post-resume")
		// A lock and an unlock that waited too long for their turn can have left the half of a lock, which
		// the next hook ends.
		if l.backend != "nft" {
			rows(1, "network-lock")
		}
		if st, _, err := l.holds(); err != nil || st.Found && !st.Intact {
			t.Errorf("after any hooks: %+v, %v", st, err)
		}
		rows(n/5, "network-unlock", "post-resume")
		if err := l.is(false); err != nil {
			t.Errorf("after hooks that unlock: %v", err)
		}
	})
}

// TestManyNamespaces locks a thousand namespaces by their hooks, lists them, and takes the
// locks off: of one half by hooks, of the other by gc when CRIU is dead.
func TestManyNamespaces(t *testing.T) {
	onItsHost(t, func(t *testing.T) {
		l := newLab(t, "nft", backends[0].config)
		l.configure(l.config + "guard = false\ntimeout = \"20s\"\n")
		n := many(1000, 40)
		count := theTable.class("many namespaces at once")
		c := l.newCRIU()
		defer c.die()
		var spaces []*netlock.Namespace
		var pids []string
		for range n {
			cmd, err := task(true)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { stop(cmd) })
			ns, err := netlock.FromPID(cmd.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { ns.Close() })
			spaces, pids = append(spaces, ns), append(pids, strconv.Itoa(cmd.Process.Pid))
		}
		want := func(when string, locked func(i int) bool) {
			for i, ns := range spaces {
				st, err := l.look.State(t.Context(), ns)
				if err == nil && (st.Intact != locked(i) || st.Found != locked(i)) {
					err = fmt.Errorf("%+v", st)
				}
				count.tried(t, when, err)
			}
		}
		hooks := func(action string, which func(i int) bool) {
			for i, pid := range pids {
				if l.pid = pid; which(i) {
					if err := l.hookOK(c, action); err != nil {
						t.Error(err)
					}
				}
			}
		}
		every := func(int) bool { return true }
		half := func(i int) bool { return i%2 == 0 }
		hooks("network-lock", every)
		want("locked", every)
		if out, err := l.command("list"); err != nil || strings.Count(out, "use        in use") != n {
			t.Errorf("list: %d, %v", strings.Count(out, "use        in use"), err)
		}
		hooks("network-unlock", func(i int) bool { return !half(i) })
		want("the one half unlocked", half)
		c.die()
		if out, err := l.command("gc", "--timeout", "20s"); err != nil || strings.Count(out, "stale, unlocked") != n/2 {
			t.Errorf("gc: %d, %v", strings.Count(out, "stale, unlocked"), err)
		}
		want("all unlocked", func(int) bool { return false })
	})
}

// TestFloods sends packets without a pause through thousands of locks, and through locks
// that are replaced by others. None comes through, none is lost without one. What takes
// its time is the kernel, which waits for a grace period after each lock that goes, so
// several namespaces wait side by side.
func TestFloods(t *testing.T) {
	together(t)
	newNFT := func() netlock.Backend { return nft.New() }
	t.Run("cycles", func(t *testing.T) {
		inside(t, func(t *testing.T) {
			spaces, cycles := many(4, 1), many(2500, 20)
			atOnce(t, spaces, func(t *testing.T) { netlocktest.Flood(t, newNFT, cycles) })
			theTable.class("lock and unlock under a flood").floods(t, spaces*cycles)
		})
	})
	t.Run("replacements", func(t *testing.T) {
		inside(t, func(t *testing.T) {
			const repairs = 50
			spaces, cycles := many(10, 1), many(100, 1)
			atOnce(t, spaces, func(t *testing.T) {
				c := netlocktest.NFT(t, newNFT)
				c.Replay = func(n *netlocktest.NS) {
					if err := spoil(n); err != nil {
						t.Fatal(err)
					}
				}
				netlocktest.FloodRepair(t, c, cycles, repairs)
			})
			theTable.class("lock replaced under a flood").floods(t, spaces*cycles*repairs)
		})
	})
}

// atOnce runs n of f side by side.
func atOnce(t *testing.T, n int, f func(t *testing.T)) {
	t.Run("at once", func(t *testing.T) {
		for i := range n {
			t.Run(fmt.Sprint(i), func(t *testing.T) {
				t.Parallel()
				f(t)
			})
		}
	})
}

// floods counts what a flood that failed or not has tried.
func (c *class) floods(t *testing.T, n int) {
	c.points += n
	if t.Failed() {
		c.wrong++
	}
}

// spoil adds a rule to the lock, so that it is none of ours any more and is replaced.
func spoil(n *netlocktest.NS) error {
	return n.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err := conn.ListTables()
		if err != nil {
			return err
		}
		for _, table := range tables {
			conn.AddRule(&nftables.Rule{Table: table, Chain: &nftables.Chain{Name: "egress", Table: table}, Exprs: []expr.Any{&expr.Counter{}}})
		}
		return conn.Flush()
	})
}

package netlocktest

// What every backend has to do.

import (
	"context"
	"fmt"
	"iter"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock"
)

// Config is a backend and how its rules are looked at from outside.
type Config struct {
	// New returns a new backend, as another process would have it.
	New func() netlock.Backend
	// Foreign puts rules in that belong to somebody else.
	Foreign func(*NS)
	// Ruleset is all rules as the host's own tools print them.
	Ruleset func(*NS) string
	// Replay puts all rules in once more, as a restore from an image does on top of
	// a lock.
	Replay func(*NS)
	// Locks counts our locks, whole or not.
	Locks func(*NS) int
	// Keep has the handles keep sockets.
	Keep bool
}

// callTime is what a call may take at most.
const callTime = 10 * time.Second

// bounded is a backend whose calls have a deadline: one that would try for ever is a
// failed test and not a hanging one.
type bounded struct{ netlock.Backend }

func bind(newBackend func() netlock.Backend) func() netlock.Backend {
	return func() netlock.Backend { return bounded{newBackend()} }
}

func (b bounded) Lock(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (netlock.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	return b.Backend.Lock(ctx, ns, o)
}

func (b bounded) Unlock(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (netlock.State, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	return b.Backend.Unlock(ctx, ns, o)
}

func (b bounded) State(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (netlock.State, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	return b.Backend.State(ctx, ns, o)
}

// NFT is the Config of the backend nft.
func NFT(t testing.TB, newBackend func() netlock.Backend) Config {
	Need(t, "nft")
	list := func(n *NS) string { n.t.Helper(); return n.Run("", "nft", "list", "ruleset") }
	return Config{
		New:     bind(newBackend),
		Foreign: func(n *NS) { n.t.Helper(); n.Run(foreignNFT, "nft", "-f", "-") },
		Ruleset: list,
		Replay:  func(n *NS) { n.t.Helper(); n.Run(list(n), "nft", "-f", "-") },
		Locks:   nftLocks,
	}
}

// nftLocks counts the tables of our names in every family.
func nftLocks(n *NS) int {
	n.t.Helper()
	k := 0
	for line := range strings.Lines(n.Run("", "nft", "list", "tables")) {
		if f := strings.Fields(line); len(f) == 3 && strings.HasPrefix(f[2], "criu-netlock") {
			k++
		}
	}
	return k
}

const foreignNFT = `table inet criu {
	set friends { type ipv4_addr; flags interval; elements = { 10.0.0.0/8, 192.0.2.1 }; }
	map ports { type inet_service : verdict; elements = { 7799 : drop, 7798 : jump away }; }
	chain away { tcp dport 7798 counter packets 5 bytes 300 drop comment "criu-netlock 1 not ours"; }
	chain in { type filter hook prerouting priority raw; policy accept; tcp dport vmap @ports; }
	chain out { type filter hook output priority raw - 1; policy accept; ip daddr 192.0.2.7 drop; }
}
table ip nat {
	chain post { type nat hook postrouting priority srcnat; policy accept; oifname "nothing" masquerade; }
}
table ip6 criu-net {
	chain lock { type filter hook forward priority 0; policy accept; }
}
`

// IPTables is the Config of the backend iptables in a variant, "legacy" or "nft".
func IPTables(t testing.TB, variant string, newBackend func() netlock.Backend) Config {
	var tools []string
	for _, f := range []string{"iptables-", "ip6tables-"} {
		tools = append(tools, f+"legacy-save", f+"nft-save", f+variant+"-restore")
	}
	Need(t, append(tools, "nft")...)
	save := func(n *NS, f, v string) string {
		n.t.Helper()
		out := n.Run("", f+"-"+v+"-save")
		// The tables come in no fixed order; one that is as the kernel makes it is none.
		var tables []string
		for _, tab := range strings.Split(rulesOnly(out), "COMMIT\n") {
			if strings.Contains(tab, "\n-A ") || strings.Contains(tab, " - ") || strings.HasSuffix(tab, " -\n") {
				tables = append(tables, tab+"COMMIT\n")
			}
		}
		return strings.Join(tables, "")
	}
	each := func(f func(prefix string)) {
		f("iptables")
		f("ip6tables")
	}
	return Config{
		New: bind(newBackend),
		Foreign: func(n *NS) {
			n.t.Helper()
			each(func(f string) {
				addr := map[string]string{"iptables": "192.0.2.7", "ip6tables": "2001:db8::7"}[f]
				n.Run(fmt.Sprintf(foreignIPTables, addr), f+"-"+variant+"-restore")
			})
		},
		Ruleset: func(n *NS) (all string) {
			n.t.Helper()
			each(func(f string) {
				for _, v := range []string{"legacy", "nft"} {
					all += f + "-" + v + "\n" + save(n, f, v)
				}
			})
			return all
		},
		Replay: func(n *NS) {
			n.t.Helper()
			each(func(f string) { n.Run(n.Run("", f+"-"+variant+"-save"), f+"-"+variant+"-restore", "--noflush") })
		},
		Locks: func(n *NS) int {
			n.t.Helper()
			count := map[string]int{}
			each(func(f string) {
				for _, v := range []string{"legacy", "nft"} {
					s := n.Run("", f+"-"+v+"-save")
					count[f] += strings.Count(s, "-A PREROUTING -j CRIU-NETLOCK-IN")
					// Half of one is not a lock that is gone either.
					if n := strings.Count(s, "-A OUTPUT -j CRIU-NETLOCK-OUT"); n > strings.Count(s, "-A PREROUTING -j CRIU-NETLOCK-IN") ||
						n == 0 && strings.Contains(s, "CRIU-NETLOCK") {
						count[f] += 100
					}
				}
			})
			if count["iptables"] != count["ip6tables"] {
				return -1
			}
			return count["iptables"]
		},
	}
}

const foreignIPTables = `*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:CRIU - [0:0]
-A INPUT -p tcp -m tcp --dport 7799 -j CRIU
-A CRIU -m comment --comment "criu-netlock 1 not ours" -j DROP
COMMIT
*raw
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A PREROUTING -d %[1]s -j DROP
-A OUTPUT -d %[1]s -j DROP
COMMIT
`

var caller = netlock.Options{Caller: netlock.Caller{PID: 4711, Name: "criu"}}

// subject is a backend on a namespace, for tests that expect no errors.
type subject struct {
	Config
	t  *testing.T
	n  *NS
	b  netlock.Backend
	ns *netlock.Namespace
	o  netlock.Options
}

func (c Config) on(t *testing.T, n *NS) *subject {
	if c.Keep {
		n.Netns().KeepSockets()
	}
	return &subject{c, t, n, c.New(), n.Netns(), caller}
}

func (s *subject) lock() netlock.Result {
	s.t.Helper()
	res, err := s.b.Lock(s.t.Context(), s.ns, s.o)
	if err != nil {
		s.t.Fatalf("lock: %v", err)
	}
	return res
}

func (s *subject) unlock() netlock.State {
	s.t.Helper()
	st, err := s.b.Unlock(s.t.Context(), s.ns, s.o)
	if err != nil {
		s.t.Fatalf("unlock: %v", err)
	}
	return st
}

func (s *subject) state() netlock.State {
	s.t.Helper()
	st, err := s.b.State(s.t.Context(), s.ns, s.o)
	if err != nil {
		s.t.Fatalf("state: %v", err)
	}
	return st
}

// one makes sure that there is one intact lock, by its own word and from outside.
func (s *subject) one() netlock.State {
	s.t.Helper()
	st := s.state()
	if !st.Found || !st.Locked || !st.Intact {
		s.t.Errorf("not an intact lock: %+v", st)
	}
	if n := s.Locks(s.n); n != 1 {
		s.t.Errorf("%d locks:\n%s", n, s.Ruleset(s.n))
	}
	return st
}

func (s *subject) none() {
	s.t.Helper()
	if st := s.state(); st != (netlock.State{}) && (st.Found || st.Locked || st.Intact) {
		s.t.Errorf("still there: %+v", st)
	}
	if n := s.Locks(s.n); n != 0 {
		s.t.Errorf("%d locks are left:\n%s", n, s.Ruleset(s.n))
	}
}

// Conformance holds a backend to netlock.Backend's contract.
func Conformance(t *testing.T, c Config) {
	t.Run("cycle", c.cycle)
	t.Run("allow", c.allow)
	t.Run("side by side", c.sideBySide)
	t.Run("deadline", c.deadline)
	t.Run("replay", c.replay)
	t.Run("owner", c.owner)
}

// cycle is a lock's life: twice put on, twice taken off, seen from outside.
func (c Config) cycle(t *testing.T) {
	tr := NewTraffic(t)
	trackConnections(tr.Inside)
	tr.Inside.Run(marks, "nft", "-f", "-")
	c.Foreign(tr.Inside)
	s := c.on(t, tr.Inside)
	tr.Expect(t, false)
	before := c.Ruleset(tr.Inside)
	s.none()
	if st := s.unlock(); st.Found || st.Locked {
		t.Errorf("unlock found something where there is nothing: %+v", st)
	}
	bye := tr.newFarewells()

	start := time.Now().Truncate(time.Second)
	res := s.lock()
	st := s.one()
	if res.Already || res.Backend == "" || st.Backend != res.Backend {
		t.Errorf("first lock: %+v, state %+v", res, st)
	}
	if st.Since.Before(start) || st.Since.After(time.Now()) || st.Caller != caller.Caller {
		t.Errorf("since and caller: %+v", st)
	}
	if res := s.lock(); !res.Already || res.Backend != st.Backend {
		t.Errorf("second lock: %+v", res)
	}
	if missing := missingLine(before, c.Ruleset(tr.Inside)); missing != "" {
		t.Errorf("while locked, foreign rules lack or misplace %q", missing)
	}
	bye.say()
	tr.Expect(t, true)
	if m := bye.moved(anyFarewell); m != nil {
		t.Errorf("conntrack saw what the lock dropped: %v", m)
	}
	later := s.one()
	if later.DroppedIn <= st.DroppedIn || later.DroppedOut <= st.DroppedOut {
		t.Errorf("the counters did not grow: %+v, then %+v", st, later)
	}
	if later.Since != st.Since || later.Caller != st.Caller {
		t.Errorf("since or caller changed: %+v, then %+v", st, later)
	}

	s.b = c.New() // another process
	if st := s.unlock(); !st.Found || !st.Locked || !st.Intact || st.Backend != res.Backend || st.DroppedIn < later.DroppedIn {
		t.Errorf("unlock found %+v", st)
	}
	s.none()
	if after := c.Ruleset(tr.Inside); after != before {
		t.Errorf("foreign rules changed; before:\n%s\nafter:\n%s", before, after)
	}
	tr.Expect(t, false)
	// The FINs come through now, so conntrack was looking all the time.
	if err := Until(func() (bool, error) { return len(bye.moved(func(f farewell) bool { return f.fin })) == 4, nil }); err != nil {
		t.Errorf("conntrack never saw the FINs: %v", err)
	}
	if st := s.unlock(); st.Found {
		t.Errorf("second unlock found %+v", st)
	}
}

// missingLine is the first line of a that is not in b, in a's order; "" if there is none.
func missingLine(a, b string) string {
	next, stop := iter.Pull(strings.Lines(b))
	defer stop()
	for want := range strings.Lines(a) {
		for {
			line, ok := next()
			if !ok {
				return want
			}
			if line == want {
				break
			}
		}
	}
	return ""
}

// allow: what is listed passes, with its answers, and nothing else.
func (c Config) allow(t *testing.T) {
	tr := NewTraffic(t)
	s := c.on(t, tr.Inside)
	for _, text := range []string{
		"ip saddr " + PeerV4 + " daddr " + InsideV4 + fmt.Sprint(" tcp dport ", tcpPort),
		"ip6 daddr " + PeerV6 + fmt.Sprint(" udp dport ", udpPort),
		"icmp",
		fmt.Sprint("tcp dport ", segPort), // its answers pass to any port, and begin nothing
	} {
		r, err := netlock.ParseRule(text)
		if err != nil {
			t.Fatal(err)
		}
		s.o.Allow = append(s.o.Allow, r)
	}
	passes := map[string]bool{"tcp4-in": true, "udp6-out": true, "mark-udp6-out": true, "ping4-in": true, "ping4-out": true,
		"seg4-in": true, "seg6-in": true, "seg4-out": true, "seg6-out": true, "mark-seg4-out": true, "mark-seg6-out": true}
	s.lock()
	s.one()
	faults := tr.compare(besideWait, func(name string) string { return want(name, !passes[name]) })
	if faults != nil {
		t.Errorf("with an allow list:\n%s", strings.Join(faults, "\n"))
	}
	if res := s.lock(); !res.Already {
		t.Error("the second lock with the same allow list made a new one")
	}
	s.o.Allow = nil
	if st := s.state(); st.Intact {
		t.Errorf("a lock with another allow list is intact: %+v", st)
	}
	if res := s.lock(); res.Already {
		t.Error("a lock with another allow list was left alone")
	}
	s.one()
	tr.Expect(t, true)
	s.unlock()
	s.none()
	tr.Expect(t, false)
}

// sideBySide: many at once, in this process, and what the last one does holds.
func (c Config) sideBySide(t *testing.T) {
	tr := NewTraffic(t)
	s := c.on(t, tr.Inside)
	var wg sync.WaitGroup
	for i := range 8 {
		b := s.b
		if i%2 == 1 {
			b = c.New()
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			for range 5 {
				if _, err := b.Lock(ctx, s.ns, s.o); err != nil {
					t.Errorf("lock: %v", err)
				}
				if i < 4 {
					if _, err := b.Unlock(ctx, s.ns, s.o); err != nil {
						t.Errorf("unlock: %v", err)
					}
				}
			}
		})
	}
	wg.Wait()
	s.lock()
	s.one()
	tr.Expect(t, true, quick...)
	s.unlock()
	s.none()
	tr.Expect(t, false, quick...)

	// Locks alone never take each other off.
	for range 8 {
		wg.Go(func() {
			for range 3 {
				if _, err := c.New().Lock(t.Context(), s.ns, s.o); err != nil {
					t.Errorf("lock: %v", err)
				}
				if st := s.state(); !st.Locked {
					t.Errorf("locked, and not locked: %+v", st)
				}
			}
		})
	}
	wg.Wait()
	s.one()
	tr.Expect(t, true, quick...)
	for range 8 {
		wg.Go(func() {
			if _, err := c.New().Unlock(t.Context(), s.ns, s.o); err != nil {
				t.Errorf("unlock: %v", err)
			}
		})
	}
	wg.Wait()
	s.none()
	tr.Expect(t, false, quick...)
}

// deadline: an expired context changes nothing and says so.
func (c Config) deadline(t *testing.T) {
	s := c.on(t, NewNS(t))
	c.Foreign(s.n)
	expired, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	is := func(err error, what string) {
		t.Helper()
		if err == nil || netlock.KindOf(err) != netlock.KindDeadline {
			t.Errorf("%s after the deadline: %v", what, err)
		}
	}
	before := c.Ruleset(s.n)
	_, err := s.b.Lock(expired, s.ns, s.o)
	is(err, "lock")
	if after := c.Ruleset(s.n); after != before {
		t.Errorf("lock after the deadline changed the rules to\n%s", after)
	}
	s.none()
	s.lock()
	_, err = s.b.Unlock(expired, s.ns, s.o)
	is(err, "unlock")
	_, err = s.b.State(expired, s.ns, s.o)
	is(err, "state")
	s.one()
	s.unlock()
	s.none()

	// Deadlines that pass in the middle of it: locked or not, never in between.
	for d := 50 * time.Microsecond; d < 200*time.Millisecond; d = d * 5 / 4 {
		ctx, cancel := context.WithTimeout(t.Context(), d)
		_, err := s.b.Lock(ctx, s.ns, s.o)
		cancel()
		if err == nil {
			s.one()
			break
		}
		is(err, fmt.Sprintf("lock within %v", d))
		s.none()
	}
	s.unlock()
	s.none()
}

// replay: a restore puts the rules of an image in where a lock is already.
func (c Config) replay(t *testing.T) {
	tr := NewTraffic(t)
	s := c.on(t, tr.Inside)
	s.lock()
	s.one()
	c.Replay(s.n)
	if st := s.state(); !st.Found || !st.Locked || st.Intact || st.Why == "" {
		t.Errorf("doubled rules: %+v", st)
	}
	tr.Expect(t, true, quick...)
	if res := s.lock(); res.Already {
		t.Error("doubled rules were left alone")
	}
	s.one()
	tr.Expect(t, true, quick...)
	if st := s.unlock(); !st.Intact {
		t.Errorf("unlock after the repair: %+v", st)
	}
	s.none()
	tr.Expect(t, false, quick...)

	// And without a repair.
	s.lock()
	c.Replay(s.n)
	if st := s.unlock(); !st.Found || st.Intact {
		t.Errorf("unlock of doubled rules: %+v", st)
	}
	s.none()
	tr.Expect(t, false, quick...)
}

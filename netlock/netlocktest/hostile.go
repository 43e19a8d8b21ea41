package netlocktest

// What stands under nft's names of ours and is no lock of ours: left by another
// version, by an image, or put there on purpose.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/nftables"

	"github.com/criu-netlock/criu-netlock/netlock"
)

// The names of our tables.
const (
	firstName  = "criu-netlock"
	secondName = "criu-netlock-2"
)

// HostileNFT holds the backend nft to this: whatever stands under its names is never
// taken for an intact lock, is replaced by one that is, and is gone after an unlock.
func HostileNFT(t *testing.T, c Config) {
	tr := NewTraffic(t)
	s := c.on(t, tr.Inside)
	s.lock()
	real := c.Ruleset(tr.Inside)
	s.unlock()
	s.none()
	for _, h := range hostile(t, real) {
		t.Run(h.name, func(t *testing.T) {
			s, tr := c.on(t, tr.Inside), tr
			feed := func() netlock.State {
				t.Helper()
				if _, err := s.n.TryRun(h.rules, "nft", "-f", "-"); err != nil {
					t.Fatalf("%v\n%s", err, h.rules)
				}
				st := s.state()
				if !st.Found || st.Intact || st.Why == "" {
					t.Errorf("taken for a lock: %+v", st)
				}
				return st
			}
			defer s.n.Run("flush ruleset", "nft", "-f", "-")
			if st := feed(); st.Locked { // damaged, but nothing passes: that has to be true
				tr.Expect(t, true, quick...)
			}
			if res := s.lock(); res.Already {
				t.Error("left alone")
			}
			s.one()
			tr.Expect(t, true, quick...)
			if st := s.unlock(); !st.Intact {
				t.Errorf("unlock found %+v", st)
			}
			s.none()
			tr.Expect(t, false, quick...)

			feed()
			if st := s.unlock(); !st.Found || st.Intact {
				t.Errorf("unlock found %+v", st)
			}
			s.none()
			tr.Expect(t, false, quick...)
		})
	}
	t.Run("owned", func(t *testing.T) { owned(t, c, tr) })
	t.Run("both owned", func(t *testing.T) { bothOwned(t, c, tr) })
	t.Run("orphan", func(t *testing.T) { orphan(t, c, tr) })
	t.Run("owned in other families", func(t *testing.T) { ownedElsewhere(t, c, tr) })
	t.Run("comes and goes", func(t *testing.T) { comesAndGoes(t, c, tr) })
	t.Run("owners come and go", func(t *testing.T) { ownersComeAndGo(t, c, tr) })
}

type hostileRules struct{ name, rules string }

// hostile makes rule sets out of a real lock.
func hostile(t *testing.T, real string) (out []hostileRules) {
	add := func(name, rules string) { out = append(out, hostileRules{name, rules}) }
	// edit changes the real lock, everywhere or only the first time.
	edit := func(k int, from, to string) string {
		t.Helper()
		s := strings.Replace(real, from, to, k)
		if s == real {
			t.Fatalf("there is no %q in\n%s", from, real)
		}
		return s
	}
	const in, out6 = "type filter hook prerouting priority raw; policy drop;", "type filter hook output priority raw; policy drop;"
	second := edit(-1, "table inet "+firstName, "table inet "+secondName)
	open := edit(-1, "policy drop;", "policy drop;\n\t\taccept")

	add("accept first", open)
	add("accept first, inwards", edit(1, "policy drop;", "policy drop;\n\t\taccept"))
	add("accept first, outwards", edit(1, out6, out6+"\n\t\taccept"))
	add("accept before the count", edit(-1, "counter packets", "accept\n\t\tcounter packets"))
	add("policy accept", edit(-1, "policy drop", "policy accept"))
	add("policy accept outwards", edit(1, out6, strings.Replace(out6, "drop", "accept", 1)))
	add("no base chain", edit(1, in, ""))
	add("no base chain outwards", edit(1, out6, ""))
	add("a chain jumped to", edit(1, in, "")+"table inet "+firstName+" {\n chain x { type filter hook prerouting priority raw; policy drop; jump ingress; }\n}\n")
	add("type route", edit(1, "type filter hook output", "type route hook output"))
	add("type nat", edit(1, in, "type nat hook prerouting priority dstnat; policy drop;"))
	add("hook input", edit(1, "hook prerouting", "hook input"))
	add("hook postrouting", edit(1, "hook output", "hook postrouting"))
	add("priority filter", edit(-1, "priority raw", "priority filter"))
	add("priority one off", edit(1, "priority raw", "priority -299"))
	add("an extra base chain", edit(1, "\tchain ingress", "\tchain z { type filter hook prerouting priority -400; policy accept; accept; }\n\tchain ingress"))
	add("an extra chain", edit(1, "\tchain ingress", "\tchain z {\n\t\taccept\n\t}\n\tchain ingress"))
	add("a set", edit(1, "\tchain ingress", "\tset s { type ipv4_addr; elements = { 10.77.0.1, 10.77.0.2 }; }\n\tchain ingress"))
	add("only the count", "table inet "+firstName+" {\n chain ingress { "+in+"\n counter; }\n chain egress { "+out6+"\n counter; }\n}\n")
	add("no neighbour discovery", edit(1, "icmpv6 type nd-neighbor-solicit accept", ""))
	add("any mark", edit(1, "meta mark 0x0000c114 ", ""))
	add("mark on any link", edit(1, `oif "lo" `, ""))
	add("another order", edit(1, "icmpv6 type nd-neighbor-solicit accept\n\t\ticmpv6 type nd-neighbor-advert accept", "icmpv6 type nd-neighbor-advert accept\n\t\ticmpv6 type nd-neighbor-solicit accept"))
	add("a forged comment", fmt.Sprintf(`table inet %s {
		chain ingress { %s
			accept comment "criu-netlock 1 2026-01-01T00:00:00Z 1 criu"
		}
		chain egress { %s
			accept comment "criu-netlock 1 2026-01-01T00:00:00Z 1 criu"
		}
	}`, firstName, in, out6))
	add("another version's comment", edit(-1, `"criu-netlock 1 `, `"criu-netlock 9 `))
	add("no comment", edit(-1, "comment \"criu-netlock 1", "comment \"criu\"\n#"))
	add("doubled", real+real)
	add("dormant", edit(1, "table inet "+firstName+" {", "table inet "+firstName+" {\n\tflags dormant"))
	add("empty", "table inet "+firstName+" {\n}\n")
	add("empty second", "table inet "+secondName+" {\n}\n")
	add("one chain", real[:strings.Index(real, "\tchain egress")]+"}\n")
	add("two locks", real+second)
	add("a lock and an open one", real+strings.ReplaceAll(open, "inet "+firstName, "inet "+secondName))
	add("an open one and a lock", open+second)
	add("both open", open+strings.ReplaceAll(open, "inet "+firstName, "inet "+secondName))
	add("a damaged second", strings.Replace(second, "policy drop;", "policy drop;\n\t\taccept", 1))
	for _, fam := range []string{"ip", "ip6"} {
		foreign := "table " + fam + " " + firstName + " {\n chain ingress { " + in + "\n }\n}\n"
		add("family "+fam, foreign)
		add("family "+fam+" beside a lock", real+foreign)
		add("family "+fam+" second name", strings.Replace(foreign, firstName, secondName, 1))
	}
	netdev := "table netdev " + firstName + " {\n chain ingress { type filter hook ingress device \"peer\" priority 0; policy accept; udp dport 7701 drop; }\n}\n"
	add("netdev", netdev)
	add("netdev beside a lock", real+netdev)
	add("arp", "table arp "+firstName+" {\n chain ingress { type filter hook input priority 0; policy accept; }\n}\n")
	add("bridge", "table bridge "+firstName+" {\n chain ingress { type filter hook prerouting priority 0; policy accept; }\n}\n")
	add("in every family", open+strings.ReplaceAll(open, "inet "+firstName, "inet "+secondName)+netdev+"table ip "+secondName+" {\n}\ntable ip6 "+firstName+" {\n}\n")

	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n set s { type ipv4_addr; flags interval; elements = { 10.0.0.0/8 }; }\n map m { type inet_service : verdict; elements = { 1 : accept, 2 : drop }; }\n", firstName)
	for i, ch := range []string{in, out6} {
		fmt.Fprintf(&b, " chain %s {\n %s\n", []string{"ingress", "egress"}[i], ch)
		for port := range 1000 {
			fmt.Fprintf(&b, "udp dport %d accept comment \"%s\"\n", port+7001, strings.Repeat("x", 100))
		}
		b.WriteString(" tcp dport vmap @m\n ip saddr @s accept\n }\n")
	}
	b.WriteString("}\n")
	add("sets, maps and a thousand rules", b.String())
	return out
}

const inet = nftables.TableFamilyINet

// owner creates a table that belongs to its socket, as a live process would have it.
func owner(t *testing.T, n *NS, family nftables.TableFamily, name string, flags nftables.TableFlags) (release func()) {
	t.Helper()
	end, err := tryOwner(n, family, name, flags)
	if err != nil {
		t.Fatalf("table %s with an owner: %v", name, err)
	}
	return func() {
		if err := end(); err != nil {
			t.Error(err)
		}
	}
}

func tryOwner(n *NS, family nftables.TableFamily, name string, flags nftables.TableFlags) (release func() error, _ error) {
	conn, err := nftables.New(nftables.WithNetNSFd(n.ns.FD()), nftables.AsLasting())
	if err != nil {
		return nil, err
	}
	accept := nftables.ChainPolicyAccept
	table := conn.CreateTable(&nftables.Table{Name: name, Family: family, Flags: flags})
	conn.AddChain(&nftables.Chain{Name: "ingress", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw, Policy: &accept})
	if err := conn.Flush(); err != nil {
		return nil, errors.Join(err, conn.CloseLasting())
	}
	return conn.CloseLasting, nil
}

// owned: a live process holds the first name, so the second one is used.
func owned(t *testing.T, c Config, tr *Traffic) {
	for i, name := range []string{firstName, secondName} {
		release := owner(t, tr.Inside, inet, name, nftables.TableFlagOwner)
		theirs := func() string {
			t.Helper()
			return tr.Inside.Run("", "nft", "list", "table", "inet", name)
		}
		before := theirs()
		mine := c
		mine.Locks = func(n *NS) int { return c.Locks(n) - strings.Count(theirs(), "table inet") }
		s := mine.on(t, tr.Inside)
		if st := s.state(); st.Locked || st.Intact {
			t.Errorf("another's table taken for a lock: %+v", st)
		}
		if st := s.unlock(); st.Intact || st.Locked {
			t.Errorf("unlock found %+v", st)
		}
		s.lock()
		s.one()
		tr.Expect(t, true, quick...)
		if free := []string{secondName, firstName}[i]; !strings.Contains(tr.Inside.Run("", "nft", "list", "tables"), "inet "+free+"\n") {
			t.Errorf("not under the free name %s", free)
		}
		if res := s.lock(); !res.Already {
			t.Error("locked again beside another's table")
		}
		s.unlock()
		s.none()
		tr.Expect(t, false, quick...)
		if after := theirs(); after != before {
			t.Errorf("the owner's table changed from\n%s\nto\n%s", before, after)
		}

		// Whose names come free again is where the next lock goes.
		s.lock()
		release()
		s.Config = c
		s.one()
		tr.Expect(t, true, quick...)
		s.unlock()
		s.none()
	}
}

// bothOwned: no name is left, nothing is changed.
func bothOwned(t *testing.T, c Config, tr *Traffic) {
	releases := []func(){owner(t, tr.Inside, inet, firstName, nftables.TableFlagOwner), owner(t, tr.Inside, inet, secondName, nftables.TableFlagOwner)}
	s := c.on(t, tr.Inside)
	before := c.Ruleset(tr.Inside)
	_, err := s.b.Lock(t.Context(), s.ns, s.o)
	if err == nil || netlock.KindOf(err) != netlock.KindHeld {
		t.Errorf("lock: %v", err)
	}
	if st, err := s.b.State(t.Context(), s.ns, s.o); err != nil || !st.Held {
		t.Errorf("state: %+v, %v; a lock before the freeze cannot be warned of", st, err)
	}
	if st, err := s.b.Unlock(t.Context(), s.ns, s.o); err != nil || st.Locked || st.Intact {
		t.Errorf("unlock: %+v, %v", st, err)
	}
	if after := c.Ruleset(tr.Inside); after != before {
		t.Errorf("the owner's tables changed from\n%s\nto\n%s", before, after)
	}
	tr.Expect(t, false, quick...)
	for _, f := range releases {
		f()
	}
	s.lock()
	s.one()
	s.unlock()
	s.none()
}

// orphan: a table that outlived its owner is anybody's.
func orphan(t *testing.T, c Config, tr *Traffic) {
	s := c.on(t, tr.Inside)
	leave := func() {
		t.Helper()
		for _, name := range []string{firstName, secondName} {
			owner(t, tr.Inside, inet, name, nftables.TableFlagOwner|nftables.TableFlagPersist)()
		}
		if k := c.Locks(tr.Inside); k != 2 {
			t.Fatalf("%d orphans", k)
		}
		if st := s.state(); st.Intact || st.Locked || !st.Found {
			t.Errorf("orphans: %+v", st)
		}
	}
	leave()
	s.lock()
	s.one()
	tr.Expect(t, true, quick...)
	s.unlock()
	s.none()
	leave()
	s.unlock()
	s.none()
	tr.Expect(t, false, quick...)
}

// ownedElsewhere: what live processes hold in another family cannot be removed, and
// is in nobody's way.
func ownedElsewhere(t *testing.T, c Config, tr *Traffic) {
	for _, fam := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6} {
		for _, name := range []string{firstName, secondName} {
			defer owner(t, tr.Inside, fam, name, nftables.TableFlagOwner)()
		}
	}
	theirs := c.Locks(tr.Inside)
	before := c.Ruleset(tr.Inside)
	c.Locks = func(n *NS) int { return nftLocks(n) - theirs }
	s := c.on(t, tr.Inside)
	if st := s.state(); st.Held || st.Locked || st.Intact {
		t.Errorf("state: %+v", st)
	}
	s.lock()
	s.one()
	tr.Expect(t, true, quick...)
	if res := s.lock(); !res.Already {
		t.Error("locked again beside others' tables")
	}
	s.unlock()
	if k := c.Locks(tr.Inside); k != 0 {
		t.Errorf("%d locks are left", k)
	}
	if after := c.Ruleset(tr.Inside); after != before {
		t.Errorf("the owners' tables changed from\n%s\nto\n%s", before, after)
	}
	tr.Expect(t, false, quick...)
}

// ownersComeAndGo: live processes take and leave our names all the time. They take
// away only what is theirs, so a lock that was reported is there until Unlock.
func ownersComeAndGo(t *testing.T, c Config, tr *Traffic) {
	s := c.on(t, tr.Inside)
	var stop atomic.Bool
	done := make(chan int)
	go func() {
		got := 0
		defer func() { done <- got }()
		for round := 0; !stop.Load(); round++ {
			// An error is ours being there.
			if release, err := tryOwner(tr.Inside, inet, []string{firstName, secondName}[round%2], nftables.TableFlagOwner); err == nil {
				got++
				if err := release(); err != nil {
					t.Error(err)
				}
			}
		}
	}()
	failed := 0
	const tries = 48
	for i := range tries {
		if _, err := s.b.Lock(t.Context(), s.ns, s.o); err != nil {
			failed++
			if netlock.KindOf(err) != netlock.KindHeld {
				t.Errorf("lock: %v", err)
			}
			continue
		}
		if st := s.state(); !st.Locked || !st.Intact {
			t.Errorf("locked, and not locked: %+v", st)
		}
		if i%8 == 0 {
			tr.Expect(t, true, quick...)
		}
		if st := s.unlock(); !st.Intact {
			t.Errorf("unlock found %+v", st)
		}
	}
	stop.Store(true)
	t.Logf("%d of %d locks failed against %d owners", failed, tries, <-done)
	s.none()
	tr.Expect(t, false, quick...)
}

// comesAndGoes: somebody makes and deletes our tables all the time.
func comesAndGoes(t *testing.T, c Config, tr *Traffic) {
	s := c.on(t, tr.Inside)
	var stop atomic.Bool
	done := make(chan int)
	go func() {
		rounds := 0
		defer func() { done <- rounds }()
		for ; !stop.Load(); rounds++ {
			conn, err := nftables.New(nftables.WithNetNSFd(tr.Inside.ns.FD()))
			if err != nil {
				t.Error(err)
				return
			}
			table := &nftables.Table{Name: []string{firstName, secondName}[rounds%2], Family: nftables.TableFamilyINet}
			conn.AddTable(table)
			conn.AddChain(&nftables.Chain{Name: "x", Table: table})
			// Errors are what the other side's haste makes of it.
			_ = conn.Flush()
			conn.DelTable(table)
			_ = conn.Flush()
		}
	}()
	failed := 0
	const tries = 50
	for range tries {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		start := time.Now()
		_, err := s.b.Lock(ctx, s.ns, s.o)
		if err != nil {
			failed++
			t.Logf("lock: %v", err)
		}
		if _, err := s.b.Unlock(ctx, s.ns, s.o); err != nil {
			t.Logf("unlock: %v", err)
		}
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("took %v", took)
		}
		cancel()
	}
	stop.Store(true)
	t.Logf("%d of %d locks failed against %d rounds", failed, tries, <-done)
	s.lock()
	s.one()
	tr.Expect(t, true, quick...)
	s.unlock()
	s.none()
	tr.Expect(t, false, quick...)
}

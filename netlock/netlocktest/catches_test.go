package netlocktest

// The suite has to be able to fail: rule sets that look like a lock and leak.

import (
	"os"
	"slices"
	"strings"
	"testing"
)

func TestMain(m *testing.M) { os.Exit(HostUntouched(m)) }

// whole is what nft's lock looks like.
const whole = `table inet lock {
	chain ingress {
		type filter hook prerouting priority raw; policy drop;
		iif "lo" meta l4proto tcp meta mark 0xc114 accept
		icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
		counter drop
	}
	chain egress {
		type filter hook output priority raw; policy drop;
		oif "lo" meta l4proto tcp meta mark 0xc114 accept
		icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
		counter drop
	}
}
`

func TestSuiteCatches(t *testing.T) {
	Need(t, "nft")
	tr := NewTraffic(t)
	tr.Expect(t, false)
	for _, c := range []struct {
		name     string
		from, to string
		// what has to be noticed, by probe; "" for nothing
		leaks string
	}{
		{"whole", "", "", ""},
		{"open", "counter drop", "counter accept", "tcp4-in tcp6-out udp4-in udp6-in udp4-out ping4-in ping6-out established4-in established6-out lo-tcp4 lo-udp6 forward4 forward6 closed4-in mark-udp4-out"},
		{"mark anywhere", `if "lo" meta l4proto tcp meta mark`, `ifname != "nowhere" meta mark`, "mark-udp4-out mark-udp6-out mark-lo-udp4"},
		{"mark of TCP anywhere outwards", `oif "lo" `, "", "mark-seg4-out mark-seg6-out"},
		{"mark of TCP anywhere inwards", `iif "lo" `, "", "seg4-in seg6-in syn4-in syn6-in"},
		{"mark of UDP on lo", "meta l4proto tcp meta mark", "meta mark", "mark-lo-udp4 mark-lo-udp6"},
		{"known protocols only", "counter drop", "meta l4proto { tcp, udp, icmp, icmpv6 } drop; accept", "other4-in other4-out other6-in other6-out"},
		{"no mark", "accept\n\t\ticmpv6", "drop\n\t\ticmpv6", "mark-lo-tcp4 mark-lo-tcp6"},
		{"no neighbour discovery", "nd-neighbor-solicit, nd-neighbor-advert", "mld-listener-query", "nd-in nd-out"},
		{"no solicitations", "nd-neighbor-solicit, ", "", "nd-in nd-out"},
		{"no advertisements", ", nd-neighbor-advert", "", "nd-in nd-out"},
		{"v4 only", "table inet", "table ip", "udp6-in udp6-out tcp6-in tcp6-out ping6-in established6-in established6-out lo-tcp6 lo-udp6 forward6"},
		{"v6 only", "table inet", "table ip6", "udp4-in udp4-out tcp4-in tcp4-out ping4-out established4-in established4-out lo-tcp4 lo-udp4 forward4"},
		{"input, not prerouting", "hook prerouting priority raw", "hook input priority 0", "forward4 forward6"},
		{"outwards open", "hook output priority raw; policy drop;", "hook output priority raw; policy drop; accept;", "udp4-out udp6-out ping4-out ping6-out established4-out established6-out"},
		{"inwards open", "hook prerouting priority raw; policy drop;", "hook prerouting priority raw; policy drop; accept;", "udp4-in udp6-in ping4-in ping6-in established4-in established6-in forward4"},
		{"lo open", `iif "lo" meta l4proto tcp meta mark 0xc114`, `iif "lo"`, ""}, // the way out still stops it
		{"established open", "counter drop", "tcp flags ack accept; counter drop", "established4-in established4-out established6-in"},
		{"dormant", "table inet lock {", "table inet lock { flags dormant;", "udp4-in tcp6-in"},
		// Last: it ends the established connections.
		{"reject", "counter drop", "tcp flags rst accept; meta l4proto tcp reject with tcp reset; counter drop", "closed4-in tcp4-in tcp6-in"},
	} {
		t.Run(c.name, func(t *testing.T) {
			rules := whole
			if c.from != "" {
				if rules = strings.ReplaceAll(whole, c.from, c.to); rules == whole {
					t.Fatalf("nothing to change: %q", c.from)
				}
			}
			tr.Inside.Run(rules+marks, "nft", "-f", "-")
			faults := tr.Faults(true)
			unnoticed := func(name string) bool {
				return !slices.ContainsFunc(faults, func(f string) bool { return strings.HasPrefix(f, name+":") })
			}
			leaks := strings.Fields(c.leaks)
			for range 2 { // what leaks late on a busy machine reads as blocked
				if slices.ContainsFunc(leaks, unnoticed) {
					faults = append(faults, tr.Faults(true)...)
				}
			}
			tr.Inside.Run("flush ruleset", "nft", "-f", "-")
			if c.name != "reject" {
				tr.Expect(t, false)
			}
			if c.leaks == "" && len(faults) > 0 {
				t.Errorf("noticed in a lock that is whole: %v", faults)
			}
			for _, name := range leaks {
				if unnoticed(name) {
					t.Errorf("%s leaks and was not noticed, only %q", name, faults)
				}
			}
		})
	}
}

// A lock behind conntrack stops the packets too, but conntrack sees them go.
func TestSuiteCatchesConntrack(t *testing.T) {
	Need(t, "nft")
	for _, c := range []struct {
		name, priority string
		moved          int
	}{{"raw", "raw", 0}, {"filter", "filter", 8}} {
		t.Run(c.name, func(t *testing.T) {
			tr := NewTraffic(t)
			trackConnections(tr.Inside)
			f := tr.newFarewells()
			if m := f.moved(anyFarewell); m != nil {
				t.Fatalf("before: %v", m)
			}
			tr.Inside.Run(strings.ReplaceAll(whole, "priority raw", "priority "+c.priority), "nft", "-f", "-")
			f.say()
			tr.Expect(t, true)
			if m := f.moved(anyFarewell); len(m) != c.moved {
				t.Errorf("moved: %v", m)
			}
		})
	}
}

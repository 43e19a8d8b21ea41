package netlock

import (
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

func TestParseRule(t *testing.T) {
	p := netip.MustParsePrefix
	for text, want := range map[string]Rule{
		"tcp":                                  {Proto: "tcp"},
		"ip tcp":                               {Family: "ip", Proto: "tcp"},
		"ip6 udp":                              {Family: "ip6", Proto: "udp"},
		"tcp dport 22":                         {Proto: "tcp", Dport: 22},
		"udp sport 53":                         {Proto: "udp", Sport: 53},
		"sctp sport 1 dport 65535":             {Proto: "sctp", Sport: 1, Dport: 65535},
		"tcp dport 2 sport 1":                  {Proto: "tcp", Sport: 1, Dport: 2},
		"tcp sport 1 tcp dport 2":              {Proto: "tcp", Sport: 1, Dport: 2},
		"icmp":                                 {Proto: "icmp"},
		"ip6 icmpv6":                           {Family: "ip6", Proto: "icmpv6"},
		"ip daddr 10.0.0.5 tcp dport 2049":     {Family: "ip", Daddr: p("10.0.0.5/32"), Proto: "tcp", Dport: 2049},
		"ip saddr 10.0.0.0/8 daddr 10.0.0.5":   {Family: "ip", Saddr: p("10.0.0.0/8"), Daddr: p("10.0.0.5/32")},
		"ip saddr 10.0.0.1 ip daddr 10.0.0.2":  {Family: "ip", Saddr: p("10.0.0.1/32"), Daddr: p("10.0.0.2/32")},
		"ip6 daddr fd00::/8 udp":               {Family: "ip6", Daddr: p("fd00::/8"), Proto: "udp"},
		"  ip6\tsaddr  fe80::1\ttcp sport  9 ": {Family: "ip6", Saddr: p("fe80::1/128"), Proto: "tcp", Sport: 9},
	} {
		got, err := ParseRule(text)
		if err != nil || got != want {
			t.Errorf("%q: %+v, %v; %+v is wanted", text, got, err, want)
		}
	}
}

func TestParseRuleErrors(t *testing.T) {
	for text, col := range map[string]int{
		"": 1, "   ": 4, "x": 1, "tcp dport": 10, "tcp dport x": 11, "tcp dport 0": 11, "tcp dport 022": 11, "tcp dport +22": 11, "tcp dport -1": 11,
		"tcp dport 65536": 11, "tcp dport 22-80": 11, "tcp dport {22}": 11, "dport 22": 1, "ip dport 22": 4, "icmp dport 22": 6,
		"tcp dport 22 dport 23": 14, "tcp udp": 5, "tcp ip": 5, "ip ip6": 4, "ip": 3, "ip6": 4, "ip saddr": 9, "saddr 10.0.0.1": 1, "tcp saddr 10.0.0.1": 5,
		"ip saddr x": 10, "ip saddr 10.0.0.1 saddr 10.0.0.2": 19, "ip saddr fd00::1": 10, "ip6 saddr 10.0.0.1": 11,
		"ip saddr 10.0.0.1/8": 10, "ip saddr 0.0.0.0/0": 10, "ip6 daddr ::/0": 11, "ip saddr 10.0.0.0/33": 10, "ip6 saddr fe80::1%lo": 11, "ip6 saddr ::ffff:10.0.0.1": 11, "ip6 saddr ::ffff:10.0.0.0/120": 11,
		"ip6 icmp": 5, "ip icmpv6": 4, "tcp dport 22 accept": 14, "tcp;": 1, "TCP dport 22": 1, "tcp\ndport 22": 1, "tcp dport 22\x00": 11,
		strings.Repeat("x", MaxRuleLen+1): MaxRuleLen + 1,
	} {
		got, err := ParseRule(text)
		var e *RuleError
		if !errors.As(err, &e) || got != (Rule{}) {
			t.Errorf("%q: %+v, %v", text, got, err)
			continue
		}
		if e.Column != col {
			t.Errorf("%q: column %d; %d is wanted: %v", text, e.Column, col, err)
		}
	}
}

func TestRuleFamilies(t *testing.T) {
	for text, want := range map[string][2]bool{
		"tcp": {true, true}, "ip tcp": {true, false}, "ip6 tcp": {false, true}, "icmp": {true, false}, "icmpv6": {false, true},
		"ip daddr 10.0.0.1": {true, false}, "ip6 daddr fd00::1": {false, true},
	} {
		r, err := ParseRule(text)
		if err != nil || r.V4() != want[0] || r.V6() != want[1] {
			t.Errorf("%q: %v %v, %v", text, r.V4(), r.V6(), err)
		}
	}
}

func TestExpand(t *testing.T) {
	parse := func(texts ...string) (out []Rule) {
		for _, s := range texts {
			r, err := ParseRule(s)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, r)
		}
		return out
	}
	got := Expand(parse("tcp dport 22", "icmp", "ip saddr 10.0.0.1 daddr 10.0.0.2 udp sport 1 dport 2", "tcp sport 22", "tcp dport 22", "tcp sport 80", "ip6 tcp"))
	want := parse("tcp dport 22", "tcp sport 22", "icmp", "ip saddr 10.0.0.1 daddr 10.0.0.2 udp sport 1 dport 2", "ip saddr 10.0.0.2 daddr 10.0.0.1 udp sport 2 dport 1",
		"tcp sport 80", "tcp dport 80", "ip6 tcp")
	want[len(want)-2].Answer = true // and not where the other direction was given too
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%v; %v is wanted", got, want)
	}
	if got := Expand(nil); len(got) != 0 {
		t.Errorf("%v", got)
	}
}

// What is taken is bounded, can be written down and read again, and its mirror's
// mirror is itself.
func FuzzParseRule(f *testing.F) {
	for _, s := range []string{"tcp dport 22", "ip daddr 10.0.0.5 tcp dport 2049", "ip6 saddr fd00::/8 udp sport 53 dport 53", "ip6 icmpv6", "ip saddr ::ffff:1.2.3.4", "ip6 saddr fe80::1%lo"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRule(s)
		if err != nil {
			var e *RuleError
			if !errors.As(err, &e) || e.Column < 1 || e.Column > len(s)+1 || strings.ContainsAny(err.Error(), "\r\n") {
				t.Errorf("%q: %v", s, err)
			}
			return
		}
		if r == (Rule{}) {
			t.Fatalf("%q matches everything", s)
		}
		if !r.V4() && !r.V6() {
			t.Errorf("%q matches nothing", s)
		}
		if again, err := ParseRule(r.String()); err != nil || again != r {
			t.Errorf("%q: written as %q, read as %+v, %v", s, r, again, err)
		}
		if m := r.Mirror(); m.Mirror() != r {
			t.Errorf("%q: mirrored twice: %+v", s, m.Mirror())
		} else if again, err := ParseRule(m.String()); err != nil || again != m {
			t.Errorf("%q: its mirror %q is read as %+v, %v", s, m, again, err)
		}
		if (r.Family == "ip") != (r.V4() && !r.V6()) && r.Proto != "icmp" {
			t.Errorf("%q: family %q", s, r.Family)
		}
		for _, p := range []netip.Prefix{r.Saddr, r.Daddr} {
			if p.IsValid() && (r.Family == "" || p.Addr().Is4() != (r.Family == "ip") || p != p.Masked()) {
				t.Errorf("%q: %v in family %q", s, p, r.Family)
			}
		}
	})
}

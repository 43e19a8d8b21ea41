package netlock

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Rule is one entry of the allow list: what passes in spite of the lock. It
// names a flow by the direction of its first packet; the answers, with source
// and destination exchanged, pass too. An unset field matches everything.
type Rule struct {
	// Family is "ip" or "ip6"; empty for both.
	Family string
	// Proto is "tcp", "udp", "sctp", "icmp" or "icmpv6"; empty for all.
	Proto        string
	Saddr, Daddr netip.Prefix
	Sport, Dport uint16
	// Answer excludes a connection's first packet, a bare SYN. Expand sets it in the
	// mirror of a TCP rule: a peer that chose its source port well could otherwise
	// begin connections to every port.
	Answer bool
}

// RuleError is a mistake in an allow rule. Column counts bytes from 1.
type RuleError struct {
	Rule   string
	Column int
	Msg    string
}

func (e *RuleError) Error() string {
	return fmt.Sprintf("allow rule %q: column %d: %s", e.Rule, e.Column, e.Msg)
}

// MaxRuleLen bounds the text of one rule, in bytes.
const MaxRuleLen = 256

// ParseRule reads a rule in nft's words: a family with "saddr A", "daddr A", then
// a protocol with "sport N", "dport N", every part optional but not all. The word
// that a clause begins with need not be repeated: "ip saddr A daddr B tcp dport N".
func ParseRule(s string) (Rule, error) {
	var r Rule
	toks := tokens(s)
	fail := func(i int, format string, args ...any) (Rule, error) {
		col := len(s) + 1
		if i < len(toks) {
			col = toks[i].col
		}
		return Rule{}, &RuleError{Rule: s, Column: col, Msg: fmt.Sprintf(format, args...)}
	}
	switch {
	case len(s) > MaxRuleLen:
		return Rule{}, &RuleError{Rule: strings.ToValidUTF8(s[:32], "") + "…", Column: MaxRuleLen + 1, Msg: fmt.Sprintf("longer than %d bytes", MaxRuleLen)}
	case len(toks) == 0:
		return fail(0, "empty rule")
	}
	context := "" // the clause we are in: a family or a protocol
	for i := 0; i < len(toks); i++ {
		w := toks[i].text
		switch w {
		case "ip", "ip6":
			if r.Family != "" && r.Family != w {
				return fail(i, "%q contradicts %q", w, r.Family)
			}
			if r.Proto != "" {
				return fail(i, "%q must stand before the protocol", w)
			}
			r.Family, context = w, w
			if i+1 == len(toks) {
				return fail(i+1, "want saddr, daddr or a protocol after %q", w)
			}
		case "tcp", "udp", "sctp", "icmp", "icmpv6":
			if r.Proto != "" && r.Proto != w {
				return fail(i, "%q contradicts %q", w, r.Proto)
			}
			if (w == "icmp" && r.Family == "ip6") || (w == "icmpv6" && r.Family == "ip") {
				return fail(i, "%q contradicts %q", w, r.Family)
			}
			r.Proto, context = w, w
		case "saddr", "daddr":
			if context != "ip" && context != "ip6" {
				return fail(i, "%q must follow ip or ip6", w)
			}
			dst := &r.Saddr
			if w == "daddr" {
				dst = &r.Daddr
			}
			if dst.IsValid() {
				return fail(i, "%q given twice", w)
			}
			if i++; i == len(toks) {
				return fail(i, "want an address after %q", w)
			}
			p, err := parsePrefix(toks[i].text)
			if err != nil {
				return fail(i, "%v", err)
			}
			if p.Addr().Is4() != (r.Family == "ip") {
				return fail(i, "%q is not an address of family %s", toks[i].text, r.Family)
			}
			*dst = p
		case "sport", "dport":
			if context != "tcp" && context != "udp" && context != "sctp" {
				return fail(i, "%q must follow tcp, udp or sctp", w)
			}
			dst := &r.Sport
			if w == "dport" {
				dst = &r.Dport
			}
			if *dst != 0 {
				return fail(i, "%q given twice", w)
			}
			if i++; i == len(toks) {
				return fail(i, "want a port after %q", w)
			}
			t := toks[i].text
			n, err := strconv.ParseUint(t, 10, 16)
			if err != nil || n == 0 || t[0] == '+' || t[0] == '0' {
				return fail(i, "%q is not a port, 1 to 65535", t)
			}
			*dst = uint16(n)
		default:
			return fail(i, "unknown word %q; want ip, ip6, tcp, udp, sctp, icmp, icmpv6, saddr, daddr, sport or dport", w)
		}
	}
	return r, nil
}

type token struct {
	text string
	col  int
}

func tokens(s string) []token {
	var out []token
	for i := 0; i < len(s); {
		if s[i] == ' ' || s[i] == '\t' {
			i++
			continue
		}
		j := i
		for j < len(s) && s[j] != ' ' && s[j] != '\t' {
			j++
		}
		out = append(out, token{s[i:j], i + 1})
		i = j
	}
	return out
}

func parsePrefix(s string) (netip.Prefix, error) {
	if !strings.Contains(s, "/") {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" || a.Is4In6() {
			return netip.Prefix{}, fmt.Errorf("%q is not an address", s)
		}
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil || p.Addr().Is4In6():
		return netip.Prefix{}, fmt.Errorf("%q is not an address or a prefix", s)
	case p.Bits() == 0:
		return netip.Prefix{}, fmt.Errorf("%q matches every address: leave it out", s)
	case p != p.Masked():
		return netip.Prefix{}, fmt.Errorf("%q has bits set outside its prefix; want %s", s, p.Masked())
	}
	return p, nil
}

// Mirror is the rule with source and destination exchanged.
func (r Rule) Mirror() Rule {
	r.Saddr, r.Daddr = r.Daddr, r.Saddr
	r.Sport, r.Dport = r.Dport, r.Sport
	return r
}

// V4 and V6 tell which of the two families the rule can match.
func (r Rule) V4() bool { return r.Family != "ip6" && r.Proto != "icmpv6" }

// V6 is V4 for IPv6.
func (r Rule) V6() bool { return r.Family != "ip" && r.Proto != "icmp" }

// String is the rule in ParseRule's words, which have none for Answer.
func (r Rule) String() string {
	var w []string
	if r.Family != "" && !r.Saddr.IsValid() && !r.Daddr.IsValid() {
		w = append(w, r.Family)
	}
	addr := func(key string, p netip.Prefix) {
		if !p.IsValid() {
			return
		}
		text := p.String()
		if p.IsSingleIP() {
			text = p.Addr().String()
		}
		w = append(w, r.Family, key, text)
	}
	addr("saddr", r.Saddr)
	addr("daddr", r.Daddr)
	if r.Proto != "" && r.Sport == 0 && r.Dport == 0 {
		w = append(w, r.Proto)
	}
	if r.Sport != 0 {
		w = append(w, r.Proto, "sport", strconv.Itoa(int(r.Sport)))
	}
	if r.Dport != 0 {
		w = append(w, r.Proto, "dport", strconv.Itoa(int(r.Dport)))
	}
	return strings.Join(w, " ")
}

// UnmarshalText is ParseRule, for decoders of configuration files.
func (r *Rule) UnmarshalText(b []byte) error {
	p, err := ParseRule(string(b))
	if err != nil {
		return err
	}
	*r = p
	return nil
}

// Expand returns every rule and its mirror, in order and without repeats: what
// both chains of a lock accept.
func Expand(rules []Rule) []Rule {
	var out []Rule
	given := make(map[Rule]bool, len(rules))
	for _, r := range rules {
		given[r] = true
	}
	seen := make(map[Rule]bool, 2*len(rules))
	for _, r := range rules {
		m := r.Mirror()
		m.Answer = m.Proto == "tcp" && !given[m]
		for _, x := range []Rule{r, m} {
			if !seen[x] {
				seen[x] = true
				out = append(out, x)
			}
		}
	}
	return out
}

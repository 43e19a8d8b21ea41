package iptables

// The pure part: what a lock looks like as iptables-save prints it, what of it is
// there, and the iptables-restore input that changes one into the other.

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock"
)

// Our chains. Every jump goes to one of them.
const (
	chainIn  = "CRIU-NETLOCK-IN"
	chainOut = "CRIU-NETLOCK-OUT"
)

// criuMark marks the TCP segments that CRIU injects over lo.
const criuMark = "0xc114"

// hooks are the built-in chains of a table from which our chains are jumped to.
func hooks(table string) [][2]string {
	if table == "raw" {
		return [][2]string{{"PREROUTING", chainIn}, {"OUTPUT", chainOut}}
	}
	return [][2]string{{"INPUT", chainIn}, {"FORWARD", chainIn}, {"OUTPUT", chainOut}}
}

// sayable tells whether a rule of iptables can name a link and mean it alone: a + at
// the end means every link with that beginning, and other characters are the parser's.
func sayable(link string) bool {
	for i := range len(link) {
		switch c := link[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_':
		case i > 0 && (c == '.' || c == '-'):
		default:
			return false
		}
	}
	return link != ""
}

func ours(chain string) bool { return chain == chainIn || chain == chainOut }

// specs is what one of our chains holds, but for the last rule, in the words and the
// order of iptables-save. lo is the name of the namespace's loopback.
func specs(chain, lo string, v6 bool, allow []netlock.Rule) []string {
	dev := "-i " + lo
	if chain == chainOut {
		dev = "-o " + lo
	}
	out := []string{dev + " -p tcp -m mark --mark " + criuMark + " -j ACCEPT"}
	if v6 {
		// Without neighbour discovery a peer gives an old IPv6 connection up.
		for _, typ := range []string{"135", "136"} {
			out = append(out, "-p ipv6-icmp -m icmp6 --icmpv6-type "+typ+" -j ACCEPT")
		}
	}
	for _, r := range netlock.Expand(allow) {
		if (v6 && r.V6()) || (!v6 && r.V4()) {
			out = append(out, allowSpec(r))
		}
	}
	return out
}

func allowSpec(r netlock.Rule) string {
	var w []string
	addr := func(flag string, p netip.Prefix) {
		if p.IsValid() {
			w = append(w, flag, p.String())
		}
	}
	addr("-s", r.Saddr)
	addr("-d", r.Daddr)
	if r.Proto != "" {
		name := r.Proto
		if name == "icmpv6" {
			name = "ipv6-icmp"
		}
		w = append(w, "-p", name)
	}
	if r.Sport != 0 || r.Dport != 0 || r.Answer {
		w = append(w, "-m", r.Proto)
	}
	if r.Sport != 0 {
		w = append(w, "--sport", strconv.Itoa(int(r.Sport)))
	}
	if r.Dport != 0 {
		w = append(w, "--dport", strconv.Itoa(int(r.Dport)))
	}
	if r.Answer { // ! --syn, as it is printed
		w = append(w, "!", "--tcp-flags", "FIN,SYN,RST,ACK", "SYN")
	}
	return strings.Join(append(w, "-j", "ACCEPT"), " ")
}

// dropSpec is the last rule of both chains, unless the first of them holds.
func dropSpec(comment string) string { return `-m comment --comment "` + comment + `" -j DROP` }

// rule is one line of iptables-save.
type rule struct {
	chain   string
	spec    string // without "-A CHAIN"
	packets uint64
	match
	// leads: it is a way into one of our chains, whatever else it says.
	leads bool
	// Of a rule that was read from nf_tables:
	table  string
	handle uint64
	opaque bool // something in it is unknown
}

// match is what a rule says, as far as a lock uses it. What else it says is in rest,
// so that such a rule is equal to none of ours.
type match struct {
	in, out, src, dst string
	proto             string
	sport, dport      string
	icmpType, mark    string
	comment           string
	target            string // of -j or -g
	queue             string // of NFQUEUE
	rest              string
}

// parseMatch reads a rule's words, which differ between versions of iptables. A word
// in a comment is no option: what it is taken for decides about somebody's rule.
func parseMatch(spec string) (m match) {
	words, ok := splitWords(spec)
	if !ok {
		m.rest = spec
	}
	fields := map[string]*string{
		"-i": &m.in, "-o": &m.out, "-s": &m.src, "-d": &m.dst, "-p": &m.proto, "--sport": &m.sport, "--dport": &m.dport,
		"--icmpv6-type": &m.icmpType, "--mark": &m.mark, "--comment": &m.comment, "-j": &m.target, "-g": &m.target,
		"--queue-num": &m.queue,
	}
	for i := 0; i < len(words); i++ {
		key, value := words[i], ""
		if i+1 < len(words) {
			value = words[i+1]
		}
		dst := fields[key]
		switch {
		case key == "-m" && slices.Contains([]string{"tcp", "udp", "sctp", "icmp6", "mark", "comment"}, value):
			i++ // says nothing without its options
		case dst == nil || *dst != "" || value == "":
			m.rest += key + " "
		default:
			*dst = value
			i++
			if key == "-g" {
				m.rest += "-g "
			}
		}
	}
	// Versions of iptables differ in how they print these.
	m.proto = protoName(m.proto)
	m.mark = strings.TrimSuffix(m.mark, "/0xffffffff")
	m.src, m.dst = canonicalPrefix(m.src), canonicalPrefix(m.dst)
	return m
}

// protoName is a protocol as we write it, if it is one that we write.
func protoName(s string) string {
	if name, ok := map[string]string{"6": "tcp", "17": "udp", "132": "sctp", "1": "icmp", "58": "ipv6-icmp", "icmpv6": "ipv6-icmp"}[s]; ok {
		return name
	}
	return s
}

func canonicalPrefix(s string) string {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.PrefixFrom(a, a.BitLen()).String()
	}
	if p, err := netip.ParsePrefix(s); err == nil {
		return p.String()
	}
	return s
}

// splitWords splits as iptables-restore does: at blanks, with "quoted words" and a \
// before a character that means itself.
func splitWords(s string) (out []string, ok bool) {
	var (
		w            []byte
		quoted, open bool
	)
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '\\' && quoted && i+1 < len(s):
			i++
			w = append(w, s[i])
		case c == '"':
			quoted, open = !quoted, true
		case c == ' ' && !quoted:
			if open {
				out = append(out, string(w))
			}
			w, open = nil, false
		default:
			w, open = append(w, c), true
		}
	}
	if open {
		out = append(out, string(w))
	}
	return out, !quoted
}

// table is what iptables-save prints of one table.
type table struct {
	name   string
	chains []string
	rules  []rule
}

// parseSave reads the output of iptables-save, with or without counters.
func parseSave(s string) []table {
	var out []table
	for _, line := range strings.Split(s, "\n") {
		var packets uint64
		if strings.HasPrefix(line, "[") {
			count, rest, ok := strings.Cut(line, "] ")
			if !ok {
				continue
			}
			p, _, _ := strings.Cut(count[1:], ":")
			packets, _ = strconv.ParseUint(p, 10, 64)
			line = rest
		}
		switch {
		case strings.HasPrefix(line, "*"):
			out = append(out, table{name: line[1:]})
		case len(out) == 0:
		case strings.HasPrefix(line, ":"):
			name, _, _ := strings.Cut(line[1:], " ")
			out[len(out)-1].chains = append(out[len(out)-1].chains, name)
		case strings.HasPrefix(line, "-A "):
			chain, spec, _ := strings.Cut(line[3:], " ")
			out[len(out)-1].rules = append(out[len(out)-1].rules, newRule(chain, spec, packets))
		}
	}
	return out
}

func newRule(chain, spec string, packets uint64) rule {
	m := parseMatch(spec)
	return rule{chain: chain, spec: spec, packets: packets, match: m, leads: ours(m.target)}
}

// jumps are the rules outside our chains that lead into one.
func (t table) jumps() (out []rule) {
	for _, r := range t.rules {
		if r.leads && !ours(r.chain) {
			out = append(out, r)
		}
	}
	return out
}

// of returns the rules of a chain.
func (t table) of(chain string) (out []rule) {
	for _, r := range t.rules {
		if r.chain == chain {
			out = append(out, r)
		}
	}
	return out
}

// found tells whether anything of ours is in the table.
func (t table) found() bool { return slices.ContainsFunc(t.chains, ours) }

// view is what a family's table holds of a lock.
type view struct {
	locks   bool   // it does drop, in and out, whatever else is there
	why     string // what keeps it from being intact
	since   time.Time
	caller  netlock.Caller
	comment string // the metadata as it stands there
	in, out uint64
	queue   queue // of mode hold
}

// judge compares a table with the lock that we would put there. dead says why
// nothing in the table takes effect, "" if it does.
func (t table) judge(v6 bool, lo string, allow []netlock.Rule, dead string) view {
	v := view{locks: true}
	blame := func(locks bool, format string, args ...any) {
		v.locks = v.locks && locks
		if v.why == "" {
			v.why = "table " + t.name + " " + fmt.Sprintf(format, args...)
		}
	}
	if dead != "" {
		blame(false, "%s", dead)
	}
	if !sayable(lo) {
		blame(false, "cannot name the loopback, %q", lo)
	}
	drop := match{target: "DROP"}
	for _, chain := range []string{chainIn, chainOut} {
		if !slices.Contains(t.chains, chain) {
			blame(false, "has no chain %s", chain)
			continue
		}
		var want []match
		for _, s := range specs(chain, lo, v6, allow) {
			want = append(want, parseMatch(s))
		}
		got, drops, end := t.of(chain), false, drop
		if n := len(want); chain == chainIn && n < len(got) {
			// Which queue it is, is the lock's own affair.
			if bare := got[n].match; got[n].comment != "" {
				if bare.comment = ""; bare.isQueue() {
					end, v.queue = bare, queue(bare.queue)
				}
			}
		}
		want = append(want, end)
		for i, r := range got {
			bare := r.match
			bare.comment = ""
			switch {
			case i < len(want) && bare == want[i]:
			case drops:
				blame(true, "has more rules in chain %s", chain)
			case !slices.Contains(want, bare):
				blame(false, "has a foreign rule in chain %s", chain)
			default:
				blame(true, "has rules of chain %s twice or out of order", chain)
			}
			if bare != end {
				if r.comment != "" {
					blame(true, "has comments in chain %s that are not ours", chain)
				}
				// Of a lock that was being opened they say whose it was.
				if since, caller, err := netlock.ParseComment(r.comment); err == nil && v.since.IsZero() {
					v.since, v.caller = since, caller
				}
				continue
			}
			if chain == chainIn {
				v.in += r.packets
			} else {
				v.out += r.packets
			}
			if drops {
				continue
			}
			drops = true
			since, caller, err := netlock.ParseComment(r.comment)
			if err != nil {
				blame(true, "has %v in chain %s", err, chain)
			} else if v.comment == "" {
				v.since, v.caller, v.comment = since, caller, r.comment
			}
		}
		if !drops {
			blame(false, "does not drop in chain %s", chain)
		} else if len(got) < len(want) {
			blame(true, "lacks rules in chain %s", chain)
		}
	}
	for _, h := range hooks(t.name) {
		if rs := t.of(h[0]); len(rs) == 0 || rs[0].match != (match{target: h[1]}) {
			blame(false, "does not begin chain %s with a jump to %s", h[0], h[1])
		}
	}
	if have, want := len(t.jumps()), len(hooks(t.name)); have != want {
		blame(true, "jumps to our chains %d times, not %d", have, want)
	}
	return v
}

// whole tells whether a lock that was put in this moment is there as a whole, though
// iptables-nft may have written its accepts in expressions that we do not know: nobody
// else's rule is in its chains or before its jumps. It is no proof for later.
func (t table) whole(lo string, v6 bool, allow []netlock.Rule, q queue, comment string) bool {
	for _, chain := range []string{chainIn, chainOut} {
		want := append(specs(chain, lo, v6, allow), lastSpec(chain, q, comment))
		got := t.of(chain)
		if len(got) != len(want) {
			return false
		}
		for i, s := range want {
			m := parseMatch(s)
			known := got[i].match == m
			if !known && (!got[i].opaque || i == len(want)-1 || got[i].target != m.target) {
				return false
			}
		}
	}
	return len(t.surplus()) == 0 && len(t.jumps()) == len(hooks(t.name))
}

// surplus are the ways into our chains but for the ones that a lock has.
func (t table) surplus() (out []rule) {
	first := map[string]bool{}
	for _, r := range t.rules {
		is := false
		for _, h := range hooks(t.name) {
			is = is || !first[r.chain] && r.chain == h[0] && r.match == match{target: h[1]}
		}
		first[r.chain] = true
		if r.leads && !ours(r.chain) && !is {
			out = append(out, r)
		}
	}
	return out
}

// unhook deletes every jump to our chains by what it says. Never by its number: by
// now that could be another rule's. What was read from nf_tables has no words, and is
// deleted by its handle.
func (t table) unhook(b *strings.Builder) {
	for _, r := range t.jumps() {
		if r.spec == "" {
			continue
		}
		fmt.Fprintf(b, "-D %s %s\n", r.chain, r.spec)
	}
}

// lockInput is what iptables-restore --noflush makes a lock from: one commit. Over
// what is there of us it replaces it in the same commit.
func (t table) lockInput(v6 bool, lo string, allow []netlock.Rule, q queue, comment string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "*%s\n", t.name)
	// Naming a chain makes it, or empties it.
	fmt.Fprintf(&b, ":%s - [0:0]\n:%s - [0:0]\n", chainIn, chainOut)
	t.unhook(&b)
	for _, chain := range []string{chainIn, chainOut} {
		for _, s := range append(specs(chain, lo, v6, allow), lastSpec(chain, q, comment)) {
			fmt.Fprintf(&b, "-A %s %s\n", chain, s)
		}
	}
	for _, h := range hooks(t.name) {
		fmt.Fprintf(&b, "-I %s 1 -j %s\n", h[0], h[1])
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

// unlockInput removes all that found found, in one commit.
func (t table) unlockInput() string {
	var b strings.Builder
	fmt.Fprintf(&b, "*%s\n", t.name)
	t.unhook(&b)
	for _, flag := range []string{"-F", "-X"} {
		for _, c := range t.chains {
			if ours(c) {
				fmt.Fprintf(&b, "%s %s\n", flag, c)
			}
		}
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

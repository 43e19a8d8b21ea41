package iptables

// The pure part: what a lock looks like as iptables-save prints it, what of it is
// there, and the iptables-restore input that changes one into the other.

import (
	"errors"
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

// formatVersion is the first word of a lock's metadata; it changes with the rules.
const formatVersion = "1"

// criuMark marks the TCP segments that CRIU injects over lo.
const criuMark = "0xc114"

// hooks are the built-in chains of a table from which our chains are jumped to.
func hooks(table string) [][2]string {
	if table == "raw" {
		return [][2]string{{"PREROUTING", chainIn}, {"OUTPUT", chainOut}}
	}
	return [][2]string{{"INPUT", chainIn}, {"FORWARD", chainIn}, {"OUTPUT", chainOut}}
}

func ours(chain string) bool { return chain == chainIn || chain == chainOut }

// specs is what one of our chains holds, but for the last rule, in the words and the
// order of iptables-save.
func specs(chain string, v6 bool, allow []netlock.Rule) []string {
	dev := "-i lo"
	if chain == chainOut {
		dev = "-o lo"
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
	if r.Sport != 0 || r.Dport != 0 {
		w = append(w, "-m", r.Proto)
	}
	if r.Sport != 0 {
		w = append(w, "--sport", strconv.Itoa(int(r.Sport)))
	}
	if r.Dport != 0 {
		w = append(w, "--dport", strconv.Itoa(int(r.Dport)))
	}
	return strings.Join(append(w, "-j", "ACCEPT"), " ")
}

const (
	dropHead = `-m comment --comment "criu-netlock `
	dropTail = `" -j DROP`
)

// dropSpec is the last rule, with the lock's metadata.
func dropSpec(now time.Time, c netlock.Caller) string {
	return dropHead + formatVersion + " " + now.UTC().Format(time.RFC3339) + " " + strconv.Itoa(c.PID) + " " + cleanName(c.Name) + dropTail
}

// cleanName keeps a task's name, which the task chooses, from ending the comment.
func cleanName(s string) string {
	b := []byte(s)
	for i, c := range b {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '_', c == '-':
		default:
			b[i] = '_'
		}
	}
	if len(b) == 0 {
		return "-"
	}
	return string(b[:min(len(b), 15)])
}

func parseDrop(spec string) (since time.Time, c netlock.Caller, err error) {
	bad := errors.New("no metadata of ours")
	if !strings.HasPrefix(spec, dropHead) || !strings.HasSuffix(spec, dropTail) {
		return since, c, bad
	}
	f := strings.Split(spec[len(dropHead):len(spec)-len(dropTail)], " ")
	if len(f) != 4 || f[0] != formatVersion {
		return since, c, bad
	}
	since, err = time.Parse(time.RFC3339, f[1])
	if err != nil {
		return since, c, bad
	}
	if c.PID, err = strconv.Atoi(f[2]); err != nil || cleanName(f[3]) != f[3] {
		return since, netlock.Caller{}, bad
	}
	c.Name = f[3]
	return since, c, nil
}

// rule is one line of iptables-save.
type rule struct {
	chain   string
	spec    string // without "-A CHAIN"
	packets uint64
}

// target is the chain that a rule goes to, "" if none of ours.
func (r rule) target() string {
	f := strings.Fields(r.spec)
	for i := 0; i+1 < len(f); i++ {
		if (f[i] == "-j" || f[i] == "-g") && ours(f[i+1]) {
			return f[i+1]
		}
	}
	return ""
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
			out[len(out)-1].rules = append(out[len(out)-1].rules, rule{chain, spec, packets})
		}
	}
	return out
}

// found tells whether anything of ours is in the table.
func (t table) found() bool {
	return slices.ContainsFunc(t.chains, ours) || slices.ContainsFunc(t.rules, func(r rule) bool { return r.target() != "" })
}

// view is what a family's table holds of a lock.
type view struct {
	locks   bool
	why     string // what keeps it from being intact
	since   time.Time
	caller  netlock.Caller
	in, out uint64
}

// judge compares a table with the lock that we would put there.
func (t table) judge(v6 bool, allow []netlock.Rule) view {
	v := view{locks: true}
	blame := func(locks bool, format string, args ...any) {
		v.locks = v.locks && locks
		if v.why == "" {
			v.why = "table " + t.name + " " + fmt.Sprintf(format, args...)
		}
	}
	for _, chain := range []string{chainIn, chainOut} {
		if !slices.Contains(t.chains, chain) {
			blame(false, "has no chain %s", chain)
			continue
		}
		var got []string
		for _, r := range t.rules {
			if r.chain != chain {
				continue
			}
			got = append(got, r.spec)
			if strings.HasSuffix(r.spec, "-j DROP") {
				if chain == chainIn {
					v.in += r.packets
				} else {
					v.out += r.packets
				}
			}
		}
		want := specs(chain, v6, allow)
		drop := slices.IndexFunc(got, func(s string) bool { return strings.HasPrefix(s, dropHead) && strings.HasSuffix(s, dropTail) })
		if drop < 0 {
			blame(false, "does not drop in chain %s", chain)
			continue
		}
		for i, s := range got[:drop] {
			if !slices.Contains(want, s) {
				blame(false, "has a foreign rule in chain %s", chain)
			} else if i >= len(want) || s != want[i] {
				blame(true, "has rules of chain %s twice or out of order", chain)
			}
		}
		if drop < len(want) {
			blame(true, "lacks rules in chain %s", chain)
		}
		if len(got) > drop+1 {
			blame(true, "has more rules in chain %s", chain)
		}
		since, caller, err := parseDrop(got[drop])
		if err != nil {
			blame(true, "has %v in chain %s", err, chain)
		}
		v.since, v.caller = since, caller
	}
	want := hooks(t.name)
	for _, h := range want {
		first := slices.IndexFunc(t.rules, func(r rule) bool { return r.chain == h[0] })
		if first < 0 || t.rules[first].spec != "-j "+h[1] {
			blame(false, "does not begin chain %s with a jump to %s", h[0], h[1])
		}
	}
	refs := 0
	for _, r := range t.rules {
		if r.target() != "" {
			refs++
		}
	}
	if refs > len(want) {
		blame(true, "jumps to our chains %d times, not %d", refs, len(want))
	}
	return v
}

// unhook deletes every jump to our chains.
func (t table) unhook(b *strings.Builder) {
	for _, r := range t.rules {
		if r.target() != "" && !ours(r.chain) {
			fmt.Fprintf(b, "-D %s %s\n", r.chain, r.spec)
		}
	}
}

// lockInput is what iptables-restore --noflush makes a lock from: one commit. Over
// what is there of us it replaces it in the same commit.
func (t table) lockInput(v6 bool, o netlock.Options, now time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "*%s\n", t.name)
	// Naming a chain makes it, or empties it.
	fmt.Fprintf(&b, ":%s - [0:0]\n:%s - [0:0]\n", chainIn, chainOut)
	t.unhook(&b)
	for _, chain := range []string{chainIn, chainOut} {
		for _, s := range append(specs(chain, v6, o.Allow), dropSpec(now, o.Caller)) {
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

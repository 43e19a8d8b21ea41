package hold

// The queues that rules of others name, whether or not somebody listens there just now.

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// lookTime bounds the look for them in Bind, when a container may be frozen: it takes 0.1 ms, and
// 0.4 ms with a hundred rules of nf_tables. A table of legacy iptables, which comes as a whole, is
// read up to lookSize, some 5,000 rules.
const (
	lookTime = 3 * time.Millisecond
	// calmTime bounds it where nothing is frozen yet.
	calmTime = 50 * time.Millisecond
	lookSize = 1 << 20
)

// spans are queue numbers, each from the first to the last.
type spans [][2]uint32

func (s spans) has(num uint16) bool {
	for _, span := range s {
		if span[0] <= uint32(num) && uint32(num) <= span[1] {
			return true
		}
	}
	return false
}

// add adds so many numbers; of none the kernel makes one.
func (s *spans) add(first, many uint16) {
	*s = append(*s, [2]uint32{uint32(first), uint32(first) + uint32(max(many, 1)) - 1})
}

// named are the queues that rules of the calling thread's namespace name, but for our own: they
// go, and what still goes to their queue then goes to the same one. What cannot be read in time
// names none.
func named(ctx context.Context) (s spans) {
	s.nft(ctx)
	for _, f := range legacyFamilies {
		for _, table := range f.tables() {
			if ctx.Err() == nil {
				s.legacy(f, f.entries(table, lookSize))
			}
		}
	}
	return s
}

// nft looks into nf_tables, where rules of iptables-nft are too.
func (s *spans) nft(ctx context.Context) {
	conn, err := nfnl.Dial()
	if err != nil {
		return
	}
	defer func() { go conn.Close() }() // which may wait for an RCU grace period
	ans, err := conn.Ask(ctx, nfnl.Request{Cmd: unix.NFT_MSG_GETRULE, Family: unix.NFPROTO_UNSPEC, Dump: true})
	if err != nil {
		return
	}
	for _, o := range ans[0].Objects {
		s.rule(o.Attrs)
	}
}

// Of our own locks: the tables of nft, the chains of iptables.
const (
	ourTable = "criu-netlock"
	ourChain = "CRIU-NETLOCK-"
)

func (s *spans) rule(attrs []byte) {
	ours := false
	nfnl.Walk(attrs, func(typ uint16, b []byte) {
		switch typ {
		case unix.NFTA_RULE_TABLE:
			ours = ours || nfnl.Str(b) == ourTable || nfnl.Str(b) == ourTable+"-2"
		case unix.NFTA_RULE_CHAIN:
			ours = ours || strings.HasPrefix(nfnl.Str(b), ourChain)
		case unix.NFTA_RULE_EXPRESSIONS: // behind both
			if !ours {
				nfnl.Walk(b, func(_ uint16, e []byte) { s.expression(e) })
			}
		}
	})
}

func (s *spans) expression(attrs []byte) {
	var name string
	nfnl.Walk(attrs, func(typ uint16, b []byte) {
		switch {
		case typ == unix.NFTA_EXPR_NAME:
			name = nfnl.Str(b)
		case typ == unix.NFTA_EXPR_DATA && name == "queue":
			var num, total uint16
			known := false
			nfnl.Walk(b, func(typ uint16, v []byte) {
				switch {
				case typ == unix.NFTA_QUEUE_NUM && len(v) == 2:
					num, known = binary.BigEndian.Uint16(v), true
				case typ == unix.NFTA_QUEUE_TOTAL && len(v) == 2:
					total = binary.BigEndian.Uint16(v)
				}
			})
			if known { // otherwise a map or a hash chooses it
				s.add(num, total)
			}
		case typ == unix.NFTA_EXPR_DATA && name == "target":
			var target string
			var rev uint32
			nfnl.Walk(b, func(typ uint16, v []byte) {
				switch {
				case typ == unix.NFTA_TARGET_NAME:
					target = nfnl.Str(v)
				case typ == unix.NFTA_TARGET_REV:
					rev = nfnl.U32(v)
				case typ == unix.NFTA_TARGET_INFO && target == nfqueue:
					s.target(byte(rev), v)
				}
			})
		}
	})
}

// nfqueue is xtables' target.
const nfqueue = "NFQUEUE"

// target reads struct xt_NFQ_info: the number, and since revision 1 how many.
func (s *spans) target(rev byte, info []byte) {
	switch {
	case len(info) < 2:
	case rev == 0 || len(info) < 4:
		s.add(binary.NativeEndian.Uint16(info), 1)
	default:
		s.add(binary.NativeEndian.Uint16(info), binary.NativeEndian.Uint16(info[2:]))
	}
}

// legacy goes through the entries of a table of legacy iptables.
func (s *spans) legacy(f legacyFamily, entries []byte) {
	const targetHdr = 32 // struct xt_entry_target: size, name, revision
	ours := false
	for len(entries) >= f.offsets+4 {
		target := int(binary.NativeEndian.Uint16(entries[f.offsets:]))
		next := int(binary.NativeEndian.Uint16(entries[f.offsets+2:]))
		if next < target+targetHdr || next > len(entries) {
			return
		}
		name, info := cString(entries[target+2:target+targetHdr-1]), entries[target+targetHdr:next]
		switch {
		case name == "ERROR": // a chain begins, or the table ends
			ours = strings.HasPrefix(cString(info), ourChain)
		case name == nfqueue && !ours:
			s.target(entries[target+targetHdr-1], info)
		}
		entries = entries[next:]
	}
}

func cString(b []byte) string {
	text, _, _ := bytes.Cut(b, []byte{0})
	return string(text)
}

// legacyFamily is one of legacy iptables' two. Its two numbers of a table are the same.
type legacyFamily struct {
	names         string // the file of /proc that lists its tables
	domain, level int
	offsets       int // of target_offset in struct ipt_entry or ip6t_entry
}

var legacyFamilies = [...]legacyFamily{
	{"ip_tables_names", unix.AF_INET, unix.IPPROTO_IP, 88},
	{"ip6_tables_names", unix.AF_INET6, unix.IPPROTO_IPV6, 140},
}

// tables are those that the calling thread's namespace has: to ask for one that is not there would
// make it.
func (f legacyFamily) tables() []string {
	names, _ := os.ReadFile("/proc/thread-self/net/" + f.names) // none without the module
	return strings.Fields(string(names))
}

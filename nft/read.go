package nft

import (
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// table is one table under a name of ours, in whatever family.
type table struct {
	name   string
	family uint8
	flags  uint32
	use    uint32 // chains, sets, objects and flow tables in it
	owner  uint32 // netlink port of a live owner
}

func (t table) inet() bool { return t.family == unix.NFPROTO_INET }

// held: a live process owns the table, and nobody else can change it.
func (t table) held() bool { return t.owner != 0 }

const (
	nftaTableOwner   = 7   // NFTA_TABLE_OWNER, Linux 5.12
	nftTableFDormant = 0x1 // NFT_TABLE_F_DORMANT
	nftaChainFlags   = 10  // NFTA_CHAIN_FLAGS
	nftaHookDev      = 3   // NFTA_HOOK_DEV
	nftaHookDevs     = 4   // NFTA_HOOK_DEVS
	nftaBitwiseOp    = 6   // NFTA_BITWISE_OP: 0 is what it was before there were others
)

// parseTable returns a table if its name is one of ours.
func parseTable(o nfnl.Object) (t table, ours bool) {
	t.family = o.Family
	nfnl.Walk(o.Attrs, func(typ uint16, b []byte) {
		switch typ {
		case unix.NFTA_TABLE_NAME:
			t.name = nfnl.Str(b)
		case unix.NFTA_TABLE_FLAGS:
			t.flags = nfnl.U32(b)
		case unix.NFTA_TABLE_USE:
			t.use = nfnl.U32(b)
		case nftaTableOwner:
			t.owner = nfnl.U32(b)
		}
	})
	return t, t.name == tableNames[0] || t.name == tableNames[1]
}

// rule is a rule as the kernel tells it: its expressions in a canonical text that
// hides nothing but the counters' values.
type rule struct {
	chain   string
	text    string
	packets uint64
	comment string
	udata   bool
	queue   *queue // where it sends packets, if it does
	handle  uint64
}

func parseRule(o nfnl.Object) (r rule) {
	sound := nfnl.Walk(o.Attrs, func(typ uint16, b []byte) {
		switch typ {
		case unix.NFTA_RULE_CHAIN:
			r.chain = nfnl.Str(b)
		case unix.NFTA_RULE_EXPRESSIONS:
			r.text, r.packets = exprsText(b)
			r.queue = queueOf(b)
		case unix.NFTA_RULE_HANDLE:
			r.handle = nfnl.U64(b)
		case unix.NFTA_RULE_USERDATA:
			r.udata = true
			r.comment = nfnl.Comment(b)
		}
	})
	if !sound {
		r.text = "malformed"
	}
	return r
}

// queueOf finds the queue that a rule sends packets to. Whether it does so in our way,
// its text tells.
func queueOf(b []byte) (q *queue) {
	nfnl.Walk(b, func(_ uint16, e []byte) {
		switch name, data, _ := splitExpr(e); name {
		case "queue":
			nfnl.Walk(data, func(typ uint16, v []byte) {
				if typ == unix.NFTA_QUEUE_NUM && len(v) == 2 {
					q = &queue{num: binary.BigEndian.Uint16(v)}
				}
			})
		case "target":
			var target string
			nfnl.Walk(data, func(typ uint16, v []byte) {
				switch {
				case typ == unix.NFTA_TARGET_NAME:
					target = nfnl.Str(v)
				case typ == unix.NFTA_TARGET_INFO && target == targetNFQueue && len(v) >= 2:
					q = &queue{num: binary.NativeEndian.Uint16(v), compat: true}
				}
			})
		}
	})
	return q
}

// malformed stands in a canonical text for what cannot be parsed; no rule of ours
// has it, since none has an expression without a name.
const malformed = "\x00malformed"

// exprsText writes a list of expressions in one canonical form, whoever marshalled
// them. Everything in it counts: an expression or an attribute we do not know makes
// another text. (The decoder of google/nftables passes over expressions that it
// does not know.) Only a counter's values are left out, and how many bytes of a
// header are compared at a time: nft joins two matches that are adjacent.
func exprsText(b []byte) (text string, packets uint64) {
	out := make([]byte, 0, len(b))
	var load *payloadLoad // the payload expression just before, not yet written
	sound := nfnl.Walk(b, func(_ uint16, e []byte) {
		name, data, ok := splitExpr(e)
		if load != nil {
			value, isEq := cmpEq(name, data)
			if isEq && len(value) == int(load.size) && load.size != 0 {
				for i, v := range value {
					out = append(out, "byte{"...)
					out = binary.BigEndian.AppendUint32(out, load.base)
					out = binary.BigEndian.AppendUint32(out, load.off+uint32(i))
					out = append(out, v, '}')
				}
				load = nil
				return
			}
			out = appendExpr(out, "payload", load.data)
			load = nil
		}
		switch {
		case !ok:
			out = append(out, malformed...)
		case name == "payload":
			if load = parseLoad(data); load == nil {
				out = appendExpr(out, name, data)
			}
		case name == "counter":
			packets += counted(data)
			out = append(out, "counter{}"...)
		default:
			out = appendExpr(out, name, data)
		}
	})
	if load != nil {
		out = appendExpr(out, "payload", load.data)
	}
	if !sound {
		return malformed, 0
	}
	return string(out), packets
}

// splitExpr takes an expression apart; ok is false if there is anything else in it.
func splitExpr(b []byte) (name string, data []byte, ok bool) {
	ok = true
	sound := nfnl.Walk(b, func(typ uint16, v []byte) {
		switch typ {
		case unix.NFTA_EXPR_NAME:
			name = nfnl.Str(v)
		case unix.NFTA_EXPR_DATA:
			data = v
		default:
			ok = false
		}
	})
	return name, data, ok && sound
}

// payloadLoad is a payload expression that loads into register 1.
type payloadLoad struct {
	base, off, size uint32
	data            []byte
}

func parseLoad(data []byte) *payloadLoad {
	l := &payloadLoad{data: data}
	plain, reg := true, uint32(0)
	sound := nfnl.Walk(data, func(typ uint16, v []byte) {
		switch typ {
		case unix.NFTA_PAYLOAD_DREG:
			reg = nfnl.U32(v)
		case unix.NFTA_PAYLOAD_BASE:
			l.base = nfnl.U32(v)
		case unix.NFTA_PAYLOAD_OFFSET:
			l.off = nfnl.U32(v)
		case unix.NFTA_PAYLOAD_LEN:
			l.size = nfnl.U32(v)
		default:
			plain = false
		}
	})
	if !sound || !plain || reg != unix.NFT_REG_1 {
		return nil
	}
	return l
}

// cmpEq returns the value that a cmp expression wants register 1 to be equal to.
func cmpEq(name string, data []byte) (value []byte, ok bool) {
	if name != "cmp" {
		return nil, false
	}
	plain, reg, op := true, uint32(0), ^uint32(0)
	sound := nfnl.Walk(data, func(typ uint16, v []byte) {
		switch typ {
		case unix.NFTA_CMP_SREG:
			reg = nfnl.U32(v)
		case unix.NFTA_CMP_OP:
			op = nfnl.U32(v)
		case unix.NFTA_CMP_DATA:
			plain = nfnl.Walk(v, func(typ uint16, d []byte) {
				plain = plain && typ == unix.NFTA_DATA_VALUE && value == nil
				value = d
			}) && plain
		default:
			plain = false
		}
	})
	return value, sound && plain && reg == unix.NFT_REG_1 && op == unix.NFT_CMP_EQ
}

func appendExpr(out []byte, name string, data []byte) []byte {
	out = append(append(out, name...), '{')
	return append(appendAttrs(out, name, 0, data), '}')
}

// nested tells whether an attribute of an expression holds attributes; outer is
// the type of the attribute that it stands in, 0 for none.
func nested(name string, outer, typ uint16) bool {
	switch name {
	case "cmp":
		return outer == 0 && typ == unix.NFTA_CMP_DATA
	case "immediate":
		return outer == 0 && typ == unix.NFTA_IMMEDIATE_DATA || outer == unix.NFTA_IMMEDIATE_DATA && typ == unix.NFTA_DATA_VERDICT
	case "bitwise":
		return outer == 0 && (typ == unix.NFTA_BITWISE_MASK || typ == unix.NFTA_BITWISE_XOR)
	}
	return false
}

func appendAttrs(out []byte, name string, outer uint16, b []byte) []byte {
	sound := nfnl.Walk(b, func(typ uint16, v []byte) {
		if name == "bitwise" && typ == nftaBitwiseOp && nfnl.U32(v) == 0 {
			return // the kernel names what we leave to its default
		}
		if name == "queue" && typ == unix.NFTA_QUEUE_FLAGS && string(v) == "\x00\x00" {
			return // nft leaves it out
		}
		isNested := nested(name, outer, typ)
		out = binary.BigEndian.AppendUint16(out, typ)
		if isNested {
			out = append(out, '{')
			out = append(appendAttrs(out, name, typ, v), '}')
			return
		}
		out = binary.BigEndian.AppendUint16(out, uint16(len(v)))
		out = append(out, v...)
	})
	if !sound {
		out = append(out, malformed...)
	}
	return out
}

// texts is the canonical text of every rule of both chains.
type texts [2][]string

func wantBoth(allow []netlock.Rule, q *queue) (want texts, err error) {
	for i, c := range chains() {
		if want[i], err = wantTexts(c, allow, q); err != nil {
			return want, err
		}
	}
	return want, nil
}

// wantTexts is the canonical text of every rule of a chain.
func wantTexts(c chain, allow []netlock.Rule, q *queue) ([]string, error) {
	var out []string
	for _, exprs := range c.rules(allow, q) {
		text, err := wantText(exprs)
		if err != nil {
			return nil, err
		}
		out = append(out, text)
	}
	return out, nil
}

func wantText(exprs []expr.Any) (string, error) {
	var elems []netlink.Attribute
	for _, e := range exprs {
		b, err := expr.Marshal(unix.NFPROTO_INET, e)
		if err != nil {
			return "", err
		}
		elems = append(elems, netlink.Attribute{Type: unix.NFTA_LIST_ELEM, Data: b})
	}
	b, err := netlink.MarshalAttributes(elems)
	if err != nil {
		return "", err
	}
	text, _ := exprsText(b)
	return text, nil
}

// baseChainWhy says what keeps a chain from being ours; "" if nothing does.
func baseChainWhy(o nfnl.Object, want chain) string {
	var (
		typ    string
		policy = ^uint32(0)
		hook   = ^uint32(0)
		prio   uint32
		extra  bool
	)
	nfnl.Walk(o.Attrs, func(t uint16, b []byte) {
		switch t {
		case unix.NFTA_CHAIN_TYPE:
			typ = nfnl.Str(b)
		case unix.NFTA_CHAIN_POLICY:
			policy = nfnl.U32(b)
		case nftaChainFlags:
			extra = extra || nfnl.U32(b)&^1 != 0 // NFT_CHAIN_BASE alone
		case unix.NFTA_CHAIN_HOOK:
			nfnl.Walk(b, func(t uint16, b []byte) {
				switch t {
				case unix.NFTA_HOOK_HOOKNUM:
					hook = nfnl.U32(b)
				case unix.NFTA_HOOK_PRIORITY:
					prio = nfnl.U32(b)
				case nftaHookDev, nftaHookDevs:
					extra = true
				}
			})
		}
	})
	switch {
	case hook == ^uint32(0):
		return "is not a base chain"
	case typ != "filter":
		return "is of type " + typ
	case hook != uint32(*want.hook) || int32(prio) != int32(*nftables.ChainPriorityRaw):
		return "is hooked elsewhere"
	case policy != uint32(nftables.ChainPolicyDrop):
		return "does not drop"
	case extra:
		return "has other flags"
	}
	return ""
}

// view is what was read of one table.
type view struct {
	table
	locks  bool   // it does drop, whatever else is in it
	why    string // why it is not intact; "" if it is
	since  time.Time
	caller netlock.Caller
	in     uint64
	out    uint64
	text   string // the comment
	queue  *queue // of mode hold
	sender uint64 // the handle of the rule that sends there
	held   netlock.Queue
}

// judge compares a table with the lock that we would put there.
func judge(t table, chainObjs [2]*nfnl.Object, rules []rule, wants texts) view {
	v := view{table: t, locks: t.inet() && t.flags&nftTableFDormant == 0}
	blame := func(locks bool, format string, args ...any) {
		v.locks = v.locks && locks
		if v.why == "" {
			v.why = "table " + t.name + " " + fmt.Sprintf(format, args...)
		}
	}
	switch {
	case !t.inet():
		blame(false, "is there in another family")
		return v
	case t.flags&nftTableFDormant != 0:
		blame(false, "is dormant")
	case t.flags != 0:
		blame(true, "has flags")
	}
	if t.use != 2 {
		blame(true, "holds %d things where the lock has two chains", t.use)
	}
	for i, c := range chains() {
		if chainObjs[i] == nil {
			blame(false, "has no chain %s", c.name)
			continue
		}
		if why := baseChainWhy(*chainObjs[i], c); why != "" {
			blame(why == "has other flags", "has a chain %s that %s", c.name, why)
		}
		want := wants[i]
		var got []rule
		for _, r := range rules {
			if r.chain == c.name {
				got = append(got, r)
			}
		}
		if n := len(want) - 1; c.inbound() && n < len(got) && got[n].queue != nil {
			// Which queue it is, and by which expression, is the lock's own affair.
			if text, err := wantText([]expr.Any{&expr.Counter{}, got[n].queue.expr()}); err == nil {
				v.queue, v.sender = got[n].queue, got[n].handle
				want = append(slices.Clone(want[:n]), text)
			}
		}
		for n, r := range got {
			last := n == len(want)-1
			switch {
			case n < len(want) && r.text == want[n] && last == r.udata:
			case !slices.Contains(want, r.text):
				blame(false, "has a foreign rule in chain %s", c.name)
			case n >= len(want) || r.text != want[n]:
				blame(true, "has rules of chain %s twice or out of order", c.name)
			case last != r.udata:
				blame(true, "has comments in chain %s that are not ours", c.name)
			}
			if i == 0 {
				v.in += r.packets
			} else {
				v.out += r.packets
			}
			// Of a lock with rules before it, or half of which is gone, they say whose it was.
			since, caller, err := netlock.ParseComment(r.comment)
			if err == nil && v.since.IsZero() {
				v.since, v.caller = since, caller
			}
			if last {
				v.text = r.comment
				if err != nil {
					blame(true, "has %v in chain %s", err, c.name)
				}
			}
		}
		if len(got) < len(want) {
			blame(true, "lacks rules in chain %s", c.name)
		}
	}
	return v
}

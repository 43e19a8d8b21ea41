package iptables

// The nft variant's rules as nf_tables has them. iptables-nft-save leaves out what it
// does not know (a match of raw bytes, say), so a rule that never matches can look like
// one that always does; and it refuses a whole table for one rule in it.

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// readNFT reads the table of a sight.
func readNFT(ctx context.Context, conn *nfnl.Conn, p sight) (table, error) {
	t := table{name: p.name}
	req := p.ask(unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, 0, "")
	req.Dump = true
	ans, err := conn.Ask(ctx, req)
	if err != nil {
		return t, err
	}
	if e := ans[0].Errno; e != 0 && e != unix.ENOENT {
		return t, e
	}
	for i, c := range [2]string{chainIn, chainOut} {
		if p.uses[i] >= 0 {
			t.chains = append(t.chains, c)
		}
	}
	v6 := families()[p.fam].v6
	for _, o := range ans[0].Objects {
		// Old kernels tell of all tables of the family.
		if r := parseRule(o, v6); r.table == p.name {
			t.rules = append(t.rules, r)
		}
	}
	return t, nil
}

func parseRule(o nfnl.Object, v6 bool) (r rule) {
	var exprs []byte
	comment := ""
	sound := nfnl.Walk(o.Attrs, func(typ uint16, b []byte) {
		switch typ {
		case unix.NFTA_RULE_TABLE:
			r.table = nfnl.Str(b)
		case unix.NFTA_RULE_CHAIN:
			r.chain = nfnl.Str(b)
		case unix.NFTA_RULE_HANDLE:
			r.handle = nfnl.U64(b)
		case unix.NFTA_RULE_EXPRESSIONS:
			exprs = b
		case unix.NFTA_RULE_USERDATA:
			comment = nfnl.Comment(b)
		}
	})
	d := decoder{rule: &r, v6: v6}
	if d.exprs(exprs); !sound {
		d.odd("malformed", nil)
	}
	if comment != "" {
		d.set(&r.comment, comment)
	}
	return r
}

// decoder makes a match of expressions. The versions of iptables-nft write the same
// rule in different ones; those that it knows give the same match, and anything else,
// down to an attribute, goes to rest and makes the rule equal to none of ours.
type decoder struct {
	*rule
	v6 bool
	// What the last expressions loaded, until a cmp says what it has to be.
	load *load
}

// load is a value in a register.
type load struct {
	reg  uint32
	meta uint32 // NFT_META_*, or
	pay  bool   // a part of the packet
	base uint32
	off  uint32
	size uint32
	mask []byte
	name string // for odd
	data []byte
}

// odd notes an expression that no rule of ours has.
func (d *decoder) odd(name string, data []byte) {
	d.opaque = true
	d.rest += fmt.Sprintf("\x00%s{%x} ", name, data)
}

// set fills a field that is said once.
func (d *decoder) set(field *string, value string) {
	if *field != "" || value == "" {
		d.odd("again", []byte(value))
		return
	}
	*field = value
}

func (d *decoder) exprs(list []byte) {
	sound := nfnl.Walk(list, func(_ uint16, e []byte) {
		a, ok := attrsOf(e, unix.NFTA_EXPR_NAME, unix.NFTA_EXPR_DATA)
		name, data := nfnl.Str(a[unix.NFTA_EXPR_NAME]), a[unix.NFTA_EXPR_DATA]
		if l := d.load; l != nil && name != "cmp" && name != "bitwise" {
			d.odd(l.name, l.data) // loaded for nothing that we know
			d.load = nil
		}
		if !ok || !d.expr(name, data) {
			d.odd(name, data)
			d.load = nil
		}
	})
	if d.load != nil {
		d.odd(d.load.name, d.load.data)
	}
	if !sound {
		d.odd("malformed", list)
	}
}

// attrsOf reads attributes; ok is false if there are others than those named, or one twice.
func attrsOf(b []byte, types ...uint16) (a map[uint16][]byte, ok bool) {
	a = make(map[uint16][]byte, len(types))
	ok = true
	sound := nfnl.Walk(b, func(typ uint16, v []byte) {
		if _, twice := a[typ]; twice || !slices.Contains(types, typ) {
			ok = false
			return
		}
		a[typ] = v
	})
	return a, ok && sound
}

const nftaBitwiseOp = 6 // NFTA_BITWISE_OP: 0 is what it was before there were others

// expr reads one expression; it tells whether it knew it.
func (d *decoder) expr(name string, data []byte) bool {
	u32 := func(b []byte) uint32 {
		if len(b) != 4 {
			return ^uint32(0)
		}
		return nfnl.U32(b)
	}
	switch name {
	case "counter":
		a, ok := attrsOf(data, unix.NFTA_COUNTER_BYTES, unix.NFTA_COUNTER_PACKETS, unix.NFTA_COUNTER_PAD)
		d.packets += nfnl.U64(a[unix.NFTA_COUNTER_PACKETS])
		return ok
	case "meta":
		a, ok := attrsOf(data, unix.NFTA_META_DREG, unix.NFTA_META_KEY)
		d.load = &load{reg: u32(a[unix.NFTA_META_DREG]), meta: u32(a[unix.NFTA_META_KEY]), name: name, data: data}
		return ok
	case "payload":
		a, ok := attrsOf(data, unix.NFTA_PAYLOAD_DREG, unix.NFTA_PAYLOAD_BASE, unix.NFTA_PAYLOAD_OFFSET, unix.NFTA_PAYLOAD_LEN)
		d.load = &load{reg: u32(a[unix.NFTA_PAYLOAD_DREG]), pay: true, base: u32(a[unix.NFTA_PAYLOAD_BASE]),
			off: u32(a[unix.NFTA_PAYLOAD_OFFSET]), size: u32(a[unix.NFTA_PAYLOAD_LEN]), name: name, data: data}
		return ok
	case "bitwise":
		a, ok := attrsOf(data, unix.NFTA_BITWISE_SREG, unix.NFTA_BITWISE_DREG, unix.NFTA_BITWISE_LEN, unix.NFTA_BITWISE_MASK, unix.NFTA_BITWISE_XOR, nftaBitwiseOp)
		mask, ok1 := value(a[unix.NFTA_BITWISE_MASK])
		xor, ok2 := value(a[unix.NFTA_BITWISE_XOR])
		l := d.load
		if !ok || !ok1 || !ok2 || l == nil || l.mask != nil || !l.pay || u32(a[unix.NFTA_BITWISE_SREG]) != l.reg ||
			u32(a[unix.NFTA_BITWISE_LEN]) != l.size || len(mask) != int(l.size) || len(xor) != len(mask) ||
			nfnl.U32(a[nftaBitwiseOp]) != 0 || slices.ContainsFunc(xor, nonzero) {
			return false
		}
		l.reg, l.mask = u32(a[unix.NFTA_BITWISE_DREG]), mask
		return true
	case "cmp":
		a, ok := attrsOf(data, unix.NFTA_CMP_SREG, unix.NFTA_CMP_OP, unix.NFTA_CMP_DATA)
		v, ok1 := value(a[unix.NFTA_CMP_DATA])
		l := d.load
		d.load = nil
		return ok && ok1 && l != nil && u32(a[unix.NFTA_CMP_SREG]) == l.reg && d.cmp(l, u32(a[unix.NFTA_CMP_OP]), v)
	case "immediate":
		a, ok := attrsOf(data, unix.NFTA_IMMEDIATE_DREG, unix.NFTA_IMMEDIATE_DATA)
		return d.verdict(a[unix.NFTA_IMMEDIATE_DATA]) && ok && u32(a[unix.NFTA_IMMEDIATE_DREG]) == unix.NFT_REG_VERDICT
	case "target":
		a, ok := attrsOf(data, unix.NFTA_TARGET_NAME, unix.NFTA_TARGET_REV, unix.NFTA_TARGET_INFO)
		return ok && d.xtTarget(nfnl.Str(a[unix.NFTA_TARGET_NAME]), u32(a[unix.NFTA_TARGET_REV]), a[unix.NFTA_TARGET_INFO])
	case "queue":
		a, ok := attrsOf(data, unix.NFTA_QUEUE_NUM, unix.NFTA_QUEUE_TOTAL, unix.NFTA_QUEUE_FLAGS)
		num, total := a[unix.NFTA_QUEUE_NUM], a[unix.NFTA_QUEUE_TOTAL]
		if !ok || len(num) != 2 || len(total) != 2 || binary.BigEndian.Uint16(total) != 1 || slices.ContainsFunc(a[unix.NFTA_QUEUE_FLAGS], nonzero) {
			return false
		}
		d.set(&d.target, queueTarget)
		d.set(&d.queue, port(num))
	case "match":
		a, ok := attrsOf(data, unix.NFTA_MATCH_NAME, unix.NFTA_MATCH_REV, unix.NFTA_MATCH_INFO)
		return ok && d.xtMatch(nfnl.Str(a[unix.NFTA_MATCH_NAME]), u32(a[unix.NFTA_MATCH_REV]), a[unix.NFTA_MATCH_INFO])
	default:
		return false
	}
	return true
}

func value(b []byte) ([]byte, bool) {
	a, ok := attrsOf(b, unix.NFTA_DATA_VALUE)
	return a[unix.NFTA_DATA_VALUE], ok && len(a[unix.NFTA_DATA_VALUE]) > 0
}

// verdict reads what a rule ends with. A way into our chains is noted whatever else
// there is about the rule.
func (d *decoder) verdict(b []byte) bool {
	outer, ok := attrsOf(b, unix.NFTA_DATA_VERDICT)
	a, ok1 := attrsOf(outer[unix.NFTA_DATA_VERDICT], unix.NFTA_VERDICT_CODE, unix.NFTA_VERDICT_CHAIN)
	chain := nfnl.Str(a[unix.NFTA_VERDICT_CHAIN])
	d.leads = d.leads || ours(chain)
	if !ok || !ok1 || len(a[unix.NFTA_VERDICT_CODE]) != 4 {
		return false
	}
	switch code := int32(nfnl.U32(a[unix.NFTA_VERDICT_CODE])); code {
	case unix.NFT_JUMP:
		d.set(&d.target, chain)
	case unix.NFT_GOTO:
		d.set(&d.target, chain)
		d.rest += "-g "
	case 0: // NF_DROP
		d.set(&d.target, "DROP")
	case 1: // NF_ACCEPT
		d.set(&d.target, "ACCEPT")
	case unix.NFT_RETURN:
		d.set(&d.target, "RETURN")
	default:
		return false
	}
	return true
}

// answerRest is what parseMatch makes of a rule's "! --syn".
const answerRest = "! --tcp-flags FIN,SYN,RST,ACK SYN "

// The flags of TCP that --syn looks at, and what it wants of them.
const synMask, syn = 0x17, 0x02

func (d *decoder) cmp(l *load, op uint32, v []byte) bool {
	transport := func(off, size uint32) bool {
		return l.pay && l.base == unix.NFT_PAYLOAD_TRANSPORT_HEADER && l.off == off && l.size == size && len(v) == int(size)
	}
	if op == unix.NFT_CMP_NEQ && transport(13, 1) && bytes.Equal(l.mask, []byte{synMask}) && v[0] == syn {
		d.rest += answerRest
		return true
	}
	if op != unix.NFT_CMP_EQ {
		return false
	}
	addrAt, addrLen := uint32(12), 4
	if d.v6 {
		addrAt, addrLen = 8, 16
	}
	switch network := l.pay && l.base == unix.NFT_PAYLOAD_NETWORK_HEADER; {
	case network && (l.off == addrAt || l.off == addrAt+uint32(addrLen)):
		p, ok := prefix(v, l, addrLen)
		if l.off == addrAt {
			d.set(&d.src, p)
		} else {
			d.set(&d.dst, p)
		}
		return ok
	case l.mask != nil:
		return false
	case network && l.size == 1 && len(v) == 1 && (!d.v6 && l.off == 9 || d.v6 && l.off == 6): // before 1.8.6
		d.set(&d.proto, protoName(strconv.Itoa(int(v[0]))))
	case transport(0, 1) && d.v6:
		d.set(&d.icmpType, strconv.Itoa(int(v[0])))
	case transport(0, 2):
		d.set(&d.sport, port(v))
	case transport(2, 2):
		d.set(&d.dport, port(v))
	case transport(0, 4):
		d.set(&d.sport, port(v))
		d.set(&d.dport, port(v[2:]))
	case l.pay:
		return false
	case l.meta == unix.NFT_META_L4PROTO && len(v) == 1:
		d.set(&d.proto, protoName(strconv.Itoa(int(v[0]))))
	case l.meta == unix.NFT_META_MARK && len(v) == 4:
		d.set(&d.mark, markName(binary.NativeEndian.Uint32(v)))
	case l.meta == unix.NFT_META_IIFNAME:
		return d.link(&d.in, v)
	case l.meta == unix.NFT_META_OIFNAME:
		return d.link(&d.out, v)
	default:
		return false
	}
	return true
}

// link reads a link's name: without a NUL it is the beginning of one.
func (d *decoder) link(field *string, v []byte) bool {
	name, rest, whole := bytes.Cut(v, []byte{0})
	if !whole {
		name = append(bytes.Clone(name), '+')
	}
	d.set(field, string(name))
	return len(v) <= unix.IFNAMSIZ && !slices.ContainsFunc(rest, nonzero)
}

func port(b []byte) string { return strconv.Itoa(int(binary.BigEndian.Uint16(b))) }

func markName(v uint32) string { return fmt.Sprintf("%#x", v) }

// prefix reads an address that is compared whole, by its first bytes, or under a mask.
func prefix(v []byte, l *load, size int) (string, bool) {
	if len(v) != int(l.size) || len(v) > size {
		return "", false
	}
	bits := 8 * len(v)
	if l.mask != nil {
		bits = 0
		for bits < 8*len(l.mask) && l.mask[bits/8]&(0x80>>(bits%8)) != 0 {
			bits++
		}
		for i := bits; i < 8*len(l.mask); i++ {
			if l.mask[i/8]&(0x80>>(i%8)) != 0 {
				return "", false
			}
		}
	}
	a, ok := netip.AddrFromSlice(append(bytes.Clone(v), make([]byte, size-len(v))...))
	p := netip.PrefixFrom(a, bits)
	return p.String(), ok && p == p.Masked()
}

func nonzero(c byte) bool { return c != 0 }

// xtTarget reads the one target of xtables' own that a rule of ours has: number, how many
// queues, flags.
func (d *decoder) xtTarget(name string, rev uint32, b []byte) bool {
	if name != queueTarget || rev < 1 || rev > 3 || len(b) < 4 || binary.NativeEndian.Uint16(b[2:]) != 1 || slices.ContainsFunc(b[4:], nonzero) {
		return false
	}
	d.set(&d.target, queueTarget)
	d.set(&d.queue, strconv.Itoa(int(binary.NativeEndian.Uint16(b))))
	return true
}

// xtMatch reads a match of xtables' own, which is a C struct.
func (d *decoder) xtMatch(name string, rev uint32, b []byte) bool {
	zero := func(b []byte) bool { return !slices.ContainsFunc(b, nonzero) }
	ne := binary.NativeEndian
	// ports sets a field from a range of one port; that of all ports says nothing.
	ports := func(field *string, b []byte) bool {
		lo, hi := ne.Uint16(b), ne.Uint16(b[2:])
		if lo == hi {
			d.set(field, strconv.Itoa(int(lo)))
		}
		return lo == hi || lo == 0 && hi == 0xffff
	}
	switch {
	case name == "comment" && rev == 0 && len(b) >= 1: // char[256]
		d.set(&d.comment, nfnl.Str(b))
	case name == "mark" && rev == 1 && len(b) >= 12: // mark, mask, invert
		d.set(&d.mark, markName(ne.Uint32(b)))
		return ne.Uint32(b[4:]) == ^uint32(0) && zero(b[8:])
	case name == "tcp" && rev == 0 && len(b) >= 12: // spts[2], dpts[2], option, flg_mask, flg_cmp, invflags
		if !ports(&d.sport, b) || !ports(&d.dport, b[4:]) || b[8] != 0 || !zero(b[12:]) {
			return false
		}
		switch [3]byte(b[9:12]) {
		case [3]byte{}:
		case [3]byte{synMask, syn, 0x04}: // XT_TCP_INV_FLAGS
			d.rest += answerRest
		default:
			return false
		}
	case name == "udp" && rev == 0 && len(b) >= 9: // spts[2], dpts[2], invflags
		return ports(&d.sport, b) && ports(&d.dport, b[4:]) && zero(b[8:9])
	case name == "sctp" && rev == 0 && len(b) >= 292:
		// dpts[2], spts[2], chunkmap[64], chunk_match_type, flag_info, flag_count, flags, invflags
		flags := ne.Uint32(b[284:])
		if flags&1 != 0 && !ports(&d.sport, b[4:]) || flags&2 != 0 && !ports(&d.dport, b) {
			return false
		}
		return flags&^3 == 0 && zero(b[288:292])
	case name == "icmp6" && rev == 0 && len(b) >= 4: // type, code[2], invflags
		d.set(&d.icmpType, strconv.Itoa(int(b[0])))
		return b[1] == 0 && b[2] == 0xff && b[3] == 0
	default:
		return false
	}
	return true
}

// clearNFT is the change that takes everything of ours out of places, whatever else is in
// their tables: the ways into our chains by their handles, then the chains.
func clearNFT(ps []place) (changes []nfnl.Request) {
	var last []nfnl.Request
	for _, p := range ps {
		changes = append(changes, p.unhookNFT(p.jumps())...)
		for _, c := range p.chains {
			changes = append(changes, p.ask(unix.NFT_MSG_DELRULE, unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, c))
			last = append(last, p.ask(unix.NFT_MSG_DELCHAIN, unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, c))
		}
	}
	return append(changes, last...)
}

func (s sight) unhookNFT(rules []rule) (changes []nfnl.Request) {
	for _, r := range rules {
		del := s.ask(unix.NFT_MSG_DELRULE, unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, r.chain)
		del.Attrs = nfnl.Attr(del.Attrs, unix.NFTA_RULE_HANDLE, binary.BigEndian.AppendUint64(nil, r.handle))
		changes = append(changes, del)
	}
	return changes
}

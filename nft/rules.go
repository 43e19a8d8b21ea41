package nft

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
)

// The names of our table. The second is for when the first is taken: by a live
// owner, or by something that has to stay until its successor is in force.
var tableNames = [2]string{"criu-netlock", "criu-netlock-2"}

// criuMark is SOCCR_MARK: CRIU marks the TCP segments that it injects to rebuild
// half-closed sockets, and they travel over lo to the container's own address.
const criuMark = 0xC114

// The initial and only loopback device of every network namespace has ifindex 1.
const loIndex = 1

// chain is one of the two base chains of a lock.
type chain struct {
	name string
	hook *nftables.ChainHook
	lo   expr.MetaKey
}

// prerouting and output at priority raw: before conntrack, which a dropped packet
// must not move, and before routing, so that forwarded packets stop too.
func chains() [2]chain {
	return [2]chain{
		{"ingress", nftables.ChainHookPrerouting, expr.MetaKeyIIF},
		{"egress", nftables.ChainHookOutput, expr.MetaKeyOIF},
	}
}

func eq(data []byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: data}
}

func meta(key expr.MetaKey, data []byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: unix.NFT_REG_1}, eq(data)}
}

func payload(base expr.PayloadBase, off, size uint32) expr.Any {
	return &expr.Payload{DestRegister: unix.NFT_REG_1, Base: base, Offset: off, Len: size}
}

func native32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

func accept(parts ...[]expr.Any) []expr.Any {
	var out []expr.Any
	for _, p := range parts {
		out = append(out, p...)
	}
	return append(out, &expr.Verdict{Kind: expr.VerdictAccept})
}

// queue is where the lock of mode hold sends what comes in.
type queue struct {
	num uint16
	// compat: by the NFQUEUE target of xtables, for a kernel without the expression.
	compat bool
}

// expr has no flag: with none a packet that finds no holder, or no room, is dropped.
func (q queue) expr() expr.Any {
	if !q.compat {
		return &expr.Queue{Num: q.num}
	}
	// struct xt_NFQ_info_v3, padded as xtables does: number, how many queues, flags.
	info := xt.Unknown(make([]byte, 8))
	binary.NativeEndian.PutUint16(info, q.num)
	binary.NativeEndian.PutUint16(info[2:], 1)
	return &expr.Target{Name: targetNFQueue, Rev: targetNFQueueRev, Info: &info}
}

const (
	targetNFQueue    = "NFQUEUE"
	targetNFQueueRev = 3
)

// fixedRules is how many rules a chain has beside those of the allow list.
const fixedRules = 4

// rules is what a chain of the lock holds, in order; the last one counts what the
// policy then drops, or in ingress what goes to the queue, if there is one.
func (c chain) rules(allow []netlock.Rule, q *queue) [][]expr.Any {
	out := [][]expr.Any{
		accept(meta(c.lo, native32(loIndex)), meta(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_TCP}), meta(expr.MetaKeyMARK, native32(criuMark))),
	}
	// Without neighbour discovery a peer gives an old IPv6 connection up.
	for _, typ := range []byte{135, 136} { // neighbour solicitation and advertisement
		out = append(out, accept(
			meta(expr.MetaKeyNFPROTO, []byte{unix.NFPROTO_IPV6}),
			meta(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_ICMPV6}),
			[]expr.Any{payload(expr.PayloadBaseTransportHeader, 0, 1), eq([]byte{typ})}))
	}
	for _, r := range netlock.Expand(allow) {
		out = append(out, allowExprs(r))
	}
	last := []expr.Any{&expr.Counter{}}
	if q != nil && c.inbound() {
		last = append(last, q.expr())
	}
	return append(out, last)
}

func (c chain) inbound() bool { return c.lo == expr.MetaKeyIIF }

var protoNumbers = map[string]byte{
	"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP, "sctp": unix.IPPROTO_SCTP,
	"icmp": unix.IPPROTO_ICMP, "icmpv6": unix.IPPROTO_ICMPV6,
}

// The flags by which TCP tells a connection's first packet.
const (
	tcpFin = 1 << iota
	tcpSyn
	tcpRst
	_
	tcpAck
)

// allowExprs writes a rule as nft would compile it, so that it reads back the same
// after a list and a replay.
func allowExprs(r netlock.Rule) []expr.Any {
	var parts [][]expr.Any
	switch r.Family {
	case "ip":
		parts = append(parts, meta(expr.MetaKeyNFPROTO, []byte{unix.NFPROTO_IPV4}),
			addr(r.Saddr, 12), addr(r.Daddr, 16))
	case "ip6":
		parts = append(parts, meta(expr.MetaKeyNFPROTO, []byte{unix.NFPROTO_IPV6}),
			addr(r.Saddr, 8), addr(r.Daddr, 24))
	}
	if r.Proto != "" {
		parts = append(parts, meta(expr.MetaKeyL4PROTO, []byte{protoNumbers[r.Proto]}))
	}
	port := func(p uint16, off uint32) {
		if p != 0 {
			parts = append(parts, []expr.Any{
				payload(expr.PayloadBaseTransportHeader, off, 2), eq(binary.BigEndian.AppendUint16(nil, p))})
		}
	}
	port(r.Sport, 0)
	port(r.Dport, 2)
	if r.Answer {
		parts = append(parts, []expr.Any{
			payload(expr.PayloadBaseTransportHeader, 13, 1),
			&expr.Bitwise{SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_1, Len: 1, Mask: []byte{tcpFin | tcpSyn | tcpRst | tcpAck}, Xor: []byte{0}},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: unix.NFT_REG_1, Data: []byte{tcpSyn}}})
	}
	return accept(parts...)
}

// addr matches the network header at off against a prefix: whole bytes by a
// shorter load, the rest by a mask, as nft does.
func addr(p netip.Prefix, off uint32) []expr.Any {
	if !p.IsValid() {
		return nil
	}
	a := p.Addr().AsSlice()
	if n := p.Bits() / 8; p.Bits()%8 == 0 {
		return []expr.Any{payload(expr.PayloadBaseNetworkHeader, off, uint32(n)), eq(a[:n])}
	}
	mask := make([]byte, len(a))
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return []expr.Any{
		payload(expr.PayloadBaseNetworkHeader, off, uint32(len(a))),
		&expr.Bitwise{SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_1, Len: uint32(len(a)), Mask: mask, Xor: make([]byte, len(a))},
		eq(a),
	}
}

// addLock puts a whole lock into a batch.
func addLock(c *nftables.Conn, name string, allow []netlock.Rule, q *queue, text string) {
	t := c.CreateTable(&nftables.Table{Name: name, Family: nftables.TableFamilyINet})
	drop := nftables.ChainPolicyDrop
	for _, ch := range chains() {
		nc := c.AddChain(&nftables.Chain{
			Name: ch.name, Table: t, Type: nftables.ChainTypeFilter,
			Hooknum: ch.hook, Priority: nftables.ChainPriorityRaw, Policy: &drop,
		})
		rules := ch.rules(allow, q)
		for i, exprs := range rules {
			r := &nftables.Rule{Table: t, Chain: nc, Exprs: exprs}
			if i == len(rules)-1 {
				r.UserData = userdata.AppendString(nil, userdata.TypeComment, text)
			}
			c.AddRule(r)
		}
	}
}

// addOpening makes one of the lock's chains accept everything.
func addOpening(c *nftables.Conn, name, chain string) {
	t := &nftables.Table{Name: name, Family: nftables.TableFamilyINet}
	c.InsertRule(&nftables.Rule{Table: t, Chain: &nftables.Chain{Name: chain, Table: t}, Exprs: accept()})
}

package iptables

// What iptables-nft does not show or cannot read, and a loopback by another name.

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// marshal makes a list of expressions.
func marshal(t *testing.T, exprs ...expr.Any) []byte {
	t.Helper()
	var elems []netlink.Attribute
	for _, e := range exprs {
		b, err := expr.Marshal(unix.NFPROTO_IPV4, e)
		if err != nil {
			t.Fatal(err)
		}
		elems = append(elems, netlink.Attribute{Type: unix.NFTA_LIST_ELEM, Data: b})
	}
	b, err := netlink.MarshalAttributes(elems)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// never is a match of the link's header that iptables-nft-save passes over, and that no
// packet of these tests fulfils: a broadcast's first byte, of ours the address is 02.
func never() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: unix.NFT_REG_1, Base: expr.PayloadBaseLLHeader, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: []byte{255}},
	}
}

// rewrite puts other expressions into the rule of a chain of a table of nf_tables that
// ends in a target. change gets the expressions that it has.
func rewrite(t *testing.T, n *netlocktest.NS, fam int, name, chain, target string, change func(exprs []byte) []byte) {
	t.Helper()
	err := n.Do(func() error {
		conn, err := nfnl.Dial()
		if err != nil {
			return err
		}
		defer conn.Close()
		at := spot{NFT, fam, name}
		ask := at.ask(unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, chain)
		ask.Dump = true
		ans, err := conn.Ask(t.Context(), ask)
		if err != nil {
			return err
		}
		for _, o := range ans[0].Objects {
			r := parseRule(o, fam == 1)
			if r.target != target || r.chain != chain {
				continue
			}
			a, _ := attrsOf(o.Attrs, unix.NFTA_RULE_EXPRESSIONS)
			msg := at.ask(unix.NFT_MSG_NEWRULE, unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, chain)
			msg.Attrs = nfnl.Attr(msg.Attrs, unix.NFTA_RULE_HANDLE, binary.BigEndian.AppendUint64(nil, r.handle))
			msg.Attrs = nfnl.Attr(msg.Attrs, unix.NFTA_RULE_EXPRESSIONS|unix.NLA_F_NESTED, change(a[unix.NFTA_RULE_EXPRESSIONS]))
			batch := []byte{0, 0, 0, unix.NFNL_SUBSYS_NFTABLES}
			return conn.Batch(t.Context(), []netlink.Message{
				{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_BEGIN, Flags: netlink.Request}, Data: batch},
				{Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWRULE, Flags: netlink.Request | netlink.Replace},
					Data: append([]byte{msg.Family, 0, 0, 0}, msg.Attrs...)},
				{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_END, Flags: netlink.Request}, Data: batch},
			})
		}
		return errors.New("there is no such rule")
	})
	if err != nil {
		t.Fatalf("rewrite %s of %s: %v", target, chain, err)
	}
}

// What iptables-nft-save leaves out opens a lock that it prints as whole.
func TestUnprintable(t *testing.T) {
	netlocktest.Need(t, "iptables-nft-restore", "nft")
	prefixed := func(exprs ...expr.Any) func(t *testing.T, old []byte) []byte {
		return func(t *testing.T, old []byte) []byte { return append(marshal(t, exprs...), old...) }
	}
	for name, c := range map[string]struct {
		rules  [][2]string // chain and target
		change func(t *testing.T, old []byte) []byte
	}{
		"jumps never taken":       {[][2]string{{"PREROUTING", chainIn}, {"OUTPUT", chainOut}}, prefixed(never()...)},
		"jump in never taken":     {[][2]string{{"PREROUTING", chainIn}}, prefixed(never()...)},
		"jump out never taken":    {[][2]string{{"OUTPUT", chainOut}}, prefixed(never()...)},
		"never drop":              {[][2]string{{chainIn, "DROP"}, {chainOut, "DROP"}}, prefixed(never()...)},
		"never drops what comes":  {[][2]string{{chainIn, "DROP"}}, prefixed(never()...)},
		"return before they drop": {[][2]string{{chainIn, "DROP"}, {chainOut, "DROP"}}, prefixed(&expr.Verdict{Kind: expr.VerdictReturn})},
		"drop above a quota":      {[][2]string{{chainIn, "DROP"}, {chainOut, "DROP"}}, prefixed(&expr.Quota{Bytes: 1 << 40, Over: true})},
	} {
		t.Run(name, func(t *testing.T) {
			p := netlocktest.NewPair(t)
			n := p.Inside
			for _, end := range []string{"lock", "unlock"} {
				lock(t, New(NFT), n)
				wantIntact(t, n, NFT)
				for _, r := range c.rules {
					rewrite(t, n, 0, "raw", r[0], r[1], func(old []byte) []byte { return c.change(t, old) })
				}
				if len(c.rules) == 2 && silent(t, p, "10.77.0.1:9", answer) {
					t.Fatal("the lock is not open: the test proves nothing")
				}
				if st := state(t, New(NFT), n); !st.Found || st.Locked || st.Intact || st.Why == "" {
					t.Errorf("an open lock is %+v", st)
				}
				if end == "lock" {
					if res := lock(t, New(NFT), n); res.Already {
						t.Error("left alone")
					}
					wantIntact(t, n, NFT)
					if !silent(t, p, "10.77.0.1:9", noAnswer) {
						t.Error("packets pass after a lock")
					}
				}
				if st := unlock(t, New(NFT), n); !st.Found || st.Intact == (end == "unlock") {
					t.Errorf("%s: unlock found %+v", end, st)
				}
				wantNothing(t, n)
				if silent(t, p, "10.77.0.1:9", answer) {
					t.Error("nothing passes after unlock")
				}
			}
		})
	}
}

// A chain of type nat sees no more than a connection's first packet.
func TestChainOfAnotherType(t *testing.T) {
	netlocktest.Need(t, "iptables-nft-restore", "nft")
	n := netlocktest.NewNS(t)
	lock(t, noRaw(New(NFT)), n)
	wantIntact(t, n, NFT)
	n.Run("", "nft", "flush chain ip filter INPUT; delete chain ip filter INPUT;"+
		"add chain ip filter INPUT { type nat hook input priority 0; }; add rule ip filter INPUT counter jump "+chainIn)
	if st := state(t, New(NFT), n); !st.Found || st.Locked || st.Intact {
		t.Errorf("%+v", st)
	}
	if res := lock(t, New(NFT), n); res.Already {
		t.Error("left alone")
	}
	wantIntact(t, n, NFT)
	unlock(t, New(NFT), n)
	wantNothing(t, n)
}

// Rules that an older iptables-nft wrote are the same rules.
func TestOtherVersions(t *testing.T) {
	ne := binary.NativeEndian
	info := func(size int, f func(b []byte)) []byte { b := make([]byte, size); f(b); return b }
	xt := func(name string, rev uint32, b []byte) []byte {
		data := nfnl.AttrString(nil, unix.NFTA_MATCH_NAME, name)
		data = nfnl.Attr(data, unix.NFTA_MATCH_REV, binary.BigEndian.AppendUint32(nil, rev))
		data = nfnl.Attr(data, unix.NFTA_MATCH_INFO, b)
		e := nfnl.Attr(nfnl.AttrString(nil, unix.NFTA_EXPR_NAME, "match"), unix.NFTA_EXPR_DATA, data)
		return nfnl.Attr(nil, unix.NFTA_LIST_ELEM, e)
	}
	pay := func(base expr.PayloadBase, off, size uint32, v ...byte) []byte {
		return marshal(t, &expr.Payload{DestRegister: unix.NFT_REG_1, Base: base, Offset: off, Len: size},
			&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: v})
	}
	meta := func(key expr.MetaKey, v ...byte) []byte {
		return marshal(t, &expr.Meta{Key: key, Register: unix.NFT_REG_1}, &expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: v})
	}
	const network, transport = expr.PayloadBaseNetworkHeader, expr.PayloadBaseTransportHeader
	end := marshal(t, &expr.Counter{Bytes: 60, Packets: 1}, &expr.Verdict{Kind: expr.VerdictAccept})
	mark := func(mask uint32, inv byte) []byte {
		return xt("mark", 1, info(16, func(b []byte) { ne.PutUint32(b, 0xc114); ne.PutUint32(b[4:], mask); b[8] = inv }))
	}
	tcp := func(sport [2]uint16, flags ...byte) []byte {
		return xt("tcp", 0, info(16, func(b []byte) {
			ne.PutUint16(b, sport[0])
			ne.PutUint16(b[2:], sport[1])
			ne.PutUint16(b[6:], 0xffff)
			copy(b[9:], flags)
		}))
	}
	lo := "-i lo -p tcp -m mark --mark 0xc114 -j ACCEPT"
	solicit := "-p ipv6-icmp -m icmp6 --icmpv6-type 135 -j ACCEPT"
	answers := "-p tcp -m tcp --sport 22 ! --tcp-flags FIN,SYN,RST,ACK SYN -j ACCEPT"
	for name, c := range map[string]struct {
		v6    bool
		exprs [][]byte
		want  string
		not   bool
	}{
		"lo, 1.8.9":              {false, [][]byte{meta(expr.MetaKeyIIFNAME, 'l', 'o', 0), meta(expr.MetaKeyL4PROTO, 6), meta(expr.MetaKeyMARK, ne.AppendUint32(nil, 0xc114)...)}, lo, false},
		"lo, 1.8.4":              {false, [][]byte{meta(expr.MetaKeyIIFNAME, 'l', 'o', 0), pay(network, 9, 1, 6), mark(^uint32(0), 0)}, lo, false},
		"lo as nft writes it":    {false, [][]byte{meta(expr.MetaKeyIIFNAME, append([]byte("lo"), make([]byte, 14)...)...), meta(expr.MetaKeyL4PROTO, 6), mark(^uint32(0), 0)}, lo, false},
		"lo*":                    {false, [][]byte{meta(expr.MetaKeyIIFNAME, 'l', 'o'), meta(expr.MetaKeyL4PROTO, 6), mark(^uint32(0), 0)}, lo, true},
		"lo and a tail":          {false, [][]byte{meta(expr.MetaKeyIIFNAME, 'l', 'o', 0, 'x'), meta(expr.MetaKeyL4PROTO, 6), mark(^uint32(0), 0)}, lo, true},
		"not lo":                 {false, [][]byte{marshal(t, &expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte("lo\x00")}), meta(expr.MetaKeyL4PROTO, 6), mark(^uint32(0), 0)}, lo, true},
		"any mark":               {false, [][]byte{meta(expr.MetaKeyIIFNAME, 'l', 'o', 0), meta(expr.MetaKeyL4PROTO, 6), mark(0, 0)}, lo, true},
		"any other mark":         {false, [][]byte{meta(expr.MetaKeyIIFNAME, 'l', 'o', 0), meta(expr.MetaKeyL4PROTO, 6), mark(^uint32(0), 1)}, lo, true},
		"another register":       {false, [][]byte{meta(expr.MetaKeyIIFNAME, 'l', 'o', 0), meta(expr.MetaKeyL4PROTO, 6), marshal(t, &expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 2, Data: ne.AppendUint32(nil, 0xc114)})}, lo, true},
		"loaded for nothing":     {false, [][]byte{meta(expr.MetaKeyIIFNAME, 'l', 'o', 0), meta(expr.MetaKeyL4PROTO, 6), marshal(t, &expr.Meta{Key: expr.MetaKeyMARK, Register: 1}), mark(^uint32(0), 0)}, lo, true},
		"a mark is set":          {false, [][]byte{meta(expr.MetaKeyIIFNAME, 'l', 'o', 0), meta(expr.MetaKeyL4PROTO, 6), mark(^uint32(0), 0), marshal(t, &expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1})}, lo, true},
		"solicit, 1.8.9":         {true, [][]byte{meta(expr.MetaKeyL4PROTO, 58), xt("icmp6", 0, []byte{135, 0, 255, 0, 0, 0, 0, 0})}, solicit, false},
		"solicit, 1.8.4":         {true, [][]byte{pay(network, 6, 1, 58), xt("icmp6", 0, []byte{135, 0, 255, 0, 0, 0, 0, 0})}, solicit, false},
		"solicit, native":        {true, [][]byte{meta(expr.MetaKeyL4PROTO, 58), pay(transport, 0, 1, 135)}, solicit, false},
		"all but solicit":        {true, [][]byte{meta(expr.MetaKeyL4PROTO, 58), xt("icmp6", 0, []byte{135, 0, 255, 1, 0, 0, 0, 0})}, solicit, true},
		"another revision":       {true, [][]byte{meta(expr.MetaKeyL4PROTO, 58), xt("icmp6", 1, []byte{135, 0, 255, 0, 0, 0, 0, 0})}, solicit, true},
		"answers, 1.8.4":         {false, [][]byte{pay(network, 9, 1, 6), tcp([2]uint16{22, 22}, 0x17, 0x02, 0x04)}, answers, false},
		"answers, any flags":     {false, [][]byte{pay(network, 9, 1, 6), tcp([2]uint16{22, 22}, 0, 0, 0)}, answers, true},
		"answers, first packets": {false, [][]byte{pay(network, 9, 1, 6), tcp([2]uint16{22, 22}, 0x17, 0x02, 0)}, answers, true},
		"answers, many ports":    {false, [][]byte{pay(network, 9, 1, 6), tcp([2]uint16{22, 23}, 0x17, 0x02, 0x04)}, answers, true},
		"destination":            {false, [][]byte{pay(network, 16, 4, 10, 0, 0, 5)}, "-d 10.0.0.5/32 -j ACCEPT", false},
		"destination, /16":       {false, [][]byte{pay(network, 16, 2, 10, 1)}, "-d 10.1.0.0/16 -j ACCEPT", false},
		"half a destination":     {false, [][]byte{pay(network, 17, 2, 1, 0)}, "-d 10.1.0.0/16 -j ACCEPT", true},
		"udp, 1.8.4":             {false, [][]byte{pay(network, 9, 1, 17), xt("udp", 0, info(16, func(b []byte) { b[2], b[3] = 255, 255; ne.PutUint16(b[4:], 53); ne.PutUint16(b[6:], 53) }))}, "-p udp -m udp --dport 53 -j ACCEPT", false},
	} {
		attrs := nfnl.Attr(nil, unix.NFTA_RULE_EXPRESSIONS, append(bytes.Join(c.exprs, nil), end...))
		r := parseRule(nfnl.Object{Attrs: attrs}, c.v6)
		if (r.match == parseMatch(c.want)) == c.not || r.packets != 1 {
			t.Errorf("%s: %s is %+v", name, c.want, r)
		}
		if got := r.opaque; got && !c.not {
			t.Errorf("%s: opaque", name)
		}
	}
}

// Whatever a namespace's rules hold, reading them ends, and what is found intact locks.
func FuzzRule(f *testing.F) {
	for _, b := range [][]byte{{}, {1, 2, 3}} {
		f.Add(nfnl.Attr(nfnl.AttrString(nil, unix.NFTA_RULE_CHAIN, chainIn), unix.NFTA_RULE_EXPRESSIONS, b), true)
	}
	f.Fuzz(func(t *testing.T, b []byte, v6 bool) {
		tab := table{name: "raw", chains: []string{chainIn, chainOut}, rules: []rule{parseRule(nfnl.Object{Attrs: b}, v6)}}
		if v := tab.judge(v6, "lo", nil, ""); v.locks || v.why == "" {
			t.Fatalf("one rule passes for a lock: %+v", v)
		}
		tab.whole("lo", v6, nil, "", "")
		tab.surplus()
	})
}

// A version whose accepts we cannot read locks all the same, and its lock is put in anew
// each time, for it proves nothing.
func TestUnknownVersion(t *testing.T) {
	netlocktest.Need(t, "iptables-nft-restore", "nft")
	p := netlocktest.NewPair(t)
	b := New(NFT)
	run := b.run
	b.run = func(ctx context.Context, path, stdin string, args ...string) (string, error) {
		out, err := run(ctx, path, stdin, args...)
		if strings.HasSuffix(path, "/iptables-nft-restore") && err == nil {
			unknown := func(old []byte) []byte { return append(marshal(t, &expr.Quota{Bytes: 1 << 40, Over: true}), old...) }
			rewrite(t, p.Inside, 0, "raw", chainIn, "ACCEPT", unknown)
			rewrite(t, p.Inside, 0, "raw", chainOut, "ACCEPT", unknown)
		}
		return out, err
	}
	for range 2 {
		if res := lock(t, b, p.Inside); res.Already {
			t.Error("an unreadable lock was left alone")
		}
		if !silent(t, p, "10.77.0.1:9", noAnswer) {
			t.Error("packets pass")
		}
		if st := state(t, b, p.Inside); st.Intact || !st.Found {
			t.Errorf("%+v", st)
		}
	}
	unlock(t, b, p.Inside)
	wantNothing(t, p.Inside)
}

// A link is no loopback for being called lo, and the loopback is one by any name.
func TestLoopbackRenamed(t *testing.T) {
	each(t, func(t *testing.T, _ *netlocktest.NS, v Variant) {
		tr := netlocktest.NewTraffic(t)
		n := tr.Inside
		rename := func(from, to string) { t.Helper(); n.Run("", "ip", "link", "set", "dev", from, "name", to) }
		// Locked first, then renamed: the rule means another link.
		lock(t, New(v), n)
		rename("lo", "old-lo")
		rename("peer", "lo")
		if st := state(t, New(v), n); st.Intact || st.Why == "" {
			t.Errorf("a lock that trusts another link is %+v", st)
		}
		if res := lock(t, New(v), n); res.Already {
			t.Error("left alone")
		}
		wantIntact(t, n, v)
		if res := lock(t, New(v), n); !res.Already {
			t.Error("locked again")
		}
		tr.Expect(t, true, "mark-seg4-out", "mark-seg6-out", "mark-tcp4-out", "mark-lo-tcp4", "mark-lo-tcp6", "tcp4-in")
		// And back.
		rename("lo", "peer")
		rename("old-lo", "lo")
		if st := state(t, New(v), n); st.Intact {
			t.Errorf("%+v", st)
		}
		lock(t, New(v), n)
		wantIntact(t, n, v)
		tr.Expect(t, true)
		unlock(t, New(v), n)
		wantNothing(t, n)

		// Renamed while the lock goes in.
		b := New(v)
		to := "new-lo"
		b.run = func(ctx context.Context, path, stdin string, args ...string) (string, error) {
			if to != "" {
				rename("lo", to)
				to = ""
			}
			return runCommand(ctx, path, stdin, args...)
		}
		lock(t, b, n)
		wantIntact(t, n, v)
		unlock(t, New(v), n)
		wantNothing(t, n)
		rename("new-lo", "lo")

		// A name that iptables takes for a pattern, or for something else.
		for _, name := range []string{"l+", "-j", `"`, "!"} {
			lock(t, New(v), n)
			rename("lo", name)
			_, err := New(v).Lock(within(t, 20*time.Second), n.Netns(), options)
			if err == nil || strings.Contains(err.Error(), "\n") || errors.Is(err, netlock.ErrUnsupported) {
				t.Errorf("loopback %s: %v", name, err)
			}
			if st := state(t, New(v), n); st.Intact || !st.Found {
				t.Errorf("loopback %s: %+v", name, st)
			}
			unlock(t, New(v), n)
			wantNothing(t, n)
			rename(name, "lo")
		}
	})
}

// What the nft variant left is read and removed by netlink alone, in one commit.
func TestWithoutTools(t *testing.T) {
	netlocktest.Need(t, "iptables-legacy-save", "iptables-nft-restore", "nft")
	n := netlocktest.NewNS(t)
	lock(t, New(NFT), n)
	b, calls := counted(New(Auto))
	b.find = func(Variant, family, string) (string, error) { return "", netlock.ErrUnsupported }
	if st := state(t, b, n); !st.Intact || !st.Locked {
		t.Errorf("%+v", st)
	}
	if st := unlock(t, b, n); !st.Intact {
		t.Errorf("unlock found %+v", st)
	}
	wantNothing(t, n)
	if len(*calls) > 0 {
		t.Errorf("ran %v", *calls)
	}
}

// Somebody who changes other rules of nf_tables all the time delays us, and no more: what
// was read is what is removed, and is read again until it is.
func TestRulesKeepChanging(t *testing.T) {
	netlocktest.Need(t, "iptables-nft-restore")
	n := netlocktest.NewNS(t)
	var stop atomic.Bool
	changes := make(chan int)
	go func() {
		made := 0
		defer func() { changes <- made }()
		err := n.Do(func() error {
			conn, err := nfnl.Dial()
			if err != nil {
				return err
			}
			defer conn.Close()
			name := nfnl.AttrString(nil, unix.NFTA_TABLE_NAME, "storm")
			for ; !stop.Load(); made++ {
				for _, cmd := range []uint8{unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_DELTABLE} {
					if err := conn.Commit(context.Background(), 0, nfnl.Request{Cmd: cmd, Family: unix.NFPROTO_INET, Attrs: name}); err != nil {
						return err
					}
				}
			}
			return nil
		})
		if err != nil {
			t.Errorf("change rules: %v", err)
		}
	}()
	for range 10 {
		if _, err := New(NFT).Lock(within(t, 20*time.Second), n.Netns(), options); err != nil {
			t.Error(err)
		}
		if st, err := New(NFT).Unlock(within(t, 20*time.Second), n.Netns(), options); err != nil || !st.Intact {
			t.Errorf("%+v, %v", st, err)
		}
	}
	stop.Store(true)
	if made := <-changes; made < 100 {
		t.Errorf("only %d changes meanwhile: the test proves nothing", made)
	}
	wantNothing(t, n)
}

// Whatever else is in a table, what is ours is found and removed, and a leftover that
// stops nothing is in nobody's way.
func TestUnreadableTable(t *testing.T) {
	netlocktest.Need(t, "iptables-legacy-save", "iptables-nft-save", "nft")
	const odd = ` chain odd { type filter hook prerouting priority -5; @ll,0,8 255 ct id 7 log prefix "x" accept; }
 set s { type ipv4_addr; }
`
	for name, c := range map[string]struct {
		rules string
		stays bool // an empty chain of our name
	}{
		"empty chain":   {"table ip raw {\n" + odd + " chain " + chainIn + " { }\n}\n", false},
		"base chain":    {"table ip raw {\n" + odd + " chain " + chainIn + " { type filter hook output priority 7; policy accept; }\n}\n", false},
		"odd rules":     {"table ip6 filter {\n" + odd + " chain " + chainOut + " { @th,0,8 255 ct id 7 accept; }\n chain x { jump " + chainOut + "; }\n}\n", false},
		"led to by map": {"table ip raw {\n" + odd + " chain " + chainIn + " { drop; }\n map m { type inet_service : verdict; elements = { 7 : jump " + chainIn + " }; }\n}\n", true},
	} {
		t.Run(name, func(t *testing.T) {
			n := netlocktest.NewNS(t)
			before := ""
			leave := func() {
				t.Helper()
				n.Run("", "nft", "flush", "ruleset")
				n.Run(c.rules, "nft", "-f", "-")
				before = n.Run("", "nft", "list", "ruleset")
				if st := state(t, New(Auto), n); !st.Found || st.Locked || st.Intact || st.Why == "" {
					t.Errorf("%+v", st)
				}
			}
			gone := func(nothingNew bool) {
				t.Helper()
				text := n.Run("", "nft", "list", "ruleset")
				switch want := chainIn + " {\n\t}"; {
				case c.stays && !strings.Contains(text, want):
					t.Errorf("want an empty chain:\n%s", text)
				case !c.stays && (strings.Contains(text, chainIn) || strings.Contains(text, chainOut)):
					t.Errorf("something is left:\n%s", text)
				}
				// All the rest is as it was.
				for line := range strings.Lines(text) {
					if nothingNew && !strings.Contains(before, line) {
						t.Errorf("new: %s", line)
					}
				}
				if strings.Count(text, "ct id") == 0 || !strings.Contains(text, "set s") {
					t.Errorf("too much went:\n%s", text)
				}
			}
			leave()
			if st := unlock(t, New(Auto), n); !st.Found || st.Intact {
				t.Errorf("unlock found %+v", st)
			}
			gone(true)
			leave()
			l := &netlock.Locker{Backends: []netlock.Backend{nft.New()}, Cleaners: []netlock.Backend{New(Auto)}, Options: options}
			if _, err := l.Lock(within(t, 20*time.Second), n.Netns()); err != nil {
				t.Errorf("lock by nft: %v", err)
			}
			if st, err := l.Unlock(within(t, 20*time.Second), n.Netns()); !st.Found || !st.Locked || err != nil && netlock.KindOf(err) != netlock.KindTampered {
				t.Errorf("unlock by nft: %+v, %v", st, err)
			}
			gone(true)
			// And our own lock gets its place.
			leave()
			lock(t, New(NFT), n)
			wantIntact(t, n, NFT)
			unlock(t, New(NFT), n)
			gone(false) // iptables makes tables and base chains, which stay
		})
	}
	t.Run("owned", func(t *testing.T) {
		n := netlocktest.NewNS(t)
		conn, err := nftables.New(nftables.WithNetNSFd(n.Netns().FD()), nftables.AsLasting())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.CloseLasting()
		table := conn.CreateTable(&nftables.Table{Name: "raw", Family: nftables.TableFamilyIPv4, Flags: nftables.TableFlagOwner})
		conn.AddChain(&nftables.Chain{Name: chainIn, Table: table})
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
		if st := unlock(t, New(Auto), n); st != (netlock.State{}) {
			t.Errorf("another's table passes for ours: %+v", st)
		}
		lock(t, New(NFT), n)
		wantIntact(t, n, NFT)
		unlock(t, New(NFT), n)
	})
}

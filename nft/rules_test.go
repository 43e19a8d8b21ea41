package nft

import (
	"testing"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

func TestPlace(t *testing.T) {
	tab := func(name string, family uint8) table { return table{name: name, family: family} }
	v := func(name string, locks bool) view { return view{table: tab(name, unix.NFPROTO_INET), locks: locks} }
	first, second := tableNames[0], tableNames[1]
	held := func(names ...string) (ts []table) {
		for _, n := range names {
			ts = append(ts, tab(n, unix.NFPROTO_INET))
		}
		return ts
	}
	for name, c := range map[string]struct {
		mine    []view
		held    []table
		want    string
		replace bool
		ok      bool
	}{
		"nothing there":                       {want: first, ok: true},
		"first broken":                        {mine: []view{v(first, true)}, want: second, ok: true},
		"second broken":                       {mine: []view{v(second, true)}, want: first, ok: true},
		"both there, the first locks":         {mine: []view{v(first, true), v(second, false)}, want: second, replace: true, ok: true},
		"both there, the second locks":        {mine: []view{v(first, false), v(second, true)}, want: first, replace: true, ok: true},
		"both lock":                           {mine: []view{v(first, true), v(second, true)}, want: second, replace: true, ok: true},
		"first held":                          {held: held(first), want: second, ok: true},
		"first held, second locks":            {held: held(first), mine: []view{v(second, true)}, want: second, replace: true, ok: true},
		"second held, first locks":            {held: held(second), mine: []view{v(first, true)}, want: first, replace: true, ok: true},
		"both held":                           {held: held(first, second)},
		"held in another family is no matter": {held: []table{tab(first, unix.NFPROTO_IPV4)}, want: first, ok: true},
	} {
		t.Run(name, func(t *testing.T) {
			got, replace, ok := place(c.mine, c.held)
			if got != c.want || replace != c.replace || ok != c.ok {
				t.Errorf("place = %q, %v, %v; want %q, %v, %v", got, replace, ok, c.want, c.replace, c.ok)
			}
		})
	}
}

// What the canonical text must tell apart, and what it must not.
func TestExprsText(t *testing.T) {
	cmp := func(nested bool, value ...byte) []byte {
		data := nfnl.Attr(nil, unix.NFTA_DATA_VALUE, value)
		typ := uint16(unix.NFTA_CMP_DATA)
		if nested {
			typ |= unix.NLA_F_NESTED
		}
		b := nfnl.Attr(nil, unix.NFTA_CMP_SREG, []byte{0, 0, 0, 1})
		return nfnl.Attr(b, typ, data)
	}
	elem := func(name string, data []byte) []byte {
		b := nfnl.AttrString(nil, unix.NFTA_EXPR_NAME, name)
		b = nfnl.Attr(b, unix.NFTA_EXPR_DATA|unix.NLA_F_NESTED, data)
		return nfnl.Attr(nil, unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, b)
	}
	text := func(b []byte) string { s, _ := exprsText(b); return s }
	base := text(elem("cmp", cmp(true, 6)))
	if got := text(elem("cmp", cmp(false, 6))); got != base {
		t.Errorf("the NESTED flag alone makes another text: %q, %q", got, base)
	}
	for name, b := range map[string][]byte{
		"another value":         elem("cmp", cmp(true, 7)),
		"a longer value":        elem("cmp", cmp(true, 6, 0)),
		"another expression":    elem("range", cmp(true, 6)),
		"one more attribute":    elem("cmp", nfnl.Attr(cmp(true, 6), 9, []byte{1})),
		"one more expression":   append(elem("cmp", cmp(true, 6)), elem("unknown", nil)...),
		"a truncated attribute": elem("cmp", cmp(true, 6)[:11]),
		"a truncated list":      elem("cmp", cmp(true, 6))[:9],
	} {
		if text(b) == base {
			t.Errorf("%s: the text is the same", name)
		}
	}
	counter := func(n byte) []byte {
		return elem("counter", nfnl.Attr(nil, unix.NFTA_COUNTER_PACKETS, []byte{0, 0, 0, 0, 0, 0, 0, n}))
	}
	a, n := exprsText(counter(3))
	b, _ := exprsText(counter(4))
	if a != b || n != 3 {
		t.Errorf("counters: %q, %q, %d packets; want the same text and 3", a, b, n)
	}
}

// The kernels of these tests have no queue expression: ours is held against the bytes
// that nft 1.0.6 sends for "counter queue to N", and the target against iptables'.
func TestQueueExpr(t *testing.T) {
	elem := func(name string, data []byte) []byte {
		b := nfnl.Attr(nfnl.AttrString(nil, unix.NFTA_EXPR_NAME, name), unix.NFTA_EXPR_DATA|unix.NLA_F_NESTED, data)
		return nfnl.Attr(nil, unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, b)
	}
	counter := elem("counter", nil)
	native := func(flags string) []byte {
		return append(counter[:len(counter):len(counter)], elem("queue", []byte("\x06\x00\x01\x00\xc1\x14\x00\x00\x06\x00\x02\x00\x00\x01\x00\x00"+flags))...)
	}
	target := func(flags byte) []byte {
		b := nfnl.AttrString(nil, unix.NFTA_TARGET_NAME, "NFQUEUE")
		b = nfnl.Attr(b, unix.NFTA_TARGET_REV, []byte{0, 0, 0, 3})
		return append(counter[:len(counter):len(counter)], elem("target", nfnl.Attr(b, unix.NFTA_TARGET_INFO, []byte{0x14, 0xc1, 1, 0, flags, 0, 0, 0}))...)
	}
	for name, c := range map[string]struct {
		raw  []byte
		q    queue
		same bool
	}{
		"queue as nft sends it":             {native(""), queue{num: 49428}, true},
		"queue as the kernel tells it":      {native("\x06\x00\x03\x00\x00\x00\x00\x00"), queue{num: 49428}, true},
		"queue with bypass":                 {native("\x06\x00\x03\x00\x00\x01\x00\x00"), queue{num: 49428}, false},
		"NFQUEUE as iptables has it":        {target(0), queue{num: 49428, compat: true}, true},
		"NFQUEUE with --queue-bypass":       {target(1), queue{num: 49428, compat: true}, false},
		"queue by the other way of queuing": {native(""), queue{num: 49428, compat: true}, false},
		"queue of another number":           {native(""), queue{num: 1}, false},
	} {
		want, err := wantText([]expr.Any{&expr.Counter{}, c.q.expr()})
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := exprsText(c.raw); (got == want) != c.same {
			t.Errorf("%s: the same as ours is %v, want %v:\n%q\n%q", name, got == want, c.same, got, want)
		}
		if q := queueOf(c.raw); q == nil || c.same && *q != c.q {
			t.Errorf("%s: read as %+v", name, q)
		}
	}
}

// No bytes from the kernel, or from whoever passes for it, may panic.
func FuzzRead(f *testing.F) {
	f.Add([]byte{8, 0, 1, 0, 'a', 0, 0, 0}, uint8(1))
	f.Add([]byte{4, 0, 1, 128, 8, 0, 2, 0, 1, 2, 3, 4}, uint8(10))
	want, err := wantBoth(nil, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte, family uint8) {
		o := nfnl.Object{Family: family, Attrs: b}
		tab, _ := parseTable(o)
		r := parseRule(o)
		if v := judge(tab, [2]*nfnl.Object{&o, &o}, []rule{r, r}, want); v.why == "" {
			t.Fatalf("%x passes for an intact lock", b)
		}
	})
}

package hold

import (
	"reflect"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// The queue expression of nf_tables, which not every kernel of the tests has.
func TestNamedByExpression(t *testing.T) {
	rule := func(table, chain string, data []byte) []byte {
		e := nfnl.Attr(nfnl.AttrString(nil, unix.NFTA_EXPR_NAME, "queue"), unix.NFTA_EXPR_DATA, data)
		b := nfnl.AttrString(nfnl.AttrString(nil, unix.NFTA_RULE_TABLE, table), unix.NFTA_RULE_CHAIN, chain)
		return nfnl.Attr(b, unix.NFTA_RULE_EXPRESSIONS, nfnl.Attr(nil, unix.NFTA_LIST_ELEM, e))
	}
	num := nfnl.Attr(nil, unix.NFTA_QUEUE_NUM, []byte{0xC1, 0x14})
	for name, c := range map[string]struct {
		rule []byte
		want spans
	}{
		"one":         {rule("t", "c", num), spans{{49428, 49428}}},
		"several":     {rule("t", "c", nfnl.Attr(num, unix.NFTA_QUEUE_TOTAL, []byte{0, 3})), spans{{49428, 49430}}},
		"up to most":  {rule("t", "c", nfnl.Attr(num, unix.NFTA_QUEUE_TOTAL, []byte{0xFF, 0xFF})), spans{{49428, 49428 + 65534}}},
		"of a map":    {rule("t", "c", nfnl.Attr(nil, 4, []byte{0, 0, 0, 1})), nil},
		"our table":   {rule("criu-netlock-2", "c", num), nil},
		"our chain":   {rule("raw", "CRIU-NETLOCK-IN", num), nil},
		"nearly ours": {rule("criu-netlock-3", "c", num), spans{{49428, 49428}}},
	} {
		var got spans
		if got.rule(c.rule); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %v, not %v", name, got, c.want)
		}
	}
	s := spans{{49428, 49428 + 65534}}
	if s.has(49427) || !s.has(49428) || !s.has(65535) {
		t.Error("a span is not what it says")
	}
}

// Whatever a table's entries are, reading them ends.
func TestNamedMalformed(t *testing.T) {
	for _, f := range legacyFamilies {
		var s spans
		for n := range 512 {
			s.legacy(f, make([]byte, n))
			b := make([]byte, n)
			for i := range b {
				b[i] = 0xFF
			}
			s.legacy(f, b)
		}
		if s != nil {
			t.Error(s)
		}
	}
}

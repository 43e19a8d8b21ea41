package netlocktest

import (
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
)

// The guard over the host's network, held over a throwaway one.
func TestHostNetwork(t *testing.T) {
	Need(t, "nft", "iptables-legacy-save", "iptables-legacy-restore", "ip6tables-legacy-save", "ip6tables-legacy-restore")
	n := NewNS(t)
	look := func() (out map[string]string) {
		t.Helper()
		n.do(func() (err error) {
			out, err = hostNetwork()
			return err
		})
		return out
	}
	filter := "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p 253 -j ACCEPT\nCOMMIT\n"
	for _, c := range []struct {
		change func()
		want   []string
	}{
		{func() {}, nil}, // looking twice makes no table
		{func() { n.Run("add table inet t", "nft", "-f", "-") }, []string{"nft rules"}},
		{func() { n.Run(filter, "iptables-legacy-restore") }, []string{"iptables filter"}},
		{func() { n.Run(filter, "ip6tables-legacy-restore") }, []string{"ip6tables filter"}},
		{func() { n.Run("*raw\nCOMMIT\n", "iptables-legacy-restore") }, []string{"iptables raw"}},
		{func() {
			n.netlink(func(h *netlink.Handle) error {
				return h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "a"}, PeerName: "b"})
			})
		}, []string{"links"}},
		{func() { n.Run("delete table inet t", "nft", "-f", "-") }, []string{"nft rules"}},
	} {
		before := look()
		c.change()
		if got := changed(before, look()); !slices.Equal(got, c.want) {
			t.Errorf("noticed %q, want %q", got, c.want)
		}
	}
}

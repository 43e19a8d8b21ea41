package netlocktest

// What a dropped FIN or RST does to a connection's entry in conntrack: nothing, if
// the lock sits before it.

import (
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// trackConnections makes conntrack work in a namespace: it does only where a rule
// asks for it.
func trackConnections(n *NS) {
	n.t.Helper()
	n.Run(`table inet tracked {
		chain in { type filter hook input priority 0; ct state established accept; }
		chain out { type filter hook output priority 0; ct state established accept; }
	}`, "nft", "-f", "-")
}

// tcpEstablished is TCP_CONNTRACK_ESTABLISHED.
const tcpEstablished = 3

// farewells are connections to be closed under a lock, from either end, by FIN or RST.
type farewells struct {
	tr    *Traffic
	conns []farewell
}

type farewell struct {
	name  string
	port  uint16
	fin   bool
	close func() error
}

// newFarewells makes the connections; conntrack has to work.
func (tr *Traffic) newFarewells() *farewells {
	tr.t.Helper()
	f := &farewells{tr: tr}
	port := uint16(7720)
	for _, addr := range []string{InsideV4, InsideV6} {
		for _, from := range []string{"peer", "inside"} {
			for _, fin := range []bool{true, false} {
				port++
				client, server := tr.connection(addr, int(port))
				c := client
				if from == "inside" {
					c = server
				}
				w := farewell{name: fmt.Sprintf("RST of %s to %s", from, addr), port: port, fin: fin, close: func() error { return reset(c) }}
				if fin {
					w.name = "FIN" + w.name[3:]
					w.close = c.CloseWrite
				}
				f.conns = append(f.conns, w)
			}
		}
	}
	return f
}

func reset(c *net.TCPConn) error {
	if err := c.SetLinger(0); err != nil {
		return err
	}
	return c.Close()
}

// say sends every FIN and RST.
func (f *farewells) say() {
	f.tr.t.Helper()
	for _, c := range f.conns {
		if err := c.close(); err != nil {
			f.tr.t.Fatalf("%s: %v", c.name, err)
		}
	}
}

// moved are the connections that conntrack no longer holds to be established.
func (f *farewells) moved(of func(farewell) bool) (out []string) {
	f.tr.t.Helper()
	states := map[uint16]uint8{}
	f.tr.Inside.netlink(func(h *netlink.Handle) error {
		for _, fam := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
			flows, err := h.ConntrackTableList(netlink.ConntrackTable, fam)
			if err != nil {
				return err
			}
			for _, fl := range flows {
				if p, ok := fl.ProtoInfo.(*netlink.ProtoInfoTCP); ok {
					states[fl.Forward.DstPort] = p.State
				}
			}
		}
		return nil
	})
	for _, c := range f.conns {
		if s := states[c.port]; of(c) && s != tcpEstablished {
			out = append(out, fmt.Sprintf("%s: state %d", c.name, s))
		}
	}
	return out
}

func anyFarewell(farewell) bool { return true }

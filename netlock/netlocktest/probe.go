package netlocktest

// Probes: one packet or connection of each kind a lock has to stop or to let pass, and
// what came of it. All run side by side, so looking at a lock costs one waiting time.

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What can come of a probe; anything else is an error's text. Blocked is what a drop
// looks like: nothing came, not even a refusal.
const (
	Passed  = "passed"
	Refused = "refused"
	Blocked = "blocked"
)

// How long a probe waits where it must be blocked, and where it must pass: then it
// comes at once, but a connection that was locked first has to retransmit, and what is sent to a
// neighbour that could not be found under the rules before is lost: it is sent again. What must
// pass beside a lock has more than a moment: a busy machine needs it.
const (
	blockedWait = 250 * time.Millisecond
	besideWait  = 2 * time.Second
	againTime   = time.Second
	openWait    = 30 * time.Second
)

const (
	criuMark   = 0xc114
	udpPort    = 7701
	tcpPort    = 7702
	markedPort = 7703 // answers with CRIU's mark
	closedPort = 7704
	segPort    = 7705 // where segments come from; nobody listens
	segToPort  = 7706 // where they go; nobody listens
)

// The addresses beyond Inside, which forwards.
const farV4, farV6 = "10.78.0.2", "fd78::2"

// Traffic is a Pair with listeners, established connections and a third namespace
// behind Inside.
type Traffic struct {
	*Pair
	t      testing.TB
	far    *NS
	probes map[string]probe
	token  atomic.Uint64
	in     map[string]*sink
}

// probe says what came of it within the context's deadline.
type probe func(context.Context) string

// quick is what tells a lock from none when there are many to look at.
var quick = []string{"udp4-in", "udp6-in", "udp4-out", "udp6-out", "tcp4-in", "tcp6-out"}

// NewTraffic makes the pair and everything that listens in it.
func NewTraffic(t testing.TB) *Traffic {
	t.Helper()
	tr := &Traffic{Pair: NewPair(t), t: t, far: NewNS(t), probes: map[string]probe{}, in: map[string]*sink{}}
	tr.token.Store(uint64(time.Now().UnixNano()))
	tr.route()
	for _, n := range []struct {
		name string
		*NS
	}{{"inside", tr.Inside}, {"peer", tr.Peer}, {"far", tr.far}} {
		for _, fam := range []string{"4", "6"} {
			tr.listenPackets(n.NS, n.name+"-udp"+fam, "udp"+fam, fmt.Sprint(":", udpPort))
		}
		tr.listenPackets(n.NS, n.name+"-ping4", "ip4:icmp", "0.0.0.0")
		tr.listenPackets(n.NS, n.name+"-ping6", "ip6:ipv6-icmp", "::")
		// One segment, one way: a connection does not tell that only its answers are stopped.
		tr.listenPackets(n.NS, n.name+"-seg4", "ip4:tcp", "0.0.0.0")
		tr.listenPackets(n.NS, n.name+"-seg6", "ip6:tcp", "::")
		// 253 is for experiments (RFC 3692): a lock is not a list of protocols.
		tr.listenPackets(n.NS, n.name+"-other4", "ip4:253", "0.0.0.0")
		tr.listenPackets(n.NS, n.name+"-other6", "ip6:253", "::")
		tr.listenTCP(n.NS, tcpPort, 0)
	}
	tr.listenTCP(tr.Inside, markedPort, criuMark)

	for _, f := range []struct{ n, inside, peer, far, lo string }{
		{"4", InsideV4, PeerV4, farV4, "127.0.0.1"}, {"6", InsideV6, PeerV6, farV6, "::1"},
	} {
		inside, peer := tr.Inside, tr.Peer
		tr.probes["tcp"+f.n+"-in"] = connect(peer, f.inside, tcpPort, 0)
		tr.probes["tcp"+f.n+"-out"] = connect(inside, f.peer, tcpPort, 0)
		tr.probes["closed"+f.n+"-in"] = connect(peer, f.inside, closedPort, 0)
		tr.probes["lo-tcp"+f.n] = connect(inside, f.lo, tcpPort, 0)
		tr.probes["mark-lo-tcp"+f.n] = connect(inside, f.lo, markedPort, criuMark)
		tr.probes["mark-tcp"+f.n+"-out"] = connect(inside, f.peer, tcpPort, criuMark)
		for _, kind := range []string{"udp", "ping", "seg", "other"} {
			k := kind + f.n
			tr.probes[k+"-in"] = tr.packet(peer, k, f.inside, 0, "inside-"+k)
			tr.probes[k+"-out"] = tr.packet(inside, k, f.peer, 0, "peer-"+k)
		}
		tr.probes["lo-udp"+f.n] = tr.packet(inside, "udp"+f.n, f.lo, 0, "inside-udp"+f.n)
		tr.probes["mark-lo-udp"+f.n] = tr.packet(inside, "udp"+f.n, f.lo, criuMark, "inside-udp"+f.n)
		tr.probes["mark-udp"+f.n+"-out"] = tr.packet(inside, "udp"+f.n, f.peer, criuMark, "peer-udp"+f.n)
		tr.probes["mark-seg"+f.n+"-out"] = tr.packet(inside, "seg"+f.n, f.peer, criuMark, "peer-seg"+f.n)
		tr.probes["syn"+f.n+"-in"] = tr.packet(peer, "syn"+f.n, f.inside, 0, "inside-seg"+f.n)
		tr.probes["forward"+f.n] = tr.packet(peer, "udp"+f.n, f.far, 0, "far-udp"+f.n)
		tr.establish(f.n, f.inside)
	}
	ndIn := make(chan struct{}, 1)
	tr.probes["nd-in"] = func(ctx context.Context) string {
		defer func() { ndIn <- struct{}{} }()
		return tr.resolve(ctx, tr.Peer, InsideV6)
	}
	tr.probes["nd-out"] = func(ctx context.Context) string {
		// One after the other: the solicitation of one side answers the other's question.
		<-ndIn
		return tr.resolve(ctx, tr.Inside, PeerV6)
	}
	return tr
}

// want is what has to come of a probe. Under a lock only CRIU's own packets and
// neighbour discovery pass, and nothing is refused.
func want(name string, locked bool) string {
	switch {
	case strings.HasPrefix(name, "mark-lo-tcp"), strings.HasPrefix(name, "nd-"):
		return Passed
	case locked:
		return Blocked
	case strings.HasPrefix(name, "closed"):
		return Refused
	}
	return Passed
}

// Faults runs the probes, all if none is named, and returns what came otherwise
// than a lock, or none, makes it.
func (tr *Traffic) Faults(locked bool, names ...string) []string {
	wait := openWait
	if locked {
		wait = besideWait
	}
	return tr.compare(wait, func(name string) string { return want(name, locked) }, names...)
}

// compare waits for what must pass.
func (tr *Traffic) compare(wait time.Duration, want func(string) string, names ...string) (out []string) {
	got := tr.run(func(name string) time.Duration {
		if want(name) == Blocked {
			return blockedWait
		}
		return wait
	}, names...)
	for name, got := range got {
		if want := want(name); got != want {
			out = append(out, fmt.Sprintf("%s: %s, want %s", name, got, want))
		}
	}
	slices.Sort(out)
	return out
}

// Expect fails the test for every fault.
func (tr *Traffic) Expect(t testing.TB, locked bool, names ...string) {
	t.Helper()
	if f := tr.Faults(locked, names...); f != nil {
		t.Errorf("locked is to be %v:\n%s", locked, strings.Join(f, "\n"))
	}
}

func (tr *Traffic) run(wait func(name string) time.Duration, names ...string) map[string]string {
	tr.t.Helper()
	if names == nil {
		names = slices.Collect(maps.Keys(tr.probes))
	}
	var (
		mu  sync.Mutex
		wg  sync.WaitGroup
		out = map[string]string{}
	)
	for _, name := range names {
		p, ok := tr.probes[name]
		if !ok {
			tr.t.Fatalf("no probe %s", name)
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), wait(name))
			defer cancel()
			o := p(ctx)
			mu.Lock()
			defer mu.Unlock()
			out[name] = o
		})
	}
	wg.Wait()
	return out
}

// route makes Inside a router between Peer and far.
func (tr *Traffic) route() {
	join(end{tr.Inside, "far", "10.78.0.1", "fd78::1", 3}, end{tr.far, "inside", farV4, farV6, 4})
	tr.Inside.sysctl("ipv4/ip_forward", "1")
	tr.Inside.sysctl("ipv6/conf/all/forwarding", "1")
	route := func(n *NS, via, to string) {
		n.netlink(func(h *netlink.Handle) error {
			dst, err := netlink.ParseIPNet(to)
			if err != nil {
				return err
			}
			return h.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(via)})
		})
	}
	route(tr.Peer, InsideV4, "10.78.0.0/24")
	route(tr.Peer, InsideV6, "fd78::/64")
	route(tr.far, "10.78.0.1", "10.77.0.0/24")
	route(tr.far, "fd78::1", "fd77::/64")
}

// sink remembers which tokens have come, and wakes who waits for one.
type sink struct {
	mu   sync.Mutex
	came map[uint64]chan struct{}
}

func newSink() *sink { return &sink{came: map[uint64]chan struct{}{}} }

func (s *sink) arrival(token uint64) chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.came[token]
	if c == nil {
		c = make(chan struct{})
		s.came[token] = c
	}
	return c
}

func (s *sink) wait(ctx context.Context, token uint64) string {
	came := s.arrival(token)
	select {
	case <-came:
		return Passed
	case <-ctx.Done():
	}
	select {
	case <-came: // both
		return Passed
	default:
		return Blocked
	}
}

// add takes what has come; a packet can come twice, the lo ones do not.
func (s *sink) add(token uint64) {
	c := s.arrival(token)
	select {
	case <-c:
	default:
		close(c)
	}
}

func (tr *Traffic) listenPackets(n *NS, name, network, addr string) {
	tr.t.Helper()
	var c net.PacketConn
	n.do(func() (err error) {
		c, err = net.ListenPacket(network, addr)
		return err
	})
	tr.t.Cleanup(func() { c.Close() })
	s := newSink()
	tr.in[name] = s
	go func() {
		b := make([]byte, 2048)
		for {
			k, _, err := c.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil && k >= 8 { // the token is always last
				s.add(binary.BigEndian.Uint64(b[k-8 : k]))
			}
		}
	}()
}

// setMark is a net.Dialer's or ListenConfig's Control.
func setMark(mark int) func(string, string, syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) (err error) {
		if mark == 0 {
			return nil
		}
		e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark) })
		return errors.Join(e, err)
	}
}

func (tr *Traffic) listenTCP(n *NS, port, mark int) {
	tr.t.Helper()
	l := listenTCP(n, port, mark)
	tr.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
}

func listenTCP(n *NS, port, mark int) net.Listener {
	n.t.Helper()
	var l net.Listener
	n.do(func() (err error) {
		lc := net.ListenConfig{Control: setMark(mark)}
		lc.SetMultipathTCP(false)
		l, err = lc.Listen(context.Background(), "tcp", fmt.Sprint(":", port))
		return err
	})
	return l
}

func dial(ctx context.Context, n *NS, network, addr string, mark int) (c net.Conn, err error) {
	err = n.Do(func() error {
		c, err = (&net.Dialer{Control: setMark(mark)}).DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

func connect(from *NS, addr string, port, mark int) probe {
	return func(ctx context.Context) string {
		c, err := dial(ctx, from, "tcp", net.JoinHostPort(addr, fmt.Sprint(port)), mark)
		// A neighbour that could not be found under the rules before is looked for again.
		for errors.Is(err, unix.EHOSTUNREACH) && ctx.Err() == nil {
			time.Sleep(10 * time.Millisecond)
			var again error
			if c, again = dial(ctx, from, "tcp", net.JoinHostPort(addr, fmt.Sprint(port)), mark); ctx.Err() == nil {
				err = again
			}
		}
		var ne net.Error
		switch {
		case err == nil:
			c.Close()
			return Passed
		case errors.Is(err, unix.ECONNREFUSED):
			return Refused
		case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &ne) && ne.Timeout():
			return Blocked
		}
		return err.Error()
	}
}

// packet sends one datagram or echo request and waits for it at the other end: one
// way only, so that a lock which stops the answers alone is seen.
func (tr *Traffic) packet(from *NS, kind, addr string, mark int, sinkName string) probe {
	return func(ctx context.Context) string {
		token := tr.token.Add(1)
		b := binary.BigEndian.AppendUint64(nil, token)
		network, addr := kind, addr
		switch kind {
		case "ping4":
			network = "ip4:icmp"
			b = echo(8, b)
			binary.BigEndian.PutUint16(b[2:], checksum(b))
		case "ping6":
			network = "ip6:ipv6-icmp"
			b = echo(128, b) // the kernel fills in the checksum
		case "seg4":
			network, b = "ip4:tcp", segment(tcpAck, b)
		case "seg6":
			network, b = "ip6:tcp", segment(tcpAck, b)
		case "syn4":
			network, b = "ip4:tcp", segment(tcpSyn, b)
		case "syn6":
			network, b = "ip6:tcp", segment(tcpSyn, b)
		case "other4":
			network = "ip4:253"
		case "other6":
			network = "ip6:253"
		default:
			addr = net.JoinHostPort(addr, fmt.Sprint(udpPort))
		}
		c, err := dial(ctx, from, network, addr, mark)
		if err != nil {
			return err.Error()
		}
		defer c.Close()
		for {
			// EPERM is how a drop at the output hook looks to the sender, EHOSTUNREACH what became of
			// the one before.
			if _, err := c.Write(b); err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EHOSTUNREACH) {
				return err.Error()
			}
			again, cancel := context.WithTimeout(ctx, againTime)
			got := tr.in[sinkName].wait(again, token)
			cancel()
			if got != Blocked || ctx.Err() != nil {
				return got
			}
		}
	}
}

// echo is an echo request with an identifier, a sequence number and the token.
func echo(typ byte, token []byte) []byte {
	return append([]byte{typ, 0, 0, 0, 0x77, 0x77, 0, 1}, token...)
}

const (
	tcpSyn = 0x02
	tcpAck = 0x10
)

// segment is a TCP segment with the flags and the token. It has no checksum: raw
// sockets get it all the same, and TCP gives no answer.
func segment(flags byte, token []byte) []byte {
	h := make([]byte, 20, 28)
	binary.BigEndian.PutUint16(h, segPort)
	binary.BigEndian.PutUint16(h[2:], segToPort)
	h[12], h[13] = 5<<4, flags
	return append(h, token...)
}

// marks are somebody's rules that give CRIU's mark to what comes from outside, before
// any lock sees it. They open none: the mark counts on lo alone.
var marks = fmt.Sprintf(`table inet marks {
	chain in { type filter hook prerouting priority -400; iifname != "lo" tcp dport %d meta mark set %#x; }
}
`, segToPort, criuMark)

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// establish makes a connection that lives as long as the Traffic, with a probe for
// each direction: a token in the stream.
func (tr *Traffic) establish(fam, addr string) {
	tr.t.Helper()
	client, server := tr.connection(addr, 7710)
	for _, d := range []struct {
		name     string
		from, to net.Conn
	}{{"established" + fam + "-in", client, server}, {"established" + fam + "-out", server, client}} {
		s := newSink()
		go func() {
			b := make([]byte, 8)
			for {
				if _, err := io.ReadFull(d.to, b); err != nil {
					return
				}
				s.add(binary.BigEndian.Uint64(b))
			}
		}()
		tr.probes[d.name] = func(ctx context.Context) string {
			token := tr.token.Add(1)
			if _, err := d.from.Write(binary.BigEndian.AppendUint64(nil, token)); err != nil {
				return err.Error()
			}
			return s.wait(ctx, token)
		}
	}
}

// connection is a TCP connection from Peer to Inside.
func (tr *Traffic) connection(addr string, port int) (client, server *net.TCPConn) {
	tr.t.Helper()
	l := listenTCP(tr.Inside, port, 0)
	defer l.Close()
	ctx, cancel := context.WithTimeout(context.Background(), openWait)
	defer cancel()
	c, err := dial(ctx, tr.Peer, "tcp", net.JoinHostPort(addr, fmt.Sprint(port)), 0)
	if err != nil {
		tr.t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		tr.t.Fatal(err)
	}
	for _, c := range []net.Conn{c, s} {
		tr.t.Cleanup(func() { c.Close() })
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err == nil {
			// Retransmit every 200 ms, without the doubling, so that it goes on soon after an unlock.
			raw.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_THIN_LINEAR_TIMEOUTS, 1)
			})
		}
		if err != nil {
			tr.t.Fatal(err)
		}
	}
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// resolve makes a namespace forget an IPv6 neighbour and ask for it again.
func (tr *Traffic) resolve(ctx context.Context, n *NS, addr string) string {
	out := Blocked
	n.netlink(func(h *netlink.Handle) error {
		routes, err := h.RouteGet(net.ParseIP(addr))
		if err != nil || len(routes) == 0 {
			return fmt.Errorf("route to %s: %w", addr, err)
		}
		neigh := &netlink.Neigh{LinkIndex: routes[0].LinkIndex, IP: net.ParseIP(addr), Family: unix.AF_INET6, State: unix.NUD_NONE}
		if err := h.NeighDel(neigh); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
		neigh.Flags = netlink.NTF_USE // as if a packet for it had come
		if err := h.NeighSet(neigh); err != nil {
			return err
		}
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			list, err := h.NeighList(neigh.LinkIndex, unix.AF_INET6)
			if err != nil {
				return err
			}
			for _, e := range list {
				if e.IP.Equal(neigh.IP) && e.State&unix.NUD_REACHABLE != 0 {
					out = Passed
					return nil
				}
			}
			select {
			case <-ctx.Done():
				// The next packet is to ask anew, not to be told that nobody answered.
				if err := h.NeighDel(neigh); err != nil && !errors.Is(err, unix.ENOENT) {
					return err
				}
				return nil
			case <-tick.C:
			}
		}
	})
	return out
}

// ForceReadBuffer gives a socket room for so many bytes, whatever net.core.rmem_max says.
func ForceReadBuffer(c *net.UDPConn, size int) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	e := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, size) })
	return errors.Join(e, err)
}

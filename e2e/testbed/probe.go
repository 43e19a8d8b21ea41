package testbed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock"
)

// closedPort is one where nothing listens: a packet that gets there is answered
// by a refusal, with or without a live task.
const closedPort = "9"

// Probes are the names of what Probe sends.
var Probes = []string{"tcp4", "tcp6", "udp4", "udp6", "ping4", "ping6", "out4", "out6"}

// Probe sends a packet of every kind between the peer and the container and says
// what came of each within the time given: "answered" or "refused", which only a
// packet that got through can be, or "timeout"; or "no address" where the container has no
// interface yet. port is the container's TCP port
// to call. The namespace is the container's, for the packets that go out.
func (n *Net) Probe(ctx context.Context, container *netlock.Namespace, port int, wait time.Duration) (map[string]string, error) {
	var (
		mu   sync.Mutex
		wg   sync.WaitGroup
		out  = map[string]string{}
		errs []error
	)
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	run := func(name string, f func() error) {
		wg.Go(func() {
			err := f()
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				out[name] = "answered"
			case errors.Is(err, syscall.ECONNREFUSED):
				out[name] = "refused"
			case isTimeout(err):
				out[name] = "timeout"
			case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EADDRNOTAVAIL):
				out[name] = "no address"
			default:
				errs = append(errs, fmt.Errorf("probe %s: %w", name, err))
			}
		})
	}
	for _, fam := range []struct{ n, addr, peer, icmp string }{
		{"4", ContainerV4, PeerV4, "ip4:icmp"},
		{"6", ContainerV6, PeerV6, "ip6:ipv6-icmp"},
	} {
		run("tcp"+fam.n, func() error {
			for {
				c, err := n.Dial(ctx, "tcp"+fam.n, net.JoinHostPort(fam.addr, fmt.Sprint(port)))
				if err == nil {
					c.Close()
				}
				if !errors.Is(err, syscall.EHOSTUNREACH) {
					return err
				}
				// A neighbour that could not be found while the link was down is looked for again.
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(10 * time.Millisecond):
				}
			}
		})
		run("udp"+fam.n, func() error {
			c, err := n.Dial(ctx, "udp"+fam.n, net.JoinHostPort(fam.addr, closedPort))
			if err != nil {
				return err
			}
			return ask(ctx, c, []byte("?"), nil)
		})
		run("ping"+fam.n, func() error {
			c, err := n.Dial(ctx, fam.icmp, fam.addr)
			if err != nil {
				return err
			}
			if fam.n == "4" {
				// Type 8, code 0, checksum, identifier, sequence. The answer is of type 0, and the
				// kernel gives it with its IP header.
				return ask(ctx, c, []byte{8, 0, 0xf7, 0xfd, 0, 1, 0, 1}, func(b []byte) bool { return len(b) > 20 && b[b[0]&15*4] == 0 })
			}
			return ask(ctx, c, []byte{128, 0, 0, 0, 0, 1, 0, 1}, func(b []byte) bool { return b[0] == 129 })
		})
		run("out"+fam.n, func() error {
			var l net.PacketConn
			err := n.Peer.Do(func() (err error) {
				l, err = net.ListenPacket("udp"+fam.n, net.JoinHostPort(fam.peer, "0"))
				return err
			})
			if err != nil {
				return err
			}
			defer l.Close()
			err = container.Do(func() error {
				c, err := net.Dial("udp"+fam.n, l.LocalAddr().String())
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = c.Write([]byte("!"))
				if errors.Is(err, syscall.EPERM) {
					err = nil // how a drop at the output hook looks to the sender of UDP
				}
				return err
			})
			if err != nil {
				return err
			}
			deadline, _ := ctx.Deadline()
			l.SetReadDeadline(deadline)
			_, _, err = l.ReadFrom(make([]byte, 1))
			return err
		})
	}
	wg.Wait()
	return out, errors.Join(errs...)
}

// Dial connects from the peer.
func (n *Net) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var c net.Conn
	err := n.Peer.Do(func() (err error) {
		c, err = new(net.Dialer).DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// ask writes a question and reads until is likes an answer.
func ask(ctx context.Context, c net.Conn, question []byte, is func([]byte) bool) error {
	defer c.Close()
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	if _, err := c.Write(question); err != nil {
		return err
	}
	b := make([]byte, 1500)
	for {
		n, err := c.Read(b)
		if err != nil {
			return err
		}
		if n > 0 && (is == nil || is(b[:n])) {
			return nil
		}
	}
}

// Arrivals counts the packets that got as far as a protocol's code in a namespace:
// TCP segments, pings, UDP datagrams for a socket or for none. A lock that lets
// packets in and only stops the answers is seen here alone.
func Arrivals(ns *netlock.Namespace) (int, error) {
	total := 0
	err := ns.Do(func() error {
		// Not /proc/net: that is the main thread's.
		b, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		// Two lines a protocol: the names of the columns, then the numbers.
		want := map[string][]string{"Tcp:": {"InSegs"}, "Udp:": {"InDatagrams", "NoPorts"}, "Icmp:": {"InEchos"}}
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		for i := 0; i+1 < len(lines); i += 2 {
			names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
			for k := 1; k < len(names) && k < len(values); k++ {
				if slices.Contains(want[names[0]], names[k]) {
					n, err := strconv.Atoi(values[k])
					if err != nil {
						return err
					}
					total += n
				}
			}
		}
		if b, err = os.ReadFile("/proc/thread-self/net/snmp6"); err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) == 2 && slices.Contains([]string{"Udp6InDatagrams", "Udp6NoPorts", "Icmp6InEchos"}, f[0]) {
				n, err := strconv.Atoi(f[1])
				if err != nil {
					return err
				}
				total += n
			}
		}
		return nil
	})
	return total, err
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &ne) && ne.Timeout()
}

package netlocktest

// Throwaway network namespaces.

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
)

// NS is a network namespace of the test's own, held by a process that sleeps.
type NS struct {
	t   testing.TB
	ns  *netlock.Namespace
	pid int
}

// NewNS makes a namespace that is gone when the test is over.
func NewNS(t testing.TB) *NS {
	t.Helper()
	Need(t)
	// cat sleeps until its standard input ends, which it does even if we are killed.
	// PR_SET_PDEATHSIG would end it with the thread that started it.
	c := exec.Command("cat")
	stdin, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := startUnshared(c); err != nil {
		t.Fatalf("new namespace: %v", err)
	}
	n := &NS{t: t, pid: c.Process.Pid}
	t.Cleanup(func() {
		if n.ns != nil {
			n.ns.Close()
		}
		stdin.(io.Closer).Close()
		c.Wait()
	})
	if n.ns, err = netlock.FromPID(n.pid); err != nil {
		t.Fatal(err)
	}
	return n
}

// startUnshared starts a process in a new network namespace. The thread goes back
// afterwards; one that cannot is thrown away.
func startUnshared(c *exec.Cmd) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		own, err := netns.Get()
		if err == nil {
			defer own.Close()
			if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
				err = c.Start()
			}
			if netns.Set(own) == nil {
				runtime.UnlockOSThread()
			}
		}
		done <- err
	}()
	return <-done
}

// Netns is the open handle; it stays the NS's.
func (n *NS) Netns() *netlock.Namespace { return n.ns }

// PID is that of a process in the namespace.
func (n *NS) PID() int { return n.pid }

// Do runs f on a thread that is in the namespace.
func (n *NS) Do(f func() error) error { return n.ns.Do(f) }

// do is Do for what must not fail.
func (n *NS) do(f func() error) {
	n.t.Helper()
	if err := n.ns.Do(f); err != nil {
		n.t.Fatal(err)
	}
}

// TryRun runs a program in the namespace and returns its standard output.
func (n *NS) TryRun(stdin, name string, args ...string) (string, error) {
	var out, stderr bytes.Buffer
	err := n.Do(func() error {
		c := exec.Command(name, args...)
		c.Stdin, c.Stdout, c.Stderr = strings.NewReader(stdin), &out, &stderr
		if err := c.Run(); err != nil {
			return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, &stderr)
		}
		return nil
	})
	return out.String(), err
}

// Run is TryRun for what must not fail.
func (n *NS) Run(stdin, name string, args ...string) string {
	n.t.Helper()
	out, err := n.TryRun(stdin, name, args...)
	if err != nil {
		n.t.Fatal(err)
	}
	return out
}

// netlink runs f with a route netlink socket of the namespace.
func (n *NS) netlink(f func(*netlink.Handle) error) {
	n.t.Helper()
	h, err := netlink.NewHandleAt(netns.NsHandle(n.ns.FD()))
	if err != nil {
		n.t.Fatal(err)
	}
	defer h.Close()
	if err := f(h); err != nil {
		n.t.Fatal(err)
	}
}

// sysctl sets one of /proc/sys/net, which is that of the thread's namespace.
func (n *NS) sysctl(name, value string) {
	n.t.Helper()
	n.do(func() error { return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0) })
}

// The addresses of a Pair.
const (
	InsideV4, InsideV6 = "10.77.0.1", "fd77::1"
	PeerV4, PeerV6     = "10.77.0.2", "fd77::2"
)

// Pair is two namespaces joined by a veth: Inside gets locked, Peer looks on.
type Pair struct {
	Inside, Peer *NS
}

// NewPair makes a pair that is gone when the test is over.
func NewPair(t testing.TB) *Pair {
	t.Helper()
	p := &Pair{NewNS(t), NewNS(t)}
	for _, n := range []*NS{p.Inside, p.Peer} {
		n.netlink(func(h *netlink.Handle) error {
			lo, err := h.LinkByName("lo")
			if err != nil {
				return err
			}
			return h.LinkSetUp(lo)
		})
	}
	join(end{p.Inside, "peer", InsideV4, InsideV6, 1}, end{p.Peer, "inside", PeerV4, PeerV6, 2})
	return p
}

// end is one end of a veth.
type end struct {
	*NS
	link, v4, v6 string
	mac          byte
}

func (e end) hw() net.HardwareAddr { return net.HardwareAddr{2, 0, 0, 0, 0x77, e.mac} }

// join connects two namespaces by a veth with fixed addresses.
func join(a, b end) {
	a.t.Helper()
	for _, e := range []end{a, b} {
		// The kernel's own link-local address comes late, and neighbour discovery needs one.
		e.sysctl("ipv6/conf/default/addr_gen_mode", "1")
	}
	a.netlink(func(h *netlink.Handle) error {
		return h.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: a.link, HardwareAddr: a.hw()},
			PeerName:  b.link, PeerHardwareAddr: b.hw(), PeerNamespace: netlink.NsFd(b.ns.FD()),
		})
	})
	for _, e := range []end{a, b} {
		e.netlink(func(h *netlink.Handle) error {
			l, err := h.LinkByName(e.link)
			if err != nil {
				return err
			}
			for _, s := range []string{e.v4 + "/24", e.v6 + "/64", fmt.Sprintf("fe80::%d/64", e.mac)} {
				addr, err := netlink.ParseAddr(s)
				if err != nil {
					return err
				}
				addr.Flags |= unix.IFA_F_NODAD
				if err := h.AddrAdd(l, addr); err != nil {
					return fmt.Errorf("add %s: %w", s, err)
				}
			}
			return h.LinkSetUp(l)
		})
	}
	// The kernel notices the carrier in the background, and has no IPv6 before.
	for _, e := range []end{a, b} {
		e.netlink(func(h *netlink.Handle) error {
			return Until(func() (bool, error) {
				l, err := h.LinkByName(e.link)
				return err == nil && l.Attrs().OperState == netlink.OperUp, err
			})
		})
	}
}

// untilTime bounds every wait for something that is to happen soon.
const untilTime = 10 * time.Second

// Until polls until a condition holds, and fails when that takes too long.
func Until(cond func() (bool, error)) error {
	end := time.NewTimer(untilTime)
	defer end.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := cond()
		if ok || err != nil {
			return err
		}
		select {
		case <-end.C:
			return errors.New("it did not happen in time")
		case <-tick.C:
		}
	}
}

// NewTask starts a task in a network namespace of its own, and returns its pid and what
// ends it. The test's end ends it too.
func NewTask(t testing.TB) (pid int, kill func()) {
	t.Helper()
	Need(t)
	cmd := exec.Command("sleep", "600")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	t.Cleanup(kill)
	return cmd.Process.Pid, kill
}

package faults

// A look at the packets that takes a millisecond, where there are thousands of points.
// netlocktest's probes wait a quarter of a second before they believe that nothing comes;
// here a packet socket, which sees a packet before any rule does, tells when it has come.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// port is where the datagrams go; netlocktest has others.
const port = 7790

// wire is the datagrams' way between Inside and Peer in one family.
type wire struct {
	in, out end
	token   uint64
}

// end is a side of a wire: where it sends from, where it receives, and what its link sees.
type end struct{ send, recv, tap int }

func newWire(p *netlocktest.Pair, inside, peer string) (w *wire, err error) {
	w = &wire{token: uint64(time.Now().UnixNano())}
	if w.in, err = newEnd(p.Inside, inside, peer); err == nil {
		w.out, err = newEnd(p.Peer, peer, inside)
	}
	return w, err
}

func newEnd(n *netlocktest.NS, own, other string) (e end, _ error) {
	return e, n.Do(func() (err error) {
		family, to := sockaddr(other)
		_, any := sockaddr(own)
		if e.send, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err = unix.Connect(e.send, to); err != nil {
			return err
		}
		if e.recv, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err = unix.Bind(e.recv, any); err != nil {
			return err
		}
		const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8 // in network order
		if e.tap, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, all); err != nil {
			return err
		}
		tv := unix.NsecToTimeval((5 * time.Second).Nanoseconds())
		return errors.Join(unix.SetsockoptTimeval(e.recv, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
			unix.SetsockoptTimeval(e.tap, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	})
}

func sockaddr(s string) (int, unix.Sockaddr) {
	a := netip.MustParseAddr(s)
	if a.Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: port, Addr: a.As4()}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Port: port, Addr: a.As16()}
}

func (w *wire) close() {
	for _, fd := range []int{w.in.send, w.in.recv, w.in.tap, w.out.send, w.out.recv, w.out.tap} {
		unix.Close(fd)
	}
}

func (w *wire) datagram() []byte {
	w.token++
	return binary.BigEndian.AppendUint64(nil, w.token)
}

// await reads from a socket until a datagram comes that ends with the token.
func await(fd int, token []byte, flags int) error {
	b := make([]byte, 2048)
	for {
		n, _, err := unix.Recvfrom(fd, b, flags)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return err
		case n >= len(token) && string(b[n-len(token):n]) == string(token):
			return nil
		}
	}
}

// passes tells whether datagrams pass, each way.
func (w *wire) passes() (in, out bool, err error) {
	if in, err = w.opensIn(); err != nil {
		return in, out, fmt.Errorf("in: %w", err)
	}
	if out, err = w.opensOut(); err != nil {
		return in, out, fmt.Errorf("out: %w", err)
	}
	return in, out, nil
}

// open is passes for what has to be so both ways or neither.
func (w *wire) open() (bool, error) {
	in, out, err := w.passes()
	if err == nil && in != out {
		err = fmt.Errorf("in passes: %t, out passes: %t", in, out)
	}
	return in, err
}

func (w *wire) opensIn() (bool, error) {
	first, second := w.datagram(), w.datagram()
	for _, d := range [][]byte{first, second} {
		if _, err := unix.Write(w.out.send, d); err != nil {
			return false, err
		}
	}
	// When the second one is at the link the kernel is done with the first.
	if err := await(w.in.tap, second, 0); err != nil {
		return false, fmt.Errorf("the datagram does not come to the link: %w", err)
	}
	switch err := await(w.in.recv, first, unix.MSG_DONTWAIT); err {
	case nil:
		return true, nil
	case unix.EAGAIN:
		return false, nil
	default:
		return false, err
	}
}

func (w *wire) opensOut() (bool, error) {
	d := w.datagram()
	switch _, err := unix.Write(w.in.send, d); err {
	case nil:
	case unix.EPERM: // so a drop at output looks to the sender
		return false, nil
	default:
		return false, err
	}
	if err := await(w.out.recv, d, 0); err != nil {
		return false, fmt.Errorf("the datagram is lost: %w", err)
	}
	return true, nil
}

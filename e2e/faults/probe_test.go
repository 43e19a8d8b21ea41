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

	"github.com/criu-netlock/criu-netlock/netlock"
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

func sockaddr(s string) (int, unix.Sockaddr) { return sockaddrOf(s, port) }

func sockaddrOf(s string, port int) (int, unix.Sockaddr) {
	a := netip.MustParseAddr(s)
	if a.Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: port, Addr: a.As4()}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Port: port, Addr: a.As16()}
}

// parcel is what a lock of mode hold is to keep: datagrams from the Peer to a port of their own.
type parcel struct{ recv, send int }

const parcelPort = port + 1

func newParcel(p *netlocktest.Pair, inside string) (k parcel, err error) {
	family, to := sockaddrOf(inside, parcelPort)
	err = p.Inside.Do(func() (err error) {
		if k.recv, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return err
		}
		return unix.Bind(k.recv, to)
	})
	if err != nil {
		return k, err
	}
	return k, p.Peer.Do(func() (err error) {
		if k.send, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Connect(k.send, to)
	})
}

func (k parcel) close() {
	unix.Close(k.recv)
	unix.Close(k.send)
}

// arrived counts what has come since.
func (l *lab) arrived() (n int) {
	b := make([]byte, 16)
	for _, k := range l.kept {
		for {
			_, _, err := unix.Recvfrom(k.recv, b, 0)
			if err == nil {
				n++
			} else if err != unix.EINTR {
				break
			}
		}
	}
	return n
}

// keep sends something to what holds, if it does, and waits until it is held.
func (l *lab) keep() (sent int, err error) {
	l.arrived()
	was, err := l.state()
	if err != nil || was.Mode != netlock.Hold || !was.Queue.Bound {
		return 0, err
	}
	for range 3 {
		for _, k := range l.kept {
			if _, err := unix.Write(k.send, []byte("kept")); err != nil {
				return sent, err
			}
			sent++
		}
	}
	return sent, netlocktest.Until(func() (bool, error) {
		st, err := l.state()
		return st.Queue.Held >= was.Queue.Held+uint64(sent), err
	})
}

// came checks, when the holder is dead, that nothing of what was held has passed a lock, and
// that all of it has come if nothing happened to the holder and it was to deliver.
func (l *lab) came(sent int, tr *trace, delivers bool) error {
	n := l.arrived()
	st, err := l.state()
	switch {
	case err != nil:
		return err
	case st.Locked && n > 0:
		return fmt.Errorf("%d of %d held packets have passed, and it is %+v", n, sent, st)
	case tr.point == (point{}) && delivers && n != sent:
		return fmt.Errorf("%d of %d held packets were delivered", n, sent)
	}
	return nil
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

package nfnl

import (
	"context"

	"golang.org/x/sys/unix"
)

// FD is the socket.
func (c *Conn) FD() int { return c.fd }

// Unconnected gives the Conn a socket that takes messages from anybody.
func (c *Conn) Unconnected() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	if err != nil {
		return err
	}
	unix.Close(c.fd)
	c.fd = fd
	return nil
}

// Post sends a request and leaves the answer in the socket's queue.
func (c *Conn) Post(ctx context.Context, r Request) error {
	flags := uint16(unix.NLM_F_REQUEST)
	if r.Dump {
		flags |= unix.NLM_F_DUMP
	}
	c.seq++
	return c.send(ctx, appendMsg(nil, unix.NFNL_SUBSYS_NFTABLES<<8|uint16(r.Cmd), flags, c.seq,
		[]byte{r.Family, unix.NFNETLINK_V0, 0, 0}, r.Attrs))
}

// Receive reads one datagram of the kernel's.
func (c *Conn) Receive(ctx context.Context) error {
	return c.receive(ctx, true, func(header, []byte) {})
}

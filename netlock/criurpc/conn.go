package criurpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// conn is a SOCK_SEQPACKET connection: one message a packet.
type conn struct {
	u   *net.UnixConn
	raw syscall.RawConn
}

// newConn owns fd from here on.
func newConn(fd int) (*conn, error) {
	f := os.NewFile(uintptr(fd), "criu")
	defer f.Close() // net has a duplicate
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		_ = c.Close() // the error before it is the one to tell
		return nil, errors.New("not a unix socket")
	}
	return fromUnix(u)
}

func fromUnix(u *net.UnixConn) (*conn, error) {
	raw, err := u.SyscallConn()
	if err != nil {
		u.Close()
		return nil, err
	}
	return &conn{u, raw}, nil
}

func (c *conn) close() error { return c.u.Close() }

// during makes what waits on the connection end with ctx.
func (c *conn) during(ctx context.Context, f func() error) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if err := c.u.SetDeadline(time.Time{}); err != nil {
		return err
	}
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.u.SetDeadline(time.Unix(1, 0)) // it may be closed
		close(fired)
	})
	err := f()
	if !stop() {
		<-fired
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return context.Cause(ctx)
		}
	}
	return err
}

// maxFiles is the kernel's limit for one message, SCM_MAX_FD.
const maxFiles = 253

// receive returns one message and the files that came with it, which are the caller's
// to close. io.EOF says that the other side has gone.
func (c *conn) receive(ctx context.Context) (msg []byte, files []*os.File, err error) {
	err = c.during(ctx, func() error {
		// The size first: what of a packet does not fit is lost.
		var size int
		if err := c.wait(c.raw.Read, func(fd int) (err error) {
			size, _, err = unix.Recvfrom(fd, make([]byte, 1), unix.MSG_PEEK|unix.MSG_TRUNC|unix.MSG_DONTWAIT)
			return err
		}); err != nil {
			return err
		}
		if size == 0 {
			return io.EOF
		}
		msg = make([]byte, size)
		oob := make([]byte, unix.CmsgSpace(maxFiles*4))
		return c.wait(c.raw.Read, func(fd int) error {
			n, oobn, flags, _, err := unix.Recvmsg(fd, msg, oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
			if err != nil {
				return err
			}
			if files, err = filesIn(oob[:oobn]); err == nil && (n != size || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0) {
				err = fmt.Errorf("a message of %d bytes came as %d, or without all of its files", size, n)
			}
			return err
		})
	})
	if err != nil {
		closeAll(files)
		return nil, nil, err
	}
	return msg, files, nil
}

// wait calls f until it neither blocks nor is interrupted.
func (c *conn) wait(how func(func(uintptr) bool) error, f func(int) error) error {
	var err error
	if e := how(func(fd uintptr) bool {
		for {
			if err = f(int(fd)); err != unix.EINTR {
				return err != unix.EAGAIN
			}
		}
	}); e != nil {
		return e
	}
	if err == unix.ECONNRESET {
		return io.EOF
	}
	return err
}

func filesIn(oob []byte) (files []*os.File, err error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	for i := range msgs {
		fds, e := unix.ParseUnixRights(&msgs[i])
		if e != nil {
			continue // other control messages
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "from CRIU"))
		}
	}
	return files, err
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// send sends one message with descriptors, which stay the caller's.
func (c *conn) send(ctx context.Context, msg []byte, fds ...int) error {
	if len(msg) == 0 {
		return errors.New("an empty message would read as the end") // which protobuf never makes of a request
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	return c.during(ctx, func() error {
		write := func() error {
			return c.wait(c.raw.Write, func(fd int) error {
				_, err := unix.SendmsgN(fd, msg, oob, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
				return err
			})
		}
		err := write()
		if err != unix.EMSGSIZE {
			return err
		}
		// A packet has to fit into the send buffer, which the kernel makes twice this.
		if e := c.raw.Control(func(fd uintptr) {
			if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, len(msg)) != nil {
				_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, len(msg)) // as far as net.core.wmem_max goes
			}
		}); e != nil {
			return e
		}
		if err = write(); err == unix.EMSGSIZE {
			return fmt.Errorf("a message of %d bytes: %w; raise net.core.wmem_max", len(msg), err)
		}
		return err
	})
}

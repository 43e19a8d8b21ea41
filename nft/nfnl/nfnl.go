// Package nfnl is a raw nfnetlink transport for nf_tables: one socket, whole
// batches in one system call, every wait bounded by a context.
//
// google/nftables builds the batches; it does not send them, because its own
// transport waits once per message for an echo (three system calls each), panics
// in FD_SET on descriptors above 1023, and has no deadline on a send. nf_tables
// answers within the system call that asks, so one send and one receive do.
package nfnl

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrUnsure is wrapped by errors that came after a batch had been handed to the
// kernel and before its answer was read: it may or may not be in force.
var ErrUnsure = errors.New("the kernel's answer was lost")

// ErrInterrupted is returned when the rule set kept changing under a dump.
var ErrInterrupted = errors.New("the rule set kept changing while it was read")

// Conn is a netlink socket of the network namespace in which it was dialled. It
// is for one goroutine at a time.
type Conn struct {
	fd  int
	seq uint32
	buf []byte
	// Slow is set once closing the socket may wait for an RCU grace period: after
	// a batch that deleted something, or that the kernel refused.
	Slow   bool
	in     func(func() error) error
	cookie uint64
}

// Dial opens a socket in the calling thread's network namespace. Whatever is done
// with the Conn later is to be done there too, for it may have to dial again.
func Dial() (*Conn, error) { return DialIn(func(f func() error) error { return f() }) }

// DialIn opens a socket in the network namespace in which its argument calls what it is
// given. The Conn is of use anywhere.
func DialIn(in func(func() error) error) (*Conn, error) {
	c := &Conn{in: in}
	var err error
	if c.fd, err = c.dial(); err != nil {
		return nil, err
	}
	c.buf = make([]byte, 16<<10)
	return c, nil
}

func (c *Conn) dial() (fd int, err error) {
	err = c.in(func() (err error) {
		fd, err = dial(0)
		return err
	})
	return fd, err
}

// rcvBuf is a limit, not a reserve. The usual net.core.rmem_default has room for the
// kernel's answers to some 250 messages.
const rcvBuf = 2 << 20

// dial opens a socket of the calling thread's network namespace. Its address there is
// port; 0 has the kernel choose, which gives it the process's id if that is free.
func dial(port uint32) (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	if port != 0 {
		if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: port}); err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("bind: %w", err)
		}
	}
	// A socket that is connected to the kernel gets nothing from anybody else. Without
	// that, whoever has CAP_NET_ADMIN in the namespace can fill its queue.
	if err := unix.Connect(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("connect: %w", err)
	}
	// Best effort: what is lost is asked for again.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, rcvBuf) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, rcvBuf)
	}
	return fd, nil
}

// Close closes the socket; see Slow.
func (c *Conn) Close() error { return unix.Close(c.Take()) }

// Take hands the descriptor to the caller; the Conn is of no use afterwards.
func (c *Conn) Take() int {
	fd := c.fd
	c.fd = -1
	return fd
}

// Cookie is the number of the socket's network namespace, which no other one has, had or
// will have until the machine starts anew; Linux tells it since 5.14.
func (c *Conn) Cookie() (cookie uint64, ok bool) {
	if c.cookie == 0 {
		c.cookie, _ = unix.GetsockoptUint64(c.fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	}
	return c.cookie, c.cookie != 0
}

// Request is one question to nf_tables, or one change of it.
type Request struct {
	Cmd    uint8 // unix.NFT_MSG_*
	Dump   bool  // all objects; only the last of several requests may be a dump
	Family uint8 // unix.NFPROTO_*
	Attrs  []byte
}

// Answer is what came back for one Request: the attributes of each object, or
// the errno (ENOENT: no such object).
type Answer struct {
	Objects []Object
	Errno   unix.Errno
}

// Object is one object of nf_tables as its attributes describe it.
type Object struct {
	Family uint8
	Attrs  []byte
}

const (
	nlmsgHdrLen = 16
	nfgenLen    = 4
)

// Ask puts all requests in one message and collects the answers. The error is
// about the socket; what the kernel says of a request is in its Answer. Answers that
// were lost, or that changed while they were given, are asked for again until the
// context ends.
func (c *Conn) Ask(ctx context.Context, reqs ...Request) ([]Answer, error) {
	for try := 0; ; try++ {
		out, err := c.ask(ctx, reqs)
		if err == nil || !passing(err) {
			return out, err
		}
		if e := c.renew(ctx, try); e != nil {
			return nil, fmt.Errorf("%w: %w", err, e)
		}
	}
}

// passing: asked again, the kernel may answer. ENOBUFS says that something did not
// fit into the socket's queue, EBUSY that an earlier dump was not read to its end.
func passing(err error) bool {
	return errors.Is(err, ErrInterrupted) || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EBUSY)
}

// renew makes the socket fit for another try: what is left in its queue is read
// away, and an unfinished dump with it, or another socket takes its place.
func (c *Conn) renew(ctx context.Context, try int) error {
	if try >= 3 {
		// It is not going to be quick: let others work.
		t := time.NewTimer(time.Millisecond)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := c.drain(ctx); err == nil && try%4 != 3 {
		return nil
	}
	fd, err := c.dial()
	if err != nil {
		return err
	}
	old := c.fd
	c.fd = fd
	if c.Slow {
		go unix.Close(old)
		c.Slow = false
	} else {
		unix.Close(old)
	}
	return ctx.Err()
}

// drain reads away what is there.
func (c *Conn) drain(ctx context.Context) error {
	for lost := 0; ; {
		switch err := c.receive(ctx, false, func(header, []byte) {}); {
		case err == nil:
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.ENOBUFS) && lost < 3: // the kernel says so once, and goes on
			lost++
		default:
			return err
		}
	}
}

func (c *Conn) ask(ctx context.Context, reqs []Request) (out []Answer, err error) {
	again := false
	first := c.seq + 1
	b := make([]byte, 0, 256)
	for _, r := range reqs {
		c.seq++
		flags := uint16(unix.NLM_F_REQUEST)
		if r.Dump {
			flags |= unix.NLM_F_DUMP
		}
		b = appendMsg(b, unix.NFNL_SUBSYS_NFTABLES<<8|uint16(r.Cmd), flags, c.seq,
			[]byte{r.Family, unix.NFNETLINK_V0, 0, 0}, r.Attrs)
	}
	if err := c.send(ctx, b); err != nil {
		return nil, err
	}
	out = make([]Answer, len(reqs))
	open := len(reqs)
	for open > 0 {
		err := c.receive(ctx, true, func(h header, data []byte) {
			i := int(h.seq - first)
			if i < 0 || i >= len(reqs) {
				return // an answer to an earlier question
			}
			again = again || h.flags&unix.NLM_F_DUMP_INTR != 0
			switch {
			case h.typ == unix.NLMSG_ERROR || h.typ == unix.NLMSG_DONE:
				if len(data) >= 4 {
					if n := int32(binary.NativeEndian.Uint32(data)); n < 0 {
						out[i].Errno = unix.Errno(-n)
					}
				}
				if open--; i == 0 && out[0].Errno == unix.EPERM {
					// Without CAP_NET_ADMIN the kernel answers the first request for them all.
					for j := range out {
						out[j].Errno = unix.EPERM
					}
					open = 0
				}
			case len(data) >= nfgenLen:
				out[i].Objects = append(out[i].Objects, Object{data[0], append([]byte(nil), data[nfgenLen:]...)})
				if h.flags&unix.NLM_F_MULTI == 0 {
					open--
				}
			}
		})
		if err != nil {
			return nil, err
		}
	}
	if again {
		return nil, ErrInterrupted
	}
	for _, a := range out {
		if a.Errno != 0 && passing(a.Errno) {
			return nil, fmt.Errorf("answer: %w", a.Errno)
		}
	}
	return out, nil
}

// BatchError is the kernel's refusal of one message of a batch, and so of all.
type BatchError struct {
	Index int    // of the message, 0 for the batch itself
	Cmd   uint16 // NFT_MSG_* of the message
	Errno unix.Errno
}

var cmdNames = map[uint16]string{
	unix.NFT_MSG_NEWTABLE: "create table", unix.NFT_MSG_DELTABLE: "delete table", msgDestroyTable: "destroy table",
	unix.NFT_MSG_NEWCHAIN: "create chain", unix.NFT_MSG_NEWRULE: "create rule",
	unix.NFT_MSG_DELCHAIN: "delete chain", unix.NFT_MSG_DELRULE: "delete rule",
}

const msgDestroyTable = 26 // NFT_MSG_DESTROYTABLE, Linux 6.3

func (e *BatchError) Error() string {
	name := cmdNames[e.Cmd]
	if e.Index == 0 || name == "" {
		name = "batch"
	}
	return name + ": " + e.Errno.Error()
}

func (e *BatchError) Unwrap() error { return e.Errno }

// IsDestroy tells whether it was a "destroy", which Linux knows since 6.3.
func (e *BatchError) IsDestroy() bool { return e.Index > 0 && e.Cmd == msgDestroyTable }

// IsNewChain tells whether it was a chain that the kernel refused.
func (e *BatchError) IsNewChain() bool { return e.Index > 0 && e.Cmd == unix.NFT_MSG_NEWCHAIN }

// IsNewRule tells whether it was a rule that the kernel refused.
func (e *BatchError) IsNewRule() bool { return e.Index > 0 && e.Cmd == unix.NFT_MSG_NEWRULE }

// Batch sends messages, the first and last of which begin and end a batch, and
// waits for the kernel to commit them all, or none. A *BatchError means none;
// ErrUnsure means that the caller has to look.
func (c *Conn) Batch(ctx context.Context, msgs []netlink.Message) error {
	if len(msgs) < 3 {
		return errors.New("empty batch")
	}
	size := 0
	for _, m := range msgs {
		size += nlmsgHdrLen + len(m.Data)
	}
	if size > 100<<10 { // half the usual net.core.wmem_default, which counts overhead too
		if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 2*size); err != nil {
			return fmt.Errorf("enlarge the send buffer: %w", err)
		}
	}
	first := c.seq + 1
	last := len(msgs) - 2
	b := make([]byte, 0, size)
	for i, m := range msgs {
		c.seq++
		flags := uint16(m.Header.Flags) &^ unix.NLM_F_ECHO
		if i == last {
			flags |= unix.NLM_F_ACK
		}
		b = appendMsg(b, uint16(m.Header.Type), flags, c.seq, m.Data, nil)
		if i > 0 && i <= last {
			switch uint16(m.Header.Type) & 0xff {
			case unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE, msgDestroyTable:
				c.Slow = true
			}
		}
	}
	if err := c.send(ctx, b); err != nil {
		return err
	}
	var refusal *BatchError
	done, lost := false, false
	for !done {
		err := c.receive(ctx, !lost, func(h header, data []byte) {
			i := int(h.seq - first)
			if h.typ != unix.NLMSG_ERROR || i < 0 || i >= len(msgs) || len(data) < 4 {
				return
			}
			if n := int32(binary.NativeEndian.Uint32(data)); n != 0 && refusal == nil {
				refusal = &BatchError{Index: i, Cmd: uint16(msgs[i].Header.Type) & 0xff, Errno: unix.Errno(-n)}
			}
			// A refusal of the batch as a whole comes alone, and instead of the ack.
			done = done || i == last || refusal != nil
		})
		if errors.Is(err, unix.ENOBUFS) && !lost {
			lost = true // but perhaps not the answer: all of it is there by now
			continue
		}
		if err != nil {
			c.Slow = true
			return fmt.Errorf("%w: %w", ErrUnsure, err)
		}
	}
	if refusal == nil {
		return nil
	}
	c.Slow = true
	// One error comes for each message at fault; read them away.
	_ = c.drain(ctx)
	return refusal
}

// Commit makes all changes in one Batch. With a generation other than 0 the kernel
// refuses them (ERESTART) if the rule set has changed since.
func (c *Conn) Commit(ctx context.Context, gen uint32, changes ...Request) error {
	msgs := make([]netlink.Message, 0, len(changes))
	for _, r := range changes {
		msgs = append(msgs, message(unix.NFNL_SUBSYS_NFTABLES<<8|int(r.Cmd), append([]byte{r.Family, unix.NFNETLINK_V0, 0, 0}, r.Attrs...)))
	}
	return c.CommitMessages(ctx, gen, msgs)
}

// CommitMessages is Commit for changes that are built already, without what begins and
// ends a batch.
func (c *Conn) CommitMessages(ctx context.Context, gen uint32, changes []netlink.Message) error {
	subsys := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}
	begin := subsys[:len(subsys):len(subsys)]
	if gen != 0 {
		begin = Attr(begin, unix.NFNL_BATCH_GENID, binary.BigEndian.AppendUint32(nil, gen))
	}
	msgs := make([]netlink.Message, 0, len(changes)+2)
	msgs = append(append(msgs, message(unix.NFNL_MSG_BATCH_BEGIN, begin)), changes...)
	return c.Batch(ctx, append(msgs, message(unix.NFNL_MSG_BATCH_END, subsys)))
}

func message(typ int, data []byte) netlink.Message {
	return netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request}, Data: data}
}

func appendMsg(b []byte, typ, flags uint16, seq uint32, data, more []byte) []byte {
	start := len(b)
	b = binary.NativeEndian.AppendUint32(b, uint32(nlmsgHdrLen+len(data)+len(more)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = append(append(b, data...), more...)
	for (len(b)-start)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func (c *Conn) send(ctx context.Context, b []byte) error {
	for try := 0; ; try++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		switch err {
		case nil:
			return nil
		case unix.EINTR:
		case unix.ENOBUFS: // nothing was sent
			if e := c.renew(ctx, try); e != nil {
				return fmt.Errorf("send: %w: %w", err, e)
			}
		case unix.EAGAIN:
			if err := c.poll(ctx, unix.POLLOUT); err != nil {
				return err
			}
		default:
			return fmt.Errorf("send: %w", err)
		}
	}
}

type header struct {
	typ, flags uint16
	seq        uint32
}

// receive reads one datagram and calls f for each message in it. Only the kernel
// is believed: a process with CAP_NET_ADMIN in the namespace can send to our port.
func (c *Conn) receive(ctx context.Context, wait bool, f func(header, []byte)) error {
	for {
		n, _, flags, from, err := unix.Recvmsg(c.fd, c.buf, nil, unix.MSG_DONTWAIT)
		switch {
		case err == unix.EINTR:
			if e := ctx.Err(); e != nil {
				return e
			}
			continue
		case err == unix.EAGAIN && wait:
			if e := c.poll(ctx, unix.POLLIN); e != nil {
				return e
			}
			continue
		case err != nil:
			return fmt.Errorf("receive: %w", err)
		case flags&unix.MSG_TRUNC != 0:
			return fmt.Errorf("receive: %w", unix.EMSGSIZE)
		}
		if sa, ok := from.(*unix.SockaddrNetlink); !ok || sa.Pid != 0 {
			if e := ctx.Err(); e != nil {
				return e
			}
			continue
		}
		for b := c.buf[:n]; len(b) >= nlmsgHdrLen; {
			size := int(binary.NativeEndian.Uint32(b))
			if size < nlmsgHdrLen || size > len(b) {
				return errors.New("receive: malformed netlink message")
			}
			f(header{
				typ:   binary.NativeEndian.Uint16(b[4:]),
				flags: binary.NativeEndian.Uint16(b[6:]),
				seq:   binary.NativeEndian.Uint32(b[8:]),
			}, b[nlmsgHdrLen:size])
			b = b[min(len(b), (size+3)&^3):]
		}
		return nil
	}
}

// poll waits for the socket until the context ends.
func (c *Conn) poll(ctx context.Context, events int16) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		// A context without a deadline can still be cancelled: look at it now and then.
		left := 100 * time.Millisecond
		if d, ok := ctx.Deadline(); ok {
			left = min(left, time.Until(d))
		}
		ts := unix.NsecToTimespec(max(0, left.Nanoseconds()))
		fds := []unix.PollFd{{Fd: int32(c.fd), Events: events}}
		n, err := unix.Ppoll(fds, &ts, nil)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("poll: %w", err)
		}
		if n > 0 {
			return nil
		}
		runtime.Gosched()
	}
}

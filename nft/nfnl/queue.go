package nfnl

// A socket of nfnetlink_queue: what a rule sends to the queue's number stays in the
// kernel until a verdict, or until the socket is closed, which drops it.

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// From linux/netfilter/nfnetlink_queue.h.
const (
	nfqnlMsgPacket       = 0
	nfqnlMsgConfig       = 2
	nfqnlMsgVerdictBatch = 3

	nfqaPacketHdr  = 1
	nfqaVerdictHdr = 2
	nfqaMark       = 3
	nfqaPayload    = 10
	nfqaCapLen     = 13

	nfqaCfgCmd      = 1
	nfqaCfgParams   = 2
	nfqaCfgMaxLen   = 3
	nfqaCfgMask     = 4
	nfqaCfgFlags    = 5
	nfqnlCmdBind    = 1
	nfqnlCopyPacket = 2
	nfqaFlagGSO     = 4
	nfAccept        = 1
	nfRepeat        = 4
	solNetlink      = 270
	netlinkNoENOBUF = 5
)

// ErrQueueTaken means that another socket has bound the queue of that number.
var ErrQueueTaken = errors.New("the queue is taken")

// Queue is a socket that has bound one queue. Its methods may be called side by side.
type Queue struct {
	num uint16
	fd  int

	mu   sync.Mutex // of reading, and of what follows
	buf  []byte
	seen uint64 // packets that the kernel has told of
	size uint64 // their bytes
	most uint64 // those of the longest
	last uint32 // the highest id
}

// BindQueue binds a queue of the calling thread's network namespace, which keeps at most
// maxLen packets. It never asks the kernel to let packets pass when that is full.
func BindQueue(ctx context.Context, num uint16, maxLen uint32) (*Queue, error) {
	fd, err := dialApart()
	if err != nil {
		return nil, err
	}
	q := &Queue{num: num, fd: fd, buf: make([]byte, 16<<10)}
	if err := q.bind(ctx, maxLen); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return q, nil
}

// dialApart opens a socket under an address that nobody else has or has just had. A socket
// that is closed gives its address up first; nf_tables, if it comes first in netlink's
// notifier chain, then waits for an RCU grace period; and nfnetlink_queue, told last, takes away
// whatever queue is bound from that address. The kernel's own choice, the process's id, is
// given again at once: a lock was left without its queue so, on Linux 6.1.
func dialApart() (fd int, err error) {
	for range 16 {
		// Above all process ids, and below what the kernel chooses where that is taken.
		if fd, err = dial(rand.Uint32()>>2 | 1<<30); !errors.Is(err, unix.EADDRINUSE) {
			return fd, err
		}
	}
	return -1, err
}

// msgSize is what one of the kernel's messages takes of the socket's buffer, at most. One
// that finds no room there costs its packet.
const msgSize = 1536

func (q *Queue) bind(ctx context.Context, maxLen uint32) error {
	// SO_RCVBUFFORCE doubles it. A limit, not a reserve.
	room := int(min(uint64(maxLen)*msgSize/2+64<<10, math.MaxInt32/2))
	if err := unix.SetsockoptInt(q.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, room); err != nil {
		return fmt.Errorf("enlarge the receive buffer: %w", err)
	}
	_ = unix.SetsockoptInt(q.fd, solNetlink, netlinkNoENOBUF, 1) // the queue's own counters tell

	// The first byte of each packet comes with its length, which comes with no less.
	params := append(binary.BigEndian.AppendUint32(nil, 1), nfqnlCopyPacket)
	// A packet that the sender's kernel has not cut into segments stays whole.
	flag := binary.BigEndian.AppendUint32(nil, nfqaFlagGSO)
	b := Attr(nil, nfqaCfgCmd, []byte{nfqnlCmdBind, 0, 0, 0})
	b = Attr(b, nfqaCfgParams, params)
	b = Attr(b, nfqaCfgMaxLen, binary.BigEndian.AppendUint32(nil, maxLen))
	b = Attr(b, nfqaCfgMask, flag)
	b = Attr(b, nfqaCfgFlags, flag)
	if err := q.post(nfqnlMsgConfig, unix.NLM_F_ACK, b); err != nil {
		return fmt.Errorf("bind queue %d: %w", q.num, err)
	}
	c := Conn{fd: q.fd, buf: q.buf}
	var answer unix.Errno
	for done := false; !done; {
		err := c.receive(ctx, true, func(h header, data []byte) {
			if h.typ == unix.NLMSG_ERROR && len(data) >= 4 {
				answer, done = unix.Errno(-int32(binary.NativeEndian.Uint32(data))), true
			}
		})
		if err != nil {
			return fmt.Errorf("bind queue %d: %w", q.num, err)
		}
	}
	switch answer {
	case 0:
		return nil
	case unix.EPERM, unix.EBUSY:
		if _, there, err := ReadQueue(q.num); err == nil && there {
			return fmt.Errorf("bind queue %d: %w: %w", q.num, ErrQueueTaken, answer)
		}
	case unix.EINVAL: // what nfnetlink says of a subsystem it has not got
		answer = unix.EOPNOTSUPP
	}
	return fmt.Errorf("bind queue %d: %w", q.num, answer)
}

// InheritQueue makes a Queue of a descriptor that another process has bound.
func InheritQueue(fd int, num uint16) *Queue {
	return &Queue{num: num, fd: fd, buf: make([]byte, 16<<10)}
}

// Number is the queue's number.
func (q *Queue) Number() uint16 { return q.num }

// FD is the socket; it stays the Queue's.
func (q *Queue) FD() int { return q.fd }

// Close gives the queue up: the kernel drops what is in it. No method may be called
// meanwhile or afterwards.
func (q *Queue) Close() { unix.Close(q.fd) }

// post sends one message. The kernel has dealt with it when this returns.
func (q *Queue) post(typ uint8, flags uint16, attrs []byte) error {
	b := q.message(typ, flags, attrs)
	for {
		err := unix.Sendto(q.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err != unix.EINTR {
			return err
		}
	}
}

// message has no sequence number: no answer is waited for but the first.
func (q *Queue) message(typ uint8, flags uint16, attrs []byte) []byte {
	return appendMsg(nil, unix.NFNL_SUBSYS_QUEUE<<8|uint16(typ), unix.NLM_F_REQUEST|flags, 0,
		[]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, byte(q.num >> 8), byte(q.num)}, attrs)
}

// SetMaxLen changes how many packets the queue keeps; those in it stay.
func (q *Queue) SetMaxLen(n uint32) error {
	return q.post(nfqnlMsgConfig, 0, Attr(nil, nfqaCfgMaxLen, binary.BigEndian.AppendUint32(nil, n)))
}

// Accept delivers all that is in the queue, in its order, with a mark if that is not 0.
// More may be in it when it returns.
func (q *Queue) Accept(last, mark uint32) error {
	return q.post(nfqnlMsgVerdictBatch, 0, verdict(nfAccept, last, mark))
}

// Repeat is Accept, but for the hook that sent it to the queue, which each packet passes once more.
func (q *Queue) Repeat(last, mark uint32) error {
	return q.post(nfqnlMsgVerdictBatch, 0, verdict(nfRepeat, last, mark))
}

func verdict(how byte, last, mark uint32) []byte {
	// Whatever has an id up to this one, read or not.
	b := Attr(nil, nfqaVerdictHdr, binary.BigEndian.AppendUint32([]byte{0, 0, 0, how}, last+math.MaxInt32/2))
	if mark != 0 {
		b = Attr(b, nfqaMark, binary.BigEndian.AppendUint32(nil, mark))
	}
	return b
}

// Wait waits until the kernel has told of a packet, or until stop is readable.
func (q *Queue) Wait(stop int) (stopped bool, err error) {
	for {
		fds := []unix.PollFd{{Fd: int32(q.fd), Events: unix.POLLIN}, {Fd: int32(stop), Events: unix.POLLIN}}
		switch _, err := unix.Poll(fds, -1); {
		case err == unix.EINTR:
		case err != nil:
			return false, fmt.Errorf("poll: %w", err)
		default:
			return fds[1].Revents != 0, nil
		}
	}
}

// Seen reads what the kernel has told of since, and returns how many packets there were
// in all, their bytes, and the highest id.
func (q *Queue) Seen() (packets, size uint64, last uint32) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		n, _, err := unix.Recvfrom(q.fd, q.buf, unix.MSG_DONTWAIT)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return q.seen, q.size, q.last
		}
		q.parse(q.buf[:n])
	}
}

// Longest is the length of the longest packet that Seen has read of.
func (q *Queue) Longest() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.most
}

func (q *Queue) parse(b []byte) {
	for len(b) >= nlmsgHdrLen+nfgenLen {
		size := int(binary.NativeEndian.Uint32(b))
		if size < nlmsgHdrLen+nfgenLen || size > len(b) {
			return
		}
		if binary.NativeEndian.Uint16(b[4:]) == unix.NFNL_SUBSYS_QUEUE<<8|nfqnlMsgPacket {
			q.packet(b[nlmsgHdrLen+nfgenLen : size])
		}
		b = b[min(len(b), (size+3)&^3):]
	}
}

func (q *Queue) packet(attrs []byte) {
	size := 0
	Walk(attrs, func(typ uint16, v []byte) {
		switch {
		case typ == nfqaPacketHdr && len(v) >= 4:
			q.last = binary.BigEndian.Uint32(v)
		case typ == nfqaPayload && size == 0:
			size = len(v)
		case typ == nfqaCapLen && len(v) == 4:
			size = int(binary.BigEndian.Uint32(v))
		}
	})
	q.seen++
	q.size += uint64(size)
	q.most = max(q.most, uint64(size))
}

// QueueStat is what the kernel tells of a queue.
type QueueStat struct {
	Held    uint64 // in it now
	Full    uint64 // dropped because it was full
	Unread  uint64 // dropped because its holder's socket was
	Counted uint64 // that have come into it, or were Unread
}

// ReadQueue tells of a queue in the calling thread's network namespace, if somebody has
// bound it.
func ReadQueue(num uint16) (st QueueStat, there bool, err error) {
	// There is no message that asks for it.
	b, err := os.ReadFile("/proc/thread-self/net/netfilter/nfnetlink_queue")
	if errors.Is(err, os.ErrNotExist) {
		return st, false, nil
	}
	if err != nil {
		return st, false, err
	}
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) < 8 || string(f[0]) != strconv.Itoa(int(num)) {
			continue
		}
		for i, dst := range map[int]*uint64{2: &st.Held, 5: &st.Full, 6: &st.Unread, 7: &st.Counted} {
			if *dst, err = strconv.ParseUint(string(f[i]), 10, 64); err != nil {
				return st, false, fmt.Errorf("nfnetlink_queue of /proc: %w", err)
			}
		}
		return st, true, nil
	}
	return st, false, nil
}

package traffic

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// EchoPort answers every byte, and counts numbered datagrams.
const EchoPort = 7400

// Echo sends back what comes.
func Echo(c *net.TCPConn) {
	defer c.Close()
	_, _ = io.Copy(c, c) // the peer knows what it lacks
}

// Report asks for a Count; the answer is its text.
const Report = "report"

// Count is what became of datagrams numbered from 1 on.
type Count struct {
	// Came are those that came, Late those of them behind a higher number, Twice those
	// that had come before. Last is the highest number.
	Came, Late, Twice, Last uint64
}

func (n Count) String() string { return fmt.Sprint(n.Came, " ", n.Late, " ", n.Twice, " ", n.Last) }

// ParseCount reads what String has written.
func ParseCount(s string) (n Count, err error) {
	_, err = fmt.Sscan(s, &n.Came, &n.Late, &n.Twice, &n.Last)
	return n, err
}

// Numbered is a datagram with a number.
func Numbered(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// Numbers sends numbered datagrams to who counts them. One goroutine at a time uses it.
type Numbers struct {
	Conn net.Conn
	Sent uint64
}

// Send sends n datagrams.
func (n *Numbers) Send(count int) error {
	for range count {
		n.Sent++
		if _, err := n.Conn.Write(Numbered(n.Sent)); err != nil {
			return err
		}
	}
	return nil
}

// Count asks what became of them all.
func (n *Numbers) Count() (Count, error) {
	if err := n.Conn.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return Count{}, err
	}
	defer n.Conn.SetDeadline(time.Time{})
	if _, err := n.Conn.Write([]byte(Report)); err != nil {
		return Count{}, err
	}
	b := make([]byte, 64)
	k, err := n.Conn.Read(b)
	if err != nil {
		return Count{}, err
	}
	return ParseCount(string(b[:k]))
}

// ServeNumbers counts numbered datagrams, and reports to who asks.
func ServeNumbers(c net.PacketConn) error {
	var count Count
	seen := map[uint64]bool{}
	b := make([]byte, 64)
	for {
		n, from, err := c.ReadFrom(b)
		switch {
		case err != nil:
			return err
		case strings.HasPrefix(string(b[:n]), Report):
			if _, err := c.WriteTo([]byte(count.String()), from); err != nil {
				return err
			}
		case n == 8:
			v := binary.BigEndian.Uint64(b)
			count.Came++
			if seen[v] {
				count.Twice++
			} else if v < count.Last {
				count.Late++
			}
			seen[v] = true
			count.Last = max(count.Last, v)
		}
	}
}

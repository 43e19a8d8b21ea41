package traffic

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Pattern is byte i of what a commanded connection carries, in either direction.
func Pattern(i int) byte { return byte(i) ^ byte(i>>8)*31 }

// Fill returns n bytes of the pattern from byte i on.
func Fill(i, n int) []byte {
	b := make([]byte, n)
	for k := range b {
		b[k] = Pattern(i + k)
	}
	return b
}

// TCP states as tcp_info(7) has them.
const (
	Established = 1
	FinWait1    = 4
	FinWait2    = 5
	CloseWait   = 8
	LastAck     = 9
	Closing     = 11
)

// State is the state of a TCP connection, by the kernel's number.
func State(c *net.TCPConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var info *unix.TCPInfo
	if e := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO) }); e != nil {
		return 0, e
	}
	if err != nil {
		return 0, err
	}
	return int(info.State), nil
}

// Commanded is a connection that does what it is told, and checks what it reads.
type Commanded struct {
	c    *net.TCPConn
	done chan struct{} // closed: the reader has ended

	mu       sync.Mutex
	sent     int
	received int
	err      error
}

// NewCommanded begins to read from c.
func NewCommanded(c *net.TCPConn) *Commanded {
	k := &Commanded{c: c, done: make(chan struct{})}
	go k.read()
	return k
}

func (k *Commanded) read() {
	defer close(k.done)
	b := make([]byte, 4096)
	for {
		n, err := k.c.Read(b)
		k.mu.Lock()
		for i := range b[:n] {
			if b[i] != Pattern(k.received+i) && k.err == nil {
				k.err = fmt.Errorf("byte %d is %#x, want %#x", k.received+i, b[i], Pattern(k.received+i))
			}
		}
		k.received += n
		if err != nil && err != io.EOF && k.err == nil {
			k.err = err
		}
		k.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// Send writes the next n bytes of the pattern.
func (k *Commanded) Send(n int) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.c.SetWriteDeadline(time.Now().Add(5 * time.Second))
	_, err := k.c.Write(Fill(k.sent, n))
	k.sent += n
	return err
}

// Shut closes the sending side.
func (k *Commanded) Shut() error { return k.c.CloseWrite() }

// Close closes the connection.
func (k *Commanded) Close() error { return k.c.Close() }

// State is the connection's TCP state.
func (k *Commanded) State() (int, error) { return State(k.c) }

// Received is how many bytes have come in order, and whether that was all.
func (k *Commanded) Received() (n int, eof bool, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	select {
	case <-k.done:
		eof = k.err == nil
	default:
	}
	return k.received, eof, k.err
}

// Commander is the workload's side: its connections by the client's address.
type Commander struct {
	mu    sync.Mutex
	conns map[string]*Commanded
}

// Add takes a connection into the Commander's care.
func (m *Commander) Add(c *net.TCPConn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.conns == nil {
		m.conns = map[string]*Commanded{}
	}
	m.conns[c.RemoteAddr().String()] = NewCommanded(c)
}

// Control serves commands on c, one a line: "ADDRESS send N", "… shut", "… close",
// "… state", "… received". The answer is a line that begins with ok or error.
func (m *Commander) Control(c net.Conn) {
	defer c.Close()
	for sc := bufio.NewScanner(c); sc.Scan(); {
		answer, err := m.do(strings.Fields(sc.Text()))
		if err != nil {
			fmt.Fprintf(c, "error %v\n", err)
			continue
		}
		fmt.Fprintf(c, "ok %s\n", answer)
	}
}

func (m *Commander) do(f []string) (string, error) {
	if len(f) < 2 {
		return "", errors.New("want an address and a command")
	}
	m.mu.Lock()
	k := m.conns[f[0]]
	m.mu.Unlock()
	if k == nil {
		return "", fmt.Errorf("no connection from %s", f[0])
	}
	switch f[1] {
	case "send":
		if len(f) != 3 {
			return "", errors.New("want a number")
		}
		n, err := strconv.Atoi(f[2])
		if err != nil {
			return "", err
		}
		return "", k.Send(n)
	case "shut":
		return "", k.Shut()
	case "close":
		return "", k.Close()
	case "state":
		st, err := k.State()
		return strconv.Itoa(st), err
	case "received":
		n, eof, err := k.Received()
		return fmt.Sprintf("%d %t", n, eof), err
	}
	return "", fmt.Errorf("unknown command %q", f[1])
}

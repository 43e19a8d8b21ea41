package nfnl_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

func TestMain(m *testing.M) { os.Exit(netlocktest.HostUntouched(m)) }

var (
	generation = nfnl.Request{Cmd: unix.NFT_MSG_GETGEN}
	tables     = nfnl.Request{Cmd: unix.NFT_MSG_GETTABLE, Dump: true}
)

// in runs f with a socket of a new namespace.
func in(t *testing.T, f func(ctx context.Context, n *netlocktest.NS, c *nfnl.Conn) error) {
	t.Helper()
	netlocktest.Need(t, "nft")
	n := netlocktest.NewNS(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := n.Do(func() error {
		c, err := nfnl.Dial()
		if err != nil {
			return err
		}
		defer c.Close()
		return f(ctx, n, c)
	}); err != nil {
		t.Fatal(err)
	}
}

// fill makes so many tables that a dump of them does not come in one piece.
func fill(n *netlocktest.NS) (many int) {
	const count = 600
	var b strings.Builder
	for i := range count {
		fmt.Fprintf(&b, "table inet a-table-with-a-rather-long-name-%d {}\n", i)
	}
	n.Run(b.String(), "nft", "-f", "-")
	return count
}

// ask wants all tables told.
func ask(ctx context.Context, c *nfnl.Conn, many int) error {
	ans, err := c.Ask(ctx, generation, tables)
	switch {
	case err != nil:
		return err
	case ans[0].Errno != 0, ans[1].Errno != 0:
		return fmt.Errorf("answers: %d, %d", int(ans[0].Errno), int(ans[1].Errno))
	case len(ans[0].Objects) != 1 || len(ans[1].Objects) != many:
		return fmt.Errorf("%d and %d objects, want 1 and %d", len(ans[0].Objects), len(ans[1].Objects), many)
	}
	return nil
}

// A dump that was not read to its end makes the kernel refuse the next one (EBUSY).
func TestUnreadDump(t *testing.T) {
	in(t, func(ctx context.Context, n *netlocktest.NS, c *nfnl.Conn) error {
		many := fill(n)
		if err := c.Post(ctx, tables); err != nil {
			return err
		}
		return ask(ctx, c, many)
	})
}

// Answers that nobody read fill the queue, and the next ones are lost (ENOBUFS).
func TestFullQueue(t *testing.T) {
	in(t, func(ctx context.Context, n *netlocktest.NS, c *nfnl.Conn) error {
		many := fill(n)
		if err := unix.SetsockoptInt(c.FD(), unix.SOL_SOCKET, unix.SO_RCVBUF, 16<<10); err != nil {
			return err
		}
		for range 100 {
			if err := c.Post(ctx, generation); err != nil {
				return err
			}
		}
		return ask(ctx, c, many)
	})
}

// The queue has room for the answers to a few thousand messages.
func TestQueue(t *testing.T) {
	in(t, func(ctx context.Context, _ *netlocktest.NS, c *nfnl.Conn) error {
		const many = 2000
		for range many {
			if err := c.Post(ctx, generation); err != nil {
				return err
			}
		}
		for i := range many {
			if err := c.Receive(ctx); err != nil {
				return fmt.Errorf("answer %d: %w", i, err)
			}
		}
		return nil
	})
}

// No queue's socket has an address that another one of the process has or has had: what
// the kernel does late for a socket that was closed would take the queue away.
func TestQueueApart(t *testing.T) {
	netlocktest.Need(t, "nft")
	n := netlocktest.NewNS(t)
	had := map[uint32]bool{0: true, uint32(os.Getpid()): true}
	for num := range uint16(50) {
		if err := n.Do(func() error {
			q, err := nfnl.BindQueue(t.Context(), num, 10)
			if err != nil {
				return err
			}
			defer q.Close()
			name, err := unix.Getsockname(q.FD())
			if err != nil {
				return err
			}
			port := name.(*unix.SockaddrNetlink).Pid
			if had[port] {
				t.Errorf("queue %d: port %d once more", num, port)
			}
			had[port] = true
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// stranger sends from another socket of the namespace to a Conn's.
func stranger(c *nfnl.Conn, many int) error {
	name, err := unix.Getsockname(c.FD())
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for range many {
		if err := unix.Sendto(fd, make([]byte, 16), 0, name); err != nil {
			return err
		}
	}
	return nil
}

// Nobody but the kernel gets anything into the queue.
func TestStranger(t *testing.T) {
	in(t, func(ctx context.Context, _ *netlocktest.NS, c *nfnl.Conn) error {
		if err := stranger(c, 1); !errors.Is(err, unix.ECONNREFUSED) {
			return fmt.Errorf("a stranger's message: %w", err)
		}
		return ask(ctx, c, 0)
	})
}

// If somebody did, he could not keep a reader busy beyond its deadline.
func TestStrangers(t *testing.T) {
	in(t, func(ctx context.Context, _ *netlocktest.NS, c *nfnl.Conn) error {
		if err := c.Unconnected(); err != nil {
			return err
		}
		if err := stranger(c, 50); err != nil {
			return err
		}
		if err := ask(ctx, c, 0); err != nil {
			return fmt.Errorf("behind strangers' messages: %w", err)
		}
		if err := stranger(c, 50); err != nil {
			return err
		}
		if err := c.Post(ctx, generation); err != nil {
			return err
		}
		over, cancel := context.WithCancel(ctx)
		cancel()
		if err := c.Receive(over); !errors.Is(err, context.Canceled) {
			return fmt.Errorf("after the end: %w", err)
		}
		return nil
	})
}

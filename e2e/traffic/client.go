package traffic

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Felt is what a client has felt of what was done to the workload meanwhile.
type Felt struct {
	// Request is the longest time that an answer took, to one request after the other; Kept
	// the same for a request on a connection that had been idle; Stream the longest in which
	// no more of an open-loop stream was confirmed; Connect the longest connect.
	Request, Kept, Stream, Connect time.Duration
	// Connects were tried; Slow of them took more than SlowConnect.
	Connects, Slow int
	// SYNs were sent again.
	SYNs uint64
	// Sent are datagrams. Lost never came; Twice came more than once.
	Sent, Lost, Twice uint64
	// Broken are connections that were reset or timed out, and why the first was.
	Broken int
	Why    error
}

// Gap is the longest that an open connection stood still.
func (f Felt) Gap() time.Duration { return max(f.Request, f.Kept, f.Stream) }

// Add makes f the sum of two, of which the longest times are kept.
func (f *Felt) Add(g Felt) {
	f.Request, f.Kept = max(f.Request, g.Request), max(f.Kept, g.Kept)
	f.Stream, f.Connect = max(f.Stream, g.Stream), max(f.Connect, g.Connect)
	f.Connects += g.Connects
	f.Slow += g.Slow
	f.SYNs += g.SYNs
	f.Sent += g.Sent
	f.Lost += g.Lost
	f.Twice += g.Twice
	f.Broken += g.Broken
	if f.Why == nil {
		f.Why = g.Why
	}
}

const (
	// SlowConnect is what no connect takes whose first SYN gets through.
	SlowConnect = 500 * time.Millisecond
	// connectPause is between two connects, keptPause between two requests on the idle
	// connections, which take turns. The other pauses are Interval.
	connectPause    = 5 * time.Millisecond
	keptPause, kept = 10 * time.Millisecond, 20
	// numbersPause is between two datagrams: those of a second fit into a socket that
	// nobody reads.
	numbersPause = 2 * time.Millisecond
	// patience is how long a client waits for anything.
	patience = 10 * time.Second
	// warm is how many messages of the stream go each way before a client says that it
	// has begun: by then TCP knows the round trip.
	warm = 100
)

// Client is a client of the workload's "numbers", from a network namespace of its own.
type Client struct {
	ns      interface{ Do(func() error) error }
	host    string
	numbers *Numbers
}

// NewClient waits until the workload answers.
func NewClient(ctx context.Context, ns interface{ Do(func() error) error }, host string) (*Client, error) {
	c := &Client{ns: ns, host: host}
	conn, err := c.dial(ctx, "udp4", EchoPort)
	if err != nil {
		return nil, err
	}
	c.numbers = &Numbers{Conn: conn}
	tick := time.NewTicker(10 * Interval)
	defer tick.Stop()
	for {
		if _, err = c.numbers.Count(); err == nil {
			return c, nil
		}
		select {
		case <-ctx.Done():
			conn.Close()
			return nil, fmt.Errorf("the workload does not answer: %w", err)
		case <-tick.C:
		}
	}
}

// Numbers are the client's datagrams, to be used while it feels nothing.
func (c *Client) Numbers() *Numbers { return c.numbers }

// Close ends the client.
func (c *Client) Close() error { return c.numbers.Conn.Close() }

func (c *Client) dial(ctx context.Context, network string, port int) (conn net.Conn, err error) {
	err = c.ns.Do(func() error {
		conn, err = new(net.Dialer).DialContext(ctx, network, net.JoinHostPort(c.host, strconv.Itoa(port)))
		return err
	})
	return conn, err
}

// feeling is one Feel.
type feeling struct {
	*Client
	ctx  context.Context
	stop chan struct{}
	wg   sync.WaitGroup
	// Of the connects and requests that are pending.
	pending sync.WaitGroup
	conns   []net.Conn

	mu   sync.Mutex
	felt Felt
}

// Feel talks to the workload in five ways at once: a request every millisecond on one
// connection, the next when the last was answered, so that it has one under way whatever
// happens; a request every 10 ms on another of a pool of connections; a numbered stream in
// both directions, which waits for no answer; a numbered datagram every 2 ms; a
// connect every 5 ms. It returns when these flow. end ends them, waits for all that was
// begun, and tells what it was like.
func (c *Client) Feel(ctx context.Context) (end func() (Felt, error), err error) {
	before, err := c.numbers.Count()
	if err != nil {
		return nil, err
	}
	sent := c.numbers.Sent
	f := &feeling{Client: c, ctx: ctx, stop: make(chan struct{})}
	defer func() {
		if err != nil {
			f.close()
		}
	}()
	for range kept + 1 {
		conn, err := c.dial(ctx, "tcp4", EchoPort)
		if err != nil {
			return nil, err
		}
		f.conns = append(f.conns, conn)
	}
	conn, err := c.dial(ctx, "tcp4", StreamPort)
	if err != nil {
		return nil, err
	}
	syns, err := c.synRetrans()
	if err != nil {
		conn.Close()
		return nil, err
	}
	stream := Start(conn)
	f.every(Interval, func() error { return f.request(f.conns[0], &f.felt.Request) })
	f.every(numbersPause, func() error { return c.numbers.Send(1) })
	f.every(connectPause, func() error { f.pending.Go(f.connect); return nil })
	f.keepAlive(f.conns[1:])
	finish := func() (Felt, error) {
		defer f.close()
		close(f.stop)
		f.wg.Wait()
		f.pending.Wait()
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		st, err := stream.Finish(ctx)
		f.felt.Stream = st.Still
		switch {
		case errors.Is(err, errStream):
			return f.felt, err
		case err != nil:
			f.broken(err)
		}
		f.felt.Sent = c.numbers.Sent - sent
		after, err := c.numbers.Count()
		if err != nil {
			return f.felt, err
		}
		f.felt.Twice = after.Twice - before.Twice
		f.felt.Lost = f.felt.Sent - (after.Came - before.Came - f.felt.Twice)
		now, err := c.synRetrans()
		f.felt.SYNs = now - syns
		return f.felt, err
	}
	if err := stream.Advance(ctx, warm); err != nil {
		_, e := finish()
		return nil, errors.Join(err, e)
	}
	return finish, nil
}

func (f *feeling) close() {
	for _, c := range f.conns {
		c.Close()
	}
}

// keepAlive has the connections take turns; one that still waits for an answer, or is
// broken, is left out.
func (f *feeling) keepAlive(conns []net.Conn) {
	idle := make(chan net.Conn, len(conns))
	for _, c := range conns {
		idle <- c
	}
	f.every(keptPause, func() error {
		select {
		case c := <-idle:
			f.pending.Go(func() {
				if err := f.request(c, &f.felt.Kept); err != nil {
					f.broken(err)
					return
				}
				idle <- c
			})
		default:
		}
		return nil
	})
}

// every calls do until it fails, or until the end.
func (f *feeling) every(pause time.Duration, do func() error) {
	f.wg.Go(func() {
		tick := time.NewTicker(pause)
		defer tick.Stop()
		for {
			select {
			case <-f.stop:
				return
			case <-tick.C:
			}
			if err := do(); err != nil {
				f.broken(err)
				return
			}
		}
	})
}

func (f *feeling) broken(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.felt.Broken++
	if f.felt.Why == nil {
		f.felt.Why = err
	}
}

func (f *feeling) request(c net.Conn, longest *time.Duration) error {
	var b [1]byte
	start := time.Now()
	if err := c.SetDeadline(start.Add(patience)); err != nil {
		return err
	}
	_, err := c.Write(b[:])
	if err == nil {
		_, err = c.Read(b[:])
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	*longest = max(*longest, time.Since(start))
	return err
}

func (f *feeling) connect() {
	ctx, cancel := context.WithTimeout(f.ctx, patience)
	defer cancel()
	start := time.Now()
	c, err := f.dial(ctx, "tcp4", EchoPort)
	took := time.Since(start)
	if err != nil {
		f.broken(err)
	} else {
		c.Close()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.felt.Connects++
	f.felt.Connect = max(f.felt.Connect, took)
	if took > SlowConnect {
		f.felt.Slow++
	}
}

// synRetrans is how many SYNs the client's kernel has sent again.
func (c *Client) synRetrans() (n uint64, err error) {
	const name = "TCPSynRetrans"
	err = c.ns.Do(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/netstat")
		if err != nil {
			return err
		}
		// The names of the columns, then the numbers.
		lines := strings.Split(string(b), "\n")
		if len(lines) > 1 {
			values := strings.Fields(lines[1])
			for i, s := range strings.Fields(lines[0]) {
				if s == name && i < len(values) {
					n, err = strconv.ParseUint(values[i], 10, 64)
					return err
				}
			}
		}
		return fmt.Errorf("no %s in netstat", name)
	})
	return n, err
}

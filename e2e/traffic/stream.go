// Package traffic is what the tests send through a lock: streams of numbered
// messages in both directions at once, which show every byte that is lost or
// repeated, and connections that are brought into a state of TCP by command.
package traffic

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Ports of the workload.
const (
	// StreamPort has the numbered streams.
	StreamPort = 7000
	// StatesPort and MutedPort have the commanded connections; a test can drop
	// the answers of the second alone.
	StatesPort = 7100
	MutedPort  = 7200
	// ControlPort takes the commands for them.
	ControlPort = 7300
)

// Interval is the pause between two messages of one direction.
const Interval = time.Millisecond

// msgLen is a message: its number, the number that is expected next from the
// other side, and a filling that depends on the number.
const msgLen = 64

func encode(b *[msgLen]byte, seq, ack uint64) {
	binary.BigEndian.PutUint64(b[0:], seq)
	binary.BigEndian.PutUint64(b[8:], ack)
	for i := 16; i < msgLen; i++ {
		b[i] = byte(seq) + byte(i)
	}
}

// errStream wraps what no network ever excuses.
var errStream = errors.New("the byte stream is broken")

func decode(b *[msgLen]byte, want uint64) (ack uint64, err error) {
	seq := binary.BigEndian.Uint64(b[0:])
	var lost string
	switch {
	case seq > want:
		lost = "lost"
	case seq < want:
		lost = "repeated"
	}
	if lost != "" {
		return 0, fmt.Errorf("%w: message %d where %d was due: %s", errStream, seq, want, lost)
	}
	for i := 16; i < msgLen; i++ {
		if b[i] != byte(seq)+byte(i) {
			return 0, fmt.Errorf("%w: message %d, byte %d is %#x", errStream, seq, i, b[i])
		}
	}
	return binary.BigEndian.Uint64(b[8:]), nil
}

// Stats is what one side of a stream has seen.
type Stats struct {
	// Sent and Received count messages.
	Sent, Received uint64
	// Acked is how many of ours the other side says it had in order.
	Acked uint64
	// Gap is the longest time between two messages received.
	Gap time.Duration
	// Still is the longest time in which no more of ours was confirmed.
	Still time.Duration
}

// Stream is one side of a numbered stream.
type Stream struct {
	conn net.Conn
	stop chan struct{} // closed: no message after the current one
	done chan struct{} // closed: the reader has ended

	mu    sync.Mutex
	stats Stats
	last  time.Time // a message came
	moved time.Time // more of ours was confirmed
	err   error
}

func newStream(conn net.Conn) *Stream {
	now := time.Now()
	return &Stream{conn: conn, stop: make(chan struct{}), done: make(chan struct{}), last: now, moved: now}
}

// Start begins to send and receive on conn.
func Start(conn net.Conn) *Stream {
	s := newStream(conn)
	go s.read()
	go s.write()
	return s
}

func (s *Stream) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
	s.conn.Close()
}

func (s *Stream) read() {
	defer close(s.done)
	var b [msgLen]byte
	for {
		_, err := io.ReadFull(s.conn, b[:])
		if err == io.EOF {
			return
		}
		s.mu.Lock()
		want := s.stats.Received
		s.mu.Unlock()
		var ack uint64
		if err == nil {
			ack, err = decode(&b, want)
		}
		if err != nil {
			s.fail(fmt.Errorf("after %d messages: %w", want, err))
			return
		}
		now := time.Now()
		s.mu.Lock()
		s.stats.Received++
		if ack > s.stats.Acked {
			s.stats.Still = max(s.stats.Still, now.Sub(s.moved))
			s.moved = now
		}
		s.stats.Acked = ack
		s.stats.Gap = max(s.stats.Gap, now.Sub(s.last))
		s.last = now
		s.mu.Unlock()
	}
}

func (s *Stream) send() error {
	var b [msgLen]byte
	s.mu.Lock()
	encode(&b, s.stats.Sent, s.stats.Received)
	s.stats.Sent++
	s.mu.Unlock()
	_, err := s.conn.Write(b[:])
	return err
}

func (s *Stream) write() {
	tick := time.NewTicker(Interval)
	defer tick.Stop()
	for {
		select {
		case <-s.stop:
			if c, ok := s.conn.(interface{ CloseWrite() error }); ok {
				c.CloseWrite()
			}
			return
		case <-s.done:
			return
		case <-tick.C:
		}
		if err := s.send(); err != nil {
			s.fail(err)
			return
		}
	}
}

// Stats is the state of the stream now. The error is nil while it is whole.
func (s *Stream) Stats() (Stats, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stats, s.err
}

// Advance waits until n more messages have come in, and n of those sent from
// now on have been confirmed.
func (s *Stream) Advance(ctx context.Context, n uint64) error {
	from, err := s.Stats()
	if err != nil {
		return err
	}
	tick := time.NewTicker(Interval)
	defer tick.Stop()
	for {
		now, err := s.Stats()
		switch {
		case err != nil:
			return err
		case now.Received >= from.Received+n && now.Acked >= from.Sent+n:
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the stream stands still: received %d, confirmed %d of %d sent: %w", now.Received-from.Received, now.Acked, now.Sent, ctx.Err())
		case <-s.done:
			_, err := s.Stats()
			return errors.Join(errors.New("the other side closed the stream"), err)
		case <-tick.C:
		}
	}
}

// Finish ends the stream in good order and returns an error unless each side has
// had every message of the other exactly once.
func (s *Stream) Finish(ctx context.Context) (Stats, error) {
	defer s.conn.Close()
	close(s.stop)
	select {
	case <-s.done:
	case <-ctx.Done():
		return s.stats, fmt.Errorf("the other side does not finish: %w", ctx.Err())
	}
	st, err := s.Stats()
	if err == nil && st.Acked != st.Sent {
		err = fmt.Errorf("%w: sent %d, the other side had %d", errStream, st.Sent, st.Acked)
	}
	return st, err
}

// Serve is the workload's side of a stream: it ends when the client has finished,
// with one last message that confirms all there was.
func Serve(conn net.Conn) error {
	defer conn.Close()
	s := newStream(conn)
	go s.read()
	tick := time.NewTicker(Interval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := s.send(); err != nil {
				s.fail(err)
				return err
			}
			continue
		case <-s.done:
		}
		if _, err := s.Stats(); err != nil {
			return err
		}
		return s.send()
	}
}

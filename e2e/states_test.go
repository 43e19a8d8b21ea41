package e2e

import (
	"bufio"
	"fmt"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/e2e/traffic"
)

// muteRules stop, in the peer, what the container answers on MutedPort: so its FIN
// stays unacknowledged for as long as the test wants.
var muteRules = fmt.Sprintf(`table inet mute {
	chain input {
		type filter hook input priority filter; policy accept;
		tcp sport %d drop
	}
}
`, traffic.MutedPort)

// How many bytes go before, and in what is on its way while the lock is on.
const (
	bytesBefore   = 3000
	bytesInFlight = 1700
	bytesAfter    = 900
)

// A halfClosed connection is seen from both of its ends.
type halfClosed struct {
	*fixture
	name   string
	family string
	port   int
	state  int // what the container's end is in when it is dumped
	client *traffic.Commanded
	id     string

	toServer, toClient int // bytes sent so far
}

// command tells the container's end what to do.
func (h *halfClosed) command(words ...any) (string, error) {
	c, err := h.net.Dial(h.ctx, "tcp4", net.JoinHostPort(testbed.ContainerV4, strconv.Itoa(traffic.ControlPort)))
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	fmt.Fprintln(c, append([]any{h.id}, words...)...)
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return "", err
	}
	answer, ok := strings.CutPrefix(strings.TrimSpace(line), "ok")
	if !ok {
		return "", fmt.Errorf("%s, container: %s", h.name, answer)
	}
	return strings.TrimSpace(answer), nil
}

func (h *halfClosed) must(words ...any) {
	h.t.Helper()
	if _, err := h.command(words...); err != nil {
		h.t.Fatal(err)
	}
}

// serverSends and clientSends put bytes on their way.
func (h *halfClosed) serverSends(n int) { h.t.Helper(); h.must("send", n); h.toClient += n }
func (h *halfClosed) clientSends(n int) {
	h.t.Helper()
	if err := h.client.Send(n); err != nil {
		h.t.Fatal(err)
	}
	h.toServer += n
}
func (h *halfClosed) clientShuts() {
	h.t.Helper()
	if err := h.client.Shut(); err != nil {
		h.t.Fatal(err)
	}
}

// arrived waits until all that was sent has come in; with eof, the end as well.
func (h *halfClosed) arrived(eof bool) {
	h.t.Helper()
	err := testbed.Poll(h.ctx, func() error {
		n, end, err := h.client.Received()
		if err != nil || n != h.toClient || end != eof {
			return fmt.Errorf("the peer has %d of %d bytes, end %t: %w", n, h.toClient, end, err)
		}
		answer, err := h.command("received")
		if want := fmt.Sprintf("%d %t", h.toServer, eof); answer != want {
			return fmt.Errorf("the container has %q, want %q: %w", answer, want, err)
		}
		return nil
	})
	if err != nil {
		h.t.Errorf("%s: %v", h.name, err)
	}
}

// reaches waits until the container's end is in a state.
func (h *halfClosed) reaches(state int) error {
	return testbed.Poll(h.ctx, func() error {
		answer, err := h.command("state")
		if err == nil && answer != strconv.Itoa(state) {
			err = fmt.Errorf("%s: TCP state %s, want %d", h.name, answer, state)
		}
		return err
	})
}

// halfStates are the states, each with what brings a connection there and what
// finishes it. Those with muted are entered while the peer hears nothing.
var halfStates = []struct {
	name   string
	state  int
	muted  bool
	early  func(*halfClosed) // before the peer is deaf
	enter  func(*halfClosed)
	finish func(*halfClosed) // after the restore
}{
	{"close-wait", traffic.CloseWait, false, nil,
		func(h *halfClosed) { h.clientShuts() },
		func(h *halfClosed) { h.serverSends(bytesAfter); h.must("shut") }},
	{"fin-wait2", traffic.FinWait2, false, nil,
		func(h *halfClosed) { h.must("shut") },
		func(h *halfClosed) { h.clientSends(bytesAfter); h.clientShuts() }},
	{"fin-wait1", traffic.FinWait1, true, nil,
		func(h *halfClosed) { h.serverSends(bytesInFlight); h.must("shut") },
		func(h *halfClosed) { h.clientSends(bytesAfter); h.clientShuts() }},
	{"closing", traffic.Closing, true, nil,
		func(h *halfClosed) {
			h.serverSends(bytesInFlight)
			h.must("shut")
			// The container's end must have sent its FIN before it sees ours.
			if err := h.reaches(traffic.FinWait1); err != nil {
				h.t.Fatal(err)
			}
			h.clientShuts()
		}, nil},
	{"last-ack", traffic.LastAck, true,
		func(h *halfClosed) {
			h.clientShuts()
			if err := h.reaches(traffic.CloseWait); err != nil {
				h.t.Fatal(err)
			}
		},
		func(h *halfClosed) { h.serverSends(bytesInFlight); h.must("shut") }, nil},
}

// TestHalfClosed restores connections that one side or both have closed. CRIU
// rebuilds them with packets that it sends itself, which must pass our lock.
func TestHalfClosed(t *testing.T) {
	for _, c := range []struct{ engine, lock string }{{"criu", "skip"}, {"runc", "skip"}, {"criu", "nftables"}, {"criu", "iptables"}} {
		t.Run(c.engine+"/"+c.lock, func(t *testing.T) {
			f := begin(t, c.engine, c.lock, oursPath, relayPath)
			var all []*halfClosed
			each := func(what func(h *halfClosed, i int)) {
				for k, h := range all {
					what(h, k%len(halfStates))
				}
			}
			for _, family := range []string{"tcp4", "tcp6"} {
				for _, s := range halfStates {
					h := &halfClosed{fixture: f, name: s.name + ", " + family, family: family, port: traffic.StatesPort, state: s.state}
					if s.muted {
						h.port = traffic.MutedPort
					}
					c := f.dial(family, h.port)
					h.id, h.client = c.LocalAddr().String(), traffic.NewCommanded(c.(*net.TCPConn))
					all = append(all, h)
				}
			}
			each(func(h *halfClosed, i int) {
				// The workload may not have accepted it yet.
				if err := h.reaches(traffic.Established); err != nil {
					t.Fatal(err)
				}
				h.clientSends(bytesBefore)
				h.serverSends(bytesBefore)
				h.arrived(false)
				if early := halfStates[i].early; early != nil {
					early(h)
				}
			})
			if _, err := f.l.Feed(f.ctx, f.net.Path(), muteRules, "nft", "-f", "-"); err != nil {
				t.Fatal(err)
			}
			each(func(h *halfClosed, i int) {
				halfStates[i].enter(h)
				if err := h.reaches(h.state); err != nil {
					t.Fatal(err)
				}
			})

			f.l.hooks.Handle(func(hook testbed.Hook) error {
				switch hook.Action {
				case "post-dump":
					return f.unplug()
				case "network-lock", "post-setup-namespaces", "post-restore":
					return f.locked(hook.Action, "/proc/"+hook.PID+"/ns/net")
				}
				return nil
			})
			if err := f.e.Dump(f.ctx, false); err != nil {
				t.Fatal(err)
			}
			each(func(h *halfClosed, i int) {
				if h.state == traffic.FinWait2 { // the one whose peer has more to say
					h.clientSends(bytesInFlight)
				}
			})
			if err := f.e.Restore(f.ctx); err != nil {
				t.Fatal(err)
			}
			f.l.hooks.Handle(nil)

			each(func(h *halfClosed, i int) {
				if err := h.reaches(h.state); err != nil {
					t.Errorf("after the restore: %v", err)
				}
			})
			if _, err := f.l.RunIn(f.ctx, f.net.Path(), "nft", "delete", "table", "inet", "mute"); err != nil {
				t.Fatal(err)
			}
			each(func(h *halfClosed, i int) {
				if finish := halfStates[i].finish; finish != nil {
					finish(h)
				}
			})
			each(func(h *halfClosed, i int) { h.arrived(true) })
		})
	}
}

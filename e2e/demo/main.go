// The demo checkpoints and restores a real container, with CRIU and runc, under
// criu-netlock's lock, while a client talks to it over IPv4 and IPv6; and tells
// what happened. It exits with 1 unless all went as it should.
//
//	go run ./e2e/demo
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/e2e/traffic"
	"github.com/criu-netlock/criu-netlock/netlock"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("root is needed: CRIU, namespaces and mounts")
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Minute)
	defer cancel()
	root, err := testbed.Default().Ensure(ctx, func(s string) { fmt.Println(s) })
	if err != nil {
		return err
	}
	s, err := root.Enter(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := s.Build(ctx, map[string]string{"criu-netlock": "cmd/criu-netlock", "workload": "e2e/workload"}); err != nil {
		return err
	}
	ctx, cancel = context.WithTimeout(ctx, time.Minute)
	defer cancel()
	n, err := s.NewNet(ctx, "peer")
	if err != nil {
		return err
	}
	defer func() {
		// ctx may be what ended.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		err = errors.Join(err, n.Close(ctx))
	}()
	e := &testbed.Runc{Container: testbed.Container{
		S: s, Net: n, ID: "demo",
		Scripts: []string{testbed.BinDir + "/criu-netlock"},
		Lock:    "skip",
		Argv:    []string{testbed.BinDir + "/workload"},
	}}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		err = errors.Join(err, e.Destroy(ctx))
	}()
	return story(ctx, s, n, e)
}

// ownRules are rules that the container has of its own.
const ownRules = `table inet own {
	chain input {
		type filter hook input priority filter; policy accept;
		tcp dport 23 drop
	}
}
`

// probeTime is how long the dead container's lock is tried; it is part of the
// longest gap that the demo reports.
const probeTime = 200 * time.Millisecond

func story(ctx context.Context, s *testbed.Session, n *testbed.Net, e *testbed.Runc) error {
	criu, err := s.Run(ctx, "criu", "--version")
	if err != nil {
		return err
	}
	runc, err := s.Run(ctx, "runc", "--version")
	if err != nil {
		return err
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	fmt.Printf("CRIU %s, runc %s, Linux %s\n\n", lastWord(criu), lastWord(runc), unix.ByteSliceToString(uts.Release[:]))

	if err := e.Start(ctx); err != nil {
		return err
	}
	if _, err := s.Feed(ctx, e.Netns(), ownRules, "nft", "-f", "-"); err != nil {
		return err
	}
	before, err := s.Rules(ctx, e.Netns())
	if err != nil {
		return err
	}
	streams := map[string]*traffic.Stream{}
	for _, c := range []struct{ name, network, addr string }{{"IPv4", "tcp4", testbed.ContainerV4}, {"IPv6", "tcp6", testbed.ContainerV6}} {
		var conn net.Conn
		if err := testbed.Poll(ctx, func() (err error) {
			conn, err = n.Dial(ctx, c.network, net.JoinHostPort(c.addr, strconv.Itoa(traffic.StreamPort)))
			return err
		}); err != nil {
			return err
		}
		streams[c.name] = traffic.Start(conn)
	}
	fmt.Printf("A runc container serves TCP. A client in another network namespace exchanges numbered\nmessages with it, one every %v in each direction, all the time.\n", traffic.Interval)
	if err := advance(ctx, streams, 300); err != nil {
		return err
	}
	if err := counters(streams); err != nil {
		return err
	}

	fmt.Println("\nrunc checkpoint")
	start := time.Now()
	if err := e.Dump(ctx, false); err != nil {
		return err
	}
	took := time.Since(start)
	if err := hooks(e, start); err != nil {
		return err
	}
	fmt.Printf("  %6.0f ms  done: the container's tasks are dead\n", ms(took))

	ns, err := netlock.FromPath(s.Path(e.Netns()))
	if err != nil {
		return err
	}
	got, err := n.Probe(ctx, ns, traffic.ControlPort, probeTime)
	ns.Close()
	if err != nil {
		return err
	}
	for _, p := range testbed.Probes {
		if got[p] != "timeout" {
			return fmt.Errorf("the lock leaks: %s was %q", p, got[p])
		}
	}
	fmt.Printf("  for %v TCP, UDP and ping, IPv4 and IPv6, in and out: nothing gets through, nothing is refused\n", probeTime)
	if err := counters(streams); err != nil {
		return err
	}

	fmt.Println("\nrunc restore")
	start = time.Now()
	if err := e.Restore(ctx); err != nil {
		return err
	}
	took = time.Since(start)
	if err := hooks(e, start); err != nil {
		return err
	}
	fmt.Printf("  %6.0f ms  done: the container runs\n", ms(took))
	if err := advance(ctx, streams, 300); err != nil {
		return err
	}
	if err := counters(streams); err != nil {
		return err
	}

	fmt.Println()
	for _, name := range []string{"IPv4", "IPv6"} {
		st, err := streams[name].Finish(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Printf("%s connection survived: %d messages, %d lost, 0 repeated, no reset; longest gap %.0f ms\n",
			name, st.Sent+st.Received, st.Sent-st.Acked, ms(st.Gap))
	}
	after, err := s.Rules(ctx, e.Netns())
	if err != nil {
		return err
	}
	if before != after {
		return fmt.Errorf("the container's rule set was\n%s\nand is\n%s", before, after)
	}
	fmt.Println("the container's rule set is byte for byte what it was before")
	return nil
}

// advance waits until n messages more have gone each way.
func advance(ctx context.Context, streams map[string]*traffic.Stream, n uint64) error {
	for name, s := range streams {
		if err := s.Advance(ctx, n); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func counters(streams map[string]*traffic.Stream) error {
	for _, name := range []string{"IPv4", "IPv6"} {
		st, err := streams[name].Stats()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Printf("  client, %s: sent %d, received %d\n", name, st.Sent, st.Received)
	}
	return nil
}

// hookRE is criu-netlock's line in CRIU's log.
var hookRE = regexp.MustCompile(`(?m)^time=(\S+) level=(\w+) .*?\baction=(\S+) .*?\bbackend=(\S*) result=("[^"]*"|\S+) duration_us=(\d+)`)

// hooks prints what criu-netlock did at each of CRIU's hooks.
func hooks(e *testbed.Runc, start time.Time) error {
	log, err := e.Log()
	if err != nil {
		return err
	}
	lines := hookRE.FindAllStringSubmatch(log, -1)
	if len(lines) == 0 {
		return errors.New("criu-netlock left no line in CRIU's log")
	}
	for _, m := range lines {
		at, err := time.Parse(time.RFC3339Nano, m[1])
		if err != nil {
			return err
		}
		if m[2] != "INFO" {
			return fmt.Errorf("CRIU's log: %s", m[0])
		}
		us, err := strconv.Atoi(m[6])
		if err != nil {
			return err
		}
		backend := strings.Trim(m[4], `"`)
		if backend != "" {
			backend += ", "
		}
		fmt.Printf("  %6.0f ms  %-22s %s (%s%.1f ms)\n", ms(at.Sub(start)), m[3], strings.Trim(m[5], `"`), backend, float64(us)/1000)
	}
	return nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// lastWord is the last word of the first line.
func lastWord(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	f := strings.Fields(line)
	if len(f) == 0 {
		return "?"
	}
	return f[len(f)-1]
}

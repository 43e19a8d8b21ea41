package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/e2e/traffic"
	"github.com/criu-netlock/criu-netlock/netlock/config"
)

// inTestbed runs f in a session of its own.
func inTestbed(program string, recipe testbed.Recipe, enter func(*testbed.Root, context.Context) (*testbed.Session, error), f func(context.Context, *testbed.Session) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	s, err := enterTestbed(ctx, program, recipe, enter)
	if err != nil {
		return err
	}
	return errors.Join(f(ctx, s), s.Close())
}

// enterTestbed opens a session that has the workload, and the program that was built.
func enterTestbed(ctx context.Context, program string, recipe testbed.Recipe, enter func(*testbed.Root, context.Context) (*testbed.Session, error)) (*testbed.Session, error) {
	root, err := recipe.Ensure(ctx, func(s string) { fmt.Fprintln(os.Stderr, s) })
	if err != nil {
		return nil, err
	}
	s, err := enter(root, ctx)
	if err != nil {
		return nil, err
	}
	err = s.Build(ctx, map[string]string{"workload": "e2e/workload", "rpcclient": "e2e/rpcclient"})
	var b []byte
	if err == nil {
		b, err = os.ReadFile(program)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(s.Work, "bin", "criu-netlock"), b, 0o755)
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// dumpWays are the locks that a real dump is felt under.
func dumpWays() []dumpWay {
	ours := []string{testbed.BinDir + "/criu-netlock"}
	return []dumpWay{
		{name: "no lock at all (`network-lock skip`)", criu: "skip"},
		{name: "CRIU's, iptables (`iptables-nft`)", criu: "iptables"},
		{name: "CRIU's, nftables", criu: "nftables"},
		{name: "criu-netlock, `drop`", criu: "skip", scripts: ours, mode: "drop"},
		{name: "**criu-netlock, `hold`**", criu: "skip", scripts: ours, mode: "hold"},
	}
}

type dumpWay struct {
	name, criu, mode string
	scripts          []string
	felt             []traffic.Felt
	freezes          []time.Duration
	failed           int // dumps, and were made once more
}

// dumper is an engine whose container can be dumped under another lock each time.
type dumper interface {
	testbed.Engine
	Freeze() (time.Duration, error)
}

// feltRunc has a client feel dumps by runc.
func feltRunc(ctx context.Context, s *testbed.Session, dumps int) error {
	n, err := s.NewNet(ctx, "peer")
	if err != nil {
		return err
	}
	defer n.Close(ctx)
	e := &testbed.Runc{Container: feltContainer(s, n)}
	e.Options = []string{inFlight}
	return feltDumps(ctx, "runc", e, n, dumps, func(w dumpWay) error {
		e.Lock, e.Scripts = w.criu, w.scripts
		return writeMode(s, w)
	})
}

// feltPodman has a client feel dumps by podman, with runc.
func feltPodman(ctx context.Context, s *testbed.Session, dumps int) error {
	n, err := s.NewLAN(ctx, "peer")
	if err != nil {
		return err
	}
	defer n.Peer.Close() // the rest goes with the session
	return feltDumps(ctx, "podman", &testbed.Podman{Container: feltContainer(s, n), Stats: true}, n, dumps, func(w dumpWay) error {
		runc := inFlight + "\n"
		for _, p := range w.scripts {
			runc += "action-script " + p + "\n"
		}
		return errors.Join(writeMode(s, w),
			os.WriteFile(s.Path("/etc/criu/runc.conf"), []byte(runc), 0o644),
			os.WriteFile(s.Path("/etc/criu/default.conf"), []byte("network-lock "+w.criu+"\n"), 0o644))
	})
}

// inFlight is an option of CRIU's: to leave out the connections that the server has not accepted.
const inFlight = "skip-in-flight"

func feltContainer(s *testbed.Session, n *testbed.Net) testbed.Container {
	return testbed.Container{S: s, Net: n, ID: "felt", Lock: "skip", Argv: []string{testbed.BinDir + "/workload", "numbers"}}
}

func writeMode(s *testbed.Session, w dumpWay) error {
	return os.WriteFile(s.Path(config.DefaultPath), []byte("mode = \""+w.mode+"\"\n"), 0o644)
}

// feltDumps has a client feel real dumps of a container that goes on running, one under
// each lock in turn, which use sets.
func feltDumps(ctx context.Context, name string, e dumper, n *testbed.Net, dumps int, use func(dumpWay) error) (err error) {
	if err := e.Start(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.Destroy(ctx)) }()
	c, err := traffic.NewClient(ctx, n.Peer, testbed.ContainerV4)
	if err != nil {
		return err
	}
	defer c.Close()
	ways := dumpWays()
	for d := range dumps + 1 {
		for i := 0; i < len(ways); i++ {
			w := &ways[i]
			if err := use(*w); err != nil {
				return err
			}
			end, err := c.Feel(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			err = e.Dump(ctx, true)
			felt, e2 := end()
			if err != nil && e2 == nil && w.criu == "skip" && w.scripts == nil && w.failed < dumps && ctx.Err() == nil {
				// A packet can come into a socket that CRIU is reading.
				fmt.Fprintf(os.Stderr, "%s: once more: %v\n", w.name, err)
				w.failed++
				i--
				continue
			}
			freeze, e3 := e.Freeze()
			if err := errors.Join(err, e2, e3); err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			if d == 0 {
				continue // the first one reads CRIU from the disk
			}
			w.felt, w.freezes = append(w.felt, felt), append(w.freezes, freeze)
		}
	}
	printFelt(name, dumps, ways)
	return nil
}

func printFelt(engine string, dumps int, ways []dumpWay) {
	fmt.Printf("A client of a container that %s dumps and leaves running, %d dumps each, in turn; medians, the worst in brackets.\n\n", engine, dumps)
	fmt.Println("| lock | freeze | longest gap | beyond the freeze | longest connect | connects over 500 ms | SYNs again | datagrams lost | twice | broken |")
	fmt.Println("|---|---|---|---|---|---|---|---|---|---|")
	for _, w := range ways {
		if w.failed > 0 {
			defer fmt.Printf("\n(%d more dumps failed, with %s.)\n", w.failed, w.name)
		}
		var gaps, beyond, connects []time.Duration
		var sum traffic.Felt
		for i, f := range w.felt {
			gaps, beyond, connects = append(gaps, f.Gap()), append(beyond, f.Gap()-w.freezes[i]), append(connects, f.Connect)
			sum.Add(f)
			if f.Why != nil {
				fmt.Fprintln(os.Stderr, w.name, f.Why)
			}
		}
		fmt.Printf("| %s | %s | %s | %s | %s | %d of %d | %d | %d of %d | %d | %d |\n", w.name, worst(w.freezes), worst(gaps), worst(beyond), worst(connects),
			sum.Slow, sum.Connects, sum.SYNs, sum.Lost, sum.Sent, sum.Twice, sum.Broken)
	}
}

// worst is a median, and the longest in brackets.
func worst(d []time.Duration) string {
	return fmt.Sprintf("%.1f (%.1f) ms", float64(median(d).Microseconds())/1e3, float64(slices.Max(d).Microseconds())/1e3)
}

package main

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/traffic"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/hold"
	"github.com/criu-netlock/criu-netlock/nft"
)

// windows are how long a lock is in force.
var windows = [...]time.Duration{20 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, time.Second}

// windowWay is a lock on a server of its own, and what a client of it has felt.
type windowWay struct {
	name, short  string // short is the picture's
	place        *windowPlace
	lock, unlock func(context.Context, *windowPlace) error
	felt         [len(windows)][]traffic.Felt
}

// windowWays are the locks, each of which is put on and off as its user would: ours by
// the library, CRIU's by the commands that it runs itself.
func windowWays() []*windowWay {
	none := func(context.Context, *windowPlace) error { return nil }
	ours := func(o netlock.Options) (lock, unlock func(context.Context, *windowPlace) error) {
		b := nft.New()
		return func(ctx context.Context, p *windowPlace) error {
				res, err := b.Lock(ctx, p.server.ns, o)
				if err == nil && res.Mode == netlock.Drop && o.Mode == netlock.Hold {
					err = res.NotHeld
				}
				return err
			}, func(ctx context.Context, p *windowPlace) error {
				st, err := b.Unlock(ctx, p.server.ns, o)
				return errors.Join(err, st.NotDelivered)
			}
	}
	dropLock, dropUnlock := ours(netlock.Options{Mode: netlock.Drop})
	holdLock, holdUnlock := ours(netlock.Options{Mode: netlock.Hold, Holder: &hold.Holder{}})
	const table = "inet CRIU-1"
	return []*windowWay{
		{name: "no lock", short: "no lock", lock: none, unlock: none},
		{name: "CRIU's, iptables (`iptables-nft`)", short: "CRIU, iptables",
			lock: func(ctx context.Context, p *windowPlace) error {
				return p.iptables(ctx, ":CRIU - [0:0]\n-I INPUT -j CRIU\n-I OUTPUT -j CRIU\n-A CRIU -m mark --mark 0xC114 -j ACCEPT\n-A CRIU -j DROP\n")
			},
			unlock: func(ctx context.Context, p *windowPlace) error {
				return errors.Join(p.iptables(ctx, ":CRIU - [0:0]\n-D INPUT -j CRIU\n-D OUTPUT -j CRIU\n"), p.iptables(ctx, ":CRIU - [0:0]\n-X CRIU\n"))
			}},
		{name: "CRIU's, nftables", short: "CRIU, nftables",
			lock: func(_ context.Context, p *windowPlace) error {
				var rules strings.Builder
				rules.WriteString("create table " + table + "\n")
				for _, hook := range []string{"output", "input"} {
					fmt.Fprintf(&rules, "add chain %s %s { type filter hook %[2]s priority 0; policy drop; }\n", table, hook)
					fmt.Fprintf(&rules, "add rule %s %s meta mark 0xC114 accept\n", table, hook)
				}
				return p.server.nft(rules.String())
			},
			unlock: func(_ context.Context, p *windowPlace) error { return p.server.nft("delete table " + table + "\n") }},
		{name: "criu-netlock, `drop`", short: "criu-netlock, drop", lock: dropLock, unlock: dropUnlock},
		{name: "**criu-netlock, `hold`**", short: "criu-netlock, hold", lock: holdLock, unlock: holdUnlock},
	}
}

// windowPlace is a server and a client in two namespaces that are joined by a veth.
type windowPlace struct {
	server, peer *benchNS
	workload     *exec.Cmd
	client       *traffic.Client
}

const windowServer, windowPeer = "10.78.0.1", "10.78.0.2"

func newWindowPlace(ctx context.Context, workload string) (p *windowPlace, err error) {
	p = &windowPlace{}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if p.server, err = newNS(); err != nil {
		return p, err
	}
	if p.peer, err = newNS(); err != nil {
		return p, err
	}
	if err := p.server.run(ctx, "link add eth0 type veth peer name eth0 netns "+p.peer.pid()+"\naddr add "+windowServer+"/24 dev eth0\nlink set eth0 up\n", "ip", "-batch", "-"); err != nil {
		return p, err
	}
	if err := p.peer.run(ctx, "addr add "+windowPeer+"/24 dev eth0\nlink set eth0 up\n", "ip", "-batch", "-"); err != nil {
		return p, err
	}
	p.workload = exec.Command(workload, "numbers")
	if err := p.server.ns.Do(p.workload.Start); err != nil {
		return p, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	p.client, err = traffic.NewClient(ctx, p.peer.ns, windowServer)
	return p, err
}

func (p *windowPlace) close() {
	if p.client != nil {
		p.client.Close()
	}
	if p.workload != nil && p.workload.Process != nil {
		_ = p.workload.Process.Kill()
		_ = p.workload.Wait()
	}
	for _, n := range []*benchNS{p.server, p.peer} {
		if n != nil {
			n.close()
		}
	}
}

// iptables changes the tables filter of both families as CRIU does.
func (p *windowPlace) iptables(ctx context.Context, rules string) error {
	for _, tool := range []string{"iptables-nft-restore", "ip6tables-nft-restore"} {
		if err := p.server.run(ctx, "*filter\n"+rules+"COMMIT\n", tool, "-w", "--noflush"); err != nil {
			return err
		}
	}
	return nil
}

// feel has the client feel one window.
func (w *windowWay) feel(ctx context.Context, i int) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	end, err := w.place.client.Feel(ctx)
	if err != nil {
		return err
	}
	err = w.lock(ctx, w.place)
	if err == nil {
		time.Sleep(windows[i])
		err = w.unlock(ctx, w.place)
	}
	felt, e := end()
	if err == nil && felt.Broken > 0 {
		err = felt.Why
	}
	w.felt[i] = append(w.felt[i], felt)
	return errors.Join(err, e)
}

// feltWindows has clients feel locks of some lengths, in turn. What the picture shows goes
// to a file, if one is named.
func feltWindows(dir string, rounds int, data string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	workload := filepath.Join(dir, "workload")
	build := exec.CommandContext(ctx, "go", "build", "-o", workload, "./e2e/workload")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w: %s", err, out)
	}
	ways := windowWays()
	for _, w := range ways {
		p, err := newWindowPlace(ctx, workload)
		if err != nil {
			return err
		}
		defer p.close()
		w.place = p
	}
	for range rounds {
		for i := range windows {
			for _, w := range ways {
				if err := w.feel(ctx, i); err != nil {
					return fmt.Errorf("%s, %v: %w", w.name, windows[i], err)
				}
			}
		}
	}
	printWindows(ways, rounds)
	if data == "" {
		return nil
	}
	return writeWindows(ways, data)
}

// The two that are shown: what an open connection feels, and one that begins.
var windowMeasures = []struct {
	name, short string
	of          func(traffic.Felt) time.Duration
}{
	{"an open connection stands still, at most", "open", traffic.Felt.Gap},
	{"a connect takes, at most", "connect", func(f traffic.Felt) time.Duration { return f.Connect }},
}

func (w *windowWay) median(i int, of func(traffic.Felt) time.Duration) time.Duration {
	var all []time.Duration
	for _, f := range w.felt[i] {
		all = append(all, of(f))
	}
	return median(all)
}

func printWindows(ways []*windowWay, rounds int) {
	fmt.Printf("A client of a server that is locked for some time, medians of %d times each, in turn.\n", rounds)
	for _, m := range windowMeasures {
		fmt.Printf("\n| %s |", m.name)
		for _, d := range windows {
			fmt.Printf(" locked %d ms |", d.Milliseconds())
		}
		fmt.Println("\n|---|" + strings.Repeat("---|", len(windows)))
		for _, w := range ways {
			fmt.Printf("| %s |", w.name)
			for i := range windows {
				fmt.Printf(" %.0f ms |", w.median(i, m.of).Seconds()*1e3)
			}
			fmt.Println()
		}
	}
	// In a longer one a connect takes that long by right.
	fmt.Println("\n| in those under 500 ms together | connects over 500 ms | SYNs sent again | datagrams lost | twice |\n|---|---|---|---|---|")
	for _, w := range ways {
		var sum traffic.Felt
		for i, d := range windows {
			if d >= traffic.SlowConnect {
				continue
			}
			for _, f := range w.felt[i] {
				sum.Add(f)
			}
		}
		fmt.Printf("| %s | %d of %d | %d | %d of %d | %d |\n", w.name, sum.Slow, sum.Connects, sum.SYNs, sum.Lost, sum.Sent, sum.Twice)
	}
}

// writeWindows writes what e2e/bench/plot reads.
func writeWindows(ways []*windowWay, name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	out := csv.NewWriter(f)
	_ = out.Write([]string{"measure", "lock", "window_ms", "felt_ms"}) // Error tells
	for _, m := range windowMeasures {
		for _, w := range ways[1:] {
			for i, d := range windows {
				_ = out.Write([]string{m.short, w.short, strconv.FormatInt(d.Milliseconds(), 10), fmt.Sprintf("%.1f", w.median(i, m.of).Seconds()*1e3)})
			}
		}
	}
	out.Flush()
	return errors.Join(out.Error(), f.Close())
}

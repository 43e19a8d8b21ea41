package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/netlock/config"
)

// restoreWay is a lock that real restores are made under.
type restoreWay struct {
	name, lock string
	scripts    []string
	unlocks    map[string][]time.Duration // by the engine's name
}

// restores dumps and restores a container, by CRIU and by runc, under each lock in turn,
// and reads from CRIU's log how long a restored container waits for its network.
func restores(ctx context.Context, s *testbed.Session, rounds int) error {
	if err := os.WriteFile(s.Path(config.DefaultPath), nil, 0o644); err != nil {
		return err
	}
	ways := []restoreWay{
		{name: "no lock at all (`network-lock skip`)", lock: "skip"},
		{name: "CRIU's, iptables (`iptables-nft`)", lock: "iptables"},
		{name: "CRIU's, nftables", lock: "nftables"},
		{name: "**criu-netlock** (`skip` + action script)", lock: "skip", scripts: []string{testbed.BinDir + "/criu-netlock"}},
	}
	for i := range ways {
		ways[i].unlocks = map[string][]time.Duration{}
	}
	for _, name := range []string{"criu", "runc"} {
		if err := restoresBy(ctx, s, name, ways, rounds); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	fmt.Println("| in real restores, from CRIU's log: from \"Unlock network\" to the next hook, `pre-resume` | criu | runc |\n|---|---|---|")
	for _, w := range ways {
		fmt.Printf("| %s | %s | %s |\n", w.name, ms(median(w.unlocks["criu"])), ms(median(w.unlocks["runc"])))
	}
	return nil
}

func restoresBy(ctx context.Context, s *testbed.Session, name string, ways []restoreWay, rounds int) (err error) {
	n, err := s.NewNet(ctx, "peer-"+name)
	if err != nil {
		return err
	}
	defer n.Close(ctx)
	c := testbed.Container{S: s, Net: n, ID: "restores-" + name, Lock: "skip", Argv: []string{testbed.BinDir + "/workload"}}
	var e testbed.Engine
	var its *testbed.Container
	if name == "runc" {
		r := &testbed.Runc{Container: c}
		e, its = r, &r.Container
	} else {
		r := &testbed.CLI{Container: c}
		e, its = r, &r.Container
	}
	if err := e.Start(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.Destroy(ctx)) }()
	for round := range rounds + 1 {
		for i := range ways {
			w := &ways[i]
			its.Lock, its.Scripts = w.lock, w.scripts
			if err := e.Dump(ctx, false); err != nil {
				return err
			}
			if err := e.Restore(ctx); err != nil {
				return err
			}
			log, err := e.Log()
			if err != nil {
				return err
			}
			took, err := unlockTime(log)
			if err != nil {
				return err
			}
			if round > 0 { // the first ones read their programs from the disk
				w.unlocks[name] = append(w.unlocks[name], took)
			}
		}
	}
	return nil
}

// unlockTime finds in a restore's log, whose lines begin with seconds in brackets, how long it
// took from the unlock to the next hook.
func unlockTime(log string) (time.Duration, error) {
	at := func(line string) (time.Duration, error) {
		m := regexp.MustCompile(`(?m)^\((\d+\.\d+)\) *` + line).FindStringSubmatch(log)
		if m == nil {
			return 0, fmt.Errorf("CRIU's log has no %q", line)
		}
		s, err := strconv.ParseFloat(m[1], 64)
		return time.Duration(s * float64(time.Second)), err
	}
	unlock, err := at("net: Unlock network")
	if err != nil {
		return 0, err
	}
	next, err := at("Running pre-resume scripts")
	return next - unlock, err
}

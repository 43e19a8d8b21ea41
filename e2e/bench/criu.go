package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/netlock/config"
)

// inCRIU dumps a container with criu dump --leave-running, under each lock in turn, and reads
// from CRIU's log how long its hooks and the freeze took.
func inCRIU(ctx context.Context, s *testbed.Session, dumps int) error {
	n, err := s.NewNet(ctx, "bench")
	if err != nil {
		return err
	}
	defer n.Close(ctx)

	ours := []string{testbed.BinDir + "/criu-netlock"}
	const shim = testbed.BinDir + "/shim" // where it is called criu
	if err := os.MkdirAll(s.Work+"/bin/shim", 0o755); err != nil {
		return err
	}
	if err := os.Symlink(ours[0], s.Work+"/bin/shim/criu"); err != nil {
		return err
	}
	if err := s.BuildLibrary(ctx, "libcriu", ours[0]); err != nil {
		return err
	}
	const asleep = "cpu-latency = \"off\"\n"
	rows := []struct {
		name, lock           string
		scripts              []string
		config               string // netlock.toml
		client               []string
		locks, unlocks, ices []time.Duration
	}{
		{name: "no lock at all (`network-lock skip`)", lock: "skip"},
		{name: "CRIU's, iptables (`iptables-nft`)", lock: "iptables"},
		{name: "CRIU's, nftables", lock: "nftables"},
		{name: "**criu-netlock** (`skip` + action script)", lock: "skip", scripts: ours},
		{name: "criu-netlock without its guard (`guard = false`)", lock: "skip", scripts: ours, config: "guard = false\n"},
		{name: "criu-netlock, the processors left alone (`cpu-latency = \"off\"`)", lock: "skip", scripts: ours, config: asleep},
		{name: "**package criurpc**, a session over `criu swrk`", lock: "skip", client: []string{testbed.BinDir + "/rpcclient", "swrk"}},
		{name: "**in CRIU's place**, before a go-criu program", lock: "skip", client: []string{testbed.BinDir + "/rpcclient", "-criu", shim + "/criu", "plain"}},
		{name: "the same, the processors left alone", lock: "skip", config: asleep, client: []string{testbed.BinDir + "/rpcclient", "-criu", shim + "/criu", "plain"}},
		{name: "no lock, a go-criu program with callbacks of its own", lock: "skip", client: []string{testbed.BinDir + "/rpcclient", "plain"}},
		{name: "package criurpc, by go-criu", lock: "skip", client: []string{testbed.BinDir + "/rpcclient", "go-criu"}},
		{name: "the C library, by libcriu", lock: "skip", client: []string{testbed.BinDir + "/libcriu"}},
	}
	e := &testbed.CLI{Container: testbed.Container{S: s, Net: n, ID: "bench", Argv: []string{testbed.BinDir + "/workload"}}}
	if err := e.Start(ctx); err != nil {
		return err
	}
	err = func() error {
		for d := range dumps + 1 {
			for i := range rows {
				r := &rows[i]
				e.Lock, e.Scripts, e.Client = r.lock, r.scripts, r.client
				if err := os.WriteFile(s.Path(config.DefaultPath), []byte(r.config), 0o644); err != nil {
					return err
				}
				if err := e.Dump(ctx, true); err != nil {
					return fmt.Errorf("%s: %w", r.name, err)
				}
				log, err := e.Log()
				if err != nil {
					return err
				}
				lock, unlock, ice, err := readLog(log)
				if err != nil {
					return fmt.Errorf("%s: %w", r.name, err)
				}
				if d == 0 {
					continue // the first one reads CRIU from the disk
				}
				r.locks, r.unlocks, r.ices = append(r.locks, lock), append(r.unlocks, unlock), append(r.ices, ice)
			}
		}
		return nil
	}()
	if err := errors.Join(err, e.Destroy(ctx)); err != nil {
		return err
	}
	fmt.Println("| in a real `criu dump --leave-running`, from CRIU's log | lock | unlock | freeze |\n|---|---|---|---|")
	for _, r := range rows {
		fmt.Printf("| %s | %s | %s | %s |\n", r.name, us(median(r.locks)), us(median(r.unlocks)), ms(median(r.ices)))
	}
	return nil
}

// readLog finds in a dump's log, whose lines begin with seconds in brackets, how
// long the lock, the unlock and the whole freeze took. Lines without a time are
// the hook's own.
func readLog(log string) (lock, unlock, freeze time.Duration, err error) {
	stamp := regexp.MustCompile(`^\((\d+\.\d+)\) *(.*)`)
	var seized, locking, unlocking, thawed, locked time.Duration
	for _, line := range strings.Split(log, "\n") {
		m := stamp.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		sec, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			return 0, 0, 0, err
		}
		at := time.Duration(sec * float64(time.Second))
		switch {
		case strings.HasPrefix(m[2], "Seized task") && seized == 0:
			seized = at
		case m[2] == "net: Lock network":
			locking = at
		case m[2] == "net: Unlock network":
			unlocking = at
		case strings.HasPrefix(m[2], "Unfreezing tasks"):
			thawed = at
		case locking != 0 && locked == 0 && !strings.Contains(m[2], "network-lock scripts") && !strings.HasPrefix(strings.TrimSpace(m[2]), "[") && strings.TrimSpace(m[2]) != "RPC":
			locked = at // the first line after the scripts, of which each has a line "[path]"
		}
	}
	if seized == 0 || locking == 0 || locked == 0 || unlocking == 0 || thawed == 0 {
		return 0, 0, 0, errors.New("CRIU's log lacks a line that the measurement needs")
	}
	return locked - locking, thawed - unlocking, thawed - seized, nil
}

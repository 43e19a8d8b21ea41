package main

// Mode hold: who holds, and when.

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/rpc"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/cmd/internal/wire"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/config"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
	"github.com/criu-netlock/criu-netlock/nft"
)

// modeOf is what the configuration's mode means in a checkpoint. What cannot be held in
// spite of it has a reason.
func modeOf(cfg config.Config, phase guard.Phase, criu int, k *nft.Kernel) (netlock.Mode, error) {
	return wire.Mode(cfg, phase, k, func() bool { return leavesRunning(criu) }, func() bool { return dumpsRules(words(criu)) })
}

// modeOfRequest is modeOf where CRIU's client says what it wants.
func modeOfRequest(cfg config.Config, k *nft.Kernel, opts *rpc.CriuOpts) func(guard.Phase, bool) (netlock.Mode, error) {
	external := slices.ContainsFunc(opts.GetExternal(), func(s string) bool { return strings.HasPrefix(s, "net[") })
	dumpsRules := opts.GetEmptyNs()&unix.CLONE_NEWNET == 0 && !external
	return func(phase guard.Phase, leavesRunning bool) (netlock.Mode, error) {
		return wire.Mode(cfg, phase, k, func() bool { return leavesRunning }, func() bool { return dumpsRules })
	}
}

// words is a process's command line.
func words(pid int) []string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
}

// leavesRunning tells whether the tasks go on after the dump, as far as the command lines
// say: CRIU's own or, where CRIU is driven by RPC, that of the runtime that started it.
func leavesRunning(criu int) bool {
	if w := words(criu); slices.Contains(w, "dump") {
		return criuLeavesRunning(w)
	}
	// By RPC it may have another title by now.
	return runtimeLeavesRunning(words(netlock.ParentOf(criu)))
}

func runtimeLeavesRunning(w []string) bool {
	return slices.Contains(w, "--leave-running") || slices.Contains(w, "--leave-running=true")
}

// criuLeavesRunning looks for -R and --leave-running among CRIU's options, as getopt_long does:
// short ones in one word, long ones cut short.
func criuLeavesRunning(w []string) bool {
	const withArg, mayHaveArg = "tDorJWLM", "vx"
	for i := 1; i < len(w) && w[i] != "--"; i++ {
		switch word := w[i]; {
		case strings.HasPrefix(word, "--"):
			if len(word) >= len("--leave-r") && strings.HasPrefix("--leave-running", word) {
				return true
			}
		case strings.HasPrefix(word, "-"):
			for k, c := range word[1:] {
				if c == 'R' {
					return true
				}
				last := k == len(word)-2
				if strings.ContainsRune(withArg, c) && last {
					i++ // the next word is its argument
				}
				if strings.ContainsRune(withArg+mayHaveArg, c) {
					break // the rest is
				}
			}
		}
	}
	return false
}

// dumpsRules tells whether CRIU puts the namespace's rules into the image, as far as its
// command line says: not where the namespace is left empty or is an external one. The
// runtimes that drive CRIU by RPC have it so.
func dumpsRules(w []string) bool {
	for i, arg := range w {
		next := ""
		if i+1 < len(w) {
			next = w[i+1]
		}
		if arg == "--empty-ns" && next == "net" || arg == "--empty-ns=net" ||
			arg == "--external" && strings.HasPrefix(next, "net[") || strings.HasPrefix(arg, "--external=net[") {
			return false
		}
	}
	return slices.Contains(w, "dump")
}

// runHolder is the life of the process that holds for a lock taken by hand.
func runHolder(args []string) int {
	_ = shedCapabilities(0)                         // it holds with all of them too
	cfg, _ := loadConfig(config.Path(os.LookupEnv)) // the lock is there, whatever it says by now
	if err := guard.RunHolder(args, wire.Holder(cfg), stayingLocker(&guard.Holder{})(cfg, parent())); err != nil {
		return netlock.ExitCode(err) // who started this has gone long ago
	}
	return 0
}

// handOver starts a holder for every lock of this command that is to hold.
func handOver(ts []target, h *guard.Holder) error {
	var bad errs
	for _, t := range ts {
		q := h.Queue(t.ns)
		if q == nil {
			continue
		}
		if err := guard.StartHolder("/proc/self/exe", t.ns, q, readyTime); err != nil {
			bad = append(bad, fmt.Errorf("%s: locked, but what comes is dropped, not held: %w", t, err))
		}
	}
	return bad.all()
}

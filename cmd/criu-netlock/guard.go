package main

// The program as a guard: started by a hook, it watches one checkpoint and does the
// work of its later hooks.

import (
	"context"
	"fmt"
	"log/syslog"
	"os"
	"os/signal"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early"
	"github.com/criu-netlock/criu-netlock/cmd/internal/wire"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/config"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
	"github.com/criu-netlock/criu-netlock/nft"
)

// readyTime is how long pre-dump waits for its guard. Nothing is frozen yet.
const readyTime = time.Second

// startGuard starts the guard of a checkpoint, if the hook is one that does. It returns
// why there is none, where there should be one.
// What the hook holds goes on to the guard.
func startGuard(ev action.Event, rep action.Report, by *criu, holder *guard.Holder) error {
	phase, wait := guard.Dump, readyTime
	switch {
	case rep.Netns == 0: // a task in our own namespace
		return nil
	case ev.Action == action.PreDump:
	case ev.Action == action.SetupNamespaces:
		phase, wait = guard.Restore, 0
	default:
		return nil
	}
	if by == nil {
		return nil // no CRIU to watch: somebody tries the hook
	}
	ns, err := netlock.FromPID(ev.PID)
	if err != nil {
		return err
	}
	defer ns.Close()
	if guard.Beside(ns.Inode(), by.pid) {
		wait = readyTime // before the other one unlocks it is to know of this one
	}
	c, err := guard.Open(phase, ns, by.pid, by.fd, ev.PID)
	if err != nil {
		return err
	}
	defer c.Close()
	c.WasLocked = rep.WasLocked
	if holder != nil {
		c.Queue = holder.Queue(ns)
	}
	var env []string
	for _, name := range []string{config.EnvPath, "PATH"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	_, err = guard.Start("/proc/self/exe", c, env, wait)
	return err
}

// leaves tells whether a hook without its guard leaves its unlock to another checkpoint.
func leaves(ev action.Event, ns *netlock.Namespace) bool {
	by, err := findCRIU(ev)
	if err != nil || by == nil {
		return false
	}
	defer by.close()
	return guard.LocksElsewhere(ns.Inode(), by.pid)
}

// tellGuard tells the guard, which has not answered, what the hook has done: to lock, if err is nil, or
// to unlock. An unlock that has failed nobody calls for again; and of one that was left to another
// checkpoint that one may have thought the same.
func tellGuard(ev action.Event, rep action.Report, fresh bool, by *criu, err error) {
	op := action.OpOf(ev.Action)
	unlocks := op == action.Unlock || op == action.Sweep
	if by == nil && unlocks {
		by, _ = findCRIU(ev) // without CRIU its guard knows what to do
		defer by.close()
	}
	if by == nil || !unlocks && err != nil {
		return
	}
	netns := rep.Netns
	if netns == 0 { // the deadline has passed
		ns, err := netlock.FromPID(ev.PID)
		if err != nil {
			return
		}
		defer ns.Close()
		netns = ns.Inode()
	}
	switch {
	case !unlocks:
		guard.Locked(netns, by.pid, ev.PID, string(ev.Action), fresh)
	case err != nil && netlock.KindOf(err) != netlock.KindTampered, rep.Result == action.Left:
		guard.Owe(netns, by.pid, ev.PID)
	default:
		guard.Unlocked(netns, by.pid, ev.PID, string(ev.Action))
	}
}

// opener gives out the guard's own handle while that is the task's namespace.
func opener(c guard.Checkpoint) func(int) (*netlock.Namespace, func(), error) {
	return func(pid int) (*netlock.Namespace, func(), error) {
		if pid == c.Task && c.NS.IsOf(pid, c.TaskFD) {
			return c.NS, func() {}, nil
		}
		ns, err := netlock.FromPID(pid)
		if err != nil {
			return nil, nil, err
		}
		return ns, func() { ns.Close() }, nil
	}
}

// runGuardStart starts a guard and leaves it alone.
func runGuardStart(args []string) int {
	if err := guard.StartAgain(args); err != nil {
		return netlock.ExitCode(err) // who started this gets no answer
	}
	return 0
}

// runGuard is the guard's whole life.
func runGuard(args []string) int {
	runtime.GOMAXPROCS(1) // as in runProxy
	logger, logErr := syslog.New(syslog.LOG_DAEMON|syslog.LOG_WARNING, "criu-netlock")
	log := func(format string, a ...any) {
		if logErr == nil {
			_ = logger.Warning(wire.OneLine(fmt.Sprintf(format, a...))) // there is no other place
		}
	}
	// A service that ends ends its processes: CRIU's death is what this one waits for.
	signal.Ignore(unix.SIGHUP, unix.SIGINT)
	quit := make(chan os.Signal, 1)
	signal.Notify(quit, unix.SIGTERM)
	if err := shedCapabilities(0); err != nil {
		log("the guard keeps all capabilities: %v", err)
	}
	if err := guard.CloseOnExecFrom(guard.FirstFree); err != nil {
		log("%v", err)
	}
	c, line, err := guard.Inherited(args)
	if err != nil {
		early.Say(wire.OneLine(err.Error()) + "\n")
		return netlock.ExitCode(&netlock.Error{Kind: netlock.KindInput, Err: err})
	}
	cfg, err := loadConfig(config.Path(os.LookupEnv))
	if err != nil {
		log("%v; the guard goes by the defaults", err)
		cfg.CPULatency = guard.NoLatency // the file may say so, behind what is wrong with it
	}
	caller := c.CRIU
	if caller == 0 {
		caller = c.Client
	}
	criu := netlock.CallerOf(caller).For(c.Task)
	if c.Phase == guard.Restore {
		policy := c.Policy
		if policy == "" {
			policy = guard.Policy(cfg.OnFailedRestore)
		}
		criu.Fallback = policy.Fallback(c.WasLocked)
	}
	kernel, holder := &nft.Kernel{}, wire.Holder(cfg)
	locker := stayingLocker(holder, nft.WithKernel(kernel))
	c.NS.KeepSockets()
	defer holder.Drop(c.NS) // and its place goes with it
	if c.Queue != nil {
		if err := holder.Adopt(c.NS, c.Queue); err != nil {
			log("%v; what comes is dropped", err)
		}
	}
	g := guard.Guard{
		Checkpoint: c,
		Locker:     locker(cfg, criu),
		GiveUp: func(ctx context.Context) error {
			defer holder.Drop(c.NS)
			_, err := locker(cfg, criu).Lock(ctx, c.NS)
			return err
		},
		Default:  guard.Policy(cfg.OnFailedRestore),
		Words:    line.Words,
		Quit:     quit,
		Deadline: cfg.GuardTimeout,
		Awake:    func() func() { return guard.StayAwake(cfg.CPULatency) },
		Log:      log,
		Hook: func(r guard.Request) guard.Answer {
			h := hookCall{start: time.Now(), locker: locker, guard: os.Getpid(), open: opener(c), leave: r.Leave, orphan: r.Orphan, phase: c.Phase, holder: holder, kernel: kernel, lookup: func(key string) (string, bool) {
				v := map[string]string{
					action.EnvAction: r.Action, action.EnvInitPID: r.PID, action.EnvImageDir: r.ImageDir, config.EnvPath: r.Config,
				}[key]
				return v, v != ""
			}, criu: criu}
			code, line := h.run()
			return guard.Answer{Code: code, Line: line, Fresh: h.fresh}
		},
	}
	// The lock of the checkpoint is not to be the first thing that this process does. One in
	// a namespace of its own, kept until the end, also keeps nf_tables' hooks in use on this
	// machine: the first and the last base chain of any namespace patch the kernel, 200 µs
	// each. All of this is over before pre-dump returns: CRIU looks every 100 ms whether the tasks are
	// frozen, and they are not in time if they have to wait for a processor.
	var kept *netlock.Namespace
	g.Ready = func() {
		defer line.Ready()
		l := locker(cfg, criu)
		trial := wire.Holder(cfg)
		trial.HandsOn = true // to nobody
		if cfg.Mode != config.Drop {
			l.Options.Mode, l.Options.Holder = netlock.Hold, trial
		}
		ctx, cancel := context.WithTimeout(context.Background(), cfg.Timeout)
		defer cancel()
		if cfg.Mode != config.Drop && c.Queue == nil {
			_ = holder.Look(ctx, c.NS) // Bind looks where this could not
		}
		if ns, err := netlock.NewThrowaway(); err == nil {
			for range 2 { // the second time it reads what is there, as an unlock does
				_, _ = l.Lock(ctx, ns) // for speed alone
			}
			trial.Drop(ns)
			kept = ns
		}
		// And a lock goes in without a look where nothing has changed since this one.
		_, _ = l.State(ctx, c.NS)
	}
	defer func() {
		if kept != nil {
			kept.Close()
		}
	}()
	switch err := g.Serve(); err {
	case nil:
	case guard.ErrTaken:
		line.Ready() // the checkpoint is guarded, by whom a hook that runs twice has started before
	default:
		log("the guard of pid %d: %v", c.Task, err)
		return netlock.ExitCode(err)
	}
	return 0
}

package main

// The program as a command line.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early"
	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/setup"
	"github.com/criu-netlock/criu-netlock/cmd/internal/wire"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/config"
)

// version is set when a release is linked.
var version = ""

// errs are the errors of several targets; each gets a line of its own.
type errs []error

func (e errs) Error() string   { return errors.Join(e...).Error() }
func (e errs) Unwrap() []error { return e }

// all is e as an error, nil if it is empty.
func (e errs) all() error {
	if len(e) == 0 {
		return nil
	}
	return e
}

// flat is all errors as one list.
func flat(all ...error) error {
	var bad errs
	for _, e := range all {
		if list, ok := e.(errs); ok { //nolint:errorlint // not wrapped: it is flattened
			bad = append(bad, list...)
		} else if e != nil {
			bad = append(bad, e)
		}
	}
	return bad.all()
}

func inputError(format string, args ...any) error {
	return &netlock.Error{Kind: netlock.KindInput, Err: fmt.Errorf(format, args...)}
}

// cli is one run of the program as a command.
type cli struct {
	start   time.Time
	pids    pidList
	netns   []string
	backend string
	timeout string
	mode    string
	json    bool
	all     bool
	dryRun  bool

	setupFlags setupFlags

	out stdout // of help and completion
	ran bool   // past the checks of cobra, whose errors are all bad input
}

// runCommand runs the command line and returns the exit code.
func runCommand(start time.Time, args []string) int {
	c := &cli{start: start}
	root := c.root()
	root.SetArgs(args)
	err := root.Execute()
	switch {
	case c.out.err != nil:
		err = c.out.err // cobra swallows it, or returns it as if the arguments were wrong
	case err == nil:
		return 0
	case !c.ran:
		err = &netlock.Error{Kind: netlock.KindInput, Err: err, Hint: "criu-netlock --help tells more"}
	}
	list, ok := err.(errs) //nolint:errorlint // not wrapped: it is printed line by line
	if !ok {
		list = errs{err}
	}
	for _, e := range list {
		if errors.As(e, new(*stdoutError)) && errors.Is(e, unix.EPIPE) {
			// Whoever read has seen enough, as head has: no reason for a line. Others die of
			// SIGPIPE there, 141 to a shell; we end as with any stdout that cannot be written.
			continue
		}
		early.Say("criu-netlock: " + told(e) + "\n")
	}
	var signal *interrupted
	if errors.As(err, &signal) {
		signal.die()
	}
	return netlock.ExitCode(list[0])
}

const usage = "usage: criu-netlock lock|unlock|status|list|gc|check|setup|version|completion [flags]"

func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "criu-netlock",
		Short: "A network lock for CRIU",
		Long: "A network lock for CRIU: no packet reaches a container while it is checkpointed or\n" +
			"restored, and none leaves it.\n\n" +
			"CRIU runs this program by itself where it is named as an action script:\n" +
			"  criu dump --action-script /usr/local/sbin/criu-netlock ...\n" +
			"It takes no arguments then; what can be set stands in " + config.DefaultPath + ".\n" +
			"Under the name criu, or as criu-netlock criu ..., it stands in CRIU's place (setup --as-criu).\n\n" +
			"The commands below do the same by hand. Begin with: criu-netlock check",
		SilenceUsage:       true,
		SilenceErrors:      true,
		DisableSuggestions: true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("unknown command %q", args[0])
			}
			return nil
		},
		RunE: func(*cobra.Command, []string) error { return errors.New(usage) },
	}
	root.SetOut(&c.out) // before the completion command is made, which asks for it then
	root.SetErr(stderr{})
	root.SetHelpCommand(&cobra.Command{
		Use: "help [command]", Short: "Help about a command",
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				return fmt.Errorf("unknown command %q", strings.Join(args, " "))
			}
			return cmd.Help()
		},
	})
	add := func(cmd *cobra.Command, run func() error) *cobra.Command {
		cmd.Args = func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("unexpected argument %q", args[0])
			}
			return nil
		}
		cmd.RunE = func(*cobra.Command, []string) error { c.ran = true; return run() }
		cmd.ValidArgsFunction = cobra.NoFileCompletions
		cmd.Flags().BoolVar(&c.json, "json", false, "print JSON, for scripts")
		root.AddCommand(cmd)
		return cmd
	}
	targets := func(cmd *cobra.Command, more string) *cobra.Command {
		cmd.Flags().Var(&c.pids, "pid", "the network namespace in which the task `PID` is"+more)
		cmd.Flags().StringArrayVar(&c.netns, "netns", nil, "the network namespace `NAME`: one that ip netns lists, or an absolute path"+more)
		return cmd
	}
	words := func(cmd *cobra.Command, flag string, words ...string) {
		// Fails for a flag that does not exist, and these do.
		_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
	}
	timeout := func(cmd *cobra.Command) *cobra.Command {
		cmd.Flags().StringVar(&c.timeout, "timeout", "", "give up after this `DURATION`, 1s to 1m (default: the configuration's, 5s)")
		words(cmd, "timeout", "1s", "5s", "30s")
		return cmd
	}
	backend := func(cmd *cobra.Command, use string) *cobra.Command {
		cmd.Flags().StringVar(&c.backend, "backend", "", use)
		words(cmd, "backend", config.Auto, config.NFT, config.IPTables)
		return cmd
	}
	const (
		repeated = " (may be repeated)"
		lockBy   = "lock by `BACKEND`: nft, iptables, or auto, the first that the kernel has (default: the configuration's, auto)"
		lookBy   = "look for locks of this `BACKEND` alone: nft or iptables (default: both)"
		anyBy    = "the `BACKEND` to begin with, auto, nft or iptables: locks of both are removed all the same"
		tryBy    = "ask about this `BACKEND`: auto, nft or iptables (default: the configuration's, auto)"
	)
	lock := backend(timeout(targets(add(&cobra.Command{Use: "lock", Short: "Lock network namespaces: all of those given, or none",
		Example: "  criu-netlock lock --pid 4711\n  criu-netlock lock --netns blue --netns /run/docker/netns/1a2b3c"}, c.lock), repeated)), lockBy)
	lock.Flags().StringVar(&c.mode, "mode", "", "what becomes of what comes in: `MODE` drop, or hold, which keeps it for the unlock (default: the configuration's, drop)")
	words(lock, "mode", config.Drop, config.Hold)
	unlock := backend(timeout(targets(add(&cobra.Command{Use: "unlock", Short: "Unlock network namespaces, whichever backend locked them",
		Example: "  criu-netlock unlock --pid 4711\n  criu-netlock unlock --all"}, c.unlock), repeated)), anyBy)
	unlock.Flags().BoolVar(&c.all, "all", false, "every locked network namespace of this host, as list shows them")
	backend(timeout(targets(add(&cobra.Command{Use: "status", Short: "Tell whether a network namespace is locked",
		Example: "  criu-netlock status --netns blue"}, c.status), "")), lookBy)
	backend(timeout(add(&cobra.Command{Use: "list", Short: "List every locked network namespace of this host"}, c.list)), lookBy)
	gc := timeout(add(&cobra.Command{Use: "gc", Short: "Unlock what a checkpoint that is over has left locked",
		Long: "Unlock every network namespace of this host whose lock is stale: who asked for it is gone,\n" +
			"and the task it was for runs. Locks that are in use, that wait for a restore, of stopped\n" +
			"tasks, and those that were taken by hand are left alone.",
		Example: "  criu-netlock gc --dry-run"}, c.gc))
	gc.Flags().BoolVar(&c.dryRun, "dry-run", false, "tell what would be unlocked, and change nothing")
	backend(timeout(targets(add(&cobra.Command{Use: "check", Short: "Tell whether a lock can be taken here, and what to do if not",
		Long: "Tell whether a lock can be taken here, by taking one in a network namespace made for it,\n" +
			"and what to do if not. With --pid or --netns, tell of these namespaces too; no rule of\n" +
			"theirs is changed."}, c.check), repeated)), tryBy)
	install := &cobra.Command{Use: "setup ENGINE", Short: "Make an engine call criu-netlock, or take that back",
		Long: "Write into CRIU's configuration what makes an engine call criu-netlock, after showing the\n" +
			"change. Engines: criu and lxc (/etc/criu/default.conf), runc, podman and docker\n" +
			"(/etc/criu/runc.conf), crun (/etc/criu/crun.conf). Twice is the same as once; --undo gives\n" +
			"the file back as it was. With --as-criu the hooks are no processes, for CRIU older than 3.19 too:\n" +
			"criu-netlock stands between CRIU and the engine.",
		Example:           "  criu-netlock setup docker --tcp-established\n  criu-netlock setup --undo docker",
		RunE:              func(_ *cobra.Command, args []string) error { c.ran = true; return c.setup(args) },
		ValidArgsFunction: cobra.FixedCompletions(setup.Names(), cobra.ShellCompDirectiveNoFileComp),
	}
	root.AddCommand(install)
	f := install.Flags()
	f.BoolVar(&c.setupFlags.undo, "undo", false, "take out what setup wrote")
	f.BoolVar(&c.setupFlags.dryRun, "dry-run", false, "show the change and write nothing")
	f.BoolVar(&c.setupFlags.yes, "yes", false, "do not ask")
	f.BoolVar(&c.setupFlags.tcpEstablished, "tcp-established", false, "let CRIU dump and restore live TCP connections (runc, crun, podman, docker)")
	f.BoolVar(&c.setupFlags.replaceLock, "replace-criu-lock", false, "turn CRIU's own lock off, in /etc/criu/default.conf (CRIU 3.19 or newer)")
	f.StringVar(&c.setupFlags.asCRIU, "as-criu", "", "in place of the action script, put criu-netlock in CRIU's place: a link `PATH`, "+defaultLink+" if none is given (runc, crun, podman, docker)")
	f.Lookup("as-criu").NoOptDefVal = defaultLink
	f.StringVar(&c.setupFlags.program, "program", "", "the `PATH` of criu-netlock to write (default: of this program)")
	f.StringVar(&c.setupFlags.root, "root", "/", "work below this `FOLDER`, for tests")
	_ = f.MarkHidden("root") // an error means that there is no such flag
	add(&cobra.Command{Use: "version", Short: "Print the version of the program and of its rules"}, c.printVersion)
	root.InitDefaultCompletionCmd()
	if cmd, _, err := root.Find([]string{"completion"}); err == nil {
		cmd.RunE = func(*cobra.Command, []string) error { return errors.New("name a shell: bash, zsh, fish or powershell") }
	}
	return root
}

// pidList is a flag that takes pids, strictly, and may be repeated.
type pidList []int

func (p *pidList) Set(s string) error {
	pid, err := action.ParsePID(s)
	*p = append(*p, pid)
	return err
}
func (p *pidList) String() string { return "" }
func (p *pidList) Type() string   { return "pid" }

// config is the configuration with the flags applied. Wrong flags are an error of
// their own, since unlocking tolerates a wrong file but not a wrong command.
func (c *cli) config() (cfg config.Config, fileErr, flagErr error) {
	cfg, fileErr = loadConfig(config.Path(os.LookupEnv))
	if c.backend != "" {
		b, err := config.ParseBackend(c.backend)
		if err != nil {
			return cfg, fileErr, inputError("--backend: %w", err)
		}
		cfg.Backend = b
	}
	if c.timeout != "" {
		d, err := config.ParseTimeout(c.timeout)
		if err != nil {
			return cfg, fileErr, inputError("--timeout: %w", err)
		}
		cfg.Timeout = d
	}
	if c.mode != "" {
		m, err := config.ParseMode(c.mode)
		if err != nil || m == config.Auto {
			return cfg, fileErr, inputError("--mode: %q is neither drop nor hold", c.mode)
		}
		cfg.Mode = m
	}
	return cfg, fileErr, nil
}

// only makes status and list look with the backend of the flag alone, if it is given.
func (c *cli) only(l *netlock.Locker) {
	if c.backend != "" && c.backend != config.Auto {
		l.Cleaners = nil
	}
}

// strictConfig is config for the commands that do nothing with a wrong file.
func (c *cli) strictConfig() (config.Config, error) {
	cfg, fileErr, flagErr := c.config()
	if flagErr != nil {
		return cfg, flagErr
	}
	return cfg, fileErr
}

// target is a namespace of the command line.
type target struct {
	ns      *netlock.Namespace
	foundAt string // how a person finds it again
}

func (t target) String() string { return fmt.Sprintf("net:[%d] (%s)", t.ns.Inode(), t.foundAt) }

// open opens all targets, each namespace once, before anything is done to any.
func (c *cli) open() (ts []target, err error) {
	var bad errs
	seen := make(map[uint64]bool)
	add := func(ns *netlock.Namespace, err error, foundAt string) {
		switch {
		case err != nil:
			bad = append(bad, err)
		case seen[ns.Inode()]:
			ns.Close()
		default:
			seen[ns.Inode()] = true
			ts = append(ts, target{ns, foundAt})
		}
	}
	for _, pid := range c.pids {
		ns, err := netlock.FromPID(pid)
		add(ns, err, fmt.Sprintf("pid %d", pid))
	}
	for _, path := range c.netns {
		ns, err := netlock.FromPath(path)
		add(ns, err, path)
	}
	if len(bad) > 0 {
		closeAll(ts)
		return nil, bad
	}
	return ts, nil
}

func closeAll(ts []target) {
	for _, t := range ts {
		t.ns.Close()
	}
}

// needTargets is open for the commands that need some.
func (c *cli) needTargets() ([]target, error) {
	if len(c.pids)+len(c.netns) == 0 {
		return nil, inputError("no network namespace is given: give --pid or --netns")
	}
	return c.open()
}

// parallel runs f for 0 to n-1, a few at a time: the kernel takes locks of different
// namespaces side by side.
func parallel(n int, f func(int)) {
	var wg sync.WaitGroup
	next := make(chan int)
	for range min(n, 2*runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for i := range next {
				f(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}

// outcome is what happened to one target of lock or unlock.
type outcome struct {
	Netns   uint64  `json:"netns"`
	Target  string  `json:"target"`
	Backend *string `json:"backend"`
	Result  string  `json:"result"`
	Error   *string `json:"error"`
	// Mode is the lock's, NotHeld why it is drop where hold was asked for.
	Mode    netlock.Mode `json:"mode,omitempty"`
	NotHeld *string      `json:"not_held,omitempty"`
	// Queue is what became of what came in under a lock of mode hold that was taken off.
	Queue        *queueJSON `json:"queue,omitempty"`
	NotDelivered *string    `json:"not_delivered,omitempty"`

	warning string // of the two above
	err     error
}

const failed = "failed"

func (t target) outcome(result, backend string, err error) outcome {
	o := outcome{Netns: t.ns.Inode(), Target: t.foundAt, Result: result, err: err, Backend: orNull(backend)}
	if err != nil {
		o.Error = orNull(told(err))
	}
	return o
}

// unlocked is the outcome of an unlock.
func (t target) unlocked(result string, st netlock.State, err error) outcome {
	o := t.outcome(result, st.Backend, err)
	if st.Mode == netlock.Hold {
		o.Queue, o.warning = newQueue(st.Queue), st.HoldWarning()
		if st.NotDelivered != nil {
			o.NotDelivered = orNull(told(st.NotDelivered))
		}
	}
	return o
}

// orNull is JSON's null for an empty string.
func orNull(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

// report prints outcomes and returns their errors. What was done stays done, and is
// not made a failure by a stdout that cannot be written.
func (c *cli) report(os []outcome) error {
	var bad errs
	for _, o := range os {
		if o.err != nil {
			bad = append(bad, o.err)
		}
	}
	if c.json {
		_ = printJSON(os)
		return bad.all()
	}
	var b strings.Builder
	for _, o := range os {
		if o.err != nil && o.Result == failed {
			continue // its line is on stderr
		}
		fmt.Fprintf(&b, "net:[%d] (%s): %s", o.Netns, wire.OneLine(o.Target), o.Result)
		if o.Backend != nil {
			fmt.Fprintf(&b, " (%s)", *o.Backend)
		}
		if o.NotHeld != nil {
			fmt.Fprintf(&b, "; in mode drop: %s", *o.NotHeld)
		} else if o.Mode == netlock.Hold {
			b.WriteString(", holding")
		}
		if q := o.Queue; q != nil && q.Delivered > 0 {
			fmt.Fprintf(&b, ", %d delivered", q.Delivered)
		}
		if o.warning != "" {
			fmt.Fprintf(&b, "; warning: %s", wire.OneLine(o.warning))
		}
		b.WriteByte('\n')
	}
	_ = printText(b.String())
	return bad.all()
}

// lock locks all targets; if one cannot be locked, those that this call locked are
// unlocked again.
func (c *cli) lock() error {
	cfg, err := c.strictConfig()
	if err != nil {
		return err
	}
	ts, err := c.needTargets()
	if err != nil {
		return err
	}
	l := newLocker(cfg, parent())
	holder := wire.Holder(cfg)
	holder.HandsOn = true
	if cfg.Mode == config.Hold {
		l.Options.Mode, l.Options.Holder = netlock.Hold, holder
	}
	var stop error
	out, err := within(c.start, cfg.Timeout, func(ctx context.Context) (out []outcome, _ error) {
		ctx, done := interruptible(ctx)
		defer done()
		if out, stop = lockAll(ctx, l, ts); stop != nil {
			return out, nil
		}
		return out, handOver(ts, holder)
	})
	if err != nil && out == nil {
		return err
	}
	err = flat(c.report(out), err)
	if err == nil && stop != nil {
		err = stop
	}
	return err
}

// lockAll locks all, or leaves none locked that was not. stop is what kept it from it,
// if that was no target's failure.
func lockAll(ctx context.Context, l *netlock.Locker, ts []target) (out []outcome, stop error) {
	out = make([]outcome, len(ts))
	mine := make([]bool, len(ts)) // locked by this call
	outer := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	failure := errors.New("another target failed")
	stopped := func() bool {
		cause := context.Cause(ctx)
		return cause == failure || errors.As(cause, new(*interrupted))
	}
	parallel(len(ts), func(i int) {
		if stopped() {
			out[i] = ts[i].outcome("not tried", "", nil)
			return
		}
		res, err := l.Lock(ctx, ts[i].ns)
		switch {
		case err != nil && stopped():
			out[i] = ts[i].outcome("not locked", "", nil) // cancelled, by another's failure or a signal
		case err != nil:
			out[i] = ts[i].outcome(failed, "", err)
			cancel(failure)
		case res.Already:
			out[i] = ts[i].outcome("already locked", res.Backend, nil)
		default:
			mine[i] = true
			out[i] = ts[i].outcome("locked", res.Backend, nil)
		}
		out[i].Mode = res.Mode
		if res.NotHeld != nil {
			out[i].NotHeld = orNull(told(res.NotHeld))
		}
	})
	var signal *interrupted
	if errors.As(context.Cause(outer), &signal) {
		stop = signal
	} else if !slices.ContainsFunc(out, func(o outcome) bool { return o.err != nil }) {
		return out, nil
	}
	// All the time that is left: many may be locked by now.
	end := time.Now().Add(netlock.UndoTime)
	if d, ok := ctx.Deadline(); ok && d.After(end) {
		end = d
	}
	undo, cancelUndo := context.WithDeadline(context.WithoutCancel(ctx), end)
	defer cancelUndo()
	parallel(len(ts), func(i int) {
		if !mine[i] {
			return
		}
		if _, err := l.Unlock(undo, ts[i].ns); err != nil {
			out[i] = ts[i].outcome("locked", "", fmt.Errorf("could not be unlocked again: %w", err))
			return
		}
		out[i] = ts[i].outcome("unlocked again", "", nil)
	})
	return out, stop
}

// unlock unlocks all targets, whatever happens to any. As in the hook, a wrong
// configuration keeps nothing locked.
func (c *cli) unlock() error {
	cfg, fileErr, flagErr := c.config()
	switch {
	case flagErr != nil:
		return flagErr
	case c.all && len(c.pids)+len(c.netns) > 0:
		return inputError("--all means every namespace: give no --pid and no --netns with it")
	}
	l := newLocker(cfg, parent())
	var ts []target
	var err error
	if !c.all {
		if ts, err = c.needTargets(); err != nil {
			return err
		}
	}
	out, err := within(c.start, cfg.Timeout, func(ctx context.Context) ([]outcome, error) {
		var findErr error
		if c.all {
			var found []locked
			found, findErr = find(ctx, l)
			for _, f := range found {
				ts = append(ts, f.target)
			}
		}
		out := make([]outcome, len(ts))
		parallel(len(ts), func(i int) {
			st, err := l.Unlock(ctx, ts[i].ns)
			if fileErr != nil && err != nil && netlock.KindOf(err) == netlock.KindTampered {
				err = nil // without the allow list no lock that was made with one looks intact
			}
			result := "not locked"
			switch {
			case err != nil && netlock.KindOf(err) != netlock.KindTampered:
				result = failed
			case st.Found:
				result = "unlocked"
			}
			out[i] = ts[i].unlocked(result, st, err)
		})
		return out, findErr
	})
	return flat(err, c.report(out), fileErr)
}

// statusJSON is a State in the form that scripts read.
type statusJSON struct {
	Locked     bool            `json:"locked"`
	Backend    *string         `json:"backend"`
	Mode       *string         `json:"mode"`
	Since      *string         `json:"since"`
	DroppedIn  uint64          `json:"dropped_in"`
	DroppedOut uint64          `json:"dropped_out"`
	LockedBy   *netlock.Caller `json:"locked_by"`
	Intact     bool            `json:"intact"`
	Netns      uint64          `json:"netns"`
	Queue      *queueJSON      `json:"queue,omitempty"` // of mode hold
}

type queueJSON struct {
	Number     uint16 `json:"number"`
	Bound      bool   `json:"bound"` // somebody holds; otherwise all is dropped
	Held       uint64 `json:"held"`
	Delivered  uint64 `json:"delivered"`
	Overflowed uint64 `json:"overflowed"`
	Lost       uint64 `json:"lost"`
}

func newQueue(q netlock.Queue) *queueJSON {
	return &queueJSON{q.Number, q.Bound, q.Held, q.Delivered, q.Overflowed, q.Lost}
}

func newStatus(ns *netlock.Namespace, st netlock.State) statusJSON {
	j := statusJSON{
		Locked: st.Locked, Backend: orNull(st.Backend), DroppedIn: st.DroppedIn, DroppedOut: st.DroppedOut,
		Intact: st.Locked && st.Intact, Netns: ns.Inode(),
	}
	j.Mode = orNull(string(st.Mode))
	if st.Mode == netlock.Hold {
		j.Queue = newQueue(st.Queue)
	}
	if !st.Found {
		j.Backend = nil
	}
	if !st.Since.IsZero() {
		j.Since = orNull(st.Since.UTC().Format(time.RFC3339))
	}
	if st.Caller != (netlock.Caller{}) {
		j.LockedBy = &st.Caller
	}
	return j
}

// statusText is a State for a person.
func statusText(t target, st netlock.State) string {
	var b strings.Builder
	head := "not locked"
	switch {
	case st.Locked:
		head = "locked"
	case st.Found:
		head = "not locked, but what a lock leaves is there"
	}
	fmt.Fprintf(&b, "%s: %s\n", wire.OneLine(t.String()), head)
	if !st.Found {
		return b.String()
	}
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "  %-10s %s\n", name, wire.OneLine(fmt.Sprintf(format, args...)))
	}
	line("backend", "%s", st.Backend)
	if st.Locked {
		line("mode", "%s", st.Mode)
	}
	switch q := st.Queue; {
	case st.Mode != netlock.Hold:
	case !q.Bound:
		line("held", "nothing: nobody holds queue %d, so it drops", q.Number)
	default:
		line("held", "%d now, %d delivered, %d found the queue full, %d lost", q.Held, q.Delivered, q.Overflowed, q.Lost)
	}
	if st.Since.IsZero() {
		line("since", "unknown")
	} else {
		line("since", "%s (%s ago)", st.Since.UTC().Format(time.RFC3339), time.Since(st.Since).Round(time.Second))
	}
	line("dropped", "%d in, %d out", st.DroppedIn, st.DroppedOut)
	if st.Caller == (netlock.Caller{}) {
		line("locked by", "unknown")
	} else {
		line("locked by", "%s, pid %d", st.Caller.Name, st.Caller.PID)
	}
	if st.Intact {
		line("intact", "yes")
	} else {
		line("intact", "no: %s", st.Why)
	}
	return b.String()
}

func (c *cli) status() error {
	cfg, err := c.strictConfig()
	if err != nil {
		return err
	}
	ts, err := c.needTargets()
	if err != nil {
		return err
	}
	if len(ts) > 1 {
		return inputError("status tells about one network namespace, list about all that are locked")
	}
	l := newLocker(cfg, parent())
	c.only(l)
	st, err := within(c.start, cfg.Timeout, func(ctx context.Context) (netlock.State, error) { return l.State(ctx, ts[0].ns) })
	if err != nil {
		return err
	}
	if c.json {
		return printJSON(newStatus(ts[0].ns, st))
	}
	return printText(statusText(ts[0], st))
}

// printVersion prints what a bug report needs.
func (c *cli) printVersion() error {
	v := version
	if v == "" {
		v = "unknown"
		if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
			v = info.Main.Version
		}
	}
	goVersion := runtime.Version() + " " + runtime.GOOS + "/" + runtime.GOARCH
	if c.json {
		return printJSON(map[string]string{"version": v, "rule_set_format": ruleSetFormat, "go": goVersion})
	}
	return printText(fmt.Sprintf("criu-netlock %s\nrule set format %s\n%s\n", v, ruleSetFormat, goVersion))
}

// stdout is where cobra prints. os.Stdout would have us killed by a pipe that nobody
// reads, and cobra forgets most errors.
type stdout struct{ err error }

func (o *stdout) Write(b []byte) (int, error) {
	if o.err == nil {
		o.err = printText(string(b))
	}
	if o.err != nil {
		return 0, o.err
	}
	return len(b), nil
}

type stderr struct{}

func (stderr) Write(b []byte) (int, error) {
	early.Say(string(b))
	return len(b), nil
}

// stdoutError is what became of writing to stdout.
type stdoutError struct{ err error }

func (e *stdoutError) Error() string { return "write to stdout: " + e.err.Error() }
func (e *stdoutError) Unwrap() error { return e.err }

func printText(s string) error {
	if err := write(unix.Stdout, s); err != nil {
		return &stdoutError{err}
	}
	return nil
}

func printJSON(v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return printText(string(b) + "\n")
}

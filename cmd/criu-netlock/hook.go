package main

// The program as CRIU's action script. Nothing here may touch the command line's
// libraries: this is a frozen container's time.

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"time"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early"
	"github.com/criu-netlock/criu-netlock/cmd/internal/wire"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/config"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
	"github.com/criu-netlock/criu-netlock/nft"
)

// runHook does what the environment asks for, writes one line about it to CRIU's log,
// and returns the exit code.
func runHook(start time.Time) int {
	h := hookCall{start: start, lookup: os.LookupEnv, locker: hookLocker}
	code, line := h.run()
	early.Say(line)
	return code
}

// hookCall is one call of a hook, by CRIU or, through the guard, by a hook process.
type hookCall struct {
	start  time.Time
	lookup func(string) (string, bool)
	locker func(config.Config, netlock.Caller) *netlock.Locker
	// guard is the pid of the guard that works for the hook; 0 in the hook's own process.
	guard int
	criu  netlock.Caller // the guard knows it
	// open, leave, orphan, phase, holder and kernel are the guard's.
	open   func(pid int) (ns *netlock.Namespace, release func(), err error)
	leave  bool
	orphan bool
	fresh  bool // the hook has locked where nothing of ours was
	phase  guard.Phase
	holder *guard.Holder
	kernel *nft.Kernel
}

// run returns the exit code and the line for CRIU's log.
func (h *hookCall) run() (code int, line string) {
	cfg, cfgErr := config.Default(), error(nil)
	ev, err := action.FromEnv(h.lookup)
	var rep action.Report
	var unguarded error // why the checkpoint has no guard, where it was to get one
	var unshed error    // why the hook keeps more capabilities than it needs
	done := false       // what the hook is for is done, whatever err says
	var by *criu
	var gone error // CRIU is no more
	if err == nil {
		cfg, cfgErr = loadConfig(config.Path(h.lookup))
		op := action.OpOf(ev.Action)
		unlocks := op == action.Unlock || op == action.Sweep
		switch {
		case h.guard != 0:
			ev.Caller = h.criu
		case !unlocks && op.NeedsPID(): // to the others it is some reads of /proc that a container would wait for
			by, gone = findCRIU(ev)
			defer by.close()
			ev.Caller = by.caller(ev)
		}
		// A container left without its network is worse than an ignored configuration, of
		// which CRIU ignores the exit code here anyway.
		if cfgErr == nil || unlocks {
			type outcome struct {
				rep    action.Report
				fresh  bool
				unshed error
			}
			var out outcome
			out, err = within(h.start, cfg.Timeout, func(ctx context.Context) (out outcome, err error) {
				l := h.locker(cfg, ev.Caller)
				l.Options.Terse = true
				notHeld := h.hold(l, cfg, ev, by)
				a := action.Handler{
					Locker: l, Open: h.open, Trial: func(ctx context.Context) (netlock.Result, error) { return netlock.Trial(ctx, l) },
					Locked: func(fresh bool) { out.fresh = fresh },
					Leave:  func(ns *netlock.Namespace) bool { return h.leave || h.guard == 0 && leaves(ev, ns) },
				}
				a.Found = func(was bool) {
					l.Options.Caller.Fallback = guard.Policy(cfg.OnFailedRestore).Fallback(was)
				}
				if h.orphan {
					gone = errCRIUGone
				}
				a.Wanted = func() error {
					if gone != nil {
						return gone
					}
					return by.alive()
				}
				if h.guard == 0 {
					a.Turn = h.turn(cfg, unlocks)
					if out.unshed = shedAsRoot(); out.unshed == nil && early.Asks(string(ev.Action)) {
						a.Entered = func() { out.unshed = shedInside(cfg) }
					}
				}
				out.rep, err = a.Handle(ctx, ev)
				if out.rep.NotHeld == nil && out.rep.Mode != "" {
					out.rep.NotHeld = notHeld
				}
				return out, err
			})
			rep, unshed, h.fresh = out.rep, out.unshed, out.fresh
			if h.guard == 0 && early.Asks(string(ev.Action)) {
				tellGuard(ev, rep, out.fresh, by, err)
			}
			if err == nil && h.guard == 0 && cfg.Guard {
				unguarded = startGuard(ev, rep, by, h.holder)
			}
		}
		done = err == nil && rep.Result != "" || err != nil && netlock.KindOf(err) == netlock.KindTampered
		if cfgErr != nil && (done || err == nil) {
			// Without the allow list no lock that was made with one looks intact.
			err = cfgErr
		}
	}
	return netlock.ExitCode(err), h.line(cfg.LogLevel, ev, rep, done, err, unguarded, unshed)
}

// hold makes the locker hold, if the configuration has it so and the hook locks. It returns
// why it does not where it was to.
func (h *hookCall) hold(l *netlock.Locker, cfg config.Config, ev action.Event, by *criu) (notHeld error) {
	switch action.OpOf(ev.Action) {
	case action.Lock, action.Ensure, action.EnsureRemovable:
		if cfg.Mode == config.Drop {
			break
		}
		if h.guard == 0 {
			if h.phase = guard.Restore; ev.Action == action.NetworkLock {
				h.phase = guard.Dump
			}
			if by != nil && ev.Action == action.SetupNamespaces && cfg.Guard {
				h.holder = wire.Holder(cfg)
				h.holder.HandsOn = true // to the guard that is about to be started
			}
		}
		l.Options.Mode, notHeld = modeOf(cfg, h.phase, ev.Caller.PID, h.kernel)
	}
	if h.holder != nil {
		l.Options.Holder = h.holder
	}
	return notHeld
}

// turn makes the hook wait while a guard is at work on the same namespace. After half
// of the time an unlock goes on without: it does no harm beside another one, and a guard
// that somebody has stopped must not keep the container locked.
func (h hookCall) turn(cfg config.Config, unlocks bool) func(*netlock.Namespace, func() error) error {
	return func(ns *netlock.Namespace, f func() error) (err error) {
		if guard.InTurn(ns.Inode(), h.start.Add(cfg.Timeout/2), func() { err = f() }) {
			return err
		}
		if unlocks {
			return f()
		}
		return &netlock.Error{Kind: netlock.KindDeadline, Op: "wait for the guard", Namespace: ns.String(),
			Err: context.DeadlineExceeded, Hint: "criu-netlock list shows what it is at"}
	}
}

// line is what CRIU's log is told about one hook.
func (h hookCall) line(levelName string, ev action.Event, rep action.Report, done bool, err, unguarded, unshed error) string {
	level := slog.LevelInfo
	msg := rep.Result
	held, holdWarns := wire.HoldAttrs(rep)
	switch {
	case err != nil:
		level, msg = slog.LevelError, string(ev.Action)+" failed"
		if !done {
			rep.Result = "failed"
		}
	case rep.Loud, unguarded != nil, unshed != nil, holdWarns:
		level = slog.LevelWarn
	}
	var least slog.Level
	if e := least.UnmarshalText([]byte(levelName)); e != nil || level < least {
		return ""
	}
	attrs := []slog.Attr{
		slog.String("action", string(ev.Action)),
		slog.Int("pid", ev.PID),
		slog.Uint64("netns", rep.Netns),
		slog.String("backend", rep.Backend),
		slog.String("result", rep.Result),
		slog.Int64("duration_us", time.Since(h.start).Microseconds()),
	}
	attrs = append(attrs, held...)
	if h.guard != 0 {
		attrs = append(attrs, slog.Int("guard", h.guard))
	}
	if unguarded != nil {
		attrs = append(attrs, slog.String("guard_err", wire.OneLine(unguarded.Error())))
	}
	if unshed != nil {
		attrs = append(attrs, slog.String("capabilities_err", wire.OneLine(unshed.Error())))
	}
	if err != nil {
		attrs = append(attrs, slog.String("err", told(err)))
	}
	// UTC, so that no time zone is read from the disk.
	r := slog.NewRecord(time.Now().UTC(), level, msg, 0)
	r.AddAttrs(attrs...)
	var line bytes.Buffer
	if slog.NewTextHandler(&line, nil).Handle(context.Background(), r) != nil {
		return ""
	}
	return line.String()
}

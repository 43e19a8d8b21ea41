package main

// The program as CRIU's action script. Nothing here may touch the command line's
// libraries: this is a frozen container's time.

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/config"
)

// runHook does what the environment asks for, writes one line about it to CRIU's log,
// and returns the exit code.
func runHook(start time.Time) int {
	cfg, cfgErr := config.Default(), error(nil)
	ev, err := action.FromEnv(os.LookupEnv)
	var rep action.Report
	done := false // what the hook is for is done, whatever err says
	if err == nil {
		cfg, cfgErr = loadConfig()
		ev.Caller = parent()
		op := action.OpOf(ev.Action)
		// A container left without its network is worse than an ignored configuration, of
		// which CRIU ignores the exit code here anyway.
		unlocks := op == action.Unlock || op == action.Sweep
		if cfgErr == nil || unlocks {
			rep, err = within(start, cfg.Timeout, func(ctx context.Context) (action.Report, error) {
				l := hookLocker(cfg, ev.Caller)
				h := action.Handler{Locker: l, Trial: func(ctx context.Context) (netlock.Result, error) { return trial(ctx, l) }}
				return h.Handle(ctx, ev)
			})
		}
		done = err == nil && rep.Result != "" || err != nil && netlock.KindOf(err) == netlock.KindTampered
		if cfgErr != nil && (done || err == nil) {
			// Without the allow list no lock that was made with one looks intact.
			err = cfgErr
		}
	}
	logHook(start, cfg.LogLevel, ev, rep, done, err)
	return netlock.ExitCode(err)
}

// logHook writes the line of one hook.
func logHook(start time.Time, levelName string, ev action.Event, rep action.Report, done bool, err error) {
	level := slog.LevelInfo
	msg := rep.Result
	switch {
	case err != nil:
		level, msg = slog.LevelError, string(ev.Action)+" failed"
		if !done {
			rep.Result = "failed"
		}
	case rep.Loud:
		level = slog.LevelWarn
	}
	var least slog.Level
	if e := least.UnmarshalText([]byte(levelName)); e != nil || level < least {
		return
	}
	attrs := []slog.Attr{
		slog.String("action", string(ev.Action)),
		slog.Int("pid", ev.PID),
		slog.Uint64("netns", rep.Netns),
		slog.String("backend", rep.Backend),
		slog.String("result", rep.Result),
		slog.Int64("duration_us", time.Since(start).Microseconds()),
	}
	if err != nil {
		attrs = append(attrs, slog.String("err", told(err)))
	}
	// UTC, so that no time zone is read from the disk.
	r := slog.NewRecord(time.Now().UTC(), level, msg, 0)
	r.AddAttrs(attrs...)
	var line bytes.Buffer
	if slog.NewTextHandler(&line, nil).Handle(context.Background(), r) == nil {
		say(line.String())
	}
}

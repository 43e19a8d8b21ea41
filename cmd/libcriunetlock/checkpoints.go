package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/cmd/internal/wire"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/config"
	"github.com/criu-netlock/criu-netlock/netlock/criurpc"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
	"github.com/criu-netlock/criu-netlock/nft"
)

// checkpoints are those that are open, by the number that C knows them by; never 0.
type checkpoints struct {
	mu   sync.Mutex
	last uint64
	open map[uint64]*criurpc.Checkpoint
}

// opts are criu_netlock_opts.
type opts struct {
	restore      bool
	pid          int
	leaveRunning bool
	// rulesNotDumped: CRIU does not put the namespace's rules into the image.
	rulesNotDumped bool
	logFD          int
	config         string // empty: the default
	guard          string // the program; empty: looked up
}

func (s *checkpoints) begin(o opts) (uint64, error) {
	path := o.config
	if path == "" {
		path = config.DefaultPath
	}
	cfg, err := config.Load(path)
	if err != nil {
		return 0, err
	}
	kernel := &nft.Kernel{}
	ro := criurpc.Options{
		// Nobody waits for the kernel's clean-up after an unlock.
		Locker:  wire.Locker(cfg, netlock.Caller{}, nft.New(nft.WithKernel(kernel), nft.WithRelease(func(fd int) { go unix.Close(fd) }))),
		Timeout: cfg.Timeout, OnFailedRestore: guard.Policy(cfg.OnFailedRestore), Guard: o.guard,
		Mode: func(phase guard.Phase, leavesRunning bool) (netlock.Mode, error) {
			return wire.Mode(cfg, phase, kernel, func() bool { return leavesRunning }, func() bool { return !o.rulesNotDumped })
		},
	}
	ro.Locker.Options.Holder = wire.Holder(cfg)
	if !cfg.Guard {
		ro.Guard = criurpc.NoGuard
	}
	if o.logFD > unix.Stderr {
		ro.Log = func(e criurpc.Entry) { _, _ = unix.Write(o.logFD, line(cfg.LogLevel, e)) } // there is no other place
	}
	c := criurpc.NewRestore(ro)
	if !o.restore {
		c = criurpc.NewDump(o.pid, o.leaveRunning, ro)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open == nil {
		s.open = make(map[uint64]*criurpc.Checkpoint)
	}
	s.last++
	s.open[s.last] = c
	return s.last, nil
}

func (s *checkpoints) notify(id uint64, name string, pid int) error {
	s.mu.Lock()
	c := s.open[id]
	s.mu.Unlock()
	if c == nil {
		return &netlock.Error{Kind: netlock.KindInput, Op: name, Err: errors.New("the checkpoint is closed")}
	}
	_, err := c.Handle(context.Background(), action.Name(name), pid)
	if op := action.OpOf(action.Name(name)); op == action.Unlock || op == action.Sweep {
		return nil // libcriu would break off; close tries again, and tells
	}
	return err
}

// end returns what there is to say beside ret, which is what CRIU returned.
func (s *checkpoints) end(id uint64, ret int) error {
	s.mu.Lock()
	c := s.open[id]
	delete(s.open, id)
	s.mu.Unlock()
	if c == nil {
		return nil
	}
	if ret >= 0 {
		return c.End(nil)
	}
	failed := fmt.Errorf("CRIU has failed: %d", ret)
	if err := c.End(failed); err.Error() != failed.Error() {
		return err
	}
	return nil
}

// line is what the log is told of a notification.
func line(levelName string, e criurpc.Entry) []byte {
	level, msg := slog.LevelInfo, e.Report.Result
	held, holdWarns := wire.HoldAttrs(e.Report)
	switch {
	case e.Err != nil:
		level, msg = slog.LevelError, string(e.Event.Action)+" failed"
	case e.Report.Loud, e.Unguarded != nil, holdWarns:
		level = slog.LevelWarn
	}
	var least slog.Level
	if err := least.UnmarshalText([]byte(levelName)); err != nil || level < least {
		return nil
	}
	r := slog.NewRecord(time.Now().UTC(), level, msg, 0)
	r.AddAttrs(slog.String("action", string(e.Event.Action)), slog.Int("pid", e.Event.PID), slog.Uint64("netns", e.Report.Netns),
		slog.String("backend", e.Report.Backend), slog.String("result", e.Report.Result), slog.Int64("duration_us", e.Took.Microseconds()))
	r.AddAttrs(held...)
	if e.Unguarded != nil {
		r.AddAttrs(slog.String("guard_err", wire.OneLine(e.Unguarded.Error())))
	}
	if e.Err != nil {
		r.AddAttrs(slog.String("err", wire.OneLine(e.Err.Error())))
	}
	var b bytes.Buffer
	if slog.NewTextHandler(&b, nil).Handle(context.Background(), r) != nil {
		return nil
	}
	return b.Bytes()
}

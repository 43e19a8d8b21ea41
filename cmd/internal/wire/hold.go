package wire

import (
	"errors"
	"log/slog"
	"strings"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/config"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
	"github.com/criu-netlock/criu-netlock/netlock/hold"
	"github.com/criu-netlock/criu-netlock/nft"
)

// Holder is the holder of a process that outlives its locks.
func Holder(cfg config.Config) *guard.Holder {
	return &guard.Holder{Holder: hold.Holder{Packets: cfg.HoldPackets, Bytes: cfg.HoldBytes}, Stays: true}
}

// Why nothing is held in some dumps.
var (
	errImage = errors.New("this kernel has no nft_queue, and without it the image that CRIU makes of the rules could not be restored")
	// What nft prints of iptables-nft's target is, read in again, an expression of nft_queue.
	errImageIPTables = errors.New("the image that CRIU makes of a queue of iptables could not be restored everywhere")
)

// Mode is what the configuration's mode means in a checkpoint. dumpsRules tells whether CRIU
// puts the namespace's rules into the image. What cannot be held in spite of the
// configuration has a reason.
func Mode(cfg config.Config, phase guard.Phase, k *nft.Kernel, leavesRunning, dumpsRules func() bool) (netlock.Mode, error) {
	switch {
	case cfg.Mode != config.Hold && cfg.Mode != config.Auto,
		cfg.Mode == config.Auto && phase == guard.Dump && !leavesRunning():
		return netlock.Drop, nil
	case phase == guard.Dump && k != nil && k.NoQueue() && dumpsRules():
		return netlock.Drop, errImage
	case phase == guard.Dump && cfg.Backend == config.IPTables && dumpsRules():
		return netlock.Drop, errImageIPTables
	}
	return netlock.Hold, nil
}

// HoldAttrs is what a log is told of mode hold, and whether it is a warning.
func HoldAttrs(rep action.Report) (attrs []slog.Attr, warn bool) {
	if rep.Mode == netlock.Hold {
		attrs = append(attrs, slog.String("mode", string(rep.Mode)))
	}
	if rep.NotHeld != nil {
		attrs = append(attrs, slog.String("mode", string(rep.Mode)), slog.String("not_held", oneLine(rep.NotHeld)))
	}
	if rep.NotDelivered != nil {
		attrs = append(attrs, slog.String("not_delivered", oneLine(rep.NotDelivered)))
	}
	if q := rep.Queue; q != (netlock.Queue{}) {
		attrs = append(attrs, slog.Uint64("delivered", q.Delivered), slog.Uint64("overflowed", q.Overflowed), slog.Uint64("lost", q.Lost))
		warn = q.Overflowed > 0 || q.Lost > 0
	}
	return attrs, warn || rep.NotHeld != nil || rep.NotDelivered != nil
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

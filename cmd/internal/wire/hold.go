package wire

import (
	"errors"

	"github.com/criu-netlock/criu-netlock/netlock"
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

// Package wire is what the program and the C library make of a configuration: the backends,
// which are wired here alone, the mode of a lock, and what a log is told of it.
package wire

import (
	"github.com/criu-netlock/criu-netlock/iptables"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/config"
	"github.com/criu-netlock/criu-netlock/nft"
)

// Locker is the Locker that a configuration asks for. An explicit backend never falls
// back; the other one only cleans up what an earlier choice left.
func Locker(cfg config.Config, caller netlock.Caller, n *nft.Backend) *netlock.Locker {
	l := &netlock.Locker{Options: netlock.Options{Allow: cfg.Allow, Caller: caller}}
	switch cfg.Backend {
	case config.NFT:
		l.Backends = []netlock.Backend{n}
		l.Cleaners = []netlock.Backend{iptables.New(iptables.Auto)}
	case config.IPTables:
		l.Backends = []netlock.Backend{iptables.New(iptables.Auto)}
		l.Cleaners = []netlock.Backend{n}
	default:
		l.Backends = []netlock.Backend{n, iptables.New(iptables.Legacy)}
	}
	return l
}

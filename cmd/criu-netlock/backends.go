package main

// The only place where backends are wired.

import (
	"github.com/criu-netlock/criu-netlock/iptables"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/config"
	"github.com/criu-netlock/criu-netlock/nft"
)

// newLocker is the Locker that a configuration asks for. An explicit backend never
// falls back; the other one only cleans up what an earlier choice left.
func newLocker(cfg config.Config, caller netlock.Caller, opts ...nft.Option) *netlock.Locker {
	l := &netlock.Locker{Options: netlock.Options{Allow: cfg.Allow, Caller: caller}}
	n := nft.New(opts...)
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

// hookLocker is newLocker for a process that exits at once after unlocking, with CRIU
// waiting: it must not be the one that waits for the kernel's clean-up.
func hookLocker(cfg config.Config, caller netlock.Caller) *netlock.Locker {
	return newLocker(cfg, caller, nft.WithRelease(nft.Park))
}

// variant is one way to lock, for check to try.
type variant struct {
	name    string
	backend string // the value of the key backend that can choose it, besides auto
	locker  *netlock.Locker
}

func variants() []variant {
	return []variant{
		{"nft", config.NFT, netlock.New(nft.New())},
		{"iptables-legacy", config.IPTables, netlock.New(iptables.New(iptables.Legacy))},
		{"iptables-nft", config.IPTables, netlock.New(iptables.New(iptables.NFT))},
	}
}

// ruleSetFormat is the version of the rules that a lock consists of.
const ruleSetFormat = nft.FormatVersion

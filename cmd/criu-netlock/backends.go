package main

// The backends as the program uses them; package wire chooses among them.

import (
	"context"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/cmd/internal/wire"
	"github.com/criu-netlock/criu-netlock/iptables"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/config"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
	"github.com/criu-netlock/criu-netlock/nft"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

func newLocker(cfg config.Config, caller netlock.Caller, opts ...nft.Option) *netlock.Locker {
	l := wire.Locker(cfg, caller, nft.New(opts...))
	l.Options.Holder = &guard.Holder{} // it binds nothing; what others hold it has delivered
	return l
}

// hookLocker is newLocker for a process that exits at once after unlocking, with CRIU
// waiting: it must not be the one that waits for the kernel's clean-up.
func hookLocker(cfg config.Config, caller netlock.Caller) *netlock.Locker {
	return newLocker(cfg, caller, nft.WithRelease(nfnl.Park))
}

// stayingLocker is newLocker for a process that stays: it waits for the kernel's clean-up
// when nobody waits for it, and remembers its locks from one hook to the next.
func stayingLocker(holder netlock.Holder, opts ...nft.Option) func(config.Config, netlock.Caller) *netlock.Locker {
	n := nft.New(append(opts, nft.WithRelease(func(fd int) { go unix.Close(fd) }))...)
	return func(cfg config.Config, caller netlock.Caller) *netlock.Locker {
		l := wire.Locker(cfg, caller, n)
		l.Options.Holder = holder
		return l
	}
}

// variant is one way to lock and no other, for check to try.
type variant struct {
	name    string
	backend netlock.Backend
}

func variants() []variant {
	return []variant{
		{"nft", nft.New()},
		{"iptables-legacy", iptables.New(iptables.Legacy)},
		{"iptables-nft", iptables.New(iptables.NFT)},
	}
}

func (v variant) Lock(ctx context.Context, ns *netlock.Namespace) (netlock.Result, error) {
	return v.backend.Lock(ctx, ns, netlock.Options{})
}

func (v variant) Unlock(ctx context.Context, ns *netlock.Namespace) (netlock.State, error) {
	return v.backend.Unlock(ctx, ns, netlock.Options{})
}

// ruleSetFormat is the version of the rules that a lock consists of.
const ruleSetFormat = netlock.FormatVersion

package main

// The command gc: what is to be done about locks whose checkpoint is over and whose
// guard is gone too, or never was.

import (
	"context"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
)

// use tells what a lock is for. A live guard still has its eye on the namespace, unless it
// has given up.
func use(ns *netlock.Namespace, st netlock.State) netlock.Use {
	u := netlock.UseOf(st, func() bool { return inhabited(ns.Inode()) }, guard.Frozen)
	if u != netlock.Stale && u != netlock.InUse {
		return u
	}
	switch watch := guard.At(ns.Inode()); {
	case u == netlock.Stale && watch != 0, u == netlock.InUse && watch == guard.Owes:
		return netlock.Guarded
	case u == netlock.InUse && watch == guard.GaveUp:
		return netlock.Stale
	}
	return u
}

// inhabited tells whether a task is in the namespace.
func inhabited(inode uint64) bool {
	pids, err := tasks()
	if err != nil {
		return true
	}
	for _, pid := range pids {
		var st unix.Stat_t
		if unix.Stat("/proc/"+strconv.Itoa(pid)+"/ns/net", &st) == nil && st.Ino == inode {
			return true
		}
	}
	return false
}

// gc unlocks every namespace whose lock is stale, and tells of the others. As with
// unlock, a wrong configuration keeps nothing locked.
func (c *cli) gc() error {
	cfg, fileErr, flagErr := c.config()
	if flagErr != nil {
		return flagErr
	}
	l := newLocker(cfg, parent())
	out, err := within(c.start, cfg.Timeout, func(ctx context.Context) ([]outcome, error) {
		found, findErr := find(ctx, l)
		if !c.dryRun {
			guard.Sweep()
		}
		out := make([]outcome, len(found))
		parallel(len(found), func(i int) {
			f := found[i]
			u := use(f.ns, f.st)
			switch {
			case u != netlock.Stale:
				out[i] = f.outcome(string(u)+", left alone", f.st.Backend, nil)
			case c.dryRun:
				out[i] = f.outcome("stale, would be unlocked", f.st.Backend, nil)
			default:
				out[i] = c.collect(ctx, l, f, fileErr != nil)
			}
		})
		return out, findErr
	})
	return flat(err, c.report(out), fileErr)
}

// collect unlocks one namespace, in turn with hooks and guards, if its lock is still the
// stale one that was found: a checkpoint may have begun meanwhile.
func (c *cli) collect(ctx context.Context, l *netlock.Locker, f locked, blind bool) (o outcome) {
	until, _ := ctx.Deadline() // there is one: within sees to it
	mine := guard.InTurn(f.ns.Inode(), until, func() {
		st, err := l.State(ctx, f.ns)
		if err != nil {
			o = f.outcome(failed, "", err)
			return
		}
		if u := use(f.ns, st); !st.Found || u != netlock.Stale {
			o = f.outcome("in use by now, left alone", "", nil)
			return
		}
		st, err = l.Unlock(ctx, f.ns)
		if blind && err != nil && netlock.KindOf(err) == netlock.KindTampered {
			err = nil
		}
		if err != nil && netlock.KindOf(err) != netlock.KindTampered {
			o = f.outcome(failed, "", err)
			return
		}
		o = f.unlocked("stale, unlocked", st, err)
	})
	if !mine {
		o = f.outcome(failed, "", &netlock.Error{Kind: netlock.KindDeadline, Op: "wait for the guard", Namespace: f.ns.String(), Err: os.ErrDeadlineExceeded})
	}
	return o
}

// useText is a use with what follows from it.
func useText(u netlock.Use) string {
	switch u {
	case netlock.Stale:
		return "stale: its checkpoint is over; criu-netlock gc unlocks it"
	case netlock.Guarded:
		return "left to its guard: CRIU is gone, or its unlock has failed, for which the system log has why"
	case netlock.Unknown:
		return "unknown: not from this host's tasks, or its metadata are gone"
	}
	return string(u)
}

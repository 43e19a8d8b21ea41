package faults

// The guard killed at each of its system calls: while it starts, while it works for a
// hook, while it does what a CRIU that was killed has left.

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock/guard"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// guardCase is a time of a guard's life.
type guardCase struct {
	name string
	// before are the hooks that come first.
	before []string
	// action is the hook during which the guard is killed; without one CRIU is.
	action string
	// starts: it is killed while it starts.
	starts bool
	// locked, when the hook is over.
	locked bool
}

var guardCases = []guardCase{
	{"guard killed as it starts a dump", nil, "pre-dump", true, false},
	{"guard killed as it starts a restore", nil, "setup-namespaces", true, true},
	{"guard killed as it locks", []string{"pre-dump"}, "network-lock", false, true},
	{"guard killed as it unlocks", []string{"pre-dump", "network-lock"}, "network-unlock", false, false},
	{"guard killed as it looks on", []string{"setup-namespaces"}, "post-restore", false, true},
	{"guard killed, and CRIU in a dump", []string{"pre-dump", "network-lock"}, "", false, false},
	{"guard killed, and CRIU in a restore", []string{"setup-namespaces"}, "", false, false},
}

func TestGuardKilled(t *testing.T) {
	eachBackend(t, func(t *testing.T, l *lab) {
		l.configure(l.config)
		for _, g := range guardCases {
			l.killGuard(t, g)
		}
	}, keeping()...)
}

func (l *lab) killGuard(t *testing.T, g guardCase) {
	points, err := clean(func(tr *trace) error { return l.guarded(g, tr, false) })
	if err != nil {
		t.Fatalf("%s: %v", g.name, err)
	}
	name := g.name
	if l.keeps() {
		name += ", holding packets"
	}
	c := theTable.class(name)
	defer c.wantPoints(t, c.points)
	if l.backend != "nft" { // with that one the noise is the same
		points = slices.DeleteFunc(points, func(p point) bool { return noise(p.nr) })
	}
	if strings.HasPrefix(l.backend, "iptables") { // each takes a quarter of a second
		i := 0
		points = slices.DeleteFunc(points, func(point) bool { i++; return i%6 != 0 })
	}
	short := 8
	if l.keeps() && l.backend != "nft"+keeps {
		short = 6
	}
	for i, p := range choose(points, short) {
		p.done = i/2%2 == 1
		tr, err := atOrNext(p, points, func(tr *trace) error { return l.guarded(g, tr, i%2 == 1) })
		c.at(t, tr, err, "%s, %v", g.name, tr.point)
	}
}

// guarded runs hooks with a guard under the tracer; then comes the next checkpoint, or
// CRIU dies and gc comes.
func (l *lab) guarded(g guardCase, tr *trace, gc bool) (err error) {
	l.unlocked()
	l.noGuards()
	c := l.newCRIU()
	defer c.die()
	if err := l.before(c, g.before...); err != nil {
		return err
	}
	sent, err := l.keep()
	if err != nil {
		return err
	}
	traced := tr
	if g.starts {
		tr.starts = true
	} else {
		pid, err := l.guard()
		if err != nil {
			return err
		}
		tr.running, traced = true, nil
		if err := tr.begin(pid); err != nil {
			return err
		}
	}
	var r result
	if g.action == "" {
		c.die()
		err = quiet(guards) // it has settled what CRIU left, or was killed
	} else {
		r, err = l.hook(c, g.action, traced)
	}
	if err == nil && g.starts {
		err = errors.Join(netlocktest.Until(func() (bool, error) { return len(processes(guards)) == 0 || l.placed(), nil }), tr.idle(guards))
	}
	for _, pid := range processes(guards) {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	if err = errors.Join(err, tr.wait(), quiet(guards), quiet(tools)); err != nil {
		return fmt.Errorf("%v: %w", r, err)
	}
	// 9 says that what the hook unlocked then was the half of a lock.
	half := r.code == 9 && g.action == "network-unlock" && l.backend != "nft"
	switch {
	case r.code != 0 && !half || r.took > hang:
		return fmt.Errorf("a hook must not suffer: %v", r)
	case g.action != "":
		err = l.is(g.locked)
	default:
		_, _, err = l.holds()
	}
	if err == nil {
		err = l.came(sent, tr, !g.locked)
	}
	if err != nil {
		return fmt.Errorf("after %v: %w", r, err)
	}
	defer func() {
		if n := l.arrived(); err == nil && n > 0 {
			err = fmt.Errorf("%d packets came whose holder was dead", n)
		}
	}()
	h := hookCase{action: "network-lock", after: true}
	switch {
	case gc || g.action == "":
		return l.follows(c, h, "gc", nil)
	default:
		err = l.follows(c, h, "again", nil)
	}
	if err == nil {
		err = l.follows(c, h, "network-unlock", nil)
	}
	return err
}

// guard waits for the guard to be in its place.
func (l *lab) guard() (pid int, err error) {
	err = netlocktest.Until(func() (bool, error) {
		pids := processes(guards) // and a fork of it, about to become iptables
		if len(pids) == 1 {
			pid = pids[0]
		}
		return len(pids) == 1 && l.placed(), nil
	})
	return pid, err
}

// placed tells whether a guard has its socket.
func (l *lab) placed() bool {
	names, _ := filepath.Glob(fmt.Sprintf("%s/%d.*.*", guard.Dir, l.Inside.Netns().Inode()))
	return len(names) > 0
}

func guards(_, cmdline string) bool {
	return strings.HasPrefix(cmdline, "criu-netlock\x00"+guard.Arg+"\x00")
}

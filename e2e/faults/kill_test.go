package faults

// The hook killed at each of its system calls.

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// hookCase is a hook, and what stands before it.
type hookCase struct {
	action string
	before bool // locked
	after  bool // locked, when it has succeeded
}

var hookCases = []hookCase{
	{"network-lock", false, true},
	{"network-unlock", true, false},
	{"setup-namespaces", false, true},
	{"post-restore", true, true},
}

// What may follow on a hook that was killed. CRIU calls network-unlock when network-lock
// has failed, an engine tries again, and gc comes when CRIU is gone.
var follows = []string{"again", "network-unlock", "gc"}

func TestHookKilled(t *testing.T) {
	eachBackend(t, func(t *testing.T, l *lab) {
		for _, h := range hookCases {
			l.killHook(t, h)
		}
	})
}

func (l *lab) killHook(t *testing.T, h hookCase) {
	points, err := clean(func(tr *trace) error { return l.killed(h, tr, "again", nil) })
	if err != nil {
		t.Fatalf("%s: %v", h.action, err)
	}
	if l.backend != "nft" { // with that one the noise is the same
		points = slices.DeleteFunc(points, func(p point) bool { return noise(p.nr) })
	}
	c := theTable.class("hook killed, " + l.backend)
	defer c.wantPoints(t, c.points)
	for i, p := range choose(points, 20) {
		for j, follow := range follows {
			// With iptables each takes a quarter of a second: one thing follows on each point, in turn.
			if (!*all || l.backend != "nft") && (i+j)%len(follows) != 0 {
				continue
			}
			if noise(p.nr) && j > 0 {
				continue // it changes nothing: one thing that follows will do
			}
			p.done = (i+j)%2 == 1 // of two threads one can be at the next call before the other is done
			tr, err := at(p, func(tr *trace) error { return l.killed(h, tr, follow, c) })
			c.at(t, tr, err, "%s, %v, then %s", h.action, tr.point, follow)
		}
	}
}

// choose leaves out for the short set what changes nothing but the process.
func choose(ps []point, short int) []point {
	if *all {
		return ps
	}
	return some(slices.DeleteFunc(ps, func(p point) bool { return noise(p.nr) }), short)
}

// some is every point, or in the short set so many of them, from all over the run.
func some(ps []point, short int) (out []point) {
	n := min(short, len(ps))
	if *all {
		n = len(ps)
	}
	for i := range n {
		out = append(out, ps[i*len(ps)/n])
	}
	return out
}

// killed runs a hook under the tracer and then what follows.
func (l *lab) killed(h hookCase, tr *trace, follow string, count *class) (err error) {
	c := l.newCRIU()
	defer c.die()
	l.unlocked()
	if h.before {
		if r, err := l.hook(c, "network-lock", nil); err != nil || r.code != 0 {
			return unexpected("before", r, err)
		}
	}
	r, err := l.hook(c, h.action, tr)
	if err = errors.Join(err, tr.wait(), quiet(tools)); err != nil {
		return err
	}
	if r.code != 0 && (r.code != 137 || !tr.hit) || r.code == 0 && tr.hit && !tr.point.done && tr.point.nth == 0 {
		return fmt.Errorf("the hook: %v", r)
	}
	st, seen, err := l.holds()
	switch {
	case err != nil:
		return err
	case r.code == 0:
		if err := l.is(h.after); err != nil {
			return fmt.Errorf("after %v: %w", r, err)
		}
	case h.before && h.after && !st.Locked:
		return fmt.Errorf("it was locked before and is no longer: %+v", st)
	}
	if count != nil && tr.hit {
		switch {
		case seen != "":
			count.note(seen, 1)
		case st.Locked:
			count.note("locked", 1)
		default:
			count.note("open", 1)
		}
	}
	return l.follows(c, h, follow, nil)
}

// follows does what comes after a fault, which has to leave one lock or none. Where the
// fault may have kept a hook from reading who calls it, gc may not know what a lock is for,
// which is counted.
func (l *lab) follows(c *criu, h hookCase, follow string, unknown *class) error {
	switch follow {
	case "gc":
		c.die()
		out, err := l.command("gc")
		if unknown != nil && strings.Contains(out, ": unknown, left alone") {
			unknown.note("unknown to gc", 1)
			c = l.newCRIU()
			defer c.die()
			return l.follows(c, h, "network-unlock", nil)
		}
		if err != nil && !tampered(err) {
			return fmt.Errorf("gc: %w", err)
		}
		if strings.Contains(out, "left to its guard, left alone") { // which has begun only now
			if err := quiet(guards); err != nil {
				return fmt.Errorf("after gc, %s: %w", out, err)
			}
		}
		if err := l.is(false); err != nil {
			return fmt.Errorf("after gc, %s: %w", out, err)
		}
		return nil
	case "again":
		follow = h.action
	default:
		h.after = false
	}
	r, err := l.hook(c, follow, nil)
	// 9 says that what it unlocked was not a whole lock, which is true of a half.
	if err != nil || r.code != 0 && (h.after || r.code != 9) {
		return unexpected(follow, r, err)
	}
	if err := l.is(h.after); err != nil {
		return fmt.Errorf("after %s, %v: %w", follow, r, err)
	}
	return nil
}

// tampered tells whether the program ended with exit code 9.
func tampered(err error) bool {
	var exit *exec.ExitError
	return errors.As(err, &exit) && exit.ExitCode() == 9
}

// heldCase is a hook of a lock that keeps packets: its guard holds them.
type heldCase struct {
	hookCase
	first []string // the hooks that come before
}

var heldCases = []heldCase{
	{hookCase{"network-lock", false, true}, []string{"pre-dump"}},
	{hookCase{"network-unlock", true, false}, []string{"pre-dump", "network-lock"}},
	{hookCase{"setup-namespaces", false, true}, nil}, // which binds the queue and hands it to its guard
	{hookCase{"post-restore", true, true}, []string{"setup-namespaces"}},
}

func TestHookKilledHolding(t *testing.T) {
	together(t)
	for _, b := range keeping() {
		t.Run(b.name, func(t *testing.T) {
			inside(t, func(t *testing.T) {
				l := newLab(t, b.name, b.config)
				l.configure(l.config)
				for _, h := range heldCases {
					l.killHolding(t, h)
				}
			}, "HIDE="+b.hide)
		})
	}
}

func (l *lab) killHolding(t *testing.T, h heldCase) {
	points, err := clean(func(tr *trace) error { return l.killedHolding(h, tr, "again") })
	if err != nil {
		t.Fatalf("%s: %v", h.action, err)
	}
	// How many of Go's own there are depends on how long the hook waits for its guard; TestHookKilled tries them.
	points = slices.DeleteFunc(points, func(p point) bool { return noise(p.nr) })
	c := theTable.class("hook killed, holding packets")
	defer c.wantPoints(t, c.points)
	for i, p := range choose(points, 6) {
		p.done = i/len(follows)%2 == 1
		follow := follows[i%len(follows)]
		tr, err := atOrNext(p, points, func(tr *trace) error { return l.killedHolding(h, tr, follow) })
		c.at(t, tr, err, "%s, %v, then %s", h.action, tr.point, follow)
	}
}

// killedHolding runs a hook under the tracer and then what follows, with a guard that lives
// on, unless it is the hook that starts it: then it is killed too, or left alone by CRIU.
func (l *lab) killedHolding(h heldCase, tr *trace, follow string) (err error) {
	l.unlocked()
	l.noGuards()
	c := l.newCRIU()
	defer func() {
		c.die()
		err = errors.Join(err, quiet(guards)) // they have settled what CRIU has left
		l.noGuards()
	}()
	if err := l.before(c, h.first...); err != nil {
		return err
	}
	sent, err := l.keep()
	if err != nil {
		return err
	}
	if h.before && sent == 0 {
		return errors.New("nothing is held")
	}
	r, err := l.hook(c, h.action, tr)
	if h.first == nil {
		if follow == "gc" {
			c.die()
			err = errors.Join(err, quiet(guards))
		}
		for _, pid := range processes(guards) {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
	if err = errors.Join(err, tr.wait(), quiet(tools)); err != nil {
		return fmt.Errorf("%v: %w", r, err)
	}
	if r.code != 0 && (r.code != 137 || !tr.hit) {
		return fmt.Errorf("the hook: %v", r)
	}
	// A guard can still be at what the hook has asked for.
	var st netlock.State
	var last error
	n := 0
	if err := netlocktest.Until(func() (bool, error) {
		if _, _, last = l.holds(); last == nil {
			n += l.arrived()
			st, last = l.state()
		}
		return last == nil, nil
	}); err != nil {
		return fmt.Errorf("after %v: %w", r, last)
	}
	switch {
	case n > 0 && st.Locked:
		return fmt.Errorf("%d of %d held packets have passed, and it is %+v", n, sent, st)
	case r.code == 0 && !h.after && n != sent:
		return fmt.Errorf("%d of %d held packets were delivered", n, sent)
	}
	if follow == "gc" {
		c.die()
		if err := quiet(guards); err != nil {
			return err
		}
	}
	return l.follows(c, h.hookCase, follow, nil)
}

// noGuards removes what guards that were killed have left.
func (l *lab) noGuards() {
	names, _ := filepath.Glob(guard.Dir + "/*")
	for _, name := range names {
		_ = os.Remove(name)
	}
}

package faults

// The hook killed at each of its system calls.

import (
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
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
	clean := trace{}
	if err := l.killed(h, &clean, "again", nil); err != nil {
		t.Fatalf("%s: %v", h.action, err)
	}
	c := theTable.class("hook killed, " + l.backend)
	defer c.wantPoints(t, c.points)
	for i, p := range choose(clean.points(), 20) {
		for j, follow := range follows {
			if !*all && (i+j)%len(follows) != 0 {
				continue
			}
			if noise(p.nr) && j > 0 {
				continue // it changes nothing: one thing that follows will do
			}
			p.done = (i+j)%2 == 1 // of two threads one can be at the next call before the other is done
			tr := trace{point: p}
			err := l.killed(h, &tr, follow, c)
			if !tr.hit {
				c.note(notComeBy, 1)
				if err == nil {
					continue
				}
			}
			c.points++
			if err != nil {
				c.wrong++
				t.Errorf("%s, %v, then %s: %v", h.action, p, follow, err)
			}
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

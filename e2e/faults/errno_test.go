package faults

// Every system call of a hook refused, with every error that it can answer.

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestHookRefused(t *testing.T) {
	eachBackend(t, func(t *testing.T, l *lab) {
		for _, h := range hookCases {
			l.refuseHook(t, h)
		}
	})
}

func (l *lab) refuseHook(t *testing.T, h hookCase) {
	points, err := clean(func(tr *trace) error { return l.refused(h, tr, "again", nil) })
	if err != nil {
		t.Fatalf("%s: %v", h.action, err)
	}
	c := theTable.class("hook refused, " + l.backend)
	defer c.wantPoints(t, c.points)
	var faults []point
	for _, p := range points {
		if l.backend != "nft" && noise(p.nr) {
			continue // it is the same with that one
		}
		known, ok := calls()[p.nr]
		if !ok && !noise(p.nr) {
			t.Errorf("%s: with what can %s fail?", h.action, callName(p.nr))
		}
		for _, p.errno = range known.errnos {
			faults = append(faults, p)
		}
	}
	for i, p := range some(faults, 25) {
		follow := follows[i%len(follows)]
		tr, err := at(p, func(tr *trace) error { return l.refused(h, tr, follow, c) })
		c.at(t, tr, err, "%s, %v, then %s", h.action, tr.point, follow)
	}
}

// hang is how long no hook may take, whatever happens.
const hang = 5 * time.Second

// refused runs a hook with one call refused, and then what follows.
func (l *lab) refused(h hookCase, tr *trace, follow string, count *class) error {
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
	st, _, err := l.holds()
	// Without a thread or a descriptor Go's runtime ends the process where it stands, as
	// SIGKILL does.
	crashed := r.code == 2 && strings.Contains(r.log, "fatal error: ")
	// Or the hook has ended before the runtime had, which was about to.
	ending := r.code == 0 && strings.Contains(r.log, "runtime: failed to create new OS thread")
	switch {
	case err != nil:
		err = fmt.Errorf("after %v: %w", r, err)
	case r.took > hang:
		err = fmt.Errorf("a hang: %v", r)
	case crashed:
		count.note("ended by Go's runtime", 1)
		if h.before && h.after && !st.Locked {
			err = fmt.Errorf("it was locked before and is no longer: %v, %+v", r, st)
		}
	case r.code > 9:
		err = fmt.Errorf("an exit code that is none: %v", r)
	case strings.Contains(r.log, "\n") && !ending:
		err = fmt.Errorf("not one line: %v", r)
	case r.code == 0 && (st.Found != h.after || st.Locked != h.after):
		err = fmt.Errorf("success, and it is %+v: %v", st, r)
	case r.code != 0 && !h.before && st.Found:
		err = fmt.Errorf("failure, and a lock is left: %v, %+v", r, st)
	case r.code != 0 && h.before && h.after && !st.Intact:
		err = fmt.Errorf("failure, and the lock that was there is not whole: %v, %+v", r, st)
	case r.code != 0 && h.before && !h.after && st.Locked != st.Intact:
		err = fmt.Errorf("failure, and half a lock is left: %v, %+v", r, st)
	}
	if err != nil {
		return err
	}
	if count != nil && tr.hit && !crashed {
		if r.code == 0 {
			count.note("done all the same", 1)
		} else {
			count.note("failed, and said so", 1)
		}
	}
	return l.follows(c, h, follow, count)
}

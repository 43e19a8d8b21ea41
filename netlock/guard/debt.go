package guard

// An unlock that CRIU, or its client, has called for and that has failed. Nobody calls for
// it again: CRIU ignores what becomes of network-unlock, and can live as long as what
// it has restored.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
)

// Watch says what a live guard is at, to who asks for it.
type Watch int

// What a guard is at. Of several in one namespace the least counts.
const (
	// Locks: its checkpoint has locked, and not unlocked yet.
	Locks Watch = 1 + iota
	// Watches: it waits for CRIU.
	Watches
	// Owes: an unlock has failed, and is tried again.
	Owes
	// GaveUp: it was, until the deadline.
	GaveUp
)

// debt is the unlock that a guard owes.
type debt struct {
	mu   sync.Mutex
	at   Watch
	wake chan struct{} // a debt was made
	// of is the lock that it is about: a later one is somebody's who wants it. It is the zero one
	// until it was read, and then one that was there when the unlock failed.
	of   lockID
	when time.Time
	// since is CLOCK_MONOTONIC when the checkpoint has locked, and made the same where it found
	// nothing: whoever says that they had locked before that has lost their lock.
	since, made int64
	// said is when the last word came of what the checkpoint wants: they may overtake each other.
	said int64
}

// lockID tells one lock from the next.
type lockID struct {
	caller netlock.Caller
	since  time.Time
}

// owes tells whether what is there now is what an unlock is owed of. Where it is not, nothing is
// owed any more.
func (g *Guard) owes(st netlock.State) bool {
	d := &g.debt
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.at <= Watches {
		return false
	}
	id := lockID{st.Caller, st.Since}
	if d.of == (lockID{}) && !st.Since.After(d.when) { // which tells whole seconds
		d.of = id
	}
	if !st.Found || d.of != id {
		d.at, d.of = Watches, lockID{}
		return false
	}
	return true
}

func (d *debt) make(when time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.at == Owes {
		return // the guard and the hook may both say so
	}
	d.at, d.of, d.when = Owes, lockID{}, when
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

func (d *debt) set(w Watch) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.at = w
	if w <= Watches {
		d.of = lockID{}
	}
}

// locks says that the checkpoint had locked at a time, and whether there was no lock before.
func (d *debt) locks(fresh bool, at int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if at < d.said {
		return
	}
	d.at, d.of, d.said, d.since = Locks, lockID{}, at, at
	if fresh {
		d.made = at
	}
}

// unlocked says that it wanted the lock no more at a time.
func (d *debt) unlocked(at int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if at < d.said {
		return
	}
	d.at, d.of, d.said = Watches, lockID{}, at
}

func (d *debt) times() (since, made int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.since, d.made
}

func (d *debt) get() Watch {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.at
}

// unlocks tells whether the hook ends the checkpoint's need of a lock.
func (r Request) unlocks() bool { return r.Action == "network-unlock" || r.Action == "post-resume" }

// after looks at what became of a hook's work.
func (g *Guard) after(r Request, a Answer) {
	switch code := a.Code; {
	case r.Action == "pre-dump":
	case !r.unlocks():
		if code == 0 {
			g.debt.locks(a.Fresh, monotonic()) // and if an unlock was owed, a lock is wanted again
		}
	case code == 0, code == netlock.ExitCode(&netlock.Error{Kind: netlock.KindTampered}):
		g.debt.unlocked(monotonic())
	default:
		g.debt.make(time.Now())
	}
}

// errNotOwed: a later hook has done it, or has locked anew.
var errNotOwed = errors.New("not owed any more")

// pay tries an unlock that is owed, in its turn.
func (g *Guard) pay() error {
	t, err := takeTurn(g.dir(), g.NS.Inode(), time.Now().Add(turnTime))
	if err != nil {
		return err
	}
	defer t.done()
	ctx, cancel := context.WithTimeout(context.Background(), unlockTime)
	defer cancel()
	st, err := g.Locker.State(ctx, g.NS)
	switch {
	case err != nil:
		return err
	case !g.owes(st):
		return errNotOwed
	case g.locksElsewhere():
		g.debt.set(Watches)
		return errNotOwed
	}
	if err := g.unlock(ctx, "an unlock of %s had failed: unlocked now", g.NS); err != nil {
		return err
	}
	g.debt.set(Watches)
	return nil
}

// payOff tries again and again, and tells whether the guard has nothing to do any more.
func (g *Guard) payOff(over <-chan struct{}) bool {
	since, poll, said := time.Now(), firstPoll, false
	for {
		err := g.pay() // the first time to see what it is about
		switch {
		case err == nil:
			return g.Phase == Dump || g.client.Load()
		case errors.Is(err, errNotOwed):
			return g.client.Load()
		case time.Since(since) > g.Deadline:
			g.debt.set(GaveUp)
			g.Log("%v; gave up after %v: run criu-netlock unlock", err, g.Deadline)
			return false
		case !said:
			g.Log("an unlock of %s has failed; trying again for %v: %v", g.NS, g.Deadline, err)
			said = true
		}
		select {
		case <-over:
			return false
		case <-time.After(poll):
		}
		poll = min(2*poll, lastPoll)
	}
}

// watch is what the guard is at, to who asks, and since when its checkpoint has locked.
func (g *Guard) watch() (w Watch, since int64) {
	if g.debt.get() == GaveUp { // perhaps somebody else has unlocked since, and locked again
		ctx, cancel := context.WithTimeout(context.Background(), fresh)
		defer cancel()
		if st, err := g.Locker.State(ctx, g.NS); err == nil {
			g.owes(st)
		}
	}
	w = g.debt.get()
	since, _ = g.debt.times()
	if b := g.board; b != nil && w == Watches && b.locks.Load() && !g.boardless.Load() {
		w, since = Locks, b.since.Load()
	}
	return w, since
}

// Actions that are none of CRIU's: a request that asks for a Watch; one that leaves an unlock to
// the guard; that there is another checkpoint in the namespace; and that a hook has locked
// or unlocked.
const (
	askWatch    = "guard-watch"
	askOwe      = "guard-owe"
	askShared   = "guard-shared"
	askLocked   = "guard-locked"
	askUnlocked = "guard-unlocked"
)

// At asks the live guards of a namespace what they are at; 0 says that there is none. One that is
// too slow to answer watches.
func At(netns uint64) (at Watch) {
	if trusted(Dir) != nil {
		return 0
	}
	names, _ := filepath.Glob(filepath.Join(Dir, strconv.FormatUint(netns, 10)+".*.*"))
	for _, path := range names {
		if !alive(path) {
			continue
		}
		if w, _, _ := watchOf(path, fresh); at == 0 || w < at {
			at = w
		}
	}
	return at
}

// watchOf asks one guard what it is at, and since when its checkpoint has locked.
func watchOf(path string, wait time.Duration) (w Watch, since int64, said bool) {
	answer, err := ask(path, wait, Request{Action: askWatch})
	if n, e := fmt.Sscanf(answer, "000 %d %d", &w, &since); err != nil || e != nil || n != 2 || w < Locks || w > GaveUp {
		return Watches, 0, false
	}
	return w, since, true
}

// locksElsewhere tells whether another checkpoint has locked the namespace, and still wants it
// so: the lock is left to that one.
func (g *Guard) locksElsewhere() bool {
	_, made := g.debt.times()
	return g.shared.Load() && locksElsewhere(g.dir(), g.NS.Inode(), g.id(), made)
}

// LocksElsewhere is that for a hook of CRIU's, in its turn, whose own guard did not answer.
func LocksElsewhere(netns uint64, criu int) bool {
	return trusted(Dir) == nil && locksElsewhere(Dir, netns, criu, 0)
}

func locksElsewhere(dir string, netns uint64, criu int, made int64) bool {
	return anyOf(placesBeside(dir, netns, criu), func(path string) bool {
		w, since, _ := watchOf(path, besideTime)
		return w == Locks && since > made
	})
}

// anyOf asks all guards at once: those that are silent take no longer than one.
func anyOf(paths []string, ask func(path string) bool) bool {
	yes := make(chan bool, len(paths))
	for _, path := range paths {
		go func() { yes <- ask(path) }()
	}
	for range paths {
		if <-yes {
			return true
		}
	}
	return false
}

// wantedElsewhere is locksElsewhere for who has time: a guard that is there and says nothing may want it.
func wantedElsewhere(dir string, netns uint64, criu int) bool {
	return anyOf(placesBeside(dir, netns, criu), func(path string) bool {
		w, _, said := watchOf(path, fresh)
		return w == Locks || !said && alive(path)
	})
}

// Beside tells whether another checkpoint in the namespace has a guard.
func Beside(netns uint64, criu int) bool {
	return slices.ContainsFunc(placesBeside(Dir, netns, criu), alive)
}

// besideTime is how long an unlock may wait for what another checkpoint's guard says. One that
// is slower is stopped, and wants nothing. It is less than a hook waits for its own guard, which asks: or that
// hook would ask once more.
const besideTime = 200 * time.Millisecond

// Owe leaves an unlock that a hook could not do to the guard of its checkpoint, if there is one: that
// did not answer, and hears of it when it can.
func Owe(netns uint64, criu, task int) { leave(netns, criu, request(askOwe, task)) }

// Locked tells it that a hook has locked, and whether there was no lock before.
func Locked(netns uint64, criu, task int, action string, fresh bool) {
	r := request(askLocked, task)
	r.Config = action
	if fresh {
		r.ImageDir = madeAnew
	}
	leave(netns, criu, r)
}

const madeAnew = "made"

// Unlocked tells it that the hook has done it.
func Unlocked(netns uint64, criu, task int, action string) {
	r := request(askUnlocked, task)
	r.ImageDir = action
	leave(netns, criu, r)
}

func request(action string, task int) Request {
	return Request{Action: action, PID: strconv.Itoa(task), Sent: monotonic()}
}

// leave does not use package net, whose start costs a hook more than all of this, with a container
// frozen.
func leave(netns uint64, criu int, r Request) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return // gc looks after what the guard does not hear
	}
	defer unix.Close(fd)
	if unix.Connect(fd, &unix.SockaddrUnix{Name: filepath.Join(Dir, nameOf(netns, criu))}) == nil { // or there is none
		_ = unix.Sendto(fd, r.encode(), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, nil)
	}
}

func ask(path string, wait time.Duration, r Request) (answer string, err error) {
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return "", err
	}
	r.Sent = monotonic()
	if _, err := c.Write(r.encode()); err != nil {
		return "", err
	}
	b := make([]byte, maxMessage)
	n, err := c.Read(b)
	return string(b[:max(n, 0)]), err
}

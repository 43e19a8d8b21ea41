package guard

// A client's line to its guard. The client locks and unlocks by itself; of other checkpoints in
// the namespace the guards tell each other.

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Word is what a client says to its guard.
type Word byte

// What there is to say.
const (
	// Done: the checkpoint is over, and nothing is left to do.
	Done Word = 1 + iota
	// Unpaid: it is over, but an unlock has failed, which the guard is to try again.
	Unpaid
	// locked: the client has locked; made: where there was no lock; unlocked: it wants the lock
	// no more.
	locked
	made
	unlocked
)

// What a guard says to its client.
const (
	inPlace byte = 1 + iota
	// sharing: there is another checkpoint in the namespace.
	sharing
)

// Link is what Start gives a client. That of a hook, and a nil one, do nothing.
type Link struct {
	netns    uint64
	id, task int

	mu     sync.Mutex
	fd     int // -1 when it is over
	shared bool
	made   int64 // when the client has locked where there was no lock
}

// Over ends it. The first call counts.
func (l *Link) Over(w Word) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.say(w)
	if l.fd >= 0 {
		unix.Close(l.fd)
	}
	l.fd = -1
}

func (l *Link) say(w Word) {
	if l.fd >= 0 {
		_ = unix.Sendto(l.fd, []byte{byte(w)}, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, nil) // it may have gone
	}
}

// Shared tells whether another checkpoint was, or is, in the namespace. It is asked in the freeze,
// and costs a system call.
func (l *Link) Shared() bool {
	if l == nil {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for !l.shared && l.fd >= 0 {
		var b [8]byte
		n, _, err := unix.Recvfrom(l.fd, b[:], unix.MSG_DONTWAIT)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n <= 0 {
			break
		}
		for _, said := range b[:n] {
			l.shared = l.shared || said == sharing
		}
	}
	return l.shared
}

// InTurn calls f in its turn among the checkpoints in the namespace: at once where there is no
// other, and when the others take too long.
func (l *Link) InTurn(until time.Time, f func()) {
	if !l.Shared() || !InTurn(l.netns, until, f) {
		f()
	}
}

// Locks says, in its turn, that the client has locked, and whether there was no lock before.
func (l *Link) Locks(fresh bool) {
	if fresh {
		l.tell(made, askMade)
		return
	}
	l.tell(locked, askLocked)
}

// Unlocks says that the client wants the lock no more.
func (l *Link) Unlocks() { l.tell(unlocked, askUnlocked) }

func (l *Link) tell(w Word, action string) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if w == made {
		l.made = monotonic()
	}
	if l.shared { // others ask the guard in their turn, which may be next
		tell(l.netns, l.id, l.task, action)
	} else {
		l.say(w)
	}
}

// Leaves says that the client wants the lock no more, and tells whether another checkpoint does,
// in its turn.
func (l *Link) Leaves() bool {
	if l == nil || !l.isShared() {
		return false
	}
	l.Unlocks()
	return trusted(Dir) == nil && locksElsewhere(Dir, l.netns, l.id, l.made)
}

func (l *Link) isShared() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.shared
}

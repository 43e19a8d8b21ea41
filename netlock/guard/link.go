package guard

// A client's line to its guard. The client locks and unlocks by itself; of other checkpoints in
// the namespace the guards tell each other. What client and guard have to know of each other while a
// container is frozen stands in a page of memory that both have: a message would wake the
// guard, which takes longer than the unlock.

import (
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

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
)

// board is the page.
type board struct {
	// shared, by the guard: there is, or was, another checkpoint in the namespace.
	shared atomic.Bool
	// locks, by the client: it has locked, and wants it so. since and made are as in debt.
	locks       atomic.Bool
	since, made atomic.Int64
}

// newBoard makes the page, and the file by which the guard has it too.
func newBoard() (*board, *os.File, error) {
	fd, err := unix.MemfdCreate("criu-netlock", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "board")
	if err := f.Truncate(int64(os.Getpagesize())); err != nil {
		f.Close()
		return nil, nil, err
	}
	b, err := mapBoard(fd)
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	b.since.Store(0) // now, and not in the freeze, the kernel finds the memory
	return b, f, nil
}

func mapBoard(fd int) (*board, error) {
	p, err := unix.MmapPtr(fd, 0, nil, unsafe.Sizeof(board{}), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return (*board)(p), os.NewSyscallError("mmap", err)
}

func (b *board) unmap() { _ = unix.MunmapPtr(unsafe.Pointer(b), unsafe.Sizeof(board{})) } // it was mapped

// Link is what Start gives a client. That of a hook is nil, and does nothing.
type Link struct {
	netns uint64
	id    int

	mu    sync.Mutex
	fd    int // -1 when it is over
	board *board
}

// Over ends it. The first call counts.
func (l *Link) Over(w Word) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fd < 0 {
		return
	}
	_ = unix.Sendto(l.fd, []byte{byte(w)}, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, nil) // it may have gone
	unix.Close(l.fd)
	l.board.unmap()
	l.fd, l.board = -1, new(board)
}

func (l *Link) page() *board {
	if l == nil {
		return new(board)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.board
}

// InTurn calls f in its turn among the checkpoints in the namespace: at once where there is no
// other, and when the others take too long.
func (l *Link) InTurn(until time.Time, f func()) {
	if !l.page().shared.Load() || !InTurn(l.netns, until, f) {
		f()
	}
}

// Locks says, in its turn, that the client has locked, and whether there was no lock before.
func (l *Link) Locks(fresh bool) {
	b, now := l.page(), monotonic()
	if fresh {
		b.made.Store(now)
	}
	b.since.Store(now)
	b.locks.Store(true)
}

// Unlocks says that the client wants the lock no more.
func (l *Link) Unlocks() { l.page().locks.Store(false) }

// Leaves is Unlocks, and tells whether another checkpoint wants the lock, in its turn.
func (l *Link) Leaves() bool {
	b := l.page()
	b.locks.Store(false)
	return b.shared.Load() && trusted(Dir) == nil && locksElsewhere(Dir, l.netns, l.id, b.made.Load())
}

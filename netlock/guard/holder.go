package guard

// The holder of a lock that was taken by hand, which no guard watches.

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// HoldArg is the program's first argument when it is to hold for a lock taken by hand.
const HoldArg = "hold"

// The descriptors that a holder is started with.
const (
	fdHeldNetns = 3 + iota
	fdHeldQueue
	fdHolderReady
	fdHolderEnd
)

// StartHolder runs exe as the holder of a queue, which it takes over, in a session of its
// own. It returns when the holder is in its place, or with an error after the wait.
func StartHolder(exe string, ns *netlock.Namespace, q *nfnl.Queue, wait time.Duration) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	n := null.Fd()
	_, err = run(exe, HoldArg, []string{strconv.Itoa(int(q.Number()))}, os.Environ(),
		[]uintptr{n, n, n, uintptr(ns.FD()), uintptr(q.FD()), w.Fd()})
	w.Close()
	if err != nil {
		return err
	}
	if err := r.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	if _, err := r.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("the holder is not in its place: %w", err)
	}
	return nil
}

// RunHolder is the life of a holder: it ends when the lock is gone, or holds no more, and when
// nobody else is left who keeps the namespace alive: it would never go away.
func RunHolder(args []string, h *Holder, l Locker) error {
	bad := errors.New("criu-netlock lock starts this, nobody else")
	if len(args) != 1 {
		return bad
	}
	num, err := strconv.Atoi(args[0])
	if err != nil || num < 0 || num > math.MaxUint16 {
		return bad
	}
	for fd := fdHeldNetns; fd < fdHolderEnd; fd++ {
		unix.CloseOnExec(fd)
	}
	ns, err := netlock.FromFD(fdHeldNetns)
	if err != nil {
		return err
	}
	unix.Close(fdHeldNetns)
	if err := h.Adopt(ns, nfnl.InheritQueue(fdHeldQueue, uint16(num))); err != nil {
		return err
	}
	_, err = unix.Write(fdHolderReady, []byte{1})
	unix.Close(fdHolderReady)
	others, alone := keepers{ns: ns}, 0
	for n := 1; err == nil && h.holding(ns); n++ {
		time.Sleep(holderPoll)
		err = holds(ns, l, num)
		if n%lookEvery != 0 {
			continue
		}
		// One look takes its time, and who comes late may be passed over.
		if alone++; others.any() {
			alone = 0
		}
		if err == nil && alone > 1 {
			err = errAlone
		}
	}
	h.answering.Lock() // who unlocks gets all that is held, and nobody begins any more
	h.Drop(ns)
	return err
}

// holding tells whether the queue is still ours, once nobody is being answered.
func (h *Holder) holding(ns *netlock.Namespace) bool {
	h.answering.Lock()
	defer h.answering.Unlock()
	return h.Queue(ns) != nil
}

// holderPoll is how soon a holder notices that its lock has gone without its help.
const holderPoll = 250 * time.Millisecond

// lookEvery is how many of these pass from one look for who else keeps the namespace to the next.
const lookEvery = 4

var (
	errNoLock = errors.New("the lock is gone")
	errAlone  = errors.New("nobody else keeps the namespace")
)

func holds(ns *netlock.Namespace, l Locker, num int) error {
	ctx, cancel := context.WithTimeout(context.Background(), unlockTime)
	defer cancel()
	// What cannot be read is there, for all we know.
	if st, err := l.State(ctx, ns); err == nil && (st.Mode != netlock.Hold || int(st.Queue.Number) != num) {
		return errNoLock
	}
	return nil
}

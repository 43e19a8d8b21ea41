package netlock

import (
	"io"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// kept is what backends have left with a handle for its next user.
type kept struct {
	mu   sync.Mutex
	on   bool
	what map[any]io.Closer
}

// KeepSockets has backends leave their sockets of the namespace with this handle from one
// call to the next, until it is closed. Without it every call enters the namespace anew: in
// a real checkpoint that takes 0.1 to 0.2 ms of the freeze. It is for a handle with a
// checkpoint to itself, and costs a descriptor.
func (ns *Namespace) KeepSockets() {
	ns.kept.mu.Lock()
	defer ns.kept.mu.Unlock()
	ns.kept.on = true
}

// KeepsSockets tells whether KeepSockets was called.
func (ns *Namespace) KeepsSockets() bool {
	ns.kept.mu.Lock()
	defer ns.kept.mu.Unlock()
	return ns.kept.on
}

// Leave leaves c, for which key stands, with the handle if it keeps such things and has
// none. If it tells false, c is still the caller's to close.
func (ns *Namespace) Leave(key any, c io.Closer) bool {
	ns.kept.mu.Lock()
	defer ns.kept.mu.Unlock()
	if _, there := ns.kept.what[key]; there || !ns.kept.on {
		return false
	}
	if ns.kept.what == nil {
		ns.kept.what = map[any]io.Closer{}
	}
	ns.kept.what[key] = c
	return true
}

// Take takes what was left under key; nil if nothing was, or if somebody has it.
func (ns *Namespace) Take(key any) io.Closer {
	ns.kept.mu.Lock()
	defer ns.kept.mu.Unlock()
	c := ns.kept.what[key]
	delete(ns.kept.what, key)
	return c
}

// Moved tells what is left here that a change of the caller's, and nothing else, has led
// nf_tables' rule set from one generation to another: it is told if it has a method Moved.
func (ns *Namespace) Moved(from, to uint32) {
	ns.kept.mu.Lock()
	defer ns.kept.mu.Unlock()
	for _, c := range ns.kept.what {
		if m, ok := c.(interface{ Moved(from, to uint32) }); ok {
			m.Moved(from, to)
		}
	}
}

func (k *kept) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, c := range k.what {
		_ = c.Close() // nothing is lost with it
	}
	k.on, k.what = false, nil
}

// IsOf tells whether the task with this pid, which pidfd was opened for, is alive and in
// the namespace.
func (ns *Namespace) IsOf(pid, pidfd int) bool {
	var held, now unix.Stat_t
	return unix.Fstat(int(ns.h), &held) == nil && unix.Stat("/proc/"+strconv.Itoa(pid)+"/ns/net", &now) == nil &&
		held.Ino == now.Ino && held.Dev == now.Dev &&
		!Dead(pidfd) // so that it was its pid until now
}

// Dead tells whether the task of a pidfd is, a zombie included.
func Dead(pidfd int) bool {
	p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, _ := unix.Poll(p, 0)
	return pidfd < 0 || n > 0
}

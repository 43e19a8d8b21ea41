//go:build amd64 || arm64

package early

// What the real criu, in whose place we are started, has from our parent. Go's runtime would
// lose it: it handles every signal, of which exec makes the default, unblocks some, and
// opens /dev/null where a standard descriptor is closed.

import (
	"syscall"
	"unsafe"
)

const (
	signals    = 64
	sigIgnore  = 1 // SIG_IGN
	sigSetSize = signals / 8
)

var (
	kept             bool
	ignored, blocked uint64 // a bit a signal, the first one's is 0
	closed           [3]bool
	// disposition is the kernel's struct sigaction.
	disposition struct{ handler, flags, restorer, mask uint64 }
)

func keep() {
	for sig := range uintptr(signals) {
		_, _, errno := syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, sig+1, 0, uintptr(unsafe.Pointer(&disposition)), sigSetSize, 0, 0)
		if errno == 0 && disposition.handler == sigIgnore {
			ignored |= 1 << sig
		}
	}
	_, _, errno := syscall.RawSyscall6(syscall.SYS_RT_SIGPROCMASK, 0, 0, uintptr(unsafe.Pointer(&blocked)), sigSetSize, 0, 0)
	kept = errno == 0
	for fd := range closed {
		_, _, errno := syscall.RawSyscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_GETFD, 0)
		closed[fd] = errno == syscall.EBADF
	}
}

// AsStarted has exec hand on what our parent gave us. It is for the thread that calls exec, just
// before that.
func AsStarted() {
	if !kept {
		return
	}
	disposition.handler, disposition.flags, disposition.restorer, disposition.mask = sigIgnore, 0, 0, 0
	for sig := range uintptr(signals) {
		if ignored&(1<<sig) != 0 {
			_, _, _ = syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, sig+1, uintptr(unsafe.Pointer(&disposition)), 0, sigSetSize, 0, 0)
		}
	}
	for fd, was := range closed {
		if was {
			_, _, _ = syscall.RawSyscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_SETFD, syscall.FD_CLOEXEC)
		}
	}
	const setMask = 2
	_, _, _ = syscall.RawSyscall6(syscall.SYS_RT_SIGPROCMASK, setMask, uintptr(unsafe.Pointer(&blocked)), 0, sigSetSize, 0, 0)
}

//go:build amd64 || arm64

package early

// System calls that are no more than that: package syscall's own tell the runtime.

import (
	"syscall"
	"unsafe"
)

const oPath = 0x200000

func pointer(s string) uintptr { return uintptr(unsafe.Pointer(unsafe.StringData(s))) }

func exit(code int) {
	for {
		_, _, _ = syscall.RawSyscall(syscall.SYS_EXIT_GROUP, uintptr(code), 0, 0)
	}
}

// open wants the name to end with a zero, in it or behind it.
func open(name string, flags uintptr) (uintptr, syscall.Errno) {
	at := int32(-100) // AT_FDCWD
	fd, _, errno := syscall.RawSyscall6(syscall.SYS_OPENAT, uintptr(at), pointer(name), flags, 0, 0, 0)
	return fd, errno
}

func closeFD(fd uintptr) { _, _, _ = syscall.RawSyscall(syscall.SYS_CLOSE, fd, 0, 0) }

func fstat(fd uintptr, st *syscall.Stat_t) bool {
	_, _, errno := syscall.RawSyscall(syscall.SYS_FSTAT, fd, uintptr(unsafe.Pointer(st)), 0)
	return errno == 0
}

func euid() uint32 {
	id, _, _ := syscall.RawSyscall(syscall.SYS_GETEUID, 0, 0, 0)
	return uint32(id)
}

func ppid() uint64 {
	id, _, _ := syscall.RawSyscall(syscall.SYS_GETPPID, 0, 0, 0)
	return uint64(id)
}

func write(fd uintptr, s string) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall(syscall.SYS_WRITE, fd, pointer(s), uintptr(len(s)))
	return int(n), errno
}

func send(fd uintptr, s string, flags uintptr) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_SENDTO, fd, pointer(s), uintptr(len(s)), flags, 0, 0)
	return int(n), errno
}

// writable waits until fd can be written to, for some nanoseconds.
func writable(fd uintptr, ns int64) bool {
	p := struct {
		fd              int32
		events, revents int16
	}{fd: int32(fd), events: 4} // POLLOUT
	ts := syscall.NsecToTimespec(ns)
	n, _, errno := syscall.RawSyscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1, uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
	return errno == 0 && n == 1
}

// quiet has a pipe without a reader be an error, and no signal, in a process that has no
// runtime to see to that.
func quiet() {
	if running {
		return
	}
	const block = 0
	pipe := uint64(1) << (syscall.SIGPIPE - 1)
	_, _, _ = syscall.RawSyscall6(syscall.SYS_RT_SIGPROCMASK, block, uintptr(unsafe.Pointer(&pipe)), 0, 8, 0, 0)
}

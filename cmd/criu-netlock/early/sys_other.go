//go:build !amd64 && !arm64

package early

import "syscall"

func exit(code int) { syscall.Exit(code) }

func open(name string, flags int) (uintptr, syscall.Errno) {
	fd, err := syscall.Open(name[:len(name)-1], flags, 0)
	return uintptr(fd), number(err)
}

func closeFD(fd uintptr) { _ = syscall.Close(int(fd)) }

func fstat(fd uintptr, st *syscall.Stat_t) bool { return syscall.Fstat(int(fd), st) == nil }

func write(fd uintptr, s string) (int, syscall.Errno) {
	n, err := syscall.Write(int(fd), []byte(s))
	return n, number(err)
}

func send(fd uintptr, s string, flags int) (int, syscall.Errno) {
	err := syscall.Sendto(int(fd), []byte(s), flags, nil)
	return len(s), number(err)
}

// writable gives a reader a moment, in which nothing else waits.
func writable(_ uintptr, ns int64) bool {
	ts := syscall.NsecToTimespec(ns)
	return syscall.Nanosleep(&ts, nil) == nil
}

func quiet() {}

func number(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	if n, ok := err.(syscall.Errno); ok { //nolint:errorlint // syscall's errors are its numbers
		return n
	}
	return syscall.EIO
}

package faults

import (
	"strconv"

	"golang.org/x/sys/unix"
)

// call is a system call that the program makes: its name, and with what it can fail.
// Without an errno it cannot, or the kernel never does where the program calls it.
type call struct {
	name   string
	errnos []unix.Errno
}

func callName(nr int) string {
	if c, ok := calls()[nr]; ok {
		return c.name
	}
	return "call " + strconv.Itoa(nr)
}

// noise are the calls of Go's runtime, which change nothing but the process itself.
func noise(nr int) bool {
	switch nr {
	case unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_SIGALTSTACK, unix.SYS_MMAP, unix.SYS_MUNMAP, unix.SYS_MPROTECT,
		unix.SYS_MADVISE, unix.SYS_NANOSLEEP, unix.SYS_FUTEX, unix.SYS_GETTID, unix.SYS_GETPID, unix.SYS_TGKILL, unix.SYS_SCHED_YIELD,
		unix.SYS_SCHED_GETAFFINITY, unix.SYS_ARCH_PRCTL, unix.SYS_PRCTL, unix.SYS_PRLIMIT64, unix.SYS_BRK, unix.SYS_EPOLL_PWAIT,
		unix.SYS_EPOLL_CTL, unix.SYS_EPOLL_CREATE1, unix.SYS_EVENTFD2, unix.SYS_CLOCK_GETTIME, unix.SYS_GETRANDOM, unix.SYS_UNAME, unix.SYS_CLONE3,
		unix.SYS_SETITIMER, unix.SYS_TIMER_CREATE, unix.SYS_TIMER_SETTIME, unix.SYS_TIMER_DELETE, unix.SYS_RESTART_SYSCALL, unix.SYS_SET_ROBUST_LIST, unix.SYS_RSEQ, unix.SYS_SET_TID_ADDRESS:
		return true
	}
	return false
}

func calls() map[int]call {
	const (
		EINTR, EAGAIN, ENOMEM, ENOBUFS, EPERM, EBUSY, EMFILE, ETIMEDOUT = unix.EINTR, unix.EAGAIN, unix.ENOMEM, unix.ENOBUFS, unix.EPERM, unix.EBUSY, unix.EMFILE, unix.ETIMEDOUT
	)
	return map[int]call{
		unix.SYS_SOCKET:            {"socket", []unix.Errno{ENOMEM, ENOBUFS, EPERM, EMFILE}},
		unix.SYS_CONNECT:           {"connect", []unix.Errno{EINTR, EAGAIN, ENOMEM, EPERM, ETIMEDOUT}},
		unix.SYS_SENDTO:            {"sendto", []unix.Errno{EINTR, EAGAIN, ENOMEM, ENOBUFS, EPERM, EBUSY, ETIMEDOUT}},
		unix.SYS_RECVFROM:          {"recvfrom", []unix.Errno{EINTR, EAGAIN, ENOMEM, ENOBUFS, ETIMEDOUT}},
		unix.SYS_RECVMSG:           {"recvmsg", []unix.Errno{EINTR, EAGAIN, ENOMEM, ENOBUFS, EPERM, EBUSY, ETIMEDOUT}},
		unix.SYS_SETSOCKOPT:        {"setsockopt", []unix.Errno{ENOMEM, ENOBUFS, EPERM}},
		unix.SYS_GETSOCKOPT:        {"getsockopt", []unix.Errno{EINTR, EAGAIN, ENOMEM, EPERM, EBUSY}},
		unix.SYS_PPOLL:             {"ppoll", []unix.Errno{EINTR, ENOMEM}},
		unix.SYS_POLL:              {"poll", []unix.Errno{EINTR, ENOMEM}},
		unix.SYS_OPENAT:            {"openat", []unix.Errno{EINTR, EAGAIN, ENOMEM, EPERM, EBUSY, EMFILE, ETIMEDOUT}},
		unix.SYS_OPENAT2:           {"openat2", []unix.Errno{EINTR, EAGAIN, ENOMEM, EPERM, EMFILE}},
		unix.SYS_OPEN:              {"open", []unix.Errno{EINTR, ENOMEM, EPERM, EMFILE}},
		unix.SYS_READ:              {"read", []unix.Errno{EINTR, EAGAIN, ENOMEM, EPERM, ETIMEDOUT}},
		unix.SYS_PREAD64:           {"pread64", []unix.Errno{EINTR, ENOMEM}},
		unix.SYS_WRITE:             {"write", []unix.Errno{EINTR, EAGAIN, ENOMEM, ENOBUFS, EPERM}},
		unix.SYS_CLOSE:             {"close", nil}, // what it answers, the descriptor is closed
		unix.SYS_NEWFSTATAT:        {"newfstatat", []unix.Errno{EINTR, ENOMEM, EPERM, ETIMEDOUT}},
		unix.SYS_FSTAT:             {"fstat", []unix.Errno{ENOMEM}},
		unix.SYS_STATX:             {"statx", []unix.Errno{EAGAIN, ENOMEM, EPERM}},
		unix.SYS_LSTAT:             {"lstat", []unix.Errno{ENOMEM, EPERM}},
		unix.SYS_FSTATFS:           {"fstatfs", []unix.Errno{EINTR, ENOMEM}},
		unix.SYS_STATFS:            {"statfs", []unix.Errno{EINTR, ENOMEM}},
		unix.SYS_READLINKAT:        {"readlinkat", []unix.Errno{ENOMEM, EPERM}},
		unix.SYS_FACCESSAT:         {"faccessat", []unix.Errno{ENOMEM, EPERM}},
		unix.SYS_FACCESSAT2:        {"faccessat2", []unix.Errno{ENOMEM, EPERM}},
		unix.SYS_ACCESS:            {"access", []unix.Errno{ENOMEM, EPERM}},
		unix.SYS_GETDENTS64:        {"getdents64", []unix.Errno{ENOMEM, EPERM}},
		unix.SYS_MKDIRAT:           {"mkdirat", []unix.Errno{ENOMEM, EPERM}},
		unix.SYS_UNLINKAT:          {"unlinkat", []unix.Errno{ENOMEM, EPERM, EBUSY}},
		unix.SYS_FLOCK:             {"flock", []unix.Errno{EINTR, EAGAIN, ENOMEM}},
		unix.SYS_FCNTL:             {"fcntl", nil}, // for the flags of a descriptor, which are there
		unix.SYS_DUP3:              {"dup3", []unix.Errno{EINTR, EBUSY, EMFILE}},
		unix.SYS_PIPE2:             {"pipe2", []unix.Errno{ENOMEM, EMFILE}},
		unix.SYS_CLONE:             {"clone", []unix.Errno{EAGAIN, ENOMEM, EPERM}},
		unix.SYS_WAITID:            {"waitid", []unix.Errno{EINTR}},
		unix.SYS_WAIT4:             {"wait4", []unix.Errno{EINTR}},
		unix.SYS_PIDFD_OPEN:        {"pidfd_open", []unix.Errno{ENOMEM, EPERM, EMFILE}},
		unix.SYS_PIDFD_SEND_SIGNAL: {"pidfd_send_signal", []unix.Errno{EPERM}},
		unix.SYS_IOCTL:             {"ioctl", []unix.Errno{ENOMEM, EPERM, EMFILE}},
		unix.SYS_SETNS:             {"setns", []unix.Errno{ENOMEM, EPERM}},
		unix.SYS_UNSHARE:           {"unshare", []unix.Errno{EAGAIN, ENOMEM, EPERM}},
		unix.SYS_IO_URING_SETUP:    {"io_uring_setup", []unix.Errno{EAGAIN, ENOMEM, EPERM, EMFILE}},
		unix.SYS_IO_URING_REGISTER: {"io_uring_register", []unix.Errno{EINTR, EAGAIN, ENOMEM, EPERM, EBUSY, EMFILE}},
		unix.SYS_CAPSET:            {"capset", []unix.Errno{ENOMEM, EPERM}}, // a seccomp filter
		unix.SYS_CAPGET:            {"capget", []unix.Errno{EPERM}},
		unix.SYS_EPOLL_CREATE1:     {"epoll_create1", []unix.Errno{ENOMEM, EMFILE}},
		unix.SYS_EPOLL_CTL:         {"epoll_ctl", []unix.Errno{ENOMEM, EPERM}},
		unix.SYS_EVENTFD2:          {"eventfd2", []unix.Errno{ENOMEM, EMFILE}},
		unix.SYS_EPOLL_PWAIT:       {"epoll_pwait", []unix.Errno{EINTR}},
		unix.SYS_CLONE3:            {"clone3", nil},
		unix.SYS_GETPID:            {"getpid", nil},
		unix.SYS_GETPPID:           {"getppid", nil},
		unix.SYS_GETTID:            {"gettid", nil},
		unix.SYS_GETEUID:           {"geteuid", nil},
		unix.SYS_EXIT_GROUP:        {"exit_group", nil},
		unix.SYS_EXIT:              {"exit", nil},
		unix.SYS_FUTEX:             {"futex", nil},
		unix.SYS_MMAP:              {"mmap", nil},
		unix.SYS_NANOSLEEP:         {"nanosleep", nil},
		unix.SYS_RT_SIGACTION:      {"rt_sigaction", nil},
		unix.SYS_RT_SIGPROCMASK:    {"rt_sigprocmask", nil},
		unix.SYS_SIGALTSTACK:       {"sigaltstack", nil},
	}
}

//go:build amd64 || arm64

package early

// The hooks of a checkpoint that has a guard: it does their work, and all that is left
// for this process is one message and its answer. Package guard has the other side and
// says why; a test holds the two together.

import (
	"syscall"
	"unsafe"
)

// GuardDir is guard.Dir.
const GuardDir = "/run/criu-netlock"

const (
	guardVersion = "1"
	notDone      = 255
	// answerTime is how many nanoseconds the guard may take before the hook turns to the
	// work itself. It works by turns with the guard, so that nothing is done twice at a time.
	answerTime = 300e6
)

// text is a string of its own memory, which nobody has to allocate.
type text struct {
	n    int
	over bool
	b    [8192]byte
}

func (t *text) add(s string) *text {
	// The last byte stays 0, for the kernel.
	if len(s) >= len(t.b)-t.n {
		t.over = true
		return t
	}
	t.n += copy(t.b[t.n:], s)
	return t
}

func (t *text) addNumber(n uint64) *text {
	d := uint64(1)
	for n/d > 9 {
		d *= 10
	}
	const figures = "0123456789"
	for ; d > 0; d /= 10 {
		i := n / d % 10
		t.add(figures[i : i+1])
	}
	return t
}

func (t *text) string() string { return unsafe.String(&t.b[0], t.n) }

// What ask works with: the heap may not be there yet.
var (
	path, socket, message, parent text
	stat                          syscall.Stat_t
	limit                         = syscall.Timeval{Usec: answerTime / 1e3}
	peer                          syscall.Ucred
	size                          uint32
	now                           syscall.Timespec
	to                            syscall.RawSockaddrUnix
)

// ask ends the process if the guard has done the hook's work.
func ask(name string, env func(string) string) {
	pid, image := env("CRTOOLS_INIT_PID"), env("CRTOOLS_IMAGE_DIR")
	criu := CRIU(image)
	if criu == "" && image != "" {
		criu = parent.addNumber(ppid()).string() // as package main has it
	}
	if criu == "" || !digits(pid) || !trusted() {
		return
	}
	netns, ok := inode(path.add("/proc/").add(pid).add("/ns/net"))
	if !ok {
		return
	}
	path.n = 0
	pidns, ok := inode(path.add("/proc/self/ns/pid\x00"))
	if !ok {
		return
	}
	socket.add(GuardDir).add("/").addNumber(netns).add(".").addNumber(pidns).add(".").add(criu)
	if !talk(name, pid, image, env("CRIU_NETLOCK_CONFIG")) {
		return
	}
	answer := message.string()
	if len(answer) < 4 || !digits(answer[:3]) || answer[3] != ' ' {
		return
	}
	code := 100*int(answer[0]-'0') + 10*int(answer[1]-'0') + int(answer[2]-'0')
	if code >= notDone {
		return
	}
	Say(answer[4:])
	exit(code)
}

// trusted tells whether the guards' directory is root's alone.
func trusted() bool {
	fd, errno := open(GuardDir+"\x00", oPath|syscall.O_DIRECTORY|syscall.O_NOFOLLOW|syscall.O_CLOEXEC)
	if errno != 0 {
		return false
	}
	ok := fstat(fd, &stat) && stat.Uid == euid() && stat.Mode&0o077 == 0
	closeFD(fd)
	return ok
}

func inode(name *text) (uint64, bool) {
	fd, errno := open(name.string(), oPath|syscall.O_CLOEXEC)
	if errno != 0 {
		return 0, false
	}
	ok := fstat(fd, &stat)
	closeFD(fd)
	return stat.Ino, ok
}

// talk sends a request and has the answer in message.
func talk(name, pid, image, config string) bool {
	s, _, errno := syscall.RawSyscall(syscall.SYS_SOCKET, syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if errno != 0 {
		return false
	}
	ok := exchange(s, name, pid, image, config)
	closeFD(s)
	return ok
}

func exchange(s uintptr, name, pid, image, config string) bool {
	to.Family = syscall.AF_UNIX
	if socket.over || socket.n >= len(to.Path) {
		return false
	}
	for i := range socket.n {
		to.Path[i] = int8(socket.b[i])
	}
	option := func(o uintptr) bool {
		_, _, errno := syscall.RawSyscall6(syscall.SYS_SETSOCKOPT, s, syscall.SOL_SOCKET, o, uintptr(unsafe.Pointer(&limit)), unsafe.Sizeof(limit), 0)
		return errno == 0
	}
	if !option(syscall.SO_SNDTIMEO) || !option(syscall.SO_RCVTIMEO) {
		return false
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_CONNECT, s, uintptr(unsafe.Pointer(&to)), unsafe.Sizeof(to)); errno != 0 {
		return false
	}
	size = uint32(unsafe.Sizeof(peer))
	if _, _, errno := syscall.RawSyscall6(syscall.SYS_GETSOCKOPT, s, syscall.SOL_SOCKET, syscall.SO_PEERCRED,
		uintptr(unsafe.Pointer(&peer)), uintptr(unsafe.Pointer(&size)), 0); errno != 0 || peer.Uid != euid() {
		return false
	}
	const monotonic = 1
	if _, _, errno := syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, monotonic, uintptr(unsafe.Pointer(&now)), 0); errno != 0 {
		return false
	}
	message.n, message.over = 0, false
	message.add(guardVersion).add("\x00").addNumber(uint64(now.Nano())).
		add("\x00").add(name).add("\x00").add(pid).add("\x00").add(image).add("\x00").add(config)
	if message.over {
		return false
	}
	if _, errno := send(s, message.string(), syscall.MSG_NOSIGNAL); errno != 0 {
		return false
	}
	for {
		n, _, errno := syscall.RawSyscall(syscall.SYS_READ, s, uintptr(unsafe.Pointer(&message.b)), uintptr(len(message.b)))
		if errno != syscall.EINTR {
			message.n = int(n)
			return errno == 0 && n > 0
		}
	}
}

package early

import "syscall"

// SayTime is how many nanoseconds Say may take. CRIU's log is a file, but may be a pipe
// that nobody reads.
const SayTime = 100e6

// Say writes a line to stderr, if that can be done at once. It must neither block nor
// be killed: a full pipe blocks, and one without a reader ends the process, even where the
// parent had the signal ignored if it is Go's os.Stderr.
func Say(line string) {
	const stderr = 2
	var st syscall.Stat_t
	if fstat(stderr, &st) && st.Mode&syscall.S_IFMT == syscall.S_IFREG {
		put(line, func(s string) (int, syscall.Errno) { return write(stderr, s) }, stderr)
		return
	}
	quiet()
	// Another opening of it does not block, and the one that others have too stays as it is.
	fd, errno := open("/proc/self/fd/2\x00", syscall.O_WRONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY|syscall.O_CLOEXEC)
	switch errno {
	case 0:
		put(line, func(s string) (int, syscall.Errno) { return write(fd, s) }, fd)
		closeFD(fd)
	case syscall.ENXIO: // a socket
		put(line, func(s string) (int, syscall.Errno) {
			return send(stderr, s, syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL)
		}, stderr)
	default:
		if writable(stderr, SayTime) {
			put(line, func(s string) (int, syscall.Errno) { return write(stderr, s) }, stderr)
		}
	}
}

// put says all of it, or what can be said in time. A signal may make that shorter.
func put(line string, w func(string) (int, syscall.Errno), fd uintptr) {
	for line != "" {
		n, errno := w(line)
		switch {
		case errno == syscall.EINTR:
		case errno == syscall.EAGAIN:
			if !writable(fd, SayTime) {
				return
			}
		case errno != 0 || n <= 0:
			return // there is nowhere to tell
		default:
			line = line[n:]
		}
	}
}

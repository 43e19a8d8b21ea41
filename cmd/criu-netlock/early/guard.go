package early

// The hooks of a checkpoint that has a guard: it does their work, and all that is left
// for this process is one message and its answer. Package guard has the other side and
// says why; a test holds the two together.

import (
	"os"
	"syscall"
	"time"
)

// GuardDir is guard.Dir.
const GuardDir = "/run/criu-netlock"

const (
	guardVersion = "1"
	notDone      = 255
	// answerTime is how long the guard may take before the hook turns to the work itself.
	// It works by turns with the guard, so that nothing is done twice at a time.
	answerTime = 300 * time.Millisecond
)

// Asks tells whether a hook asks the guard. The others come before there is one.
func Asks(name string) bool {
	switch name {
	case "network-lock", "network-unlock", "post-setup-namespaces", "post-restore", "post-resume":
		return true
	}
	return false
}

// ask ends the process if the guard has done the hook's work.
func ask(name string) {
	pid, image := os.Getenv("CRTOOLS_INIT_PID"), os.Getenv("CRTOOLS_IMAGE_DIR")
	criu := CRIU(image)
	if criu == "" || !digits(pid) || !trusted(GuardDir) {
		return
	}
	var netns, pidns syscall.Stat_t
	if syscall.Stat("/proc/"+pid+"/ns/net", &netns) != nil || syscall.Stat("/proc/self/ns/pid", &pidns) != nil {
		return
	}
	path := GuardDir + "/" + decimal(netns.Ino) + "." + decimal(pidns.Ino) + "." + criu
	answer, ok := talk(path, []string{name, pid, image, os.Getenv("CRIU_NETLOCK_CONFIG")})
	if !ok || len(answer) < 4 || !digits(answer[:3]) || answer[3] != ' ' {
		return
	}
	code := 0
	for _, c := range []byte(answer[:3]) {
		code = 10*code + int(c-'0')
	}
	if code >= notDone {
		return
	}
	Say(answer[4:])
	os.Exit(code)
}

// CRIU is the pid in CRTOOLS_IMAGE_DIR, /proc/<pid>/fd/<n>; empty if there is none.
func CRIU(image string) string {
	const before, after = "/proc/", "/fd/"
	if len(image) < len(before) || image[:len(before)] != before {
		return ""
	}
	rest := image[len(before):]
	n := 0
	for n < len(rest) && rest[n] != '/' {
		n++
	}
	if pid := rest[:n]; digits(pid) && len(rest) > n+len(after) && rest[n:n+len(after)] == after {
		return pid
	}
	return ""
}

// decimal is strconv's, which would have packages initialised that come late.
func decimal(n uint64) string {
	var b [20]byte
	i := len(b)
	for {
		i--
		b[i] = byte('0' + n%10)
		if n /= 10; n == 0 {
			return string(b[i:])
		}
	}
}

func digits(s string) bool {
	if s == "" || len(s) > 10 {
		return false
	}
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return false
		}
	}
	return true
}

func trusted(dir string) bool {
	var st syscall.Stat_t
	return syscall.Lstat(dir, &st) == nil &&
		st.Mode&syscall.S_IFMT == syscall.S_IFDIR && int(st.Uid) == os.Geteuid() && st.Mode&0o077 == 0
}

// talk sends a request and returns the answer.
func talk(path string, words []string) (string, bool) {
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", false
	}
	defer syscall.Close(fd)
	limit := syscall.NsecToTimeval(answerTime.Nanoseconds())
	if syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_SNDTIMEO, &limit) != nil ||
		syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &limit) != nil ||
		syscall.Connect(fd, &syscall.SockaddrUnix{Name: path}) != nil {
		return "", false
	}
	if peer, err := syscall.GetsockoptUcred(fd, syscall.SOL_SOCKET, syscall.SO_PEERCRED); err != nil || int(peer.Uid) != os.Geteuid() {
		return "", false
	}
	request := guardVersion + "\x00" + decimal(uint64(monotonic()))
	for _, w := range words {
		request += "\x00" + w
	}
	if syscall.Sendto(fd, []byte(request), syscall.MSG_NOSIGNAL, nil) != nil {
		return "", false
	}
	b := make([]byte, 8192)
	for {
		n, err := syscall.Read(fd, b)
		if err != syscall.EINTR {
			return string(b[:max(n, 0)]), err == nil && n > 0
		}
	}
}

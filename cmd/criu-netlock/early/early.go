// Package early ends the process where CRIU's hook has nothing for us to do, or where the
// checkpoint's guard does it: most hooks, and all of those for which a container waits
// frozen.
//
// It comes before everything else. Linked with link.Flag, on amd64 and arm64, the program begins here: before Go's
// runtime has started a thread, mapped a heap or initialised a package, which is most of
// what a short-lived Go program costs. So nothing here may allocate, panic, wait on a
// channel or call what does; a test has the compiler say so. Without the flag
// it comes as early as Go has it: packages are initialised in the order of their import
// paths as soon as what they import is ready, so this one imports syscall alone (os or
// strconv would come too late).
package early

import "syscall"

// Passed is true in every process that goes on. It is here to be initialised.
var Passed = pass()

func pass() bool {
	running = true
	if !entered && bare() {
		hook(getenv)
	}
	return true
}

var (
	entered bool // the program began with entry, which has found nothing to end it for
	running bool // Go's runtime is
)

func getenv(name string) string {
	v, _ := syscall.Getenv(name)
	return v
}

// bare tells whether this process was started with nothing but its name.
func bare() bool {
	fd, err := syscall.Open("/proc/self/cmdline", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer syscall.Close(fd)
	var b [4096]byte
	n, err := syscall.Read(fd, b[:])
	if err != nil || n == 0 || n == len(b) {
		return false
	}
	for _, c := range b[:n-1] {
		if c == 0 {
			return false
		}
	}
	return b[n-1] == 0
}

// hook returns where there is something to do in this process, and whether that is a hook's work.
func hook(env func(string) string) bool {
	name := env("CRTOOLS_SCRIPT_ACTION")
	switch {
	case name == "":
		return false
	case !Busy(name):
		exit(0)
	case Asks(name):
		ask(name, env)
	}
	return true
}

// IsCRIU tells whether the program was called in CRIU's place: by that name, or with that verb.
func IsCRIU(name, verb string) bool {
	for i := len(name) - 1; i >= 0; i-- {
		if name[i] == '/' {
			name = name[i+1:]
			break
		}
	}
	return name == "criu" || verb == "criu"
}

// Busy tells whether a hook has something to do: action.OpOf says what, and a test
// holds the two together.
func Busy(name string) bool {
	switch name {
	case "pre-dump", "network-lock", "network-unlock", "pre-restore",
		"setup-namespaces", "post-setup-namespaces", "post-restore", "post-resume":
		return true
	}
	return false
}

// Asks tells whether a hook asks the guard. The others come before there is one.
func Asks(name string) bool {
	switch name {
	case "network-lock", "network-unlock", "post-setup-namespaces", "post-restore", "post-resume":
		return true
	}
	return false
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

func digits(s string) bool {
	if s == "" || len(s) > 10 {
		return false
	}
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return true
}

// Package proc reads small files of /proc without package os, whose first open sets
// up epoll and costs a hook more than the file.
package proc

import (
	"errors"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Read returns the first 4 KiB of a file.
func Read(path string) (string, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	for err == unix.EINTR {
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var buf [4096]byte
	for {
		// Files of /proc that are this small come in one piece.
		n, err := unix.Read(fd, buf[:])
		if err != unix.EINTR {
			return string(buf[:max(n, 0)]), err
		}
	}
}

// Stat is what /proc/PID/stat says of a task.
type Stat struct {
	Comm string
	// State is R, S, D, T (stopped), t (traced), Z (a zombie) or X.
	State byte
	PPID  int
	// Flags are the kernel's PF_ flags.
	Flags uint64
	// Start is in clock ticks since the boot.
	Start uint64
}

// StatOf reads a task's Stat. The error tells that there is none to be seen.
func StatOf(pid int) (Stat, error) {
	s, err := Read("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return Stat{}, err
	}
	return parseStat(s)
}

// parseStat reads a line of proc(5): "12 (name) S 1 …". The name is the task's own
// choice, ) and blanks included, so it ends at the last ).
func parseStat(s string) (st Stat, err error) {
	open, end := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
	if open < 0 || end < open {
		return st, errors.New("not a stat line")
	}
	st.Comm = s[open+1 : end]
	f := strings.Fields(s[end+1:])
	const startTime = 22 - 3 // its place among the fields behind the name
	if len(f) <= startTime || len(f[0]) != 1 {
		return st, errors.New("a short stat line")
	}
	st.State = f[0][0]
	if st.PPID, err = strconv.Atoi(f[1]); err != nil {
		return st, err
	}
	if st.Flags, err = strconv.ParseUint(f[9-3], 10, 64); err != nil {
		return st, err
	}
	st.Start, err = strconv.ParseUint(f[startTime], 10, 64)
	return st, err
}

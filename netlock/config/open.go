package config

// Opening a file without waiting for whoever serves it. A read from a FUSE file system
// whose server took the request and keeps silent cannot be ended, not by a deadline and
// not by SIGKILL, and the process cannot end before it: a hook would keep CRIU, and the
// frozen container, waiting for ever.

import (
	"bufio"
	"errors"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrMayWait is what Read says of a file that another process or machine may serve.
var ErrMayWait = errors.New("the file system may never answer")

// resolveCached is RESOLVE_CACHED of linux/openat2.h, Linux 5.12.
const resolveCached = 0x20

// openLocal opens a file for reading if that can wait for nothing but a disk.
func openLocal(path string) (int, error) {
	const flags = unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY
	if strings.HasPrefix(path, "/dev/") || strings.HasPrefix(path, "/proc/") {
		return unix.Open(path, flags, 0) // links that mean this process alone, and no file of a user's
	}
	at, err := lookup(path)
	if err == unix.ENOSYS || err == unix.EINVAL || err == unix.EPERM { // before Linux 5.12, or a seccomp filter
		return unix.Open(path, flags, 0)
	}
	if err != nil {
		return -1, err
	}
	defer unix.Close(at)
	if !local(at) {
		return -1, ErrMayWait
	}
	return unix.Open("/proc/thread-self/fd/"+strconv.Itoa(at), flags, 0)
}

// lookup walks to a file in the kernel's cache and, where that does not know it, step by
// step through local file systems.
func lookup(path string) (int, error) {
	fd, err := cached(unix.AT_FDCWD, path, 0)
	if err != unix.EAGAIN {
		return fd, err
	}
	start := "."
	if strings.HasPrefix(path, "/") {
		start = "/"
	}
	at, err := unix.Open(start, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	for _, step := range strings.Split(path, "/") {
		if step == "" || step == "." {
			continue
		}
		next, err := cached(at, step, unix.O_NOFOLLOW)
		if err == unix.EAGAIN && local(at) {
			next, err = unix.Openat(at, step, unix.O_PATH|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		}
		unix.Close(at)
		if err == unix.EAGAIN {
			return -1, ErrMayWait
		}
		if err != nil {
			return -1, err
		}
		at = next
		if st, err := cachedStat(at); err != nil || st.Mode&unix.S_IFMT == unix.S_IFLNK {
			unix.Close(at)
			return -1, ErrMayWait // who knows where it leads
		}
	}
	return at, nil
}

// cached is an open with O_PATH that EAGAIN ends where the kernel's cache does.
func cached(at int, path string, flags uint64) (int, error) {
	return unix.Openat2(at, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC | flags, Resolve: resolveCached})
}

// cachedStat asks for nothing but what the kernel has at hand.
func cachedStat(fd int) (st unix.Statx_t, err error) {
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st)
	return st, err
}

// local tells whether a file is on a disk or in memory of this machine. Even statfs waits
// for a FUSE server: what sort of file system it is, the mount table tells.
func local(fd int) bool {
	st, err := cachedStat(fd)
	if err != nil {
		return false
	}
	if st.Dev_major != 0 {
		return true // a block device's
	}
	switch fsType(st.Mnt_id) {
	case "overlay", "tmpfs", "ramfs", "rootfs", "devtmpfs", "btrfs", "bcachefs", "zfs", "erofs", "squashfs":
		return true
	}
	return false
}

// fsType reads a line of mountinfo: "36 35 0:4 / /mnt rw shared:1 - tmpfs none rw".
func fsType(mount uint64) string {
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return ""
	}
	defer f.Close()
	id := strconv.FormatUint(mount, 10) + " "
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if !strings.HasPrefix(lines.Text(), id) {
			continue
		}
		if _, behind, ok := strings.Cut(lines.Text(), " - "); ok {
			typ, _, _ := strings.Cut(behind, " ")
			return typ
		}
	}
	return ""
}

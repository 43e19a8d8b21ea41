package main

// A file system that does not answer: a small FUSE server, which the test binary turns
// into, that serves one directory with one file and falls silent when it is told to.

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// envFUSE makes the test binary a FUSE server: MOUNTPOINT:BIND:SILENT:KEEP:READY. It mounts
// itself at MOUNTPOINT, binds BIND over its file d/f unless BIND is empty, falls silent
// at the requests in SILENT ("all", or opcodes with commas between), lets the kernel keep
// names for KEEP seconds, and makes the file READY.
const envFUSE = "CRIU_NETLOCK_TEST_FUSE"

// Requests of linux/fuse.h.
const (
	fuseLookup  = 1
	fuseForget  = 2
	fuseGetattr = 3
	fuseOpen    = 14
	fuseRead    = 15
	fuseStatfs  = 17
	fuseRelease = 18
	fuseFlush   = 25
	fuseInit    = 26
	fuseForgets = 42
)

// The text of the server's file.
const fuseText = "backend = \"nft\"\n"

func runFUSE(spec string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, "fuse:", err)
		os.Exit(99)
	}
	f := strings.Split(spec, ":")
	if len(f) != 5 {
		fail(fmt.Errorf("%q", spec))
	}
	dir, bind, silent, ready := f[0], f[1], f[2], f[4]
	keep, err := strconv.Atoi(f[3])
	if err != nil {
		fail(err)
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		fail(err)
	}
	if err := unix.Mount("silent", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fd)); err != nil {
		fail(err)
	}
	mute := make(chan []uint32, 1)
	done := make(chan struct{})
	go serveFUSE(fd, uint64(keep), mute, done)
	if bind != "" {
		if err := unix.Mount(bind, filepath.Join(dir, "d", "f"), "", unix.MS_BIND, ""); err != nil {
			fail(err)
		}
	}
	var ops []uint32
	for _, s := range strings.Split(silent, ",") {
		n, _ := strconv.Atoi(s) // "all" is 0
		ops = append(ops, uint32(n))
	}
	mute <- ops
	if err := os.WriteFile(ready, nil, 0o600); err != nil {
		fail(err)
	}
	<-done
}

func serveFUSE(fd int, keep uint64, mute <-chan []uint32, done chan<- struct{}) {
	defer close(done)
	var silent []uint32
	buf := make([]byte, 1<<20)
	attr := func(node uint64) []byte {
		b := make([]byte, 88)
		binary.NativeEndian.PutUint64(b, node)
		binary.NativeEndian.PutUint64(b[8:], uint64(len(fuseText)))
		mode := uint32(unix.S_IFDIR | 0o755)
		if node == 3 {
			mode = unix.S_IFREG | 0o644
		}
		binary.NativeEndian.PutUint32(b[60:], mode)
		binary.NativeEndian.PutUint32(b[64:], 1)
		return b
	}
	for {
		n, err := unix.Read(fd, buf)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil || n < 40 {
			return
		}
		select {
		case silent = <-mute:
		default:
		}
		op := binary.NativeEndian.Uint32(buf[4:])
		node := binary.NativeEndian.Uint64(buf[16:])
		if slices.Contains(silent, 0) || slices.Contains(silent, op) {
			continue // taken, and never answered: not even SIGKILL ends such a wait
		}
		var out []byte
		errno := unix.Errno(0)
		switch op {
		case fuseForget, fuseForgets, 36: // 36 is an interrupt
			continue
		case fuseInit:
			out = make([]byte, 64)
			binary.NativeEndian.PutUint32(out, 7)
			binary.NativeEndian.PutUint32(out[4:], 31)
			binary.NativeEndian.PutUint32(out[20:], 4096)
		case fuseLookup:
			child := map[string]uint64{"d": 2, "f": 3}[strings.TrimRight(string(buf[40:n]), "\x00")]
			if child == 0 {
				errno = unix.ENOENT
				break
			}
			out = make([]byte, 40)
			binary.NativeEndian.PutUint64(out, child)
			binary.NativeEndian.PutUint64(out[16:], keep) // 0: every walk asks anew
			out = append(out, attr(child)...)
		case fuseGetattr:
			out = append(make([]byte, 16), attr(node)...)
		case fuseOpen:
			out = make([]byte, 16)
		case fuseRead:
			if off := binary.NativeEndian.Uint64(buf[48:]); off < uint64(len(fuseText)) {
				out = []byte(fuseText)[off:]
			}
		case fuseStatfs:
			out = make([]byte, 80)
		case fuseFlush, fuseRelease:
		default:
			errno = unix.ENOSYS
		}
		h := make([]byte, 16)
		binary.NativeEndian.PutUint32(h, uint32(16+len(out)))
		binary.NativeEndian.PutUint32(h[4:], uint32(-int32(errno)))
		copy(h[8:], buf[8:16]) // whom it answers
		_, _ = unix.Write(fd, append(h, out...))
	}
}

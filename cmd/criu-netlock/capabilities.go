package main

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early"
	"github.com/criu-netlock/criu-netlock/netlock/config"
)

// shedCapabilities gives up, in all threads, every capability that early.Needs does not have.
// What the process executes from here on gets no more than it has left and lends, root's or not.
func shedCapabilities(lends uint64) error {
	hdr, data, more, err := capabilities(early.Needs, lends)
	if err != nil {
		return err
	}
	if sealed, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); err == nil && sealed == 1 && !more {
		return nil // package early has done it
	}
	if _, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); errno != 0 {
		return errno
	}
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&hdr)), uintptr(unsafe.Pointer(&data[0])), 0); errno != 0 {
		return errno
	}
	return nil
}

// shedAsRoot is shedCapabilities for a process that starts others. What anybody but root
// starts may get capabilities from its file, which it shall.
func shedAsRoot() error {
	if unix.Geteuid() != 0 {
		return nil
	}
	return shedCapabilities(early.Lends)
}

// shedInside gives up what is not needed in the one namespace that this thread has entered,
// for good: the thread, which cannot leave it any more, ends with its goroutine. The others
// stay where they are and only wait.
func shedInside(cfg config.Config) error {
	lends := early.Lends
	if cfg.Backend == config.NFT {
		lends = 0
	}
	hdr, data, _, err := capabilities(early.NeedsInside, lends)
	if err != nil {
		return err
	}
	return unix.Capset(&hdr, &data[0])
}

// capabilities are those of this thread that are needed, or lent to what it executes, and whether
// it has more.
func capabilities(needs, lends uint64) (hdr unix.CapUserHeader, data [2]unix.CapUserData, more bool, err error) {
	hdr.Version = unix.LINUX_CAPABILITY_VERSION_3
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return hdr, data, false, err
	}
	has := data
	for i := range data {
		d := &data[i]
		d.Effective &= uint32(needs >> (32 * i))
		d.Permitted &= uint32((needs | lends) >> (32 * i))
		d.Inheritable &= d.Permitted
	}
	return hdr, data, has != data, nil
}

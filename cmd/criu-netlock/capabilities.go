package main

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// shedCapabilities gives up, in all threads, every capability but those that a process
// which stays needs: to enter namespaces, to change their rules, to look at their tasks, for
// legacy iptables, and to read a configuration wherever it is. What the process executes
// from here on gets no more than it has left, root's or not.
func shedCapabilities() error {
	needs := []int{unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN, unix.CAP_SYS_PTRACE, unix.CAP_NET_RAW, unix.CAP_DAC_READ_SEARCH}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var has [2]unix.CapUserData
	if err := unix.Capget(&hdr, &has[0]); err != nil {
		return err
	}
	var keep [2]uint32
	for _, c := range needs {
		keep[c/32] |= 1 << (c % 32)
	}
	for i := range has {
		has[i].Permitted &= keep[i]
		has[i].Effective &= keep[i]
		has[i].Inheritable = 0
	}
	if _, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); errno != 0 {
		return errno
	}
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&hdr)), uintptr(unsafe.Pointer(&has[0])), 0); errno != 0 {
		return errno
	}
	return nil
}

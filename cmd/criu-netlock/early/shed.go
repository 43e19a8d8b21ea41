//go:build amd64 || arm64

package early

import (
	"syscall"
	"unsafe"
)

// What shed works with.
var (
	capHeader = struct {
		version uint32
		pid     int32
	}{version: 0x20080522} // _LINUX_CAPABILITY_VERSION_3
	capData [2]struct{ effective, permitted, inheritable uint32 }
)

// shed gives up, in a hook that does its work itself, what no hook needs: while there is
// one thread, which costs nothing. Where it fails, package main tries again, and tells.
func shed() {
	if euid() != 0 {
		return // what it executes has what its file gives it
	}
	header, data := uintptr(unsafe.Pointer(&capHeader)), uintptr(unsafe.Pointer(&capData))
	if _, _, errno := syscall.RawSyscall(syscall.SYS_CAPGET, header, data, 0); errno != 0 {
		return
	}
	for i := range capData {
		d, half := &capData[i], 32*i
		d.effective &= uint32(Needs >> half)
		d.permitted &= uint32((Needs | Lends) >> half)
		d.inheritable &= d.permitted
	}
	const noNewPrivs = 38 // PR_SET_NO_NEW_PRIVS
	_, _, _ = syscall.RawSyscall6(syscall.SYS_PRCTL, noNewPrivs, 1, 0, 0, 0, 0)
	_, _, _ = syscall.RawSyscall(syscall.SYS_CAPSET, header, data, 0)
}

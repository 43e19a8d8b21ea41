package nfnl

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Park closes a netlink socket without waiting for the RCU grace period that the
// close of an nf_tables socket waits for after a delete, even if the process exits
// at once.
//
// The socket becomes a registered file of an io_uring that does nothing else. When
// the ring's descriptor goes, with the process at the latest, a worker of the
// kernel tears the ring down and drops the file: the wait is the worker's. Nothing
// leaks, since the ring dies with its descriptor. Where io_uring is missing or
// forbidden (kernel.io_uring_disabled), the socket is closed here and now.
func Park(fd int) {
	defer unix.Close(fd)
	var params [120]byte // struct io_uring_params, all zero
	ring, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return
	}
	files := [1]int32{int32(fd)}
	const registerFiles = 2 // IORING_REGISTER_FILES
	_, _, _ = unix.Syscall6(unix.SYS_IO_URING_REGISTER, ring, registerFiles, uintptr(unsafe.Pointer(&files)), 1, 0, 0)
	unix.Close(int(ring))
}

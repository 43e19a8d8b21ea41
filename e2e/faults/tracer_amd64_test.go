package faults

import "golang.org/x/sys/unix"

// skipCall makes the kernel not make the call at whose beginning a thread is.
func skipCall(tid int) error {
	var r unix.PtraceRegs
	if err := unix.PtraceGetRegs(tid, &r); err != nil {
		return err
	}
	r.Orig_rax = ^uint64(0)
	return unix.PtraceSetRegs(tid, &r)
}

// setResult changes what the call at whose end a thread is returns.
func setResult(tid, result int) error {
	var r unix.PtraceRegs
	if err := unix.PtraceGetRegs(tid, &r); err != nil {
		return err
	}
	r.Rax = uint64(result)
	return unix.PtraceSetRegs(tid, &r)
}

// traceable: the tracer knows this machine's registers and system calls.
const traceable = true

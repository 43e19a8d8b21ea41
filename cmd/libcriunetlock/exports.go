//go:build clibrary

package main

// #cgo LDFLAGS: -ldl -lpthread
// #include <stddef.h>
// #include <stdint.h>
import "C"

import (
	"fmt"
	"unsafe"

	"github.com/criu-netlock/criu-netlock/cmd/internal/wire"
	"github.com/criu-netlock/criu-netlock/netlock"
)

var all checkpoints

// call runs f and makes of its error what C returns, and the text.
func call(text *C.char, size C.size_t, f func() error) C.int {
	err := func() (err error) {
		defer func() {
			if r := recover(); r != nil {
				err = fmt.Errorf("criu-netlock has panicked: %v", r)
			}
		}()
		return f()
	}()
	if err == nil {
		return 0
	}
	b := unsafe.Slice((*byte)(unsafe.Pointer(text)), size)
	b[copy(b[:size-1], wire.OneLine(err.Error()))] = 0
	return -C.int(max(1, netlock.ExitCode(err)))
}

//export criuNetlockInit
func criuNetlockInit(restore, pid, leaveRunning, logFD, rulesNotDumped C.int, config, guard *C.char, id *C.uint64_t, text *C.char, size C.size_t) C.int {
	return call(text, size, func() error {
		o := opts{restore: restore != 0, pid: int(pid), leaveRunning: leaveRunning != 0, logFD: int(logFD), rulesNotDumped: rulesNotDumped != 0, config: C.GoString(config), guard: C.GoString(guard)}
		n, err := all.begin(o)
		*id = C.uint64_t(n)
		return err
	})
}

//export criuNetlockNotify
func criuNetlockNotify(id C.uint64_t, action *C.char, pid C.int, text *C.char, size C.size_t) C.int {
	return call(text, size, func() error { return all.notify(uint64(id), C.GoString(action), int(pid)) })
}

//export criuNetlockClose
func criuNetlockClose(id C.uint64_t, ret C.int, text *C.char, size C.size_t) C.int {
	wrong := call(text, size, func() error { return all.end(uint64(id), int(ret)) })
	if ret < 0 || wrong == 0 {
		return ret
	}
	return wrong
}

//go:build !amd64

package faults

import (
	"strconv"

	"golang.org/x/sys/unix"
)

// traceable: the tracer knows this machine's registers and system calls.
const traceable = false

type call struct{ errnos []unix.Errno }

func callName(nr int) string   { return strconv.Itoa(nr) }
func noise(int) bool           { return false }
func calls() map[int]call      { return nil }
func skipCall(int) error       { return unix.ENOSYS }
func setResult(int, int) error { return unix.ENOSYS }

package netlock

import (
	"strings"

	"golang.org/x/sys/unix"
)

var capNames = map[int]string{
	unix.CAP_SYS_ADMIN:  "CAP_SYS_ADMIN",
	unix.CAP_NET_ADMIN:  "CAP_NET_ADMIN",
	unix.CAP_SYS_PTRACE: "CAP_SYS_PTRACE",
	unix.CAP_NET_RAW:    "CAP_NET_RAW",
}

// HasCapability tells whether the calling thread has a capability in effect.
func HasCapability(c int) bool {
	var data [2]unix.CapUserData
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	return data[c/32].Effective&(1<<(c%32)) != 0
}

// CapabilityName is the kernel's name of one of the capabilities we need.
func CapabilityName(c int) string { return capNames[c] }

// MissingCapability words what to do after EPERM: which of caps is missing, or
// that none is.
func MissingCapability(caps ...int) string {
	var missing, names []string
	for _, c := range caps {
		names = append(names, capNames[c])
		if !HasCapability(c) {
			missing = append(missing, capNames[c])
		}
	}
	if len(missing) == 0 {
		verb := " are there"
		if len(names) == 1 {
			verb = " is there"
		}
		return strings.Join(names, " and ") + verb + ": a security module, a seccomp filter or another user namespace forbids it"
	}
	return "run with " + strings.Join(missing, " and ")
}

// errnoName is the kernel's name of an error number.
func errnoName(no unix.Errno) string { return unix.ErrnoName(no) }

package main

// Kernels that lack a part, or a container's seccomp filter that forbids it: the program
// runs under a filter of this test's that answers some system calls with an error.

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// refusal is a system call, the low halves of its arguments that matter, and the answer.
type refusal struct {
	nr    uint32
	args  map[int]uint32
	errno unix.Errno
}

// The refusals, by the name that a test gives its child in envRefuse.
func refusals() map[string]refusal {
	netfilter := map[int]uint32{0: unix.AF_NETLINK, 2: unix.NETLINK_NETFILTER}
	return map[string]refusal{
		"netfilter-unsupported": {unix.SYS_SOCKET, netfilter, unix.EPROTONOSUPPORT},
		"netfilter-forbidden":   {unix.SYS_SOCKET, netfilter, unix.EPERM},
		"netfilter-acces":       {unix.SYS_SOCKET, netfilter, unix.EACCES},
		"io_uring-forbidden":    {unix.SYS_IO_URING_SETUP, nil, unix.EPERM},
		"io_uring-missing":      {unix.SYS_IO_URING_SETUP, nil, unix.ENOSYS},
		"io_uring-register":     {unix.SYS_IO_URING_REGISTER, nil, unix.EPERM},
		"no-pidfd-netns":        {unix.SYS_IOCTL, map[int]uint32{1: 0xFF04}, unix.ENOTTY},
		"no-pidfd-netns-old":    {unix.SYS_IOCTL, map[int]uint32{1: 0xFF04}, unix.EINVAL},
		"pidfd-missing":         {unix.SYS_PIDFD_OPEN, nil, unix.ENOSYS},
		"setns-forbidden":       {unix.SYS_SETNS, nil, unix.EPERM},
		"unshare-forbidden":     {unix.SYS_UNSHARE, nil, unix.EPERM},
		"openat2-missing":       {unix.SYS_OPENAT2, nil, unix.ENOSYS},
		"openat2-forbidden":     {unix.SYS_OPENAT2, nil, unix.EPERM},
		"close_range-missing":   {unix.SYS_CLOSE_RANGE, nil, unix.ENOSYS},
	}
}

// envRefuse makes of the test binary a program that runs another one, under a filter.
const envRefuse = "CRIU_NETLOCK_TEST_REFUSE"

// refused runs argv as execute does, with the named refusals.
func refused(t *testing.T, names string, env []string, argv ...string) result {
	t.Helper()
	netlocktest.Need(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return execute(t, append([]string{envRefuse + "=" + names}, env...), append([]string{self}, argv...)...)
}

// runRefused is the child: it puts the filters on its thread and becomes the program.
func runRefused(names string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, "test:", err)
		os.Exit(99)
	}
	runtime.LockOSThread()
	for _, name := range strings.Split(names, ",") {
		r, ok := refusals()[name]
		if !ok {
			fail(fmt.Errorf("no refusal %q", name))
		}
		if err := r.install(); err != nil {
			fail(err)
		}
	}
	if err := os.Unsetenv(envRefuse); err != nil {
		fail(err)
	}
	fail(syscall.Exec(os.Args[1], os.Args[1:], os.Environ()))
}

func (r refusal) install() error {
	const (
		nrAt, argsAt = 0, 16 // in struct seccomp_data
		load         = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal        = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		answer       = unix.BPF_RET | unix.BPF_K
	)
	type test struct{ at, want uint32 }
	tests := []test{{nrAt, r.nr}}
	low := uint32(0)
	if one := [2]byte{0, 1}; *(*uint16)(unsafe.Pointer(&one)) == 1 {
		low = 4 // big endian
	}
	for i, v := range r.args {
		tests = append(tests, test{argsAt + 8*uint32(i) + low, v})
	}
	var f []unix.SockFilter
	for i, c := range tests {
		left := len(tests) - i - 1
		f = append(f, unix.SockFilter{Code: load, K: c.at}, unix.SockFilter{Code: equal, K: c.want, Jf: uint8(2*left + 1)})
	}
	f = append(f,
		unix.SockFilter{Code: answer, K: unix.SECCOMP_RET_ERRNO | uint32(r.errno)},
		unix.SockFilter{Code: answer, K: unix.SECCOMP_RET_ALLOW})
	prog := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	return nil
}

// Without nf_tables auto locks by iptables, and takes that lock off again; nft alone
// does not fall back.
func TestKernelWithoutNFTables(t *testing.T) {
	netlocktest.Need(t, "iptables-legacy-restore", "iptables-legacy-save")
	const without = "netfilter-unsupported"
	s := newSpace(t)
	legacy := func() string { return s.inside(t, "iptables-legacy-save") + s.inside(t, "ip6tables-legacy-save") }
	before := s.rules(t)
	wantLegacy := func(want bool) {
		t.Helper()
		if got := strings.Count(legacy(), "-j CRIU-NETLOCK-"); (got == 4) != want || (got == 0) == want {
			t.Errorf("%d jumps of a legacy lock; locked %v is wanted:\n%s", got, want, legacy())
		}
		if after := s.rules(t); after != before {
			t.Errorf("rules of nf_tables were changed:\n%s", after)
		}
	}
	env := "CRIU_NETLOCK_CONFIG=" + file(t, "c", `backend = "nft"`)
	for _, argv := range [][]string{{"lock", "--backend", "nft", "--pid", s.pid}} {
		refused(t, without, nil, append([]string{program}, argv...)...).oneError(t, 6, "nft", "not supported here")
	}
	for _, action := range []string{"network-lock", "pre-dump", "pre-restore"} {
		refused(t, without, append(hookEnv(action, s.pid), env), program).oneError(t, 6, "nft")
	}
	wantLegacy(false)

	refused(t, without, nil, program, "check", "--pid", s.pid).want(t, 0, "warning  backend nft: ", "ok       backend = auto: locks by iptables-legacy", "can be locked")
	refused(t, without, nil, program, "lock", "--pid", s.pid).want(t, 0, "): locked (iptables-legacy)")
	wantLegacy(true)
	refused(t, without, nil, program, "status", "--pid", s.pid).want(t, 0, "backend    iptables-legacy", "intact     yes")
	refused(t, without, nil, program, "unlock", "--pid", s.pid).want(t, 0, "unlocked (iptables-legacy)")
	wantLegacy(false)

	for _, c := range []struct {
		action string
		locked bool
	}{{"pre-dump", false}, {"network-lock", true}, {"network-unlock", false}, {"setup-namespaces", true}, {"post-setup-namespaces", true}, {"post-restore", true}, {"network-unlock", false}, {"post-resume", false}} {
		r := refused(t, without, hookEnv(c.action, s.pid), program).want(t, 0)
		if c.locked && !strings.Contains(r.stderr, "backend=iptables-legacy") {
			t.Error(r)
		}
		wantLegacy(c.locked)
	}
}

// A privilege that is missing is no reason to lock in another way.
func TestForbiddenNFTables(t *testing.T) {
	netlocktest.Need(t, "iptables-legacy-save")
	s := newSpace(t)
	for _, forbidden := range []string{"netfilter-forbidden", "netfilter-acces"} {
		untouched(t, func() {
			for _, args := range [][]string{
				{"lock"}, {"lock", "--backend", "nft"}, {"lock", "--backend", "iptables"}, {"unlock"}, {"status"},
			} {
				r := refused(t, forbidden, nil, append([]string{program}, append(args, "--pid", s.pid)...)...)
				r.oneError(t, 5, "CAP_NET_ADMIN is there: a security module, a seccomp filter")
			}
			for _, action := range []string{"pre-dump", "network-lock", "network-unlock", "pre-restore", "setup-namespaces"} {
				refused(t, forbidden, hookEnv(action, s.pid), program).oneError(t, 5, "action="+action)
			}
			refused(t, forbidden, nil, program, "check").want(t, 5, "failed   backend = auto: ")
		}, s)
		if out := s.inside(t, "iptables-legacy-save") + s.inside(t, "ip6tables-legacy-save"); strings.Contains(out, "CRIU-NETLOCK") {
			t.Errorf("%s: locked all the same:\n%s", forbidden, out)
		}
	}
}

// What is only a faster way has another one beside it.
func TestWaysAround(t *testing.T) {
	for _, without := range []string{
		"io_uring-forbidden", "io_uring-missing", "io_uring-register", "no-pidfd-netns", "no-pidfd-netns-old",
		"openat2-missing", "openat2-forbidden", "io_uring-forbidden,no-pidfd-netns",
	} {
		t.Run(without, func(t *testing.T) {
			s := newSpace(t)
			before := s.rules(t)
			for _, c := range []struct {
				env    []string
				args   []string
				locked bool
			}{
				{hookEnv("pre-dump", s.pid), nil, false},
				{hookEnv("network-lock", s.pid), nil, true},
				{hookEnv("network-unlock", s.pid), nil, false},
				{hookEnv("setup-namespaces", s.pid), nil, true},
				{nil, []string{"status", "--pid", s.pid}, true},
				{nil, []string{"unlock", "--pid", s.pid}, false},
				{nil, []string{"lock", "--netns", "/proc/" + s.pid + "/ns/net"}, true},
				{hookEnv("post-restore", s.pid), nil, true},
				{hookEnv("network-unlock", s.pid), nil, false},
				{hookEnv("post-resume", s.pid), nil, false},
				{nil, []string{"check", "--pid", s.pid}, false},
			} {
				refused(t, without, c.env, append([]string{program}, c.args...)...).want(t, 0)
				s.wantLocked(t, c.locked)
				if after := s.rules(t); !c.locked && after != before {
					t.Errorf("%v: this is left:\n%s", c.args, after)
				}
			}
			// Which is worth nothing if the filter did not bite.
			if strings.HasPrefix(without, "no-pidfd-netns") {
				refused(t, without, nil, program, "check").want(t, 0, "a task's namespace by setns on a pidfd")
				refused(t, without+",setns-forbidden", nil, program, "lock", "--pid", s.pid).oneError(t, 5, "CAP_SYS_PTRACE")
			}
		})
	}
}

// What there is no way around is named.
func TestNoWayAround(t *testing.T) {
	s := newSpace(t)
	untouched(t, func() {
		for _, c := range []struct {
			without string
			code    int
			says    string
			actions []string
		}{
			{"pidfd-missing", 6, "Linux 5.8 or newer is needed", []string{"network-lock", "pre-dump"}},
			{"setns-forbidden", 5, "CAP_SYS_ADMIN is there: ", []string{"network-lock", "pre-dump", "network-unlock"}},
			{"unshare-forbidden", 5, "CAP_SYS_ADMIN is there: ", []string{"pre-dump", "pre-restore"}},
		} {
			for _, a := range c.actions {
				refused(t, c.without, hookEnv(a, s.pid), program).oneError(t, c.code, c.says)
			}
			refused(t, c.without, nil, program, "check").want(t, c.code, "failed   ")
		}
	}, s)
}

// The filters themselves: each answers what it is to answer, and nothing else.
func TestRefusals(t *testing.T) {
	netlocktest.Need(t, "strace")
	s := newSpace(t)
	for name, call := range map[string]string{"io_uring-missing": "io_uring_setup", "no-pidfd-netns": "ioctl", "netfilter-unsupported": "socket"} {
		trace := filepath.Join(t.TempDir(), "trace")
		hook(t, "network-lock", s.pid).want(t, 0)
		refused(t, name, hookEnv("network-unlock", s.pid), "/usr/bin/strace", "-f", "-o", trace, "-e", "trace="+call, program)
		b, err := os.ReadFile(trace)
		if err != nil {
			t.Fatal(err)
		}
		if want := " = -1 " + unix.ErrnoName(refusals()[name].errno); !strings.Contains(string(b), want) {
			t.Errorf("%s: no%q in\n%s", strconv.Quote(name), want, b)
		}
	}
	hook(t, "network-unlock", s.pid).want(t, 0)
}

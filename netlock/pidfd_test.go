package netlock

import (
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The way of kernels without PIDFD_GET_NET_NAMESPACE leads to the same namespace, and
// the thread that went there is back.
func TestNetnsBySetns(t *testing.T) {
	c := exec.Command("cat")
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET}
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { in.Close(); _ = c.Wait() }()
	pidfd, err := unix.PidfdOpen(c.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	inode := func(fd int) uint64 {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		return st.Ino
	}
	a, err := netnsOfPidfd(pidfd)
	if err != nil {
		t.Fatal(err)
	}
	b, err := netnsBySetns(pidfd)
	if err != nil {
		t.Fatal(err)
	}
	if x, y := inode(a), inode(b); x != y {
		t.Errorf("net:[%d] by the pidfd, net:[%d] by setns", x, y)
	}
	var own, main unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &own); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat("/proc/self/ns/net", &main); err != nil {
		t.Fatal(err)
	}
	if own.Ino != main.Ino {
		t.Error("a thread stayed in the other namespace")
	}
}

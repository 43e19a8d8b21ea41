package guard

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// Whatever keeps a namespace alive beside this process is found, and nothing else is.
func TestKeepers(t *testing.T) {
	netlocktest.Need(t, "nsenter", "unshare", "mount")
	if !seesAll() {
		netlocktest.CannotRun(t, "not all processes of this machine can be seen")
	}
	pid, kill := netlocktest.NewTask(t)
	ns, err := netlock.FromPID(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	k := keepers{ns: ns}
	expect := func(what string, want bool) {
		t.Helper()
		if fresh := (&keepers{ns: ns}).any(); fresh != want {
			t.Errorf("%s: found %v", what, fresh)
		}
		if err := netlocktest.Until(func() (bool, error) { return k.any() == want, nil }); err != nil {
			t.Errorf("%s, after what was found before: %v", what, err)
		}
	}
	file, err := os.Open(fdName(ns.FD()))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var socket *os.File
	if err := ns.Do(func() error {
		c, err := net.ListenPacket("udp4", "127.0.0.1:0")
		if err != nil {
			return err
		}
		defer c.Close()
		socket, err = c.(*net.UDPConn).File()
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	// at is a path at which others see the namespace.
	at := filepath.Join(t.TempDir(), "net")
	if err := os.WriteFile(at, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	start := func(extra []*os.File, args ...string) (end func()) {
		t.Helper()
		c := exec.Command(args[0], args[1:]...)
		c.ExtraFiles = extra
		out, err := c.StdoutPipe()
		if err == nil {
			err = c.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		end = func() {
			_ = c.Process.Kill()
			_ = c.Wait()
		}
		t.Cleanup(end)
		if _, err := out.Read(make([]byte, 1)); err != nil {
			t.Fatalf("%q: %v", args, err)
		}
		return end
	}
	const ready = "echo; exec sleep 600"

	expect("a task", true)
	kill()
	expect("nobody", false)
	end := start([]*os.File{file}, "sh", "-c", ready)
	expect("a descriptor", true)
	end()
	expect("nobody", false)
	end = start([]*os.File{socket}, "sh", "-c", ready)
	expect("a socket", true)
	end()
	expect("nobody", false)
	// The first process of the new mount namespace has the descriptor no more when it says so.
	end = start([]*os.File{file}, "unshare", "-m", "sh", "-c", "mount --bind /proc/self/fd/3 "+at+" && exec 3<&- && "+ready)
	expect("a mount in another mount namespace", true)
	end()
	expect("nobody", false)

	if err := unix.Mount(fdName(ns.FD()), at, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	unmount := func() error { return unix.Unmount(at, unix.MNT_DETACH) }
	t.Cleanup(func() {
		if err := unmount(); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Error(err)
		}
	})
	expect("a mount", true)
	mounted, err := os.Open(at)
	if err != nil {
		t.Fatal(err)
	}
	defer mounted.Close()
	end = start([]*os.File{mounted}, "sh", "-c", ready)
	if err := unmount(); err != nil {
		t.Fatal(err)
	}
	expect("a descriptor of what was mounted", true)
	end()
	expect("nobody", false)
}

func fdName(fd int) string { return filepath.Join("/proc/self/fd", strconv.Itoa(fd)) }

package guard

import (
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRestorerAt(t *testing.T) {
	const maps = `10000-18000 rwxp 00000000 00:00 0 
400000-401000 r-xp 00001000 08:01 1234 /bin/task
500000-501000 rwxp 00001000 08:01 1234 /bin/task
600000-601000 rw-p 00000000 00:00 0 [heap]
nonsense
`
	for pc, want := range map[uint64]bool{
		0x10000: true, 0x17fff: true, 0x18000: false, 0xffff: false, // to the end, and no further
		0x400100: false, 0x500100: false, // a program's own, writable or not
		0x600100: false, 0: false,
	} {
		if got := restorerAt(maps, pc); got != want {
			t.Errorf("%#x: %v", pc, got)
		}
	}
}

// A task that runs is let go; one that is dead, or of which nothing can be read, is not.
func TestLetGo(t *testing.T) {
	task := exec.Command("sleep", "600")
	if err := task.Start(); err != nil {
		t.Fatal(err)
	}
	pid := task.Process.Pid
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if !letGo(pid, fd) {
		t.Error("a task that sleeps has not been let go")
	}
	if err := task.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitPidfd(fd, -1)
	if letGo(pid, fd) {
		t.Error("a zombie has been let go")
	}
	_ = task.Wait()
	if letGo(pid, fd) {
		t.Error("a task that is gone has been let go")
	}
	// While it was looked at another one took the pid.
	if letGo(unix.Getpid(), fd) {
		t.Error("a dead task has been let go")
	}
}

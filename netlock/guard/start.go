package guard

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
)

// Arg is the program's first argument when it is to be a guard.
const Arg = "guard"

// The descriptors that a guard is started with; it opens nothing by a pid.
const (
	fdCRIU = 3 + iota
	fdTask
	fdNetns
	fdReady
	fdEnd
)

// FirstFree is the first descriptor that is none of the Checkpoint's.
const FirstFree = fdEnd

// Start runs exe as a guard: in a session of its own, with none of our descriptors but
// the Checkpoint's, so that neither CRIU's log nor a terminal waits for it. It returns
// when the guard is in its place, or after the wait with an error; with a wait of 0 at
// once. The guard is not to be waited for: it lives on when the hook has ended.
func Start(exe string, c Checkpoint, env []string, waitReady time.Duration) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	defer unix.Close(pipe[0])
	n := null.Fd()
	pid, _, err := syscall.StartProcess(exe, append([]string{"criu-netlock", Arg}, c.args()...), &syscall.ProcAttr{
		Dir: "/", Env: env,
		Files: []uintptr{n, n, n, uintptr(c.CRIUfd), uintptr(c.TaskFD), uintptr(c.NS.FD()), uintptr(pipe[1])},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	unix.Close(pipe[1])
	if err != nil {
		return fmt.Errorf("start the guard: %w", err)
	}
	if waitReady == 0 {
		return nil
	}
	p := []unix.PollFd{{Fd: int32(pipe[0]), Events: unix.POLLIN}}
	until := time.Now().Add(waitReady)
	for {
		k, err := unix.Poll(p, max(0, int(time.Until(until).Milliseconds())))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("wait for the guard, pid %d: %w", pid, err)
		case k == 0:
			return fmt.Errorf("the guard, pid %d, is not ready after %v", pid, waitReady)
		}
		var b [1]byte
		if n, _ := unix.Read(pipe[0], b[:]); n != 1 {
			return fmt.Errorf("the guard, pid %d, ended at once: the system log has the reason", pid)
		}
		return nil
	}
}

func (c Checkpoint) args() []string {
	return []string{string(c.Phase), strconv.Itoa(c.CRIU), strconv.Itoa(c.Task), flag(c.WasLocked), flag(c.WasFrozen)}
}

func flag(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// Inherited is the Checkpoint that Start gave this process, and what tells it that
// the guard is ready.
func Inherited(args []string) (c Checkpoint, ready func(), err error) {
	bad := fmt.Errorf("criu-netlock %s %s: hooks start this, nobody else", Arg, strings.Join(args, " "))
	if len(args) != 5 {
		return c, nil, bad
	}
	c = Checkpoint{Phase: Phase(args[0]), CRIUfd: fdCRIU, TaskFD: fdTask, WasLocked: args[3] == "yes", WasFrozen: args[4] == "yes"}
	if c.Phase != Dump && c.Phase != Restore {
		return c, nil, bad
	}
	for i, dst := range []*int{&c.CRIU, &c.Task} {
		if *dst, err = strconv.Atoi(args[1+i]); err != nil || *dst <= 0 {
			return c, nil, bad
		}
	}
	for fd := fdCRIU; fd < fdEnd; fd++ {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return c, nil, bad
		}
	}
	if c.NS, err = netlock.FromFD(fdNetns); err != nil {
		return c, nil, err
	}
	unix.Close(fdNetns)
	return c, func() {
		_, _ = unix.Write(fdReady, []byte{1}) // the hook may have gone
		unix.Close(fdReady)
	}, nil
}

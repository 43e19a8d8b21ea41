package guard

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// Arg is the program's first argument when it is to be a guard, and StartArg when it is
// to start one and to end: a guard that a long-lived client started would be its child,
// and dead one day, a zombie.
const (
	Arg      = "guard"
	StartArg = "guard-start"
)

// The descriptors that a guard is started with; it opens nothing by a pid.
const (
	fdCRIU = 3 + iota
	fdTask
	fdClient
	fdNetns
	fdQueue
	fdBoard
	fdReady
	fdEnd
)

// startVersion is of the arguments, the descriptors and the board: a program that links the package
// may find a guard of another version installed, which has to refuse.
const startVersion = "2"

// FirstFree is the first descriptor that is none of the Checkpoint's.
const FirstFree = fdEnd

// Start runs exe as a guard: in a session of its own, with none of our descriptors but
// the Checkpoint's, so that neither CRIU's log nor a terminal waits for it. It returns
// when the guard is in its place, or after the wait with an error; with a wait of 0 at
// once. The guard is not to be waited for: it lives on when the hook has ended. A client has a
// Link to it.
func Start(exe string, c Checkpoint, env []string, waitReady time.Duration) (link *Link, err error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return link, err
	}
	defer null.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return link, err
	}
	boardFD := -1
	if c.Client != 0 {
		b, f, err := newBoard()
		if err != nil {
			unix.Close(pair[0])
			unix.Close(pair[1])
			return nil, err
		}
		defer f.Close() // the guard has it
		link, boardFD = &Link{netns: c.NS.Inode(), id: c.id(), fd: pair[0], board: b}, int(f.Fd())
	}
	files := []uintptr{null.Fd(), null.Fd(), null.Fd()}
	for _, fd := range []int{c.CRIUfd, c.TaskFD, c.ClientFD, c.NS.FD(), c.queueFD(), boardFD, pair[1]} {
		if fd < 0 {
			fd = int(null.Fd())
		}
		files = append(files, uintptr(fd))
	}
	arg := Arg
	if c.Client != 0 {
		arg = StartArg
	}
	pid, err := run(exe, arg, c.args(), env, files)
	unix.Close(pair[1])
	if err != nil {
		if link == nil {
			unix.Close(pair[0])
		}
		link.Over(Done)
		return nil, err
	}
	if c.Client == 0 {
		defer unix.Close(pair[0])
	} else {
		go func() {
			for {
				if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
					return // somebody else may have reaped it
				}
			}
		}()
	}
	if waitReady == 0 {
		return link, nil
	}
	p := []unix.PollFd{{Fd: int32(pair[0]), Events: unix.POLLIN}}
	until := time.Now().Add(waitReady)
	for {
		k, err := unix.Poll(p, max(0, int(time.Until(until).Milliseconds())))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return link, fmt.Errorf("wait for the guard: %w", err)
		case k == 0:
			return link, fmt.Errorf("the guard is not ready after %v", waitReady)
		}
		var b [1]byte
		if n, _ := unix.Read(pair[0], b[:]); n != 1 {
			return link, errors.New("the guard ended at once: the system log has the reason")
		}
		return link, nil
	}
}

func run(exe, arg string, args, env []string, files []uintptr) (int, error) {
	pid, _, err := syscall.StartProcess(exe, append([]string{"criu-netlock", arg}, args...), &syscall.ProcAttr{
		Dir: "/", Env: env, Files: files, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, fmt.Errorf("start the guard: %w", err)
	}
	return pid, nil
}

// StartAgain is all that a process does that was started with StartArg.
func StartAgain(args []string) error {
	if err := CloseOnExecFrom(fdEnd); err != nil {
		return err
	}
	var files []uintptr
	for fd := uintptr(0); fd < fdEnd; fd++ {
		files = append(files, fd)
	}
	_, err := run("/proc/self/exe", Arg, args, os.Environ(), files)
	return err
}

// CloseOnExecFrom has what this process starts get none of its descriptors from first on, but
// those that it is given. A connection to CRIU may be among what we have inherited, of
// which somebody shall notice the end.
func CloseOnExecFrom(first int) error {
	if unix.CloseRange(uint(first), math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) == nil {
		return nil
	}
	names, err := os.ReadDir("/proc/self/fd") // Linux before 5.11, or a filter that does not know it
	if err != nil {
		return err
	}
	for _, name := range names {
		if fd, err := strconv.Atoi(name.Name()); err == nil && fd >= first {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

func (c Checkpoint) args() []string {
	return []string{
		string(c.Phase), strconv.Itoa(c.CRIU), strconv.Itoa(c.Task), flag(c.WasLocked), flag(c.WasFrozen),
		strconv.Itoa(c.Client), string(c.Policy), strconv.Itoa(c.queueNumber()), startVersion,
	}
}

func (c Checkpoint) queueFD() int {
	if c.Queue == nil {
		return -1
	}
	return c.Queue.FD()
}

func (c Checkpoint) queueNumber() int {
	if c.Queue == nil {
		return -1
	}
	return int(c.Queue.Number())
}

func flag(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// Line is a guard's to who has started it.
type Line struct {
	// Ready tells that the guard is in its place.
	Ready func()
	// Words are what a client says.
	Words <-chan Word
}

// Inherited is the Checkpoint that Start gave this process, and the line to who called it.
func Inherited(args []string) (c Checkpoint, line Line, err error) {
	bad := fmt.Errorf("criu-netlock %s %s: hooks start this, nobody else", Arg, strings.Join(args, " "))
	if len(args) != 9 || args[8] != startVersion {
		return c, line, bad
	}
	c = Checkpoint{Phase: Phase(args[0]), CRIUfd: fdCRIU, TaskFD: fdTask, ClientFD: fdClient, WasLocked: args[3] == "yes", WasFrozen: args[4] == "yes", Policy: Policy(args[6])}
	if c.Phase != Dump && c.Phase != Restore {
		return c, line, bad
	}
	for _, n := range []struct {
		arg string
		to  *int
	}{{args[1], &c.CRIU}, {args[2], &c.Task}, {args[5], &c.Client}} {
		if *n.to, err = strconv.Atoi(n.arg); err != nil || *n.to < 0 {
			return c, line, bad
		}
	}
	queue, err := strconv.Atoi(args[7])
	if err != nil || queue > math.MaxUint16 {
		return c, line, bad
	}
	if c.Task == 0 || c.CRIU == 0 && c.Client == 0 {
		return c, line, bad
	}
	for fd := fdCRIU; fd < fdEnd; fd++ {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return c, line, bad
		}
	}
	if c.NS, err = netlock.FromFD(fdNetns); err != nil {
		return c, line, err
	}
	unix.Close(fdNetns)
	for _, of := range []struct {
		pid int
		fd  *int
	}{{c.CRIU, &c.CRIUfd}, {c.Client, &c.ClientFD}} {
		if of.pid == 0 { // /dev/null holds its place
			unix.Close(*of.fd)
			*of.fd = -1
		}
	}
	if queue < 0 {
		unix.Close(fdQueue)
	} else {
		c.Queue = nfnl.InheritQueue(fdQueue, uint16(queue))
	}
	if c.Client == 0 {
		unix.Close(fdBoard)
	} else if c.board, err = mapBoard(fdBoard); err != nil {
		return c, line, err
	}
	words := make(chan Word, 1)
	line.Words = words
	line.Ready = func() {
		_ = unix.Sendto(fdReady, []byte{1}, unix.MSG_NOSIGNAL, nil) // the hook may have gone
		if c.Client == 0 {
			unix.Close(fdReady)
			return
		}
		go func() {
			var b [1]byte
			for {
				n, err := unix.Read(fdReady, b[:])
				switch {
				case n == 1:
					words <- Word(b[0])
					return
				case err != unix.EINTR: // it has gone, which its pidfd tells too
					return
				}
			}
		}()
	}
	return c, line, nil
}

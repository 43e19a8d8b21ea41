package main

// Who a hook works for.

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
)

// criu is the CRIU that calls a hook: its pid, and a pidfd of it.
type criu struct{ pid, fd int }

var errCRIUGone = errors.New("CRIU is gone, and would not unlock")

// findCRIU is the process whose image directory the hook was given, if it is one of our
// ancestors: a script around us would pass for CRIU otherwise, and end at once. CRIU always names
// itself there; a program that calls the hooks like it and names a directory is our parent.
// There may be none, where somebody tries the hook. The error is errCRIUGone.
func findCRIU(ev action.Event) (*criu, error) {
	parent := os.Getppid()
	named := early.CRIU(ev.ImageDir)
	pid, err := strconv.Atoi(named)
	switch {
	case named == "" && ev.ImageDir != "":
		pid = parent
	case err != nil:
		return nil, nil
	}
	if pid <= 1 {
		return nil, nil
	}
	// An orphan that init has taken in had a CRIU. With another parent a pid that is nobody's was
	// perhaps never CRIU's.
	orphan := parent == 1
	fd, err := unix.PidfdOpen(pid, 0)
	switch {
	case err == unix.ESRCH && orphan:
		return nil, fmt.Errorf("%w: pid %d", errCRIUGone, pid)
	case err != nil:
		return nil, nil // somebody who is no process
	}
	c := &criu{pid, fd}
	const generations = 8
	up := os.Getppid() // once more: what it was may have gone before there was a pidfd
	for range generations {
		if up == pid {
			return c, nil
		}
		if up = netlock.ParentOf(up); up <= 1 {
			break
		}
	}
	defer c.close()
	if err := c.alive(); err != nil && orphan {
		return nil, err
	}
	return nil, nil
}

// alive returns errCRIUGone when CRIU is dead, or a zombie.
func (c *criu) alive() error {
	if c != nil && netlock.Dead(c.fd) {
		return fmt.Errorf("%w: pid %d", errCRIUGone, c.pid)
	}
	return nil
}

func (c *criu) close() {
	if c != nil {
		unix.Close(c.fd)
	}
}

// caller is who a lock of this hook's bears: CRIU, or who started us.
func (c *criu) caller(ev action.Event) netlock.Caller {
	if c != nil {
		return netlock.CallerOf(c.pid).For(ev.PID)
	}
	who := netlock.CallerOf(os.Getppid()).For(ev.PID)
	if who.PID == 1 {
		who.Start = 0 // who takes in orphans; who started us is not to be known any more
	}
	return who
}

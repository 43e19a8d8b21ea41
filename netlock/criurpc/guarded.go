package criurpc

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/config"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
)

// NoGuard as Options.Guard says that no guard is wanted.
const NoGuard = "none"

// ErrNoGuard is in Entry.Unguarded where the program was not found.
var ErrNoGuard = errors.New("there is no criu-netlock in PATH or /usr/local/sbin to be the guard: should this program be killed, nobody unlocks")

// readyTime is how long pre-dump waits for its guard. Nothing is frozen yet.
const readyTime = time.Second

// findGuard is the program that is to be the guard.
func findGuard(named string) (string, error) {
	if named != "" {
		return named, nil
	}
	if path, err := exec.LookPath("criu-netlock"); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"} {
		if path, err := exec.LookPath(filepath.Join(dir, "criu-netlock")); err == nil {
			return path, nil
		}
	}
	return "", ErrNoGuard
}

// guardFrom starts the guard at pre-dump, or with the first lock of a restore.
func (c *Checkpoint) guardFrom(name action.Name, rep action.Report) error {
	wait := readyTime
	switch {
	case c.o.Guard == NoGuard, c.link != nil, rep.Netns == 0: // the last is a task in our own namespace
		return nil
	case name == action.PreDump:
	case name == action.SetupNamespaces:
		wait = 0
	default:
		return nil
	}
	exe, err := findGuard(c.o.Guard)
	if err != nil {
		return err
	}
	ns, done, err := c.openHeld(c.pid)
	if err != nil {
		return err
	}
	defer done()
	criu := c.criu
	if criu == 0 && c.phase == guard.Restore {
		// CRIU forks the root task, if it is not to be our own child (rst_sibling).
		if criu = netlock.ParentOf(c.pid); criu <= 1 || criu == os.Getpid() {
			criu = 0
		}
	}
	g, err := guard.OpenFor(os.Getpid(), c.phase, ns, criu, c.pid)
	if err != nil {
		return err
	}
	defer g.Close()
	g.WasLocked, g.Policy = rep.WasLocked, c.o.OnFailedRestore
	if g.Policy == "" {
		g.Policy = guard.Previous
	}
	if guard.Beside(ns.Inode(), g.CRIU) {
		wait = readyTime // before the other one unlocks it is to know of this one
	}
	var env []string
	for _, name := range []string{config.EnvPath, "PATH"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	c.link, err = guard.Start(exe, g, env, wait)
	if c.phase == guard.Restore {
		c.link.Locks(false)
	}
	return err
}

package testbed

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Session is a root that has been entered: a mount and a pid namespace that live
// until Close, or until the process that opened it ends.
type Session struct {
	init *exec.Cmd
	stop io.Closer // its closing ends the session's pid 1
	log  bytes.Buffer
	// Work is a folder of the machine that the session sees as WorkDir.
	Work string
}

// Paths inside a session.
const (
	// WorkDir is where the session sees its Work folder.
	WorkDir = "/run/e2e"
	// BinDir is where it sees the programs under test.
	BinDir = WorkDir + "/bin"
)

// enterScript becomes the session's pid 1. pivot_root, not chroot: in a chroot
// CRIU finds no parent for the root's mount. The root is read-only, so that no
// test changes what the next one runs in; what has to be written is in tmpfs or
// in the work folder. /run/netns is made the way ip netns would. It ends with its standard input, and reaps what is orphaned.
const enterScript = `
set -e
root=$1 work=$2
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mkdir -p "$root/run/e2e" "$root/run/netns" "$root/run/lock"
mount --bind "$root/run/netns" "$root/run/netns"
mount --make-shared "$root/run/netns"
mount --bind "$work" "$root/run/e2e"
mount --bind "$work/criu" "$root/etc/criu"
mount -o remount,bind,ro "$root"
cd "$root"
pivot_root . .
umount -l .
cd /
echo entered
exec 3<&0 </dev/null >/dev/null
cat <&3 & wait $!
`

// path is what programs inside are looked up in.
const path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Enter opens a session. ctx bounds the entering only.
func (r *Root) Enter(ctx context.Context) (*Session, error) {
	work, err := os.MkdirTemp("", "criu-netlock-e2e-")
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*Session, error) {
		os.RemoveAll(work)
		return nil, fmt.Errorf("enter %s: %w", r.dir, err)
	}
	for _, d := range []string{"criu", "bin"} {
		if err := os.MkdirAll(filepath.Join(work, d), 0o755); err != nil {
			return fail(err)
		}
	}
	// What this process inherited it shall not hand on: CRIU could dump no file
	// that is open from outside of the session.
	if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fail(fmt.Errorf("close_range: %w", err))
	}
	s := &Session{Work: work}
	s.init = exec.Command("/bin/sh", "-c", enterScript, "enter", r.dir, work)
	s.init.Env = environ()
	s.init.Stderr = &s.log
	s.init.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Setpgid:    true, // an interrupt typed at the tests is theirs to handle
	}
	in, err := s.init.StdinPipe()
	if err != nil {
		return fail(err)
	}
	out, err := s.init.StdoutPipe()
	if err != nil {
		return fail(err)
	}
	if err := s.init.Start(); err != nil {
		return fail(err)
	}
	s.stop = in
	cancel := context.AfterFunc(ctx, func() { s.init.Process.Kill() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if !cancel() || line != "entered\n" {
		s.Close()
		return fail(errors.Join(ctx.Err(), errOutput(err, s.log.Bytes())))
	}
	return s, nil
}

// ownMounts gives cmd a mount namespace, and a pid namespace so that nothing it
// started outlives it.
func ownMounts(cmd *exec.Cmd) {
	argv := append([]string{"/bin/sh", "-c", `mount --make-rprivate / && mount -t proc proc /proc && "$@"`, "sh"}, cmd.Args...)
	cmd.Path, cmd.Args, cmd.Err = argv[0], argv, nil
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID}
	cmd.WaitDelay = 5 * time.Second
}

func environ(more ...string) []string {
	return append([]string{"PATH=" + path, "HOME=/root", "LC_ALL=C"}, more...)
}

// Command is a command inside the session, in the machine's network namespace.
// When ctx ends it is killed, with the process group it leads.
func (s *Session) Command(ctx context.Context, argv ...string) *exec.Cmd {
	return s.command(ctx, "", argv)
}

// CommandIn is Command in the network namespace at a path of the session.
func (s *Session) CommandIn(ctx context.Context, netns string, argv ...string) *exec.Cmd {
	return s.command(ctx, netns, argv)
}

func (s *Session) command(ctx context.Context, netns string, argv []string) *exec.Cmd {
	args := []string{"--target", strconv.Itoa(s.init.Process.Pid), "--mount", "--pid"}
	if netns != "" {
		args = append(args, "--net="+s.Path(netns))
	}
	cmd := exec.CommandContext(ctx, "nsenter", append(append(args, "--"), argv...)...)
	cmd.Env = environ()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// Run runs a command inside and returns what it printed.
func (s *Session) Run(ctx context.Context, argv ...string) (string, error) {
	return output(s.Command(ctx, argv...), argv)
}

// RunIn is Run in the network namespace at a path of the session.
func (s *Session) RunIn(ctx context.Context, netns string, argv ...string) (string, error) {
	return output(s.CommandIn(ctx, netns, argv...), argv)
}

func output(cmd *exec.Cmd, argv []string) (string, error) {
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s: %w", strings.Join(argv, " "), errOutput(err, out))
	}
	return string(out), nil
}

// Path is where the machine sees a file of the session.
func (s *Session) Path(inside string) string {
	return fmt.Sprintf("/proc/%d/root%s", s.init.Process.Pid, inside)
}

// Processes lists what runs inside beside the session's own, as "pid name".
func (s *Session) Processes() ([]string, error) {
	dirs, err := filepath.Glob(s.Path("/proc/[0-9]*"))
	if err != nil {
		return nil, err
	}
	own := map[string]bool{"1": true}
	if b, err := os.ReadFile(s.Path("/proc/1/task/1/children")); err == nil {
		for i, pid := range strings.Fields(string(b)) {
			// The first child is the cat that waits for our end; others were orphaned.
			own[pid] = i == 0
		}
	}
	var out []string
	for _, d := range dirs {
		pid := filepath.Base(d)
		comm, err := os.ReadFile(filepath.Join(d, "comm"))
		if err != nil || own[pid] {
			continue
		}
		out = append(out, pid+" "+strings.TrimSpace(string(comm)))
	}
	slices.Sort(out)
	return out, nil
}

// Mounts lists the mount points inside, sorted.
func (s *Session) Mounts() ([]string, error) {
	b, err := os.ReadFile(s.Path("/proc/1/mountinfo"))
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 {
			out = append(out, f[4])
		}
	}
	slices.Sort(out)
	return out, nil
}

// CgroupParent is the cgroup under which containers of a session belong, so that
// what they leave can be found and removed.
func (s *Session) CgroupParent() string {
	return "/" + filepath.Base(s.Work)
}

// Close ends everything that runs inside: with its pid 1 the kernel kills the
// rest, and with the last process the mounts go.
func (s *Session) Close() error {
	s.stop.Close()
	done := make(chan error, 1)
	go func() { done <- s.init.Wait() }()
	var err error
	select {
	case err = <-done:
	case <-time.After(10 * time.Second):
		s.init.Process.Kill()
		err = <-done
	}
	if err != nil {
		err = fmt.Errorf("leave the testbed: %w", errOutput(err, s.log.Bytes()))
	}
	return errors.Join(err, s.removeCgroups(), os.RemoveAll(s.Work))
}

// removeCgroups removes what a container that was killed left behind.
func (s *Session) removeCgroups() error {
	var errs []error
	tops, _ := filepath.Glob("/sys/fs/cgroup/*" + s.CgroupParent())
	for _, top := range append(tops, "/sys/fs/cgroup"+s.CgroupParent()) {
		var dirs []string
		filepath.WalkDir(top, func(p string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		slices.Reverse(dirs)
		for _, d := range dirs {
			if err := syscall.Rmdir(d); err != nil && err != syscall.ENOENT {
				errs = append(errs, fmt.Errorf("rmdir %s: %w", d, err))
			}
		}
	}
	return errors.Join(errs...)
}

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
	// apart: it has a network and a cgroup namespace too.
	apart   bool
	daemons []*daemon
	// Work is a folder of the machine that the session sees as WorkDir.
	Work string
	held *os.File // its folder, locked
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
root=$1 work=$2 apart=$3; shift 3
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
if [ -z "$apart" ]; then
	mount --rbind /sys "$root/sys"
else
	# A sysfs shows the interfaces of the network namespace that it was mounted in, a
	# cgroup file system what is below the root of the cgroup namespace.
	mounts=$(cat /proc/mounts)
	mount -t sysfs sysfs "$root/sys"
	case $mounts in *" cgroup rw,"*) mount -t tmpfs -o mode=755 cgroup "$root/sys/fs/cgroup" ;; esac
	while read -r _ at type options _; do
		case $type in
		cgroup)
			options=$(echo "$options" | tr , '\n' | grep -Ev '^(r[ow]|nosuid|nodev|noexec|relatime)$' | paste -sd,)
			mkdir "$root$at"
			mount -t cgroup -o "$options" cgroup "$root$at" ;;
		cgroup2)
			# Beside those of version 1 it is left out: with both LXC 7.0 frees twice and dies.
			[ "$at" != /sys/fs/cgroup ] || mount -t cgroup2 cgroup2 "$root$at" ;;
		esac
	done <<-MOUNTS
	$mounts
	MOUNTS
fi
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mkdir -p "$root/run/e2e" "$root/run/netns" "$root/run/lock"
mount --bind "$root/run/netns" "$root/run/netns"
mount --make-shared "$root/run/netns"
mount --bind "$work" "$root/run/e2e"
mount --bind "$work/criu" "$root/etc/criu"
for d; do
	mkdir -p "$work/state/$d"
	mount --bind "$work/state/$d" "$root/$d"
done
mount -o remount,bind,ro "$root"
cd "$root"
pivot_root . .
umount -l .
cd /
echo entered
exec 3<&0 </dev/null >/dev/null
cat <&3 & wait $!
`

// apartScript comes first in a session apart: a cgroup namespace begins where the
// process is that makes it.
const apartScript = `
set -e
enter=$1; shift
for c in /sys/fs/cgroup/"$3" /sys/fs/cgroup/*/"$3"; do
	[ ! -d "$c" ] || echo 0 >"$c/cgroup.procs"
done
exec unshare --cgroup /bin/sh -c "$enter" enter "$@"
`

// path is what programs inside are looked up in.
const path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Enter opens a session. ctx bounds the entering only.
func (r *Root) Enter(ctx context.Context) (*Session, error) { return r.enter(ctx, false) }

// workDir makes a session's folder, which is locked as long as it is in use, and removes
// those whose processes were killed.
func workDir() (dir string, held *os.File, err error) {
	const pattern = "criu-netlock-testbed-"
	take := func(dir string) (*os.File, error) {
		f, err := os.Open(dir)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			return nil, fmt.Errorf("flock %s: %w", dir, err)
		}
		return f, nil
	}
	stale, _ := filepath.Glob(filepath.Join(os.TempDir(), pattern+"*"))
	for _, d := range stale {
		if f, err := take(d); err == nil {
			os.RemoveAll(d)
			f.Close()
		}
	}
	for range 100 {
		if dir, err = os.MkdirTemp("", pattern); err != nil {
			return "", nil, err
		}
		if held, err = take(dir); err == nil {
			if _, err = os.Stat(dir); err == nil {
				return dir, held, nil
			}
			held.Close()
		}
		os.RemoveAll(dir) // another process has just taken it for such a one
	}
	return "", nil, err
}

// EnterApart opens a session with a network namespace and a cgroup namespace of its
// own: what an engine's daemons do to bridges, rules and cgroups stays in there.
func (r *Root) EnterApart(ctx context.Context) (*Session, error) { return r.enter(ctx, true) }

func (r *Root) enter(ctx context.Context, apart bool) (*Session, error) {
	work, held, err := workDir()
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*Session, error) {
		os.RemoveAll(work)
		held.Close()
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
	s := &Session{Work: work, held: held, apart: apart}
	argv := append([]string{"-c", enterScript, "enter", r.dir, work, ""}, r.writable...)
	if apart {
		name := s.CgroupParent()[1:]
		argv = append([]string{"-c", apartScript, "apart", enterScript, r.dir, work, name}, r.writable...)
		if err := makeCgroups(name); err != nil {
			return fail(errors.Join(err, s.removeCgroups()))
		}
	}
	s.init = exec.Command("/bin/sh", argv...)
	s.init.Env = environ()
	s.init.Stderr = &s.log
	s.init.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Setpgid:    true, // an interrupt typed at the tests is theirs to handle
	}
	if apart {
		s.init.SysProcAttr.Cloneflags |= syscall.CLONE_NEWNET
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

// makeCgroups makes a cgroup in every hierarchy. One of cpuset takes no task
// before it has CPUs and memory, which its children inherit in their turn.
func makeCgroups(name string) error {
	tops, _ := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	if len(tops) == 0 {
		tops = []string{"/sys/fs/cgroup/cgroup.procs"}
	}
	for _, top := range tops {
		top = filepath.Dir(top)
		dir := filepath.Join(top, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			b, err := os.ReadFile(filepath.Join(top, f))
			if err != nil {
				continue // not this hierarchy
			}
			if err := os.WriteFile(filepath.Join(dir, f), b, 0); err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, "cgroup.clone_children"), []byte("1"), 0); err != nil {
				return err
			}
		}
	}
	return nil
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

// Command is a command inside the session, in the session's network namespace or,
// where it has none, in the machine's.
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
	switch {
	case netns != "":
		args = append(args, "--net="+s.Path(netns))
	case s.apart:
		args = append(args, "--net")
	}
	if s.apart {
		args = append(args, "--cgroup")
	}
	args = append(append(args, "--"), argv...)
	name := "nsenter"
	if s.apart {
		// nsenter enters the namespace of the cgroups, not the cgroups.
		script := `for c in /sys/fs/cgroup$0 /sys/fs/cgroup/*$0; do [ ! -d "$c" ] || echo $$ >"$c/cgroup.procs"; done; exec nsenter "$@"`
		name, args = "/bin/sh", append([]string{"-c", script, s.CgroupParent()}, args...)
	}
	cmd := exec.CommandContext(ctx, name, args...)
	// Podman has a warning for each command about cgroups of version 1.
	cmd.Env = environ("PODMAN_IGNORE_CGROUPSV1_WARNING=1")
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

// daemon is a program that was started and goes on until the session ends.
type daemon struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// Daemon starts a program that runs until Close, with its words in a file of the
// session's Work, and waits until it is ready.
func (s *Session) Daemon(ctx context.Context, ready func() error, argv ...string) error {
	name := filepath.Join(s.Work, filepath.Base(argv[0])+".log")
	log, err := os.Create(name)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := s.Command(context.Background(), argv...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	d := &daemon{cmd: cmd, done: make(chan struct{})}
	s.daemons = append(s.daemons, d)
	go func() {
		d.err = cmd.Wait()
		close(d.done)
	}()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-d.done: // it will never be ready
			cancel()
		case <-ctx.Done():
		}
	}()
	if err := Poll(ctx, ready); err != nil {
		said, _ := os.ReadFile(name)
		return fmt.Errorf("%s is not ready: %w", argv[0], errOutput(err, said))
	}
	return nil
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
	err := s.thaw()
	s.stop.Close()
	done := make(chan error, 1)
	go func() { done <- s.init.Wait() }()
	var left error
	select {
	case left = <-done:
	case <-time.After(10 * time.Second):
		s.init.Process.Kill()
		left = <-done
	}
	for _, d := range s.daemons {
		<-d.done // killed with the session's pid 1
	}
	if left != nil {
		left = fmt.Errorf("leave the testbed: %w", errOutput(left, s.log.Bytes()))
	}
	err = errors.Join(err, left, s.removeCgroups(), os.RemoveAll(s.Work))
	s.held.Close()
	return err
}

// thaw lets go what a container that was left paused has in it: it could not die, and the
// session's pid 1 would wait for it.
func (s *Session) thaw() error {
	var errs []error
	for _, f := range []struct{ top, name, text string }{
		{"/sys/fs/cgroup/freezer", "freezer.state", "THAWED"}, {"/sys/fs/cgroup", "cgroup.freeze", "0"},
	} {
		filepath.WalkDir(f.top+s.CgroupParent(), func(p string, d os.DirEntry, err error) error {
			if err == nil && d.Name() == f.name {
				errs = append(errs, os.WriteFile(p, []byte(f.text), 0))
			}
			return nil
		})
	}
	return errors.Join(errs...)
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

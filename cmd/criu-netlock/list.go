package main

// The command list: every network namespace of this host that bears a lock of ours.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
)

// locked is a namespace in which something of ours was found.
type locked struct {
	target
	st netlock.State
}

// find looks at every namespace that there is a way to. With an error come those that
// could be looked at.
func find(ctx context.Context, l *netlock.Locker) ([]locked, error) {
	for _, capability := range []int{unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN, unix.CAP_SYS_PTRACE} {
		// An empty list that is empty for want of privileges would be a lie.
		if !netlock.HasCapability(capability) {
			return nil, &netlock.Error{Kind: netlock.KindPrivilege, Op: "list", Err: unix.EPERM, Hint: netlock.MissingCapability(capability)}
		}
	}
	ts, err := namespaces(ctx)
	var bad errs
	if err != nil {
		bad = append(bad, err)
	}
	states := make([]netlock.State, len(ts))
	failed := make([]error, len(ts))
	parallel(len(ts), func(i int) { states[i], failed[i] = l.State(ctx, ts[i].ns) })
	var out []locked
	for i, t := range ts {
		switch {
		case failed[i] != nil:
			bad = append(bad, failed[i])
			t.ns.Close()
		case states[i].Found:
			out = append(out, locked{t, states[i]})
		default:
			t.ns.Close()
		}
	}
	return out, bad.all()
}

// scan collects namespaces, each once.
type scan struct {
	seen map[uint64]bool // inodes of namespaces, whether or not they are ours to look at
	ts   []target
	bad  errs
	// silent are mounts whose path cannot be walked without asking a file system that
	// may never answer, by inode.
	silent map[uint64]string
	// nsfs is the device of namespaces, 0 if unknown.
	nsfs uint64
}

// namespaces opens every network namespace but the host's and our own: first those
// with a name, then the bind mounts of every mount namespace, then those of tasks.
func namespaces(ctx context.Context) ([]target, error) {
	s := &scan{seen: make(map[uint64]bool), silent: make(map[uint64]string)}
	var self unix.Stat_t
	if unix.Stat("/proc/thread-self/ns/net", &self) == nil {
		s.nsfs = self.Dev
	}
	names, err := os.ReadDir(netlock.NamedDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		s.bad = append(s.bad, err)
	}
	for _, n := range names {
		s.path(filepath.Join(netlock.NamedDir, n.Name()), 0)
	}
	pids, err := tasks()
	if err != nil {
		return nil, err
	}
	if root, err := unix.Open("/", unix.O_PATH|unix.O_CLOEXEC, 0); err == nil {
		s.mounts("/proc/self", "", root)
		unix.Close(root)
	}
	views := make(map[view]bool)
	for _, pid := range pids {
		if ctx.Err() != nil {
			closeAll(s.ts)
			return nil, ctx.Err()
		}
		dir := "/proc/" + strconv.Itoa(pid)
		root, err := unix.Open(dir+"/root", unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			continue // dead, a zombie, or not to be seen
		}
		if v, ok := viewOf(dir, root); ok && !views[v] {
			views[v] = true
			s.mounts(dir, dir+"/root", root)
		}
		unix.Close(root)
	}
	for _, pid := range pids {
		s.task(pid)
	}
	for _, ino := range slices.Sorted(maps.Keys(s.silent)) {
		if at := s.silent[ino]; !s.seen[ino] {
			s.bad = append(s.bad, &netlock.Error{
				Kind: netlock.KindOther, Op: "list", Namespace: fmt.Sprintf("net:[%d]", ino),
				Err:  errors.New(at + ": passed over: it lies in a file system that may never answer"),
				Hint: "unmount it there, or end the tasks that see it",
			})
		}
	}
	return s.ts, s.bad.all()
}

// view is what a task sees: tasks of one mount namespace with one root see the same.
type view struct{ mnt, rootMount, rootDev, root uint64 }

func viewOf(dir string, root int) (v view, ok bool) {
	var mnt unix.Stat_t
	if unix.Stat(dir+"/ns/mnt", &mnt) != nil {
		return v, false
	}
	st, err := cachedStat(root)
	return view{mnt.Ino, st.Mnt_id, unix.Mkdev(st.Dev_major, st.Dev_minor), st.Ino}, err == nil
}

// cachedStat asks for nothing but what the kernel has at hand: a plain stat waits for the
// server of a FUSE or network file system.
func cachedStat(fd int) (st unix.Statx_t, err error) {
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st)
	return st, err
}

// tasks lists the pids of /proc in order.
func tasks() ([]int, error) {
	d, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, n := range names {
		if pid, err := strconv.Atoi(n); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids, nil
}

func (s *scan) add(ns *netlock.Namespace, foundAt string) {
	if s.seen[ns.Inode()] {
		ns.Close()
		return
	}
	s.seen[ns.Inode()] = true
	s.ts = append(s.ts, target{ns, foundAt})
}

// path takes a bind mount of a namespace. What is none, or gone by now, or covered by
// another mount, is passed over; ino is what the mount table says, 0 if unknown.
func (s *scan) path(path string, ino uint64) {
	ns, err := netlock.FromPath(path)
	switch {
	case err == nil && ino != 0 && ns.Inode() != ino:
		ns.Close()
	case err == nil:
		s.add(ns, path)
	case netlock.KindOf(err) == netlock.KindRefused:
		if ino != 0 {
			s.seen[ino] = true
		}
	}
}

// mounts takes every network namespace that a mount table has, by way of root.
func (s *scan) mounts(procDir, root string, rootFD int) {
	f, err := os.Open(procDir + "/mountinfo")
	if err != nil {
		return
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if ino, at, ok := netnsMount(lines.Text()); ok && !s.seen[ino] {
			s.mount(rootFD, at, root+at, ino)
		}
	}
}

// resolveCached is RESOLVE_CACHED of linux/openat2.h, Linux 5.12.
const resolveCached = 0x20

// mount takes the namespace mounted at a path below root.
//
// Anybody who may mount can put it where the walk to it leads through a file system of
// theirs, and who waits for that file system's answer can wait for ever: not a deadline
// and not SIGKILL ends such a wait. So the walk may use what the kernel has cached, which
// for a mount point is all of its path, unless a file system insists on being asked.
func (s *scan) mount(root int, at, path string, ino uint64) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC | unix.O_NOFOLLOW,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | resolveCached,
	}
	fd, err := -1, error(unix.EAGAIN)
	for try := 0; try < 8 && err == unix.EAGAIN; try++ { // any mount or rename meanwhile is EAGAIN too
		fd, err = unix.Openat2(root, at, &how)
	}
	switch err {
	case nil:
	case unix.EAGAIN:
		s.silent[ino] = path
		return
	case unix.EINVAL, unix.ENOSYS, unix.EPERM: // before Linux 5.12, or a seccomp filter
		s.path(path, ino)
		return
	default:
		return // gone by now
	}
	defer unix.Close(fd)
	st, err := cachedStat(fd)
	if err != nil || st.Ino != ino || unix.Mkdev(st.Dev_major, st.Dev_minor) != s.nsfs {
		return // covered by another mount
	}
	nsfd, err := unix.Open("/proc/thread-self/fd/"+strconv.Itoa(fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(nsfd)
	ns, err := netlock.FromNamedFD(nsfd, path)
	switch {
	case err == nil:
		s.add(ns, path)
	case netlock.KindOf(err) == netlock.KindRefused:
		s.seen[ino] = true
	}
}

// netnsMount reads a line of mountinfo: "36 35 0:4 net:[4026532567] /run/netns/a rw
// shared:1 - nsfs nsfs rw".
func netnsMount(line string) (ino uint64, at string, ok bool) {
	if !strings.Contains(line, " - nsfs ") {
		return 0, "", false
	}
	f := strings.Fields(line)
	if len(f) < 5 || !strings.HasPrefix(f[3], "net:[") {
		return 0, "", false
	}
	ino, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(f[3], "net:["), "]"), 10, 64)
	return ino, unescape(f[4]), err == nil
}

// unescape undoes the octal escapes of /proc: \040 is a space.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// task takes the namespace of a task.
func (s *scan) task(pid int) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/"+strconv.Itoa(pid)+"/ns/net", &st); err == nil && s.seen[st.Ino] {
		return
	}
	ns, err := netlock.FromPID(pid)
	if err == nil {
		s.add(ns, strings.TrimSuffix(fmt.Sprintf("pid %d %s", pid, netlock.CallerOf(pid).Name), " "))
		return
	}
	switch netlock.KindOf(err) {
	case netlock.KindRefused:
		if st.Ino != 0 {
			s.seen[st.Ino] = true // the host's or our own: once is enough
		}
	case netlock.KindNoTask:
	default:
		if pid != 1 { // pid 1 may have a capability more than we; its namespace is the host's
			s.bad = append(s.bad, err)
		}
	}
}

// foundJSON is a status and where the namespace was found.
type foundJSON struct {
	statusJSON
	FoundAt string      `json:"found_at"`
	Use     netlock.Use `json:"use"`
}

func (c *cli) list() error {
	cfg, err := c.strictConfig()
	if err != nil {
		return err
	}
	l := newLocker(cfg, parent())
	c.only(l)
	found, err := within(c.start, cfg.Timeout, func(ctx context.Context) ([]locked, error) { return find(ctx, l) })
	if netlock.ExitCode(err) == int(netlock.KindDeadline) {
		return err
	}
	var printErr error
	if c.json {
		out := make([]foundJSON, 0, len(found))
		for _, f := range found {
			out = append(out, foundJSON{newStatus(f.ns, f.st), f.foundAt, use(f.ns, f.st)})
		}
		printErr = printJSON(out)
	} else {
		var b strings.Builder
		for _, f := range found {
			b.WriteString(statusText(f.target, f.st))
			fmt.Fprintf(&b, "  %-10s %s\n", "use", useText(use(f.ns, f.st)))
		}
		if len(found) == 0 && err == nil {
			b.WriteString("no network namespace of this host is locked\n")
		}
		printErr = printText(b.String())
	}
	if err == nil {
		err = printErr
	}
	return err
}

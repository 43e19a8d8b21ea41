package netlock

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock/internal/proc"
)

// Namespace is an open handle on a network namespace that is neither the host's
// nor our own. It stays valid when the task it came from dies.
type Namespace struct {
	h    netns.NsHandle
	ino  uint64
	name string // what it was opened by: "pid 123", a path
	// inside is the thread of the last Do that is still in its function; 0 for none.
	inside atomic.Int32
	kept   kept
}

// What is said of the host's namespace wherever it is refused.
const (
	hosts = "the host's namespace"
	never = "it is never locked: the host would lose its network"
)

// ErrOwnNamespace is wrapped by the refusal of the caller's own namespace.
var ErrOwnNamespace = errors.New("our own namespace")

// initialNetIno is the inode number of the initial network namespace on kernels
// that fix it (PROC_NET_INIT_INO); no other namespace ever gets it.
const initialNetIno = 0xEFFFFFF9

// pidfdGetNetNamespace is PIDFD_GET_NET_NAMESPACE, _IO(0xFF, 4) of linux/pidfd.h.
const pidfdGetNetNamespace = 0xFF04

// NamedDir is where `ip netns` keeps its names.
const NamedDir = "/run/netns"

// FromPID opens the network namespace of a task, by way of a pidfd: what it
// returns can never be that of another task which got the pid later.
//
// Sources: pidfd_open(2) of Linux 5.3, PIDFD_GET_NET_NAMESPACE of 6.11, setns(2)
// on a pidfd of 5.8.
func FromPID(pid int) (*Namespace, error) {
	name := "pid " + strconv.Itoa(pid)
	fail := func(kind Kind, op string, err error, hint string) (*Namespace, error) {
		return nil, &Error{Kind: kind, Op: op, Namespace: name, Err: err, Hint: hint}
	}
	if pid <= 0 {
		return fail(KindInput, "open", errors.New("not a pid"), "")
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	switch {
	case err == unix.ESRCH:
		return fail(KindNoTask, "pidfd_open", err, "there is no such task")
	case err == unix.EINVAL || err == unix.ENOENT:
		// What pidfd_open says of a thread that leads no thread group, before and since Linux 6.9.
		return fail(KindNoTask, "pidfd_open", err, "that is a thread, not a task: give the thread group's pid")
	case err == unix.ENOSYS:
		return fail(KindNoBackend, "pidfd_open", err, "Linux 5.8 or newer is needed")
	case err != nil:
		return fail(KindOther, "pidfd_open", err, "")
	}
	defer unix.Close(pidfd)

	fd, err := netnsOfPidfd(pidfd)
	switch {
	case err == unix.ESRCH:
		return fail(KindNoTask, "open namespace", err, "the task is dead or a zombie")
	case err == unix.EPERM || err == unix.EACCES:
		if isKernelThread(pid) {
			return fail(KindRefused, "open namespace", errors.New("a kernel thread"), "a kernel thread lives in the host's namespace")
		}
		if pid == 1 { // may have a capability more than root in a shell
			return fail(KindRefused, "open namespace", errors.New(hosts), never)
		}
		return fail(KindPrivilege, "open namespace", err, MissingCapability(unix.CAP_SYS_ADMIN, unix.CAP_SYS_PTRACE))
	case err != nil:
		return fail(KindOther, "open namespace", err, "")
	}
	ns, err := newNamespace(fd, name)
	if err != nil && KindOf(err) == KindRefused && isKernelThread(pid) {
		err = &Error{Kind: KindRefused, Op: "open", Namespace: name, Err: errors.New("a kernel thread"), Hint: "a kernel thread lives in the host's namespace"}
	}
	return ns, err
}

// netnsOfPidfd returns a descriptor of the namespace of the task behind pidfd.
func netnsOfPidfd(pidfd int) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(pidfd), pidfdGetNetNamespace, 0)
	switch errno {
	case 0:
		return int(fd), nil
	case unix.ENOTTY, unix.EINVAL: // before Linux 6.11
	default:
		return -1, errno
	}
	return netnsBySetns(pidfd)
}

// netnsBySetns sends a thread into the task's namespace, to open it from there.
func netnsBySetns(pidfd int) (int, error) {
	out, err := -1, error(nil)
	inThread(func() error { return unix.Setns(pidfd, unix.CLONE_NEWNET) }, func() {
		var h netns.NsHandle
		h, err = netns.Get()
		out = int(h)
	}, &err)
	return out, err
}

// FromPath opens the network namespace bound at a path, or, for a word without a
// slash, the one of that name in `ip netns`.
func FromPath(path string) (*Namespace, error) {
	fail := func(kind Kind, err error, hint string) (*Namespace, error) {
		return nil, &Error{Kind: kind, Op: "open namespace", Namespace: strconv.Quote(path), Err: err, Hint: hint}
	}
	file := path
	switch {
	case path == "" || path == "." || path == ".." || strings.ContainsRune(path, 0):
		return fail(KindInput, errors.New("not a name"), "give a name as ip netns lists it, or an absolute path")
	case !strings.Contains(path, "/"):
		file = filepath.Join(NamedDir, path)
	case path[0] != '/':
		return fail(KindInput, errors.New("neither a name nor an absolute path"), "a name has no / in it, a path begins with one")
	}
	// O_PATH first: opening a device or a fifo for reading can do something.
	fd, err := unix.Open(file, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		if (err == unix.EACCES || err == unix.EPERM) && isHostsPath(file) {
			return fail(KindRefused, errors.New(hosts), never)
		}
		return fail(openKind(err), err, openHint(err))
	}
	defer unix.Close(fd)
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return fail(KindOther, err, "")
	}
	if st.Type != unix.NSFS_MAGIC {
		return fail(KindInput, errors.New("not a namespace"), "give a file of /run/netns or /proc/PID/ns/net")
	}
	nsfd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail(openKind(err), err, openHint(err))
	}
	if err := checkNetNS(nsfd); err != nil {
		unix.Close(nsfd)
		return fail(KindInput, err, "")
	}
	return newNamespace(nsfd, file)
}

// isHostsPath tells whether a path that may not be followed leads to the namespace of
// pid 1 or of a kernel thread, which can have capabilities that we have not: the host's
// namespace is to be refused, not to be tried again with more privileges.
func isHostsPath(path string) bool {
	// The link cannot be read, and the error says which one that was after all others.
	var link *fs.PathError
	if _, err := filepath.EvalSymlinks(path); !errors.As(err, &link) {
		return false
	}
	f := strings.Split(link.Path, "/")
	// /proc/PID/ns/net, /proc/PID/task/TID/ns/net
	if n := len(f); (n != 5 && n != 7) || f[0] != "" || f[1] != "proc" || f[n-2] != "ns" || f[n-1] != "net" || n == 7 && f[3] != "task" {
		return false
	}
	pid, err := strconv.Atoi(f[2])
	return err == nil && (pid == 1 || isKernelThread(pid))
}

func openKind(err error) Kind {
	switch err {
	case unix.EPERM, unix.EACCES:
		return KindPrivilege
	case unix.ENOENT, unix.ENOTDIR, unix.ENAMETOOLONG, unix.ELOOP:
		return KindInput
	}
	return KindOther
}

func openHint(err error) string {
	switch openKind(err) {
	case KindPrivilege:
		return MissingCapability(unix.CAP_SYS_PTRACE)
	case KindInput:
		return "ip netns lists the names there are"
	}
	return ""
}

func checkNetNS(fd int) error {
	switch typ, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); {
	case err != nil:
		return fmt.Errorf("not a namespace: %w", err)
	case typ != unix.CLONE_NEWNET:
		return errors.New("a namespace, but not of the network")
	}
	return nil
}

// FromFD takes a duplicate of an open namespace; fd stays the caller's.
func FromFD(fd int) (*Namespace, error) { return FromNamedFD(fd, "fd "+strconv.Itoa(fd)) }

// FromNamedFD is FromFD for a caller who knows a name that tells a person more than the
// number of a descriptor.
func FromNamedFD(fd int, name string) (*Namespace, error) {
	if err := checkNetNS(fd); err != nil {
		return nil, &Error{Kind: KindInput, Op: "open namespace", Namespace: name, Err: err}
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, &Error{Kind: KindOther, Op: "dup", Namespace: name, Err: err}
	}
	return newNamespace(dup, name)
}

// newNamespace owns fd from here on. It refuses the host's namespace and our own.
func newNamespace(fd int, name string) (*Namespace, error) {
	ns := &Namespace{h: netns.NsHandle(fd), name: name}
	if err := ns.check(); err != nil {
		ns.Close()
		return nil, err
	}
	return ns, nil
}

func (ns *Namespace) check() error {
	var st unix.Stat_t
	if err := unix.Fstat(int(ns.h), &st); err != nil {
		return &Error{Kind: KindOther, Op: "fstat", Namespace: ns.name, Err: err}
	}
	ns.ino = st.Ino
	refuse := func(why, hint string) error {
		return &Error{Kind: KindRefused, Op: "open", Namespace: ns.String(), Err: errors.New(why), Hint: hint}
	}
	same := func(path string) (bool, error) {
		var o unix.Stat_t
		if err := unix.Stat(path, &o); err != nil {
			return false, err
		}
		return o.Ino == st.Ino && o.Dev == st.Dev, nil
	}
	// Not /proc/self: the main thread may be in another namespace, in a Do.
	own, err := same("/proc/thread-self/ns/net")
	switch {
	case err != nil:
		return &Error{Kind: KindOther, Op: "stat /proc/thread-self/ns/net", Namespace: ns.String(), Err: err, Hint: "/proc must be mounted"}
	case own:
		return &Error{Kind: KindRefused, Op: "open", Namespace: ns.String(), Err: ErrOwnNamespace, Hint: "CRIU locks no task that shares its namespace"}
	case st.Ino == initialNetIno:
		return refuse(hosts, never)
	}
	host, err := same("/proc/1/ns/net")
	if err != nil && isKernelThread(2) {
		// pid 1 can have a capability more than root in a shell; a kernel
		// thread's namespace is the same one and can be read.
		host, err = same("/proc/2/ns/net")
	}
	switch {
	case err != nil:
		return &Error{Kind: KindPrivilege, Op: "stat /proc/1/ns/net", Namespace: ns.String(), Err: err,
			Hint: "without it the host's namespace cannot be told; " + MissingCapability(unix.CAP_SYS_PTRACE)}
	case host:
		return refuse(hosts, never)
	}
	return nil
}

// isKernelThread reads PF_KTHREAD from the flags in /proc/PID/stat.
func isKernelThread(pid int) bool {
	s, err := proc.Read("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	f := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(f) < 7 {
		return false
	}
	flags, err := strconv.ParseUint(f[6], 10, 64)
	return err == nil && flags&0x00200000 != 0
}

// Close releases the handle, not the lock.
func (ns *Namespace) Close() error {
	ns.kept.close()
	return ns.h.Close()
}

// Dup is another handle on the namespace, for who outlives this one.
func (ns *Namespace) Dup() (*Namespace, error) {
	fd, err := unix.FcntlInt(uintptr(ns.h), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, &Error{Kind: KindOther, Op: "duplicate the handle", Namespace: ns.String(), Err: err}
	}
	return &Namespace{h: netns.NsHandle(fd), ino: ns.ino, name: ns.name}, nil
}

// FD is the open descriptor of the namespace; it stays the Namespace's.
func (ns *Namespace) FD() int { return int(ns.h) }

// Inode is the namespace's inode number, as readlink /proc/PID/ns/net shows it.
func (ns *Namespace) Inode() uint64 { return ns.ino }

// String names the namespace for a person.
func (ns *Namespace) String() string {
	return "net:[" + strconv.FormatUint(ns.ino, 10) + "] (" + ns.name + ")"
}

// Do runs f on an OS thread that is in the namespace, and in no other goroutine:
// sockets and processes that f makes belong to the namespace. The thread goes
// back afterwards; one that cannot go back dies. A Do within a Do of the same
// Namespace stays where it is.
func (ns *Namespace) Do(f func() error) error {
	// Only the goroutine that is locked to that thread can find itself on it.
	if tid := ns.inside.Load(); tid != 0 && int(tid) == unix.Gettid() {
		return f()
	}
	var err error
	inThread(func() error {
		if e := netns.Set(ns.h); e != nil {
			kind, hint := KindOther, ""
			if e == unix.EPERM {
				kind, hint = KindPrivilege, MissingCapability(unix.CAP_SYS_ADMIN)
			}
			return &Error{Kind: kind, Op: "setns", Namespace: ns.String(), Err: e, Hint: hint}
		}
		return nil
	}, func() {
		tid := int32(unix.Gettid())
		ns.inside.Store(tid)
		// Another Do may have stored its own meanwhile, which is not ours to clear.
		defer ns.inside.CompareAndSwap(tid, 0)
		err = f()
	}, &err)
	return err
}

// inThread runs enter and then f on a locked OS thread, and brings the thread
// back to the network namespace it had. An error of enter goes to err, and f is
// not run.
func inThread(enter func() error, f func(), err *error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		own, e := netns.GetFromPath("/proc/thread-self/ns/net")
		if e != nil {
			runtime.UnlockOSThread()
			*err = &Error{Kind: KindOther, Op: "open own namespace", Err: e}
			return
		}
		defer own.Close()
		if e := enter(); e != nil {
			runtime.UnlockOSThread()
			*err = e
			return
		}
		f()
		// A goroutine that ends with its thread locked takes the thread with it.
		if netns.Set(own) == nil {
			runtime.UnlockOSThread()
		}
	}()
	<-done
}

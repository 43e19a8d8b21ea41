package netlock_test

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func here(t *testing.T) uint64 { t.Helper(); return inode(t, "/proc/thread-self/ns/net") }

// A namespace is the same one by its task, its path and a descriptor, and outlives
// the task.
func TestNamespace(t *testing.T) {
	pid, kill := netlocktest.NewTask(t)
	path := "/proc/" + strconv.Itoa(pid) + "/ns/net"
	want := inode(t, path)
	byPID, err := netlock.FromPID(pid)
	if err != nil {
		t.Fatal(err)
	}
	byPath, err := netlock.FromPath(path)
	if err != nil {
		t.Fatal(err)
	}
	byFD, err := netlock.FromFD(byPath.FD())
	if err != nil {
		t.Fatal(err)
	}
	if byFD.FD() == byPath.FD() {
		t.Error("FromFD took the caller's descriptor")
	}
	kill()
	own := here(t)
	for _, ns := range []*netlock.Namespace{byPID, byPath, byFD} {
		if ns.Inode() != want || !strings.HasPrefix(ns.String(), "net:["+strconv.FormatUint(want, 10)+"] (") {
			t.Errorf("%v; net:[%d] is wanted", ns, want)
		}
		var inside uint64
		if err := ns.Do(func() error { inside = here(t); return nil }); err != nil || inside != want {
			t.Errorf("%v: inside net:[%d], %v", ns, inside, err)
		}
		broken := errors.New("broken")
		if err := ns.Do(func() error { return broken }); !errors.Is(err, broken) {
			t.Errorf("%v: %v", ns, err)
		}
		if err := ns.Close(); err != nil {
			t.Error(err)
		}
		if err := ns.Do(func() error { t.Error("in a closed namespace"); return nil }); err == nil {
			t.Errorf("%v: closed, and no error", ns)
		}
	}
	if here(t) != own {
		t.Error("the caller's thread was moved")
	}
}

// Do moves no thread but its own: not while it runs, not afterwards.
func TestDoKeepsOtherThreads(t *testing.T) {
	pid, _ := netlocktest.NewTask(t)
	ns, err := netlock.FromPID(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	own := here(t)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if err := ns.Do(func() error {
				if here(t) != ns.Inode() {
					t.Error("not inside")
				}
				runtime.Gosched()
				return nil
			}); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			runtime.Gosched()
			if here(t) != own {
				t.Error("another goroutine is inside")
			}
		})
	}
	wg.Wait()
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range tasks {
		var st unix.Stat_t
		if unix.Stat(p, &st) == nil && st.Ino != own { // a thread may end meanwhile
			t.Errorf("%s was left in net:[%d]", p, st.Ino)
		}
	}
}

func wantKind(t *testing.T, ns *netlock.Namespace, err error, kind netlock.Kind, says string) {
	t.Helper()
	if err == nil {
		t.Errorf("%v was opened; kind %d is wanted", ns, kind)
		ns.Close()
		return
	}
	var e *netlock.Error
	if !errors.As(err, &e) || e.Kind != kind || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "\n") {
		t.Errorf("%v; kind %d and %q are wanted", err, kind, says)
	}
}

func TestFromPIDRefuses(t *testing.T) {
	dead, kill := netlocktest.NewTask(t)
	kill()
	for _, c := range []struct {
		pid  int
		kind netlock.Kind
		says string
	}{
		{0, netlock.KindInput, "not a pid"}, {-1, netlock.KindInput, "not a pid"},
		{1 << 30, netlock.KindNoTask, "no such task"}, {dead, netlock.KindNoTask, "no such task"},
		{os.Getpid(), netlock.KindRefused, "our own namespace"}, {os.Getppid(), netlock.KindRefused, "our own namespace"},
		{1, netlock.KindRefused, ""}, {2, netlock.KindRefused, "kernel thread"},
	} {
		ns, err := netlock.FromPID(c.pid)
		wantKind(t, ns, err, c.kind, c.says)
	}
	if _, err := netlock.FromPID(os.Getpid()); !errors.Is(err, netlock.ErrOwnNamespace) {
		t.Errorf("%v is not ErrOwnNamespace", err)
	}
	// A thread is no task, even one in a namespace of its own.
	tid, done := make(chan int), make(chan struct{})
	defer close(done)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread dies
		for unix.Gettid() == os.Getpid() {
			// The main thread leads the group; it waits here, so that another is taken.
			go func() {
				runtime.LockOSThread()
				tid <- unix.Gettid()
				<-done
			}()
			<-done
			return
		}
		tid <- unix.Gettid()
		<-done
	}()
	ns, err := netlock.FromPID(<-tid)
	wantKind(t, ns, err, netlock.KindNoTask, "thread")
}

func TestFromPathRefuses(t *testing.T) {
	pid, _ := netlocktest.NewTask(t)
	dir := t.TempDir()
	regular, fifo := filepath.Join(dir, "regular"), filepath.Join(dir, "fifo")
	if err := os.WriteFile(regular, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	proc := "/proc/" + strconv.Itoa(pid) + "/ns/"
	for _, path := range []string{
		"", ".", "..", "a/b", "./a", "../a", "a\x00b", "no-such-name", strings.Repeat("x", 5000), "\n",
		"/", dir, regular, fifo, "/dev/null", "/no/such", proc + "mnt", proc + "user", proc + "net/x", proc,
	} {
		ns, err := netlock.FromPath(path)
		wantKind(t, ns, err, netlock.KindInput, "")
	}
	ns, err := netlock.FromPath("/proc/self/ns/net")
	wantKind(t, ns, err, netlock.KindRefused, "our own namespace")
}

// The host's namespace is refused by a path too, whether or not we may look at pid 1:
// here root in a shell often may not, and without CAP_SYS_PTRACE nobody may.
func TestFromPathRefusesHost(t *testing.T) {
	netlocktest.Need(t)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("/proc/1/ns/net", link); err != nil {
		t.Fatal(err)
	}
	far := filepath.Join(t.TempDir(), "far")
	if err := os.Symlink(link, far); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/proc/1/ns/net", "/proc/1/task/1/ns/net", "//proc/./1/ns/../ns/net", link, far, "/proc/2/ns/net"} {
		for _, may := range []bool{true, false} {
			done := make(chan struct{})
			go func() {
				defer close(done)
				runtime.LockOSThread() // and never unlocked: its capabilities go with it
				if !may {
					dropCapability(t, unix.CAP_SYS_PTRACE)
				}
				ns, err := netlock.FromPath(path)
				wantKind(t, ns, err, netlock.KindRefused, "namespace")
			}()
			<-done
		}
	}
}

// dropCapability takes a capability from the calling thread.
func dropCapability(t *testing.T, c int) {
	var data [2]unix.CapUserData
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		t.Error(err)
	}
	data[c/32].Effective &^= 1 << (c % 32)
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		t.Error(err)
	}
	if netlock.HasCapability(c) {
		t.Error("the capability is still there")
	}
}

func TestMissingCapability(t *testing.T) {
	for _, c := range []struct {
		caps []int
		want string
	}{
		{[]int{unix.CAP_NET_ADMIN}, "CAP_NET_ADMIN is there: "},
		{[]int{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW}, "CAP_NET_ADMIN and CAP_NET_RAW are there: "},
	} {
		netlocktest.Need(t)
		if got := netlock.MissingCapability(c.caps...); !strings.HasPrefix(got, c.want) {
			t.Errorf("%q; %q is wanted", got, c.want)
		}
	}
}

func TestFromFDRefuses(t *testing.T) {
	pid, _ := netlocktest.NewTask(t)
	for path, kind := range map[string]netlock.Kind{
		"/dev/null": netlock.KindInput, "/": netlock.KindInput,
		"/proc/" + strconv.Itoa(pid) + "/ns/mnt": netlock.KindInput, "/proc/self/ns/net": netlock.KindRefused,
	} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		ns, err := netlock.FromFD(int(f.Fd()))
		wantKind(t, ns, err, kind, "")
		f.Close()
	}
	ns, err := netlock.FromFD(-1)
	wantKind(t, ns, err, netlock.KindInput, "")
}

// A Do can run on the main thread, whose namespace /proc/self/ns/net is: meanwhile the
// namespace must not pass for our own.
func TestFromPIDBesideDo(t *testing.T) {
	netlocktest.Need(t)
	n := netlocktest.NewNS(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					_ = n.Do(func() error { runtime.Gosched(); return nil })
				}
			}
		})
	}
	defer wg.Wait()
	defer close(stop)
	for range 2000 {
		ns, err := netlock.FromPID(n.PID())
		if err != nil {
			t.Fatal(err)
		}
		ns.Close()
	}
}

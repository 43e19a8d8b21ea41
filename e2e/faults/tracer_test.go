package faults

// A tracer that follows a process and spoils one of its system calls.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// point is a place in the run of a process: the nth time that any of its threads makes
// a system call. It is counted over all threads, so that it is one place.
type point struct {
	nr, nth int
	// errno is what the call answers instead of being made; 0 stands for SIGKILL,
	errno unix.Errno
	// before the call begins or, if done, when the kernel has finished it.
	done bool
}

// same tells whether it is the same call.
func (p point) same(o point) bool { return p.nr == o.nr && p.nth == o.nth }

func (p point) String() string {
	what, when := "SIGKILL", ""
	if p.errno != 0 {
		what = unix.ErrnoName(p.errno)
	}
	if p.done {
		when = ", done"
	}
	return fmt.Sprintf("%s at %s %d%s", what, callName(p.nr), p.nth, when)
}

// trace is the run of a process under the tracer.
type trace struct {
	point point
	// instead is what is done at the point in place of SIGKILL; the process goes on then.
	instead func()
	// starts: what counts is the guard that the traced process starts, and not what it
	// becomes itself by its next exec.
	starts bool
	// running: the process is traced as it runs, and no exec is waited for.
	running bool

	// What came of it, to be read after wait.
	hit    bool
	counts map[int]int // calls by number
	pid    int         // of the process that counted

	// worked counts the calls that are no noise.
	worked atomic.Int64
	ended  chan error
}

// clean runs something without a fault and tells all the places that it usually comes by.
// One run is not enough: on a busy machine a hook may wait so long for its guard that it
// goes another way.
func clean(run func(*trace) error) (out []point, err error) {
	counts := map[int][]int{}
	const runs = 3
	for i := range runs {
		tr := trace{}
		if err := run(&tr); err != nil {
			return nil, err
		}
		for nr, n := range tr.counts {
			if counts[nr] == nil {
				counts[nr] = make([]int, runs)
			}
			counts[nr][i] = n
		}
	}
	for _, nr := range slices.Sorted(maps.Keys(counts)) {
		slices.Sort(counts[nr])
		for n := range counts[nr][runs/2] {
			out = append(out, point{nr: nr, nth: n + 1})
		}
	}
	return out, nil
}

// at runs something with a fault. Where this run makes fewer of the calls, it is run again
// with the fault at the last of them: the trace tells which it was.
func at(p point, run func(*trace) error) (tr *trace, err error) {
	for range 3 {
		tr = &trace{point: p}
		if err = run(tr); tr.hit || err != nil || tr.counts[p.nr] == 0 || p.nth == 1 {
			break
		}
		p.nth = min(p.nth-1, tr.counts[p.nr])
	}
	return tr, err
}

// atOrNext is at for so few of all points that each has to be come by: where a run does not, the
// next one will do.
func atOrNext(p point, all []point, run func(*trace) error) (tr *trace, err error) {
	tr, err = at(p, run)
	for next := slices.IndexFunc(all, p.same) + 1; !tr.hit && err == nil && next < len(all); next++ {
		q := all[next]
		q.done, q.errno = p.done, p.errno
		tr, err = at(q, run)
	}
	return tr, err
}

// begin attaches to a process, which goes on when begin returns.
func (tr *trace) begin(pid int) error {
	tr.counts, tr.ended = map[int]int{}, make(chan error, 1)
	attached := make(chan error)
	go func() {
		// ptrace knows threads. This one is thrown away, and what it still traces with it.
		runtime.LockOSThread()
		t := tracer{trace: tr, leaders: map[int]int{}, alive: map[int]bool{}}
		err := t.attach(pid)
		attached <- err
		if err == nil {
			tr.ended <- t.run()
		}
	}()
	return <-attached
}

// wait waits until all traced processes are dead.
func (tr *trace) wait() error {
	select {
	case err := <-tr.ended:
		return err
	case <-time.After(patience):
		return errors.New("the traced processes do not end")
	}
}

// idle waits until the process that counts is dead or has made no call for a while.
func (tr *trace) idle(is func(comm, cmdline string) bool) error {
	const looks = 50 // a millisecond each
	last, same := int64(-1), 0
	return netlocktest.Until(func() (bool, error) {
		if n := tr.worked.Load(); n != last {
			last, same = n, 0
		}
		same++
		return same > looks || len(processes(is)) == 0, nil
	})
}

// tracer is a trace's own thread.
type tracer struct {
	*trace
	leaders map[int]int  // thread to process
	alive   map[int]bool // every thread ever heard of
	at      int          // the thread that is in the call of the point
}

// sysGood marks the stops at system calls, PTRACE_O_TRACESYSGOOD.
const sysGood = 0x80

func (t *tracer) attach(pid int) error {
	opts := unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEEXEC | unix.PTRACE_O_EXITKILL
	if t.starts {
		opts |= unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACEFORK
	}
	if t.running {
		t.pid = pid
	}
	attached := 0
	for more := true; more; { // until no thread has come meanwhile
		more = false
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return err
		}
		for _, entry := range entries {
			tid, err := strconv.Atoi(entry.Name())
			if err != nil || t.alive[tid] {
				continue
			}
			var e error
			if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(tid), 0, uintptr(opts), 0, 0); errno != 0 {
				e = errno
			} else {
				e = unix.PtraceInterrupt(tid)
			}
			switch {
			case (e == unix.ESRCH || e == unix.EPERM) && tid != pid: // it has gone meanwhile, or came and is traced
			case e != nil:
				return fmt.Errorf("seize %d: %w", tid, e)
			default:
				more, t.alive[tid] = true, true
				attached++
			}
		}
	}
	for attached > 0 { // each stops once
		var ws unix.WaitStatus
		tid, err := unix.Wait4(-1, &ws, unix.WALL|unix.WNOTHREAD, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("attach to %d: %w", pid, err)
		}
		if t.alive[tid] {
			attached--
		}
		if t.alive[tid] = ws.Stopped(); !t.alive[tid] {
			continue // it ended instead
		}
		if err := unix.PtraceSyscall(tid, 0); err != nil {
			return err
		}
	}
	return nil
}

func (t *tracer) run() error {
	// The thread may have children besides, which it has started for the test.
	for slices.Contains(slices.Collect(maps.Values(t.alive)), true) {
		var ws unix.WaitStatus
		tid, err := unix.Wait4(-1, &ws, unix.WALL|unix.WNOTHREAD, nil)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		}
		if t.alive[tid] = ws.Stopped(); !t.alive[tid] {
			continue
		}
		sig, event := ws.StopSignal(), int(ws)>>16
		switch {
		case sig == unix.SIGTRAP|sysGood:
			sig, err = 0, t.call(tid)
		case event == unix.PTRACE_EVENT_EXEC:
			if t.pid == 0 && t.starts == isGuard(tid) {
				t.pid, t.counts = tid, map[int]int{}
			}
			sig = 0
		case event == unix.PTRACE_EVENT_CLONE, event == unix.PTRACE_EVENT_FORK, event == unix.PTRACE_EVENT_VFORK:
			// The new thread may have been heard of before, and be dead by now.
			var n uint
			n, err = unix.PtraceGetEventMsg(tid)
			if _, ok := t.alive[int(n)]; err == nil && !ok {
				t.alive[int(n)] = true
			}
			sig = 0
		case event != 0:
			sig = 0
		}
		// A thread that SIGKILL has hit is no longer there to answer.
		switch {
		case err != nil:
		case t.pid == 0 || t.leader(tid) != t.pid || t.hit && t.at == 0:
			err = unix.PtraceCont(tid, int(sig)) // nothing of what it calls counts
		default:
			err = unix.PtraceSyscall(tid, int(sig))
		}
		if err != nil && err != unix.ESRCH {
			return err
		}
	}
	return nil
}

func isGuard(pid int) bool {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return guards("", string(b))
}

func (t *tracer) leader(tid int) int {
	if l, ok := t.leaders[tid]; ok {
		return l
	}
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid)) // a dead one has none, and does not count
	_, rest, _ := strings.Cut(string(b), "\nTgid:\t")
	word, _, _ := strings.Cut(rest, "\n")
	l, _ := strconv.Atoi(word)
	t.leaders[tid] = l
	return l
}

// call is at the beginning or the end of a system call.
func (t *tracer) call(tid int) error {
	if t.pid == 0 || t.leader(tid) != t.pid {
		return nil
	}
	nr, fd, begins, err := callOf(tid)
	switch {
	case err != nil:
		return err
	case !begins && t.at == tid:
		t.at = 0
		if t.point.errno != 0 {
			return setResult(tid, -int(t.point.errno))
		}
		return unix.Kill(t.pid, unix.SIGKILL)
	case !begins:
		return nil
	}
	t.counts[nr]++
	if !noise(nr) {
		t.worked.Add(1)
	}
	if t.hit || nr != t.point.nr || t.counts[nr] != t.point.nth {
		return nil
	}
	// A pipe needs no memory, and an EAGAIN that is not true is one that epoll never ends. It
	// is looked at now: of two threads the other one may be first this time.
	if (nr == unix.SYS_READ || nr == unix.SYS_WRITE) && t.point.errno != 0 && t.point.errno != unix.EINTR {
		if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", t.pid, fd)); err != nil || strings.HasPrefix(to, "pipe:") {
			return nil
		}
	}
	t.hit = true
	switch {
	case t.point.errno != 0:
		t.at = tid
		return skipCall(tid)
	case t.point.done:
		t.at = tid
		return nil
	case t.instead != nil:
		t.instead()
		return nil
	}
	return unix.Kill(t.pid, unix.SIGKILL) // and the kernel does not begin with the call
}

// callOf is the system call at which a stopped thread is, its first argument, and whether
// it begins.
func callOf(tid int) (nr, arg int, begins bool, _ error) {
	var info [88]byte // struct ptrace_syscall_info of linux/ptrace.h
	const op, number, args = 0, 24, 32
	_, _, e := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(tid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if e != 0 {
		return 0, 0, false, e
	}
	word := func(at int) int { return int(binary.NativeEndian.Uint64(info[at:])) }
	return word(number), word(args), info[op] == unix.PTRACE_SYSCALL_INFO_ENTRY, nil
}

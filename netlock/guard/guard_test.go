package guard

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

func TestDecide(t *testing.T) {
	for name, c := range map[string]struct {
		f    facts
		want verdict
	}{
		"unlocked by CRIU":                     {facts{phase: Dump, alive: true}, over},
		"restore, unlocked":                    {facts{phase: Restore, policy: Previous, wasLocked: true}, over},
		"dump failed, task runs":               {facts{phase: Dump, found: true, alive: true}, release},
		"dump killed the task":                 {facts{phase: Dump, found: true}, keep},
		"left stopped":                         {facts{phase: Dump, found: true, alive: true, stopped: true}, wait},
		"paused before":                        {facts{phase: Dump, found: true, alive: true, frozen: true, wasFrozen: true}, wait},
		"paused before, runs again":            {facts{phase: Dump, found: true, alive: true, wasFrozen: true}, release},
		"frozen by CRIU, which was killed":     {facts{phase: Dump, found: true, alive: true, frozen: true}, release},
		"policies are for restores":            {facts{phase: Dump, found: true, alive: true, policy: Keep}, release},
		"restore failed, new namespace":        {facts{phase: Restore, found: true, policy: Previous}, release},
		"restore failed, was locked":           {facts{phase: Restore, found: true, policy: Previous, wasLocked: true}, keep},
		"restore failed, half a task is there": {facts{phase: Restore, found: true, alive: true, policy: Previous, wasLocked: true}, keep},
		"restore failed, keep":                 {facts{phase: Restore, found: true, policy: Keep}, keep},
		"restore failed, unlock":               {facts{phase: Restore, found: true, policy: Unlock, wasLocked: true}, release},
		"CRIU gone, had let the task go":       {facts{phase: Restore, found: true, alive: true, letGo: true, wasLocked: true, policy: Previous}, release},
		"CRIU gone, had let it go, dead":       {facts{phase: Restore, found: true, letGo: true, wasLocked: true, policy: Previous}, keep},
		"client killed, CRIU has the task":     {facts{phase: Dump, found: true, alive: true, abandoned: true, working: true}, wait},
		"client killed, CRIU has let go":       {facts{phase: Dump, found: true, alive: true, abandoned: true}, release},
		"client killed, dumped":                {facts{phase: Dump, found: true, abandoned: true, working: true}, keep},
		"client killed, restored":              {facts{phase: Restore, found: true, alive: true, abandoned: true, wasLocked: true, policy: Previous}, release},
		"client killed, restored, keep":        {facts{phase: Restore, found: true, alive: true, abandoned: true, policy: Keep}, release},
		"client killed, restoring":             {facts{phase: Restore, found: true, alive: true, abandoned: true, working: true}, wait},
		"client killed, restore failed":        {facts{phase: Restore, found: true, abandoned: true, wasLocked: true, policy: Previous}, keep},
	} {
		if got := decide(c.f); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

func TestFrozenBy(t *testing.T) {
	files := map[string]string{
		"/sys/fs/cgroup/freezer/a/freezer.state":     "FROZEN\n",
		"/sys/fs/cgroup/freezer/b/freezer.state":     "FREEZING\n",
		"/sys/fs/cgroup/freezer/c/freezer.state":     "THAWED\n",
		"/sys/fs/cgroup/d/cgroup.events":             "populated 1\nfrozen 1\n",
		"/sys/fs/cgroup/e/cgroup.events":             "populated 1\nfrozen 0\n",
		"/sys/fs/cgroup/unified/f:g h/cgroup.events": "frozen 1\n",
	}
	read := func(p string) (string, error) {
		if s, ok := files[p]; ok {
			return s, nil
		}
		return "", os.ErrNotExist
	}
	for lines, want := range map[string]bool{
		"5:memory:/a\n4:freezer:/a\n0::/x\n": true, "4:freezer:/b": true, "4:freezer:/c": false, "4:devices,freezer:/a": true,
		"0::/d": true, "0::/e": false, "0::/f:g h\n": true, "4:memory:/a": false, "": false, "nonsense": false, "4:freezer:/gone": false,
	} {
		if got := frozenBy(lines, read); got != want {
			t.Errorf("%q: %v, want %v", lines, got, want)
		}
	}
}

// A freeze by a real cgroup is seen, and its end.
func TestFrozen(t *testing.T) {
	netlocktest.Need(t)
	dir, file, freeze, thaw := cgroupRoot+"/freezer", "freezer.state", "FROZEN", "THAWED"
	if _, err := os.Stat(dir); err != nil { // version 2 alone
		dir, file, freeze, thaw = cgroupRoot, "cgroup.freeze", "1", "0"
	}
	dir += "/criu-netlock-test-" + strconv.Itoa(os.Getpid())
	if err := os.Mkdir(dir, 0o755); err != nil {
		netlocktest.CannotRun(t, err.Error())
	}
	t.Cleanup(func() { // after the task's own: an empty cgroup can go
		eventually(t, "removed", func() bool { err := os.Remove(dir); return err == nil || errors.Is(err, os.ErrNotExist) })
	})
	pid := sleeper(t, "")
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(dir+"/"+name, []byte(text), 0); err != nil {
			t.Fatal(err)
		}
	}
	write("cgroup.procs", strconv.Itoa(pid))
	if Frozen(pid) {
		t.Fatal("a task that runs is frozen")
	}
	write(file, freeze)
	t.Cleanup(func() { write(file, thaw) }) // or it does not die
	eventually(t, "frozen", func() bool { return Frozen(pid) })
	write(file, thaw)
	eventually(t, "thawed", func() bool { return !Frozen(pid) })
}

// A pause of a real task is seen, and its end.
func TestStopped(t *testing.T) {
	pid := sleeper(t, "")
	if Stopped(pid) || Frozen(pid) {
		t.Fatal("a task that runs is stopped")
	}
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "stopped", func() bool { return Stopped(pid) })
}

// fake is a Locker over a variable.
type fake struct {
	found   atomic.Bool
	fail    atomic.Int32 // so many unlocks fail
	by      atomic.Int32 // the pid of who has locked
	unlocks atomic.Int32
}

func (f *fake) State(context.Context, *netlock.Namespace) (netlock.State, error) {
	return netlock.State{Found: f.found.Load(), Locked: f.found.Load(), Caller: netlock.Caller{PID: int(f.by.Load())}}, nil
}

func (f *fake) Unlock(context.Context, *netlock.Namespace) (netlock.State, error) {
	f.unlocks.Add(1)
	if f.fail.Add(-1) >= 0 {
		return netlock.State{}, errors.New("no")
	}
	f.found.Store(false)
	return netlock.State{Found: true}, nil
}

// lab is a guard over a fake lock, with real tasks.
type lab struct {
	*Guard
	lock       *fake
	criu, task int
	log        *strings.Builder
	end        chan error
}

func newLab(t *testing.T, phase Phase, dir string, ns *netlock.Namespace) *lab {
	l := &lab{lock: new(fake), criu: sleeper(t, "criu"), task: sleeper(t, "task"), log: new(strings.Builder), end: make(chan error, 1)}
	fd, err := unix.PidfdOpen(l.criu, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	c, err := Open(phase, ns, l.criu, fd, l.task)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	l.lock.found.Store(true)
	l.Guard = &Guard{
		Checkpoint: c, Locker: l.lock, Default: Previous, Deadline: 10 * time.Second, Dir: dir,
		Hook: func(r Request) Answer { return Answer{Line: "did " + r.Action + "\n"} },
		Log:  func(f string, a ...any) { fmt.Fprintf(l.log, f+"\n", a...) },
	}
	return l
}

func (l *lab) start(t *testing.T) {
	t.Helper()
	ready := make(chan struct{})
	l.Ready = func() { close(ready) }
	go func() { l.end <- l.Serve() }()
	select {
	case <-ready:
	case err := <-l.end:
		t.Fatalf("the guard did not start: %v", err)
	}
}

// ask is what a hook of a task does, and returns the answer.
func (l *lab) ask(t *testing.T, action string, task int) string {
	t.Helper()
	for {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: filepath.Join(l.Guard.Dir, nameOf(l.NS.Inode(), l.id())), Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write(Request{Action: action, PID: strconv.Itoa(task), Sent: monotonic()}.encode()); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, maxMessage)
		n, err := c.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		if answer := string(b[:n]); answer != "255 " { // a busy machine made it too late
			return answer
		}
	}
}

func (l *lab) ends(t *testing.T) {
	t.Helper()
	select {
	case err := <-l.end:
		if err != nil {
			t.Errorf("the guard ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the guard did not end")
	}
}

func sleeper(t *testing.T, name string) int {
	t.Helper()
	c := exec.Command("sleep", "600")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	return c.Process.Pid
}

// kill returns when the task is dead.
func kill(t *testing.T, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if !waitPidfd(fd, 10_000) {
		t.Fatal("it does not die")
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not %s after 10 s", what)
		}
	}
}

func namespace(t *testing.T) *netlock.Namespace { return netlocktest.NewNS(t).Netns() }

func tempDir(t *testing.T) string { return t.TempDir() + "/guard" }

func TestUnlocksWhenCRIUIsKilled(t *testing.T) {
	l := newLab(t, Dump, tempDir(t), namespace(t))
	l.start(t)
	if l.lock.unlocks.Load() != 0 {
		t.Fatal("unlocked while CRIU lives")
	}
	kill(t, l.criu)
	l.ends(t)
	if l.lock.found.Load() || l.lock.unlocks.Load() != 1 {
		t.Errorf("not unlocked; %s", l.log)
	}
}

// forClient makes the lab's CRIU the client of one that is not known.
func (l *lab) forClient(t *testing.T) {
	t.Helper()
	c, err := OpenFor(l.criu, l.Phase, l.NS, 0, l.task)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	l.Checkpoint = c
}

// A client that does not know CRIU is killed: the task is unlocked when nobody traces it any
// more, as CRIU does while its sockets are taken apart.
func TestUnlocksWhenTheClientIsKilled(t *testing.T) {
	l := newLab(t, Dump, tempDir(t), namespace(t))
	l.forClient(t)
	l.start(t)
	trace, release := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread() // a tracer is a thread
		trace <- unix.PtraceSeize(l.task)
		<-release
		err := unix.PtraceInterrupt(l.task)
		if err == nil {
			_, err = unix.Wait4(l.task, nil, 0, nil)
		}
		trace <- errors.Join(err, unix.PtraceDetach(l.task))
	}()
	if err := <-trace; err != nil {
		t.Fatal(err)
	}
	kill(t, l.criu)
	select {
	case <-l.end:
		t.Fatal("the guard of a task that is traced ended")
	case <-time.After(3 * firstPoll): // it has looked
	}
	if l.lock.unlocks.Load() != 0 {
		t.Fatal("unlocked while CRIU has the task")
	}
	close(release)
	if err := <-trace; err != nil {
		t.Fatal(err)
	}
	l.ends(t)
	if l.lock.found.Load() {
		t.Error("not unlocked when CRIU had let go of the task")
	}
}

// A guard whose tasks go on leaves them the processors: its place is free at once, for the guard of the
// next dump, and its process ends later. What is dead it does not keep.
func TestLingers(t *testing.T) {
	was := lingerTime
	lingerTime = 2 * time.Second // of a busy machine
	defer func() { lingerTime = was }()
	for name, dead := range map[string]bool{"the task lives": false, "the task is dead": true} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, Dump, tempDir(t), namespace(t))
			l.forClient(t)
			said := make(chan Word, 1)
			l.Words = said
			l.start(t)
			if dead {
				kill(t, l.task)
			}
			path := filepath.Join(l.Guard.Dir, nameOf(l.NS.Inode(), l.id()))
			freed := make(chan time.Time, 1)
			go func() {
				for alive(path) {
					time.Sleep(100 * time.Microsecond)
				}
				freed <- time.Now()
			}()
			said <- Done
			l.ends(t)
			end := time.Now()
			if took := end.Sub(<-freed); (took < lingerTime/2) != dead {
				t.Errorf("its place was free %v before its end", took)
			}
		})
	}
}

// A client that says that all is over has decided itself.
func TestClientSaysOver(t *testing.T) {
	l := newLab(t, Dump, tempDir(t), namespace(t))
	l.forClient(t)
	said := make(chan Word, 1)
	l.Words = said
	l.start(t)
	said <- Done
	l.ends(t)
	if l.lock.unlocks.Load() != 0 {
		t.Error("unlocked what the client has kept")
	}
}

func TestKeepsWhenTheTaskIsDead(t *testing.T) {
	l := newLab(t, Dump, tempDir(t), namespace(t))
	l.start(t)
	kill(t, l.task)
	kill(t, l.criu)
	l.ends(t)
	if l.lock.unlocks.Load() != 0 {
		t.Error("the lock of a dead task was taken off")
	}
}

// A task that was left stopped stays locked until it goes on.
func TestWaitsForAStoppedTask(t *testing.T) {
	l := newLab(t, Dump, tempDir(t), namespace(t))
	if err := unix.Kill(l.task, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "stopped", func() bool { return Stopped(l.task) })
	l.start(t)
	l.ask(t, "network-lock", l.task)
	if w := l.ask(t, askWatch, 0); !strings.HasPrefix(w, fmt.Sprint("000 ", int(Locks), " ")) {
		t.Errorf("it is at %q", w)
	}
	kill(t, l.criu)
	select {
	case <-l.end:
		t.Fatal("the guard of a stopped task ended")
	case <-time.After(3 * firstPoll): // it has looked
	}
	if l.lock.unlocks.Load() != 0 {
		t.Fatal("a stopped task was unlocked")
	}
	// The next dump of the task would leave its lock to this one.
	if w := l.ask(t, askWatch, 0); !strings.HasPrefix(w, fmt.Sprint("000 ", int(Watches), " ")) {
		t.Errorf("without CRIU it is at %q", w)
	}
	if err := unix.Kill(l.task, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	l.ends(t)
	if l.lock.found.Load() {
		t.Error("not unlocked when the task went on")
	}
}

func TestTriesAgain(t *testing.T) {
	l := newLab(t, Dump, tempDir(t), namespace(t))
	l.lock.fail.Store(3)
	l.start(t)
	kill(t, l.criu)
	l.ends(t)
	if l.lock.found.Load() || !strings.Contains(l.log.String(), "trying again") {
		t.Errorf("not unlocked, or in silence: %q", l.log)
	}
}

// An unlock that a hook could not do, with CRIU alive.
func TestPaysWhatAHookOwes(t *testing.T) {
	for _, phase := range []Phase{Dump, Restore} {
		t.Run(string(phase), func(t *testing.T) {
			l := newLab(t, phase, tempDir(t), namespace(t))
			l.lock.fail.Store(2)
			l.Hook = func(r Request) Answer { return Answer{Code: 8, Line: "no\n"} }
			l.start(t)
			// The guard did the hook's work, or the hook itself.
			if by, want := "network-unlock", "008 no\n"; phase == Restore {
				if a := l.ask(t, by, l.task); a != want {
					t.Fatal(a)
				}
			} else if a := l.ask(t, askOwe, l.task); a != "000 " {
				t.Fatal(a)
			}
			if phase == Restore { // post-resume is to come, or CRIU's end
				eventually(t, "unlocked", func() bool { return !l.lock.found.Load() })
				kill(t, l.criu)
			}
			l.ends(t)
			if l.lock.found.Load() || l.lock.unlocks.Load() != 3 || !strings.Contains(l.log.String(), "had failed: unlocked now") {
				t.Errorf("not unlocked, or in silence, after %d times: %q", l.lock.unlocks.Load(), l.log)
			}
		})
	}
}

// What it could not unlock for CRIU it unlocks when CRIU has gone, although the restore had
// found it locked.
func TestOwesAfterCRIU(t *testing.T) {
	l := newLab(t, Restore, tempDir(t), namespace(t))
	l.lock.fail.Store(1 << 20)
	l.WasLocked = true
	l.Deadline = 10 * time.Millisecond
	l.Hook = func(r Request) Answer { return Answer{Code: 8, Line: "no\n"} }
	l.start(t)
	l.ask(t, "network-unlock", l.task)
	eventually(t, "given up", func() bool { return l.debt.get() == GaveUp })
	l.lock.fail.Store(0)
	kill(t, l.criu)
	l.ends(t)
	if l.lock.found.Load() {
		t.Errorf("still locked: %q", l.log)
	}
}

// A hook that locks again, and one of another task, owe nothing; and it is no end of this
// checkpoint what becomes of another task.
func TestOwesNothing(t *testing.T) {
	l := newLab(t, Dump, tempDir(t), namespace(t))
	code := 8
	l.Hook = func(r Request) Answer { return Answer{Code: code, Line: "said\n"} }
	l.lock.fail.Store(1 << 20)
	l.Deadline = time.Hour
	l.start(t)
	l.ask(t, "network-unlock", l.task+1)
	l.ask(t, askOwe, l.task+1)
	if l.debt.get() != Watches {
		t.Error("owes what was another task's")
	}
	code = 0
	l.ask(t, "network-unlock", l.task+1)
	code = 8
	l.ask(t, "network-unlock", l.task)
	if l.debt.get() != Owes {
		t.Fatal("owes nothing, or has gone")
	}
	code = 0
	l.ask(t, "network-lock", l.task)
	tried := l.lock.unlocks.Load()
	time.Sleep(4 * firstPoll) // it would have tried
	if l.debt.get() != Locks || l.lock.unlocks.Load() > tried {
		t.Error("owes an unlock of what was locked anew, or has tried it")
	}
	l.ask(t, "network-unlock", l.task)
	l.ends(t)
}

// What is owed is an unlock of that lock: of the next one, which another checkpoint has made since, it is
// none, whether the guard still tries or has given up.
func TestOwesNotTheNextLock(t *testing.T) {
	for _, gaveUp := range []bool{false, true} {
		t.Run(fmt.Sprint("gave up ", gaveUp), func(t *testing.T) {
			l := newLab(t, Dump, tempDir(t), namespace(t))
			l.lock.fail.Store(1 << 20)
			l.lock.by.Store(1)
			l.Deadline = time.Hour
			if gaveUp {
				l.Deadline = 10 * time.Millisecond
			}
			l.Hook = func(r Request) Answer { return Answer{Code: 8, Line: "no\n"} }
			l.start(t)
			l.ask(t, "network-unlock", l.task)
			if gaveUp {
				eventually(t, "given up", func() bool { return l.ask(t, askWatch, 0) == fmt.Sprint("000 ", int(GaveUp), " 0") })
			} else {
				eventually(t, "tried", func() bool { return l.lock.unlocks.Load() > 1 })
			}
			l.lock.by.Store(2)
			eventually(t, "nothing owed", func() bool { return l.ask(t, askWatch, 0) == fmt.Sprint("000 ", int(Watches), " 0") })
			l.lock.fail.Store(0)
			tried := l.lock.unlocks.Load()
			// Its dump was one that kills.
			kill(t, l.task)
			kill(t, l.criu)
			l.ends(t)
			if !l.lock.found.Load() || l.lock.unlocks.Load() > tried {
				t.Errorf("the next one's lock was taken off: %q", l.log)
			}
		})
	}
}

// A guard that was told to end before CRIU was, as the processes of a service are, still does what it is
// for.
func TestToldToEndWithALock(t *testing.T) {
	quit := make(chan os.Signal, 1)
	quit <- unix.SIGTERM
	l := newLab(t, Dump, tempDir(t), namespace(t))
	l.Quit = quit
	l.lock.fail.Store(3)
	l.start(t)
	kill(t, l.criu)
	l.ends(t)
	if l.lock.found.Load() {
		t.Errorf("an unlock that failed was not tried again: %q", l.log)
	}
}

// A hook that has done its work itself says so, and the guard of a dump has nothing left to do.
func TestHearsOfAnUnlock(t *testing.T) {
	for phase, actions := range map[Phase][]string{Dump: {"network-unlock"}, Restore: {"network-unlock", "post-resume"}} {
		l := newLab(t, phase, tempDir(t), namespace(t))
		l.start(t)
		say := func(action string, task int) {
			t.Helper()
			c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: filepath.Join(l.Guard.Dir, nameOf(l.NS.Inode(), l.id())), Net: "unixpacket"})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			r := request(askUnlocked, task)
			r.ImageDir = action
			if _, err := c.Write(r.encode()); err != nil {
				t.Fatal(err)
			}
		}
		l.ask(t, "post-restore", l.task)
		say(actions[len(actions)-1], l.task+1)
		if l.ask(t, askWatch, 0); l.debt.get() != Locks {
			t.Errorf("%s: another task's unlock was heard", phase)
		}
		for i, action := range actions {
			say(action, l.task)
			if i < len(actions)-1 {
				eventually(t, "heard", func() bool { return l.debt.get() == Watches })
				select {
				case <-l.end:
					t.Fatalf("%s: it ended after %s", phase, action)
				case <-time.After(50 * time.Millisecond):
				}
			}
		}
		l.ends(t)
	}
}

// Of a task that has died without a lock there is nothing to guard, however long CRIU lives.
func TestTaskDies(t *testing.T) {
	for _, phase := range []Phase{Dump, Restore} {
		l := newLab(t, phase, tempDir(t), namespace(t))
		l.lock.found.Store(false)
		l.start(t)
		kill(t, l.task)
		l.ends(t)
	}
	l := newLab(t, Dump, tempDir(t), namespace(t))
	l.start(t)
	kill(t, l.task)
	select {
	case <-l.end:
		t.Fatal("the guard of a lock ended with the task")
	case <-time.After(50 * time.Millisecond):
	}
	kill(t, l.criu)
	l.ends(t)
	if !l.lock.found.Load() {
		t.Error("what was dumped was unlocked")
	}
}

// A hook that CRIU has begun before it died finds a guard that says so.
func TestOrphan(t *testing.T) {
	l := newLab(t, Dump, tempDir(t), namespace(t))
	l.Hook = func(r Request) Answer { return Answer{Line: fmt.Sprintln(r.Orphan)} }
	// A stopped task keeps the guard.
	if err := unix.Kill(l.task, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "stopped", func() bool { return Stopped(l.task) })
	l.start(t)
	if a := l.ask(t, "network-lock", l.task); a != "000 false\n" {
		t.Errorf("with CRIU: %q", a)
	}
	kill(t, l.criu)
	if a := l.ask(t, "network-lock", l.task); a != "000 true\n" {
		t.Errorf("without CRIU: %q", a)
	}
	kill(t, l.task)
	l.ends(t)
}

// Guards that are silent are waited for at the same time.
func TestAsksAtOnce(t *testing.T) {
	var all sync.WaitGroup
	all.Add(3)
	said := make(chan bool, 1)
	go func() {
		said <- anyOf([]string{"a", "b", "c"}, func(path string) bool {
			all.Done()
			all.Wait()
			return path == "b"
		})
	}()
	select {
	case yes := <-said:
		if !yes {
			t.Error("the second has said yes")
		}
	case <-time.After(10 * time.Second):
		t.Error("one waits for the other")
	}
	if anyOf(nil, nil) {
		t.Error("nobody has said yes")
	}
}

// A task that was stopped before its dump has to run for a moment to be stopped again when CRIU, which
// traces it, is killed.
func TestOnItsWayToItsStop(t *testing.T) {
	for _, stops := range []bool{false, true} {
		t.Run(fmt.Sprint(stops), func(t *testing.T) {
			l := newLab(t, Dump, tempDir(t), namespace(t))
			l.WasFrozen = true
			place, err := listen(l.dir(), nameOf(l.NS.Inode(), l.id()))
			if err != nil {
				t.Fatal(err)
			}
			defer place.close()
			l.place = place
			if v, err := l.once(); v != wait || err != nil || !l.working {
				t.Errorf("at first: %v, %v", v, err)
			}
			want := release
			if stops {
				if err := unix.Kill(l.task, unix.SIGSTOP); err != nil {
					t.Fatal(err)
				}
				eventually(t, "stopped", func() bool { return Stopped(l.task) })
				want = wait
			}
			if v, err := l.once(); v != want || err != nil || l.working {
				t.Errorf("then: %v, %v", v, err)
			}
		})
	}
}

// What a hook has done itself it tells, and the last word counts, in whichever order they come.
func TestLastWordCounts(t *testing.T) {
	l := newLab(t, Restore, tempDir(t), namespace(t))
	l.start(t)
	now := monotonic()
	say := func(action, image string, at int64) Watch {
		t.Helper()
		l.hook(Request{Action: action, PID: strconv.Itoa(l.task), ImageDir: image, Sent: at})
		return l.debt.get()
	}
	if w := say(askLocked, madeAnew, now); w != Locks {
		t.Errorf("locked: %v", w)
	}
	if since, made := l.debt.times(); since != now || made != now {
		t.Errorf("since %d, made %d, not %d", since, made, now)
	}
	l.lock.found.Store(false)
	if w := say(askUnlocked, "network-unlock", now+2); w != Watches {
		t.Errorf("unlocked: %v", w)
	}
	if w := say(askLocked, "", now+1); w != Watches {
		t.Errorf("an older word: %v", w)
	}
	if w := say(askLocked, "", now+3); w != Locks {
		t.Errorf("locked again: %v", w)
	}
	for _, action := range []string{"post-setup-namespaces", "post-restore"} {
		l.hook(Request{Action: askLocked, PID: strconv.Itoa(l.task), Config: action, Sent: now + 4})
		if got := l.restored.Load(); got != (action == "post-restore") {
			t.Errorf("%s, and restored is %v", action, got)
		}
	}
	kill(t, l.criu)
	l.ends(t)
}

// A client whose CRIU is not known can have two tasks in one namespace, each with its guard; and a
// debt of which nothing is left keeps no guard.
func TestGuardsOfOneClient(t *testing.T) {
	dir, ns := tempDir(t), namespace(t)
	one, two := newLab(t, Dump, dir, ns), newLab(t, Dump, dir, ns)
	words := make(chan Word, 1)
	for _, l := range []*lab{one, two} {
		c, err := OpenFor(one.criu, Dump, ns, 0, l.task)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		l.Checkpoint, l.lock, l.Locker = c, one.lock, one.lock
	}
	one.Words = words
	one.start(t)
	two.start(t)
	one.lock.found.Store(false)
	words <- Unpaid
	one.ends(t)
	kill(t, one.criu)
	two.ends(t)
}

// Told to end while CRIU lives a guard stays; and without CRIU it looks once.
func TestToldToEnd(t *testing.T) {
	quit := make(chan os.Signal, 1)
	quit <- unix.SIGTERM
	l := newLab(t, Dump, tempDir(t), namespace(t))
	l.Quit = quit
	l.start(t)
	select {
	case <-l.end:
		t.Fatal("it ended before CRIU")
	case <-time.After(100 * time.Millisecond):
	}
	kill(t, l.criu)
	l.ends(t)
	if l.lock.found.Load() {
		t.Error("not unlocked")
	}

	l = newLab(t, Dump, tempDir(t), namespace(t))
	if err := unix.Kill(l.task, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "stopped", func() bool { return Stopped(l.task) })
	l.Quit = quit
	l.start(t)
	kill(t, l.criu)
	quit <- unix.SIGTERM
	l.ends(t)
	if !l.lock.found.Load() || !strings.Contains(l.log.String(), "told to end") {
		t.Errorf("unlocked, or in silence: %q", l.log)
	}
}

func TestGivesUpLoudly(t *testing.T) {
	l := newLab(t, Dump, tempDir(t), namespace(t))
	l.lock.fail.Store(1 << 30)
	l.Deadline = 100 * time.Millisecond
	l.start(t)
	kill(t, l.criu)
	if err := <-l.end; err == nil || !strings.Contains(l.log.String(), "gave up") {
		t.Errorf("%v, log %q", err, l.log)
	}
}

// The lock of a checkpoint that another guard watches is that one's to take off.
func TestTwoGuardsAgree(t *testing.T) {
	dir, ns := tempDir(t), namespace(t)
	one, two := newLab(t, Dump, dir, ns), newLab(t, Dump, dir, ns)
	two.lock, two.Locker = one.lock, one.lock
	one.start(t)
	two.start(t)
	two.ask(t, "network-lock", two.task)
	kill(t, one.criu)
	one.ends(t)
	if one.lock.unlocks.Load() != 0 {
		t.Fatal("the first unlocked under the second's feet")
	}
	kill(t, two.criu)
	two.ends(t)
	if one.lock.found.Load() {
		t.Error("the last one did not unlock")
	}
}

// The places of dead guards are taken away, when their CRIU is dead too; nobody else's.
func TestSweep(t *testing.T) {
	l := newLab(t, Dump, tempDir(t), namespace(t))
	l.start(t)
	dir := l.Guard.Dir
	dead, alive := sleeper(t, ""), sleeper(t, "")
	kill(t, dead)
	place := func(name string) {
		t.Helper()
		s, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(dir, name), Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		s.SetUnlinkOnClose(false)
		s.Close()
	}
	of := func(netns uint64, criu int) string { return nameOf(netns, criu) }
	strange := "7.1." + strconv.Itoa(dead) // of another pid namespace
	names := []string{of(7, dead), of(8, alive), strange, "turn-9", "x.y.z"}
	for _, n := range names[:3] {
		place(n)
	}
	for _, n := range names[3:] {
		if err := os.WriteFile(filepath.Join(dir, n), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sweep(dir)
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range left {
		got = append(got, e.Name())
	}
	want := append([]string{nameOf(l.NS.Inode(), l.criu)}, names[1:]...)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("left are %q, want %q", got, want)
	}
}

// The lock of two checkpoints goes with the last of them, in whichever order they end, and however.
func TestLockOfTwoCheckpoints(t *testing.T) {
	for _, way := range []string{"unlocked", "killed"} {
		t.Run(way, func(t *testing.T) {
			dir, ns := tempDir(t), namespace(t)
			labs := []*lab{newLab(t, Dump, dir, ns), newLab(t, Dump, dir, ns), newLab(t, Dump, dir, ns)}
			for _, l := range labs {
				l.lock, l.Locker = labs[0].lock, labs[0].lock
				l.Hook = func(r Request) Answer { return Answer{Line: fmt.Sprintln(r.Leave)} }
				l.start(t)
			}
			one, two, idle := labs[0], labs[1], labs[2]
			unlock := func(l *lab, leaves bool) {
				t.Helper()
				if a, want := l.ask(t, "network-unlock", l.task), fmt.Sprintf("000 %v\n", leaves); a != want {
					t.Errorf("the answer is %q, want %q", a, want)
				}
				l.ends(t)
			}
			one.ask(t, "network-lock", one.task)
			two.ask(t, "network-lock", two.task)
			if way == "killed" {
				kill(t, one.criu)
				one.ends(t)
				if one.lock.unlocks.Load() != 0 {
					t.Error("unlocked under the second's feet")
				}
			} else {
				unlock(one, true)
			}
			unlock(two, false) // one has begun, and locks nothing
			idle.ask(t, "pre-dump", idle.task)
			one = newLab(t, Dump, dir, ns)
			one.Hook = idle.Hook
			one.start(t)
			one.ask(t, "network-lock", one.task)
			unlock(one, false)
			unlock(idle, false)
		})
	}
	// One whose lock has gone without a word to its guard, while CRIU lives on, wants none.
	t.Run("lost", func(t *testing.T) {
		dir, ns := tempDir(t), namespace(t)
		one, two := newLab(t, Restore, dir, ns), newLab(t, Dump, dir, ns)
		two.Hook = func(r Request) Answer { return Answer{Line: fmt.Sprintln(r.Leave), Fresh: r.Action == "network-lock"} }
		one.start(t)
		one.ask(t, "post-restore", one.task)
		two.start(t)
		two.ask(t, "network-lock", two.task)
		if a := two.ask(t, "network-unlock", two.task); a != "000 false\n" {
			t.Errorf("left to who has no lock: %q", a)
		}
		two.ends(t)
	})
	// A restore has locked before it has a guard.
	dir, ns := tempDir(t), namespace(t)
	one, two := newLab(t, Restore, dir, ns), newLab(t, Dump, dir, ns)
	two.Hook = func(r Request) Answer { return Answer{Line: fmt.Sprintln(r.Leave)} }
	one.start(t)
	two.start(t)
	two.ask(t, "network-lock", two.task)
	if a := two.ask(t, "network-unlock", two.task); a != "000 true\n" {
		t.Errorf("beside a restore: %q", a)
	}
	two.ends(t)
}

func TestTaken(t *testing.T) {
	l := newLab(t, Dump, tempDir(t), namespace(t))
	l.start(t)
	second := Guard{Checkpoint: l.Guard.Checkpoint, Dir: l.Guard.Dir}
	if err := second.Serve(); !errors.Is(err, ErrTaken) {
		t.Errorf("a second guard of one checkpoint: %v", err)
	}
	kill(t, l.criu)
	l.ends(t)
	// The place of a dead guard is free.
	s, err := listen(l.Guard.Dir, nameOf(l.NS.Inode(), l.criu))
	if err != nil {
		t.Fatal(err)
	}
	f, err := s.l.File() // a copy keeps the socket, as SIGKILL does
	if err != nil {
		t.Fatal(err)
	}
	s.l.SetUnlinkOnClose(false)
	s.close()
	f.Close()
	if s, err = listen(l.Guard.Dir, nameOf(l.NS.Inode(), l.criu)); err != nil {
		t.Errorf("the place of a dead guard: %v", err)
	} else {
		s.close()
	}
}

func TestPlaceIsOurs(t *testing.T) {
	for name, make := range map[string]func(string) error{
		"open to all": func(d string) error { return errors.Join(os.Mkdir(d, 0o777), os.Chmod(d, 0o777)) },
		"a link":      func(d string) error { return errors.Join(os.Mkdir(d+"2", 0o700), os.Symlink(d+"2", d)) },
		"a file":      func(d string) error { return os.WriteFile(d, nil, 0o600) },
		"another's":   func(d string) error { return errors.Join(os.Mkdir(d, 0o700), os.Chown(d, 65534, 65534)) },
	} {
		dir := tempDir(t)
		if err := make(dir); err != nil {
			t.Fatal(err)
		}
		if s, err := listen(dir, "1.2.3"); err == nil {
			s.close()
			t.Errorf("%s: a guard took it for its place", name)
		}
	}
}

func TestTurns(t *testing.T) {
	dir := tempDir(t)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	first, err := takeTurn(dir, 7, time.Now().Add(time.Second))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := takeTurn(dir, 7, time.Now().Add(20*time.Millisecond)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("two had the turn: %v", err)
	}
	if other, err := takeTurn(dir, 8, time.Now()); err != nil {
		t.Errorf("another namespace's turn: %v", err)
	} else {
		other.done()
	}
	first.done()
	// Many: never two at a time, and no file is left.
	var in, sum atomic.Int32
	end := make(chan error)
	const workers, rounds = 8, 50
	for range workers {
		go func() {
			for range rounds {
				t, err := takeTurn(dir, 7, time.Now().Add(time.Minute))
				if err != nil {
					end <- err
					return
				}
				if in.Add(1) != 1 {
					err = errors.New("two at a time")
				}
				sum.Add(1)
				in.Add(-1)
				t.done()
				if err != nil {
					end <- err
					return
				}
			}
			end <- nil
		}()
	}
	for range workers {
		if err := <-end; err != nil {
			t.Error(err)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 || sum.Load() != workers*rounds {
		t.Errorf("%d turns of %d, left %v", sum.Load(), workers*rounds, left)
	}
}

func TestMessages(t *testing.T) {
	r := Request{Action: "network-lock", PID: "12", ImageDir: "/proc/1/fd/3", Config: "/etc/x", Sent: 99}
	if got, err := parseRequest(r.encode()); err != nil || got != r {
		t.Errorf("%+v, %v", got, err)
	}
	if (Request{Sent: monotonic()}).expired() || !(Request{Sent: monotonic() - int64(time.Second)}).expired() || !(Request{Sent: monotonic() + int64(time.Minute)}).expired() {
		t.Error("the age of a request")
	}
	if b := (Answer{Code: 7, Line: strings.Repeat("x", 2*maxMessage)}).encode(); len(b) != maxMessage || string(b[:4]) != "007 " {
		t.Errorf("%d bytes, %q", len(b), b[:4])
	}
}

// What passes for a request reads the same when it is written again.
func FuzzRequest(f *testing.F) {
	f.Add([]byte("1\x00123\x00network-lock\x001\x00\x00"))
	f.Add(Request{Action: "network-unlock", PID: "7", ImageDir: "/proc/6/fd/3", Config: "/c", Sent: -1}.encode())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRequest(b)
		if err != nil {
			return
		}
		if again, err := parseRequest(r.encode()); err != nil || again != r {
			t.Errorf("%q: %+v, read again %+v, %v", b, r, again, err)
		}
	})
}

// Another user gets no answer and nothing done, should the directory let him in.
func TestAnotherUser(t *testing.T) {
	dir, err := os.MkdirTemp("", "guard")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l := newLab(t, Dump, dir, namespace(t))
	l.Hook = func(Request) Answer { t.Error("it was done"); return Answer{} }
	l.start(t)
	path := filepath.Join(dir, nameOf(l.NS.Inode(), l.criu))
	for name, mode := range map[string]os.FileMode{dir: 0o755, path: 0o777} {
		if err := os.Chmod(name, mode); err != nil {
			t.Fatal(err)
		}
	}
	said := make(chan error)
	go func() {
		runtime.LockOSThread() // and the thread is never given back
		said <- func() error {
			const nobody = 65534
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
				return errno
			}
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
				return err
			}
			err = unix.Sendto(fd, Request{Action: "network-unlock", PID: strconv.Itoa(l.task), Sent: monotonic()}.encode(), unix.MSG_NOSIGNAL, nil)
			if err != nil && err != unix.EPIPE { // it may have hung up by now
				return err
			}
			b := make([]byte, 100)
			if n, err := unix.Read(fd, b); n > 0 || err != nil && err != unix.ECONNRESET {
				return errors.Join(fmt.Errorf("answered with %q", b[:max(n, 0)]), err)
			}
			return nil
		}()
	}()
	if err := <-said; err != nil {
		t.Error(err)
	}
}

// Whatever comes over the socket, the guard goes on and answers the next hook.
func TestGarbage(t *testing.T) {
	l := newLab(t, Dump, tempDir(t), namespace(t))
	l.start(t)
	path := l.Guard.Dir + "/" + nameOf(l.NS.Inode(), l.criu)
	send := func(b []byte) (string, error) {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return "", err
		}
		defer unix.Close(fd)
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
			return "", err
		}
		if b != nil {
			if err := unix.Sendto(fd, b, unix.MSG_NOSIGNAL, nil); err != nil {
				return "", err
			}
		}
		var out [100]byte
		n, err := unix.Read(fd, out[:])
		return string(out[:max(n, 0)]), err
	}
	for _, b := range [][]byte{{0}, []byte("GET / HTTP/1.0\r\n\r\n"), make([]byte, 2*maxMessage), []byte("1\x00x\x00a\x00b\x00c\x00d"), []byte("2\x001\x00a\x00b\x00c\x00d")} {
		if got, err := send(b); got != "" || err != nil {
			t.Errorf("%.20q was answered with %q, %v", b, got, err)
		}
	}
	stale := Request{Action: "network-lock", Sent: monotonic() - int64(time.Second)}
	if got, err := send(stale.encode()); err != nil || got != "255 " {
		t.Errorf("a request that its hook has given up: %q, %v", got, err)
	}
	if got, err := send(Request{Action: "network-lock", Sent: monotonic()}.encode()); err != nil || got != "000 did network-lock\n" {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := send(Request{Action: "network-unlock", PID: strconv.Itoa(l.task), Sent: monotonic()}.encode()); err != nil || got != "000 did network-unlock\n" {
		t.Errorf("%q, %v", got, err)
	}
	l.ends(t) // after the unlock of a dump nothing is left to guard
}

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/config"
	"github.com/criu-netlock/criu-netlock/netlock/criurpc"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft"
)

// fakeCRIU is a process that runs the hook as CRIU does, and dies as it does.
type fakeCRIU struct {
	*exec.Cmd
	in  io.Writer
	out *bufio.Reader
}

func newCRIU(t *testing.T, env ...string) *fakeCRIU {
	t.Helper()
	const script = `eval "$PREPARE" || exit
while read a p; do
	CRTOOLS_SCRIPT_ACTION=$a CRTOOLS_INIT_PID=$p CRTOOLS_IMAGE_DIR=${IMAGES-/proc/$$/fd/3} "$1" 2>"$2"
	echo $?
done`
	dir := t.TempDir()
	c := &fakeCRIU{Cmd: exec.Command("sh", "-c", script, "criu", program, dir+"/log")}
	c.Env = append(append(os.Environ(), env...), "LOG="+dir+"/log")
	c.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS} // for PREPARE
	var err error
	if c.in, err = c.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.out = bufio.NewReader(out)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.kill()
		// No guard may outlive its test, nor its place.
		eventually(t, "without a guard", func() bool { return len(guards(t, c.Process.Pid)) == 0 })
		names, _ := filepath.Glob(guard.Dir + "/*." + strconv.Itoa(c.Process.Pid))
		for _, n := range names {
			_ = os.Remove(n) // of a guard that was killed
		}
		_ = os.Remove(guard.Dir) // if it is empty
	})
	return c
}

// hook runs one hook and returns its exit code and its log.
func (c *fakeCRIU) hook(t *testing.T, action, pid string) (string, string) {
	t.Helper()
	if _, err := fmt.Fprintln(c.in, action, pid); err != nil {
		t.Fatal(err)
	}
	code, err := c.out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.ReadFile(c.Args[len(c.Args)-1])
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(code), string(log)
}

// ok runs hooks that must succeed and returns the last one's log.
func (c *fakeCRIU) ok(t *testing.T, pid string, actions ...string) (log string) {
	t.Helper()
	for _, a := range actions {
		var code string
		if code, log = c.hook(t, a, pid); code != "0" {
			t.Fatalf("%s: exit %s, %s", a, code, log)
		}
	}
	return log
}

func (c *fakeCRIU) kill() {
	_ = c.Process.Kill() // it may be dead
	_ = c.Wait()
}

// guards are the pids of the guards of that CRIU.
func guards(t *testing.T, criu int) (pids []int) {
	t.Helper()
	all, err := tasks()
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range all {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		f := strings.Split(string(b), "\x00")
		if len(f) > 3 && f[1] == guard.Arg && f[3] == strconv.Itoa(criu) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (c *fakeCRIU) guard(t *testing.T) int {
	t.Helper()
	var g []int
	// One that has found another there is there a moment longer.
	eventually(t, "guarded by one", func() bool { g = guards(t, c.Process.Pid); return len(g) == 1 })
	return g[0]
}

// placed waits for a guard of a restore, which its hook does not wait for, to be asked.
func (c *fakeCRIU) placed(t *testing.T, pid string) {
	t.Helper()
	c.guard(t)
	eventually(t, "in its place", func() bool {
		names, err := filepath.Glob(fmt.Sprintf("%s/%d.*.%d", guard.Dir, netnsOf(t, pid), c.Process.Pid))
		return err == nil && len(names) == 1
	})
}

func TestGuardServesTheHooks(t *testing.T) {
	s, c := newSpace(t), newCRIU(t)
	if log := c.ok(t, s.pid, "pre-dump"); strings.Contains(log, "guard=") {
		t.Errorf("pre-dump: %s", log)
	}
	g := fmt.Sprint("guard=", c.guard(t))
	if log := c.ok(t, s.pid, "network-lock"); !strings.Contains(log, "result=locked") || !strings.Contains(log, g) || !s.isLocked(t) {
		t.Errorf("network-lock: %s", log)
	}
	if log := c.ok(t, s.pid, "network-unlock"); !strings.Contains(log, "result=unlocked") || !strings.Contains(log, g) || s.isLocked(t) {
		t.Errorf("network-unlock: %s", log)
	}
	eventually(t, "gone when all is unlocked", func() bool { return len(guards(t, c.Process.Pid)) == 0 })
}

// The lock tells who locked and for whom, whether the guard or the hook made it.
func TestGuardKnowsCRIU(t *testing.T) {
	s, c := newSpace(t), newCRIU(t)
	c.ok(t, s.pid, "pre-dump", "network-lock")
	run(t, "status", "--json", "--pid", s.pid).want(t, 0, `"intact": true`, fmt.Sprintf(`"pid": %d`, c.Process.Pid))
}

func TestGuardUnlocksWhenCRIUIsKilled(t *testing.T) {
	s, c := newSpace(t), newCRIU(t)
	c.ok(t, s.pid, "pre-dump", "network-lock")
	c.guard(t)
	c.kill()
	eventually(t, "unlocked", func() bool { return !s.isLocked(t) })
}

// What a guard has not unlocked yet, or cannot, is no lock in use, and list says so.
func TestListOfAGuardsLock(t *testing.T) {
	s, c := newSpace(t), newCRIU(t)
	c.ok(t, s.pid, "pre-dump", "network-lock")
	says := func(command, want string) {
		t.Helper()
		r := run(t, command) // of every namespace of this host
		if _, of, ok := strings.Cut(r.stdout, fmt.Sprintf("(pid %s ", s.pid)); !ok || !strings.Contains(strings.SplitN(of, "net:[", 2)[0], want) {
			t.Errorf("%s does not say %q: %v", command, want, r)
		}
	}
	says("list", "use        in use\n")
	g := c.guard(t)
	stop(t, g)
	c.kill()
	says("list", "use        left to its guard: ")
	if err := unix.Kill(g, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, "unlocked", func() bool { return !s.isLocked(t) })
}

// stop stops a process. The signal comes sooner than the stop.
func stop(t *testing.T, pid int) {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Kill(pid, unix.SIGKILL) })
	eventually(t, "stopped", func() bool { return allIn(pid, "T") })
}

// allIn tells whether every thread of a process that is there is in one of the states.
func allIn(pid int, states string) bool {
	stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // it is gone
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		if rest == "" || !strings.Contains(states, rest[:1]) {
			return false
		}
	}
	return true
}

// kill ends a process, which may just have ended, and waits for the last of its threads: it has no
// command line sooner than it has closed its files, its socket and its queue among them.
func kill(t *testing.T, pid int) {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
		t.Fatal(err)
	}
	eventually(t, "dead", func() bool { return allIn(pid, "ZX") })
}

// A hook whose guard is dead, stopped, or not to be had does the work itself.
func TestHookWithoutItsGuard(t *testing.T) {
	for name, break_ := range map[string]func(t *testing.T, pid int){
		"killed":  kill,
		"stopped": stop,
	} {
		t.Run(name, func(t *testing.T) {
			s, c := newSpace(t), newCRIU(t)
			c.ok(t, s.pid, "pre-dump")
			break_(t, c.guard(t))
			if log := c.ok(t, s.pid, "network-lock"); !s.isLocked(t) || strings.Contains(log, "guard=") {
				t.Errorf("network-lock: %s", log)
			}
			if log := c.ok(t, s.pid, "network-unlock"); s.isLocked(t) || strings.Contains(log, "guard=") {
				t.Errorf("network-unlock: %s", log)
			}
		})
	}
}

// What a stopped guard finds in its socket when it goes on has been done by the hook
// itself, and by then another checkpoint may have locked.
func TestGuardForgetsOldRequests(t *testing.T) {
	s, c := newSpace(t), newCRIU(t)
	c.ok(t, s.pid, "pre-dump", "network-lock")
	g := c.guard(t)
	stop(t, g)
	c.ok(t, s.pid, "network-unlock", "network-lock") // the hook's own work, both
	if err := unix.Kill(g, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	// Its answer to this one comes after what it found.
	if log := c.ok(t, s.pid, "post-setup-namespaces"); !strings.Contains(log, "already locked") || !strings.Contains(log, "guard=") {
		t.Errorf("after it went on: %s", log)
	}
	c.ok(t, s.pid, "network-unlock")
}

// A script that is configured twice runs twice at each hook: one guard, and no word of
// complaint; and what the first run locked was not locked before.
func TestGuardOfAScriptThatRunsTwice(t *testing.T) {
	s, c := newSpace(t), newCRIU(t)
	for range 2 {
		if log := c.ok(t, s.pid, "pre-dump"); strings.Contains(log, "guard_err") || strings.Contains(log, "WARN") {
			t.Errorf("pre-dump: %s", log)
		}
		c.guard(t)
	}
	c.ok(t, s.pid, "network-lock", "network-lock", "network-unlock", "network-unlock")
	s.wantLocked(t, false)

	r := newCRIU(t)
	r.ok(t, s.pid, "setup-namespaces")
	kill(t, r.guard(t)) // so that the second run's is the one that counts
	r.ok(t, s.pid, "setup-namespaces")
	r.guard(t)
	s.wantLocked(t, true)
	r.kill()
	eventually(t, "unlocked, as before the restore", func() bool { return !s.isLocked(t) })
}

// Containers of a pod share a namespace. Whoever of two checkpoints ends first leaves the lock to
// the other one, whichever way CRIU calls, and also where a hook does its work itself.
func TestCheckpointsOfAPod(t *testing.T) {
	for _, way := range []struct {
		name          string
		first, second func(t *testing.T, pid string) *part
	}{
		{"guards", scriptPart, scriptPart},
		{"the first without its guard", unguardedPart, scriptPart},
		{"a dump and a restore", scriptPart, restorePart},
		{"RPC", rpcPart, rpcPart},
		{"RPC and scripts", rpcPart, scriptPart},
		{"scripts and RPC", scriptPart, rpcPart},
		{"RPC and a restore", rpcPart, restorePart},
		{"a restore and RPC", restorePart, rpcPart},
	} {
		t.Run(way.name, func(t *testing.T) {
			s := newSpace(t)
			before := s.rules(t)
			sibling := exec.Command("nsenter", "-t", s.pid, "-n", "sleep", "600")
			if err := sibling.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = sibling.Process.Kill(); _ = sibling.Wait() })
			other := strconv.Itoa(sibling.Process.Pid)
			eventually(t, "in the namespace", func() bool { return netnsOf(t, other) == netnsOf(t, s.pid) })
			first, second := way.first(t, s.pid), way.second(t, other)
			first.lock()
			second.lock()
			if said := first.unlock(); said != "left to another checkpoint" {
				t.Errorf("the first: %s", said)
			}
			run(t, "status", "--pid", s.pid, "--json").want(t, 0, `"intact": true`)
			// It may begin again, and is the last one then.
			if first = way.first(t, s.pid); way.name == "the first without its guard" {
				first = scriptPart(t, s.pid) // without a guard nobody knows of it
			}
			first.lock()
			if said := second.unlock(); said != "left to another checkpoint" {
				t.Errorf("the second: %s", said)
			}
			if said := first.unlock(); said != "unlocked" {
				t.Errorf("the first, again: %s", said)
			}
			if after := s.rules(t); after != before {
				t.Errorf("this is left:\n%s", after)
			}
		})
	}
}

// A restore over RPC that has unlocked wants no lock any more, though it is not over.
func TestCheckpointsOfAPodInTurn(t *testing.T) {
	s := newSpace(t)
	before := s.rules(t)
	first := newRPC(t, s.pid, func(_ int, o criurpc.Options) *criurpc.Checkpoint { return criurpc.NewRestore(o) })
	for _, name := range []action.Name{action.PreRestore, action.SetupNamespaces, action.PostSetupNamespaces, action.PostRestore, action.NetworkUnlock} {
		first.do(name)
	}
	second := scriptPart(t, s.pid)
	second.lock()
	if said := second.unlock(); said != "unlocked" {
		t.Errorf("the second: %s", said)
	}
	first.do(action.PostResume)
	first.end()
	if after := s.rules(t); after != before {
		t.Errorf("this is left:\n%s", after)
	}
}

// part is one of two checkpoints.
type part struct {
	lock   func()
	unlock func() (result string)
}

var resultWord = regexp.MustCompile(`result=("[^"]*"|[^ ]*)`)

func resultOf(log string) string {
	if m := resultWord.FindStringSubmatch(log); m != nil {
		return strings.Trim(m[1], `"`)
	}
	return log
}

func scriptPart(t *testing.T, pid string) *part {
	c := newCRIU(t)
	return &part{
		func() { c.ok(t, pid, "pre-dump", "network-lock"); c.guard(t) },
		func() string {
			said := resultOf(c.ok(t, pid, "network-unlock"))
			eventually(t, "without a guard", func() bool { return len(guards(t, c.Process.Pid)) == 0 })
			return said
		},
	}
}

func unguardedPart(t *testing.T, pid string) *part {
	c := newCRIU(t)
	p := scriptPart(t, pid)
	p.lock = func() {
		c.ok(t, pid, "pre-dump", "network-lock")
		kill(t, c.guard(t))
	}
	p.unlock = func() string { return resultOf(c.ok(t, pid, "network-unlock")) }
	return p
}

func restorePart(t *testing.T, pid string) *part {
	c := newCRIU(t)
	return &part{
		func() {
			c.ok(t, pid, "setup-namespaces")
			c.placed(t, pid)
			c.ok(t, pid, "post-setup-namespaces", "post-restore")
		},
		func() string {
			said := resultOf(c.ok(t, pid, "network-unlock"))
			c.ok(t, pid, "post-resume")
			eventually(t, "without a guard", func() bool { return len(guards(t, c.Process.Pid)) == 0 })
			return said
		},
	}
}

func rpcPart(t *testing.T, pid string) *part {
	r := newRPC(t, pid, func(pid int, o criurpc.Options) *criurpc.Checkpoint { return criurpc.NewDump(pid, true, o) })
	return &part{
		func() { r.do(action.PreDump); r.do(action.NetworkLock) },
		func() string {
			defer r.end()
			return r.do(action.NetworkUnlock)
		},
	}
}

// rpcCheckpoint is one that a program has, which drives CRIU.
type rpcCheckpoint struct {
	t    *testing.T
	c    *criurpc.Checkpoint
	task int
	criu *exec.Cmd
}

func newRPC(t *testing.T, pid string, begin func(pid int, o criurpc.Options) *criurpc.Checkpoint) *rpcCheckpoint {
	task, err := strconv.Atoi(pid)
	if err != nil {
		t.Fatal(err)
	}
	r := &rpcCheckpoint{t, begin(task, criurpc.Options{Locker: netlock.New(nft.New()), Guard: program}), task, exec.Command("sleep", "600")}
	if err := r.criu.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.criu.Process.Kill(); _ = r.criu.Wait() })
	r.c.SetCRIU(r.criu.Process.Pid)
	return r
}

func (r *rpcCheckpoint) do(name action.Name) string {
	r.t.Helper()
	pid := 0
	if name == action.SetupNamespaces {
		pid = r.task
	}
	rep, err := r.c.Handle(r.t.Context(), name, pid)
	if err != nil {
		r.t.Fatal(err)
	}
	return rep.Result
}

func (r *rpcCheckpoint) end() {
	r.t.Helper()
	if err := r.c.End(nil); err != nil {
		r.t.Error(err)
	}
	eventually(r.t, "without a guard", func() bool { return len(guards(r.t, r.criu.Process.Pid)) == 0 })
}

func TestGuardOff(t *testing.T) {
	s := newSpace(t)
	file := filepath.Join(t.TempDir(), "netlock.toml")
	if err := os.WriteFile(file, []byte("guard = false\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := newCRIU(t, "CRIU_NETLOCK_CONFIG="+file)
	c.ok(t, s.pid, "pre-dump", "network-lock")
	if g := guards(t, c.Process.Pid); len(g) != 0 {
		t.Errorf("guards %v", g)
	}
	c.ok(t, s.pid, "network-unlock")
}

// A restore that fails goes back to what was there, or as the configuration has it.
func TestGuardOfARestore(t *testing.T) {
	for policy, stays := range map[string]func(was bool) bool{
		"previous": func(was bool) bool { return was },
		"keep":     func(bool) bool { return true },
		"unlock":   func(bool) bool { return false },
	} {
		for _, was := range []bool{false, true} {
			t.Run(fmt.Sprint(policy, ", locked before ", was), func(t *testing.T) {
				s, c := newSpace(t), newCRIU(t, config.EnvPath+"="+file(t, "netlock.toml", "on-failed-restore = \""+policy+"\"\n"))
				if was {
					run(t, "lock", "--pid", s.pid).want(t, 0)
				}
				c.ok(t, s.pid, "setup-namespaces")
				if !s.isLocked(t) {
					t.Fatal("not locked")
				}
				c.guard(t)
				c.ok(t, s.pid, "post-setup-namespaces")
				c.kill()
				eventually(t, "without a guard", func() bool { return len(guards(t, c.Process.Pid)) == 0 })
				if s.isLocked(t) != stays(was) {
					t.Errorf("after the restore failed: locked is %v", !stays(was))
				}
			})
		}
	}
}

// A restore that fails in a namespace which another one has left locked, its guard dead, goes back to
// what was there before that one.
func TestGuardOfASecondRestore(t *testing.T) {
	s, c := newSpace(t), newCRIU(t)
	before := s.rules(t)
	c.ok(t, s.pid, "setup-namespaces")
	kill(t, c.guard(t))
	c.kill()
	c = newCRIU(t)
	c.ok(t, s.pid, "setup-namespaces", "post-setup-namespaces")
	// The lock is the second one's by now, or gc would take it off.
	run(t, "status", "--json", "--pid", s.pid).want(t, 0, `"intact": true`, fmt.Sprintf(`"pid": %d`, c.Process.Pid))
	c.kill()
	eventually(t, "unlocked", func() bool { return s.rules(t) == before })
}

// Somebody who ends a service ends its guards: they stay while CRIU does.
func TestGuardToldToEnd(t *testing.T) {
	s, c := newSpace(t), newCRIU(t)
	c.ok(t, s.pid, "pre-dump", "network-lock")
	g := c.guard(t)
	for _, sig := range []unix.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGTERM} {
		if err := unix.Kill(g, sig); err != nil {
			t.Fatal(err)
		}
	}
	if log := c.ok(t, s.pid, "post-setup-namespaces"); !strings.Contains(log, fmt.Sprint("guard=", g)) {
		t.Errorf("it does not answer: %s", log)
	}
	c.kill()
	eventually(t, "unlocked", func() bool { return !s.isLocked(t) })
}

// An unlock that failed is done by the guard as soon as it can be, CRIU alive or not; meanwhile
// list says so, and when the guard has given up gc does it.
func TestGuardOwesAnUnlock(t *testing.T) {
	for _, gaveUp := range []bool{false, true} {
		t.Run(fmt.Sprint("gave up ", gaveUp), func(t *testing.T) {
			t.Parallel()
			limit := "60s"
			if gaveUp {
				limit = "1s"
			}
			log, prepare := newSystemLog(t)
			s := newSpace(t)
			c := newCRIU(t, append(prepare, config.EnvPath+"="+file(t, "netlock.toml", "backend = \"iptables\"\ntimeout = \"1s\"\nguard-timeout = \""+limit+"\"\n"))...)
			c.ok(t, s.pid, "setup-namespaces", "post-restore")
			// xtables' own lock, held by somebody.
			f, err := os.OpenFile("/proc/"+strconv.Itoa(c.Process.Pid)+"/root/run/xtables.lock", os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
				t.Fatal(err)
			}
			if code, said := c.hook(t, "network-unlock", s.pid); code != "8" {
				t.Fatalf("exit %s, %s", code, said)
			}
			says := func(command, want string) {
				t.Helper()
				var r result
				for range 3 { // a guard that does not answer soon is taken for one at work
					r = execute(t, nil, "nsenter", "-t", strconv.Itoa(c.Process.Pid), "-m", program, command)
					if _, of, ok := strings.Cut(r.stdout, fmt.Sprintf("(pid %s ", s.pid)); ok && strings.Contains(strings.SplitN(of, "net:[", 2)[0], want) {
						return
					}
				}
				t.Errorf("%s does not say %q: %v", command, want, r)
			}
			if gaveUp {
				log.wait(t, "gave up")
				says("list", "use        stale: ")
			} else {
				log.wait(t, "has failed; trying again for 1m0s")
				says("list", "use        left to its guard: ")
				says("gc", "left to its guard, left alone")
			}
			f.Close()
			if gaveUp {
				says("gc", "stale, unlocked")
			} else {
				log.wait(t, "had failed: unlocked now")
			}
			r := execute(t, nil, "nsenter", "-t", strconv.Itoa(c.Process.Pid), "-m", program, "status", "--pid", s.pid)
			r.want(t, 0, "not locked")
		})
	}
}

func TestGuardEndsWithItsRestore(t *testing.T) {
	s, c := newSpace(t), newCRIU(t)
	c.ok(t, s.pid, "setup-namespaces")
	c.placed(t, s.pid)
	c.ok(t, s.pid, "post-setup-namespaces", "post-restore", "network-unlock")
	if log := c.ok(t, s.pid, "post-resume"); !strings.Contains(log, "not locked") {
		t.Errorf("post-resume: %s", log)
	}
	eventually(t, "gone", func() bool { return len(guards(t, c.Process.Pid)) == 0 })
}

// A guard holds nothing of its hook's: no log, no terminal, no folder.
func TestGuardIsDetached(t *testing.T) {
	s, c := newSpace(t), newCRIU(t)
	c.ok(t, s.pid, "pre-dump")
	pid := c.guard(t)
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("session %d, %v", sid, err)
	}
	for fd := range 3 {
		if at, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); err != nil || at != os.DevNull {
			t.Errorf("descriptor %d: %s, %v", fd, at, err)
		}
	}
	if at, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); err != nil || at != "/" {
		t.Errorf("in %s, %v", at, err)
	}
}

// While its checkpoint is at work a guard has the processors kept awake; not longer, and not where the
// configuration says so.
func TestGuardKeepsAwake(t *testing.T) {
	const device = "/dev/cpu_dma_latency"
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		netlocktest.CannotRun(t, err.Error())
	}
	f.Close()
	asks := func(pid int) (n int) {
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		for _, fd := range fds {
			if at, err := os.Readlink(fd); err == nil && at == device {
				n++
			}
		}
		return n
	}
	for value, want := range map[string]int{"0s": 1, "20us": 1, "off": 0} {
		s, c := newSpace(t), newCRIU(t, config.EnvPath+"="+file(t, "netlock.toml", "cpu-latency = \""+value+"\"\n"))
		c.ok(t, s.pid, "pre-dump")
		g := c.guard(t)
		if n := asks(g); n != want {
			t.Errorf("%s: the guard asks %d times, want %d", value, n, want)
		}
		c.ok(t, s.pid, "network-lock")
		if n := asks(g); n != want {
			t.Errorf("%s, locked: the guard asks %d times, want %d", value, n, want)
		}
		// CRIU dies, and the task is stopped: that can last.
		task, err := strconv.Atoi(s.pid)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Kill(task, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		eventually(t, "stopped", func() bool { return guard.Stopped(task) })
		c.kill()
		killed := time.Now()
		eventually(t, "CRIU is gone, and nobody is kept awake", func() bool { return asks(g) == 0 })
		if took := time.Since(killed); took > 3*time.Second { // after five it would have ended by itself
			t.Errorf("%s: asked on for %v", value, took)
		}
		if n := len(guards(t, c.Process.Pid)); n != 1 {
			t.Errorf("%s: %d guards of a stopped task", value, n)
		}
		if err := unix.Kill(task, unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
}

// A guard is small: beside the program's file it has what README says, once its checkpoint is
// locked.
func TestGuardIsSmall(t *testing.T) {
	s, c := newSpace(t), newCRIU(t)
	c.ok(t, s.pid, "pre-dump")
	c.ok(t, s.pid, "network-lock")
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", c.guard(t)))
	if err != nil {
		t.Fatal(err)
	}
	// Where the kernel gives huge pages, most of one is of no use to anybody.
	kib, huge := -1, 0
	for line := range strings.Lines(string(b)) {
		for name, to := range map[string]*int{"Anonymous:": &kib, "AnonHugePages:": &huge} {
			if text, ok := strings.CutPrefix(line, name); ok {
				_, e := fmt.Sscan(text, to)
				err = errors.Join(err, e)
			}
		}
	}
	kib -= huge
	t.Logf("%d KiB", kib)
	const said = 1400 // Go's runtime takes some more or less
	if err != nil || kib <= 0 || kib > 2*said {
		t.Errorf("%d KiB of its own, %v:\n%s", kib, err, b)
	}
	c.ok(t, s.pid, "network-unlock")
}

func TestGuardIsStartedByHooksAlone(t *testing.T) {
	for _, args := range [][]string{{"guard"}, {"guard", "dump", "1", "1", "no", "no"}, {"guard", "dump", "x", "1", "no", "no"}, {"guard", "--help"}} {
		run(t, args...).oneError(t, 2, "hooks start this")
	}
}

// The two sides of the socket say the same.
func TestEarlyIsTheGuards(t *testing.T) {
	if early.GuardDir != guard.Dir {
		t.Errorf("%s and %s", early.GuardDir, guard.Dir)
	}
	for _, a := range []action.Name{action.NetworkLock, action.NetworkUnlock, action.PostSetupNamespaces, action.PostRestore, action.PostResume} {
		if !early.Asks(string(a)) {
			t.Errorf("%s does not ask the guard", a)
		}
	}
	for path, want := range map[string]string{
		"/proc/12/fd/3": "12", "/proc/self/fd/3": "", "/var/img": "", "": "", "/proc/12": "", "/proc/12/cwd": "", "/proc/-1/fd/3": "",
	} {
		if got := early.CRIU(path); got != want {
			t.Errorf("%q: %q, want %q", path, got, want)
		}
	}
}

// gc takes off what a checkpoint that is over has left, and nothing else. It is about
// every namespace of the host, so it gets a host of its own: no other test's, nor
// anybody's, is to be seen from there.
func TestGC(t *testing.T) {
	netlocktest.Need(t, "unshare", "mount")
	const script = `set -e
umount -a -t nsfs || true; mount -t tmpfs tmpfs /run; mkdir /run/netns
echo guard = false >/run/netlock.toml; export CRIU_NETLOCK_CONFIG=/run/netlock.toml
freeze() {
	if [ -d /sys/fs/cgroup/freezer ]; then
		mkdir "$CGROUP"; echo $1 >"$CGROUP/cgroup.procs"; echo FROZEN >"$CGROUP/freezer.state"
		until grep -q FROZEN "$CGROUP/freezer.state"; do :; done
	else
		mkdir "$CGROUP"; echo $1 >"$CGROUP/cgroup.procs"; echo 1 >"$CGROUP/cgroup.freeze"
		until grep -q 'frozen 1' "$CGROUP/cgroup.events"; do :; done
	fi
}
thaw() {
	if [ -d /sys/fs/cgroup/freezer ]; then echo THAWED >"$CGROUP/freezer.state"; else echo 0 >"$CGROUP/cgroup.freeze"; fi
	kill -KILL $frozen; wait $frozen || true; rmdir "$CGROUP"
}
task() {
	unshare -n sleep 600 & task=$!
	until [ "$(readlink /proc/$task/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do :; done
	: >/run/netns/$1; mount --bind /proc/$task/ns/net /run/netns/$1
}
hook='CRTOOLS_SCRIPT_ACTION=network-lock CRTOOLS_INIT_PID=$2 CRTOOLS_IMAGE_DIR=/proc/$$/fd/3 "$1" 2>/run/log || exit 1; $3'
task busy; sh -c "$hook" criu "$0" $task 'exec sleep 600' &
until grep -q result=locked /run/log 2>/dev/null; do :; done
task stale; sh -c "$hook" criu "$0" $task true
task stopped; sh -c "$hook" criu "$0" $task true; kill -STOP $task
until grep -q '^State:.T' /proc/$task/status; do :; done
task waiting; sh -c "$hook" criu "$0" $task true; kill -KILL $task; wait $task || true
task paused; sh -c "$hook" criu "$0" $task true; frozen=$task; freeze $task
restore=$(echo "$hook" | sed s/network-lock/setup-namespaces/)
task failed; sh -c "$restore" criu "$0" $task true; kill -KILL $task; wait $task || true
task half; sh -c "$restore" criu "$0" $task true
task again; sh -c "$hook" criu "$0" $task true; kill -KILL $task; wait $task || true; nsenter --net=/run/netns/again sleep 600 & task=$!
until [ "$(readlink /proc/$task/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do :; done
sh -c "$restore" criu "$0" $task true; kill -KILL $task; wait $task || true
echo 'on-failed-restore = "keep"' >>/run/netlock.toml
task kept; sh -c "$restore" criu "$0" $task true; kill -KILL $task; wait $task || true
task hand; "$0" lock --netns hand >/dev/null
echo -- list; "$0" list
echo -- dry; "$0" gc --dry-run
echo -- gc; "$0" gc
echo -- left; for n in busy stale stopped waiting hand paused failed half again kept; do "$0" status --netns $n | head -1; done
thaw`
	cgroup := fmt.Sprintf("/sys/fs/cgroup/criu-netlock-test-%d", os.Getpid())
	if _, err := os.Stat("/sys/fs/cgroup/freezer"); err == nil {
		cgroup = "/sys/fs/cgroup/freezer/" + filepath.Base(cgroup)
	}
	t.Cleanup(func() { // of a test that failed, whose tasks are killed with their pid namespace
		if _, err := os.Stat(cgroup); err != nil {
			return
		}
		for file, text := range map[string]string{"freezer.state": "THAWED", "cgroup.freeze": "0"} {
			_ = os.WriteFile(filepath.Join(cgroup, file), []byte(text), 0) // one of them is there
		}
		eventually(t, "without the cgroup", func() bool { return os.Remove(cgroup) == nil })
	})
	r := execute(t, []string{"CGROUP=" + cgroup}, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script, program).want(t, 0)
	part := func(name string) string {
		_, s, _ := strings.Cut(r.stdout, "-- "+name+"\n")
		s, _, _ = strings.Cut(s, "-- ")
		return s
	}
	for _, c := range []struct {
		part string
		says []string
	}{
		{"list", []string{"use        in use\n", "use        stale:", "use        stopped\n", "use        waiting for a restore\n", "use        by hand\n"}},
		{"dry", []string{"/stale): stale, would be unlocked", "/waiting): waiting for a restore, left alone"}},
		{"gc", []string{"/busy): in use, left alone", "/stale): stale, unlocked", "/stopped): stopped, left alone", "/waiting): waiting for a restore, left alone", "/hand): by hand, left alone",
			"/paused): stopped, left alone", "/failed): stale, unlocked", "/half): stale, unlocked", "/again): waiting for a restore, left alone", "/kept): waiting for a restore, left alone"}},
		{"left", []string{"(busy): locked", "(stale): not locked", "(stopped): locked", "(waiting): locked", "(hand): locked",
			"(paused): locked", "(failed): not locked", "(half): not locked", "(again): locked", "(kept): locked"}},
	} {
		for _, want := range c.says {
			if !strings.Contains(part(c.part), want) {
				t.Errorf("%s does not say %q: %v", c.part, want, r)
			}
		}
	}
	run(t, "gc", "--pid", "1").oneError(t, 2, "unknown flag")
}

// The units that come with the program are ones that systemd takes.
func TestUnits(t *testing.T) {
	netlocktest.Need(t, "systemd-analyze")
	dir := t.TempDir()
	units, err := filepath.Glob("../../packaging/*.*")
	if err != nil || len(units) != 2 {
		t.Fatalf("%q, %v", units, err)
	}
	for _, u := range units {
		b, err := os.ReadFile(u)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(string(b), "/usr/local/sbin/criu-netlock", program)
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(u)), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, u := range units {
		u = filepath.Join(dir, filepath.Base(u))
		if r := execute(t, nil, "systemd-analyze", "verify", u); r.code != 0 || strings.Contains(r.stderr, "criu-netlock") {
			t.Errorf("%s: %v", u, r)
		}
	}
}

// The service has the capabilities that it needs: gc finds a stale lock with them, and they do
// for taking it off.
func TestUnitsCapabilities(t *testing.T) {
	netlocktest.Need(t, "setpriv")
	b, err := os.ReadFile("../../packaging/criu-netlock-gc.service")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^CapabilityBoundingSet=(.*)$`).FindStringSubmatch(string(b))
	if m == nil {
		t.Fatal("it has all")
	}
	bound := "-all"
	for _, name := range strings.Fields(m[1]) {
		bound += ",+" + strings.ToLower(strings.TrimPrefix(name, "CAP_"))
	}
	conf := config.EnvPath + "=" + file(t, "netlock.toml", "guard = false\n")
	s, c := newSpace(t), newCRIU(t, conf)
	c.ok(t, s.pid, "network-lock")
	c.kill()
	as := []string{"setpriv", "--bounding-set", bound, "--no-new-privs", program}
	r := execute(t, nil, append(as, "gc", "--dry-run")...) // of every namespace of this host
	if _, of, ok := strings.Cut(r.stdout, fmt.Sprintf("(pid %s ", s.pid)); !ok || !strings.Contains(strings.SplitN(of, "\n", 2)[0], "stale, would be unlocked") {
		t.Error(r)
	}
	execute(t, nil, append(as, "unlock", "--pid", s.pid)...).want(t, 0, "unlocked")
	s.wantLocked(t, false)
}

package e2e

// What else can befall a checkpoint: a disk that is full, a container that somebody has
// paused, privileges that are missing.

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/netlock/config"
)

// The file system of the images is full in the middle of a dump: CRIU fails, and the
// container runs on, unlocked, with its connections.
func TestDiskFull(t *testing.T) {
	sizes := []string{"256k"}
	if *everyHook {
		sizes = []string{"24k", "48k", "96k", "256k", "512k"}
	}
	for _, engine := range []string{"criu", "runc"} {
		if engine == "criu" && !*everyHook {
			continue
		}
		for _, size := range sizes {
			t.Run(engine+"/"+size, func(t *testing.T) {
				r := newRun(t, engine, "skip")
				r.smallDisk(size)
				r.fails("No space left on device")
				r.unguarded()
				r.runsOn()
				r.container().Images = ""
				want(t, r.dump("", true), "pre-dump", "network-lock", "post-dump", "network-unlock")
				r.finish()
			})
		}
	}
}

// container is what the engines have in common.
func (r *run) container() *testbed.Container {
	switch e := r.e.(type) {
	case *testbed.CLI:
		return &e.Container
	case *testbed.Runc:
		return &e.Container
	}
	r.t.Fatalf("%T has no container", r.e)
	return nil
}

// smallDisk makes a file system of that size for the images.
func (r *run) smallDisk(size string) {
	r.t.Helper()
	const dir = testbed.WorkDir + "/small"
	if err := os.MkdirAll(filepath.Join(r.l.Work, "small"), 0o700); err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.l.Run(r.ctx, "mount", "-t", "tmpfs", "-o", "size="+size, "tmpfs", dir); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if _, err := r.l.Run(ctx, "umount", dir); err != nil {
			r.t.Error(err)
		}
	})
	r.container().Images = dir
}

// fails dumps, which is to fail for a reason that CRIU's log has, while it is locked.
func (r *run) fails(why string) {
	r.t.Helper()
	var locked bool
	r.at["network-lock"] = func() error { locked = true; return nil }
	r.errs = nil
	r.l.hooks.Handle(r.watch)
	err := r.e.Dump(r.ctx, false)
	var names []string
	for _, h := range r.l.hooks.Seen() {
		names = append(names, h.Action)
	}
	r.l.hooks.Handle(nil)
	delete(r.at, "network-lock")
	for _, e := range r.errs {
		r.t.Error(e)
	}
	log, e := r.e.Log()
	if err == nil || e != nil || !strings.Contains(log, why) {
		r.t.Fatalf("the dump: %v, %v; CRIU's log has not %q:\n%s", err, e, why, ofInterest(log))
	}
	if !locked || names[len(names)-1] != "network-unlock" {
		r.t.Errorf("not in the middle of a dump: CRIU called %q", names)
	}
}

// A container that somebody has paused is dumped as any other, and is paused afterwards.
// Nothing of it is locked then, and when it goes on so do its connections.
func TestPaused(t *testing.T) {
	long := func(name string, f func(*testing.T)) {
		if *everyHook {
			t.Run(name, f)
		}
	}
	t.Run("runc", func(t *testing.T) {
		r := newRun(t, "runc", "skip")
		r.pause()
		want(t, r.dump("", true), "pre-dump", "network-lock", "post-dump", "network-unlock")
		r.paused()
		r.unlocks()
		r.resume()
		r.finish()
	})
	long("runc, restored", func(t *testing.T) {
		r := newRun(t, "runc", "skip")
		r.pause()
		r.dump("", false)
		r.dead()
		r.restore("")
		r.finish()
	})
	// CRIU has thawed the cgroup by then: killed, it leaves tasks that run.
	long("runc, killed", func(t *testing.T) {
		r := newRun(t, "runc", "skip")
		r.pause()
		r.killAt = "network-lock"
		r.dump("network-lock", true)
		r.killAt = ""
		r.unlocks()
		r.flows("after CRIU was killed")
		r.finish()
	})
	// Paused again, they wait for whoever has done so.
	t.Run("runc, killed and paused", func(t *testing.T) {
		r := newRun(t, "runc", "skip")
		r.pause()
		r.at["network-lock"] = func() error {
			_, err := r.l.Run(r.ctx, "sh", "-c", "echo FROZEN >"+r.freezer())
			return err
		}
		r.killAt = "network-lock"
		r.dump("network-lock", true)
		r.killAt = ""
		delete(r.at, "network-lock")
		r.paused()
		r.waits()
		r.runc("resume")
		r.unlocks()
		r.finish()
	})
	// The same with a signal.
	long("criu", func(t *testing.T) {
		r := newRun(t, "criu", "skip")
		r.signal("STOP", "T")
		want(t, r.dump("", true), "pre-dump", "network-lock", "post-dump", "network-unlock")
		r.signal("", "T")
		r.unlocks()
		r.signal("CONT", "S")
		r.finish()
	})
	t.Run("criu, killed", func(t *testing.T) {
		r := newRun(t, "criu", "skip")
		r.signal("STOP", "T")
		r.killAt = "network-lock"
		r.dump("network-lock", true)
		r.killAt = ""
		r.signal("", "T")
		r.waits()
		r.signal("CONT", "S")
		r.unlocks()
		r.finish()
	})
	// CRIU leaves it so, if it is told to, and calls no network-unlock. It leaves the sockets in
	// TCP_REPAIR too: the container has a network again, not its connections.
	long("criu, left stopped", func(t *testing.T) {
		r := newRun(t, "criu", "skip")
		r.e.(*testbed.CLI).Flags = []string{"--leave-stopped"}
		want(t, r.do("dump", "", func() error { return r.e.Dump(r.ctx, true) }), "pre-dump", "network-lock", "post-dump")
		r.signal("", "T")
		r.waits()
		r.signal("CONT", "S")
		r.unlocks()
		if err := r.probe("when it went on", r.e.Netns(), false); err != nil {
			t.Error(err)
		}
	})
}

// freezer is the file of the container's cgroup freezer, as the session sees it.
func (r *run) freezer() string {
	return "/sys/fs/cgroup/freezer" + r.l.CgroupParent() + "/" + r.container().ID + "/freezer.state"
}

// signal sends the task a signal, if one is given, and waits for its state.
func (r *run) signal(name, state string) {
	r.t.Helper()
	pid := strconv.Itoa(r.e.PID())
	if name != "" {
		if _, err := r.l.Run(r.ctx, "sh", "-c", "kill -"+name+" "+pid); err != nil {
			r.t.Fatal(err)
		}
	}
	if err := testbed.Poll(r.ctx, func() error {
		b, err := os.ReadFile(r.l.Path("/proc/" + pid + "/stat"))
		if _, rest, _ := strings.Cut(string(b), ") "); err == nil && !strings.HasPrefix(rest, state) {
			err = fmt.Errorf("task %s is not in state %s: %s", pid, state, b)
		}
		return err
	}); err != nil {
		r.t.Fatal(err)
	}
}

// waits asserts that the guard leaves a lock alone whose CRIU is gone. Its first look comes 50
// ms after that, and each of these takes longer.
func (r *run) waits() {
	r.t.Helper()
	r.withoutCRIU()
	for range 3 {
		if err := r.locked("paused", r.e.Netns()); err != nil {
			r.t.Fatal(err)
		}
	}
	if g, err := r.guards(); err != nil || len(g) == 0 {
		r.t.Fatalf("the guard has gone: %v", err)
	}
	if out, err := r.l.Run(r.ctx, oursPath, "gc"); err != nil || !strings.Contains(out, "left alone") {
		r.t.Errorf("gc: %v\n%s", err, out)
	}
}

func (r *run) pause() {
	r.t.Helper()
	r.runc("pause")
	r.paused()
}

func (r *run) resume() {
	r.t.Helper()
	r.runc("resume")
	r.flows("resumed")
}

func (r *run) runc(verb string) {
	r.t.Helper()
	if _, err := r.l.Run(r.ctx, "runc", verb, r.container().ID); err != nil {
		r.t.Fatal(err)
	}
}

// paused asserts that the container is.
func (r *run) paused() {
	r.t.Helper()
	out, err := r.l.Run(r.ctx, "runc", "state", r.container().ID)
	if err != nil || !strings.Contains(out, `"status": "paused"`) {
		r.t.Fatalf("not paused: %v\n%s", err, out)
	}
}

// Our hooks have the capabilities that docs/security.md names, and no other: all goes well.
// With one fewer a dump, or a restore, fails at the first hook, which names it, and nothing is
// changed.
func TestCapabilities(t *testing.T) {
	needed := []string{"sys_admin", "net_admin", "sys_ptrace"}
	t.Run("those that are needed", func(t *testing.T) {
		r := newBounded(t, "", needed...)
		want(t, r.dump("", true), "pre-dump", "network-lock", "post-dump", "network-unlock")
		r.bounded(needed)
		r.dump("", false)
		r.dead()
		r.restore("")
		r.bounded(needed)
		r.unguarded()
		r.finish()
	})
	for i, without := range needed {
		// The guard would do the work of the later one.
		for j, hook := range []string{"pre-dump", "network-lock"} {
			if !*everyHook && i != j {
				continue
			}
			t.Run(hook+" without "+without, func(t *testing.T) {
				r := newBounded(t, hook, slices.Delete(slices.Clone(needed), i, i+1)...)
				if hook == "network-lock" {
					r.withoutGuard()
				}
				r.refusal(hook, without)
				r.runsOn()
				r.unguarded()
				r.finish()
			})
		}
	}
}

// newBounded is a container of runc's, whose hooks, or one of them, have those capabilities
// alone.
func newBounded(t *testing.T, hook string, capabilities ...string) *run {
	t.Helper()
	const bounded = testbed.BinDir + "/bounded"
	l := openLab(t)
	// Root that executes a program gets what its bounding set has.
	script := `#!/bin/sh
hook=` + hook + `
[ "${hook:-$CRTOOLS_SCRIPT_ACTION}" = "$CRTOOLS_SCRIPT_ACTION" ] || exec ` + oursPath + `
exec setpriv --bounding-set -all,+` + strings.Join(capabilities, ",+") + ` sh -c 'grep CapEff /proc/self/status >&2; exec ` + oursPath + `'
`
	if err := os.WriteFile(filepath.Join(l.Work, "bin", "bounded"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	r := &run{fixture: begin(t, "runc", "skip", bounded, relayPath)}
	r.begin()
	return r
}

// bounded asserts that the hooks had those capabilities, by what they have said themselves.
func (r *run) bounded(capabilities []string) {
	r.t.Helper()
	var mask uint64
	for _, c := range capabilities {
		mask |= 1 << map[string]int{"sys_admin": unix.CAP_SYS_ADMIN, "net_admin": unix.CAP_NET_ADMIN, "sys_ptrace": unix.CAP_SYS_PTRACE}[c]
	}
	log, err := r.e.Log()
	said := regexp.MustCompile("CapEff:.*").FindAllString(log, -1)
	if err != nil || len(said) < 4 || slices.ContainsFunc(said, func(s string) bool { return s != fmt.Sprintf("CapEff:\t%016x", mask) }) {
		r.t.Errorf("the hooks are to have the capabilities %#x, and had %q, %v", mask, said, err)
	}
}

// refusal asserts that a hook ends a dump for want of a capability.
func (r *run) refusal(hook, capability string) {
	r.t.Helper()
	r.l.hooks.Handle(nil)
	err := r.e.Dump(r.ctx, false)
	log, e := r.e.Log()
	if err == nil || e != nil || !strings.Contains(log, " action="+hook+" ") || !strings.Contains(log, "run with CAP_"+strings.ToUpper(capability)) ||
		!strings.Contains(log, "exited, status=5") {
		r.t.Errorf("without %s: %v, %v\n%s", capability, err, e, ofInterest(log))
	}
}

// withoutGuard switches the guard off.
func (r *run) withoutGuard() {
	r.t.Helper()
	file := r.l.Path(config.DefaultPath)
	if err := os.WriteFile(file, []byte("guard = false\n"), 0o644); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { os.Remove(file) })
}

package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
)

// everyHook: the whole sets of what can befall a checkpoint, for make faults. TestKilled kills
// CRIU at every hook then, and not at those alone at which something is locked.
var everyHook = flag.Bool("every-hook", false, "try every fault of a checkpoint, not the short set alone")

// CRIU is killed at the hooks at which something is locked, or at all. It cannot call any
// further hook then: what remains is the guard.
func TestKilled(t *testing.T) {
	dumps, restores := []string{"network-lock", "post-dump"}, []string{"setup-namespaces", "post-setup-namespaces", "post-restore"}
	if *everyHook {
		dumps = append(dumps, "pre-dump", "network-unlock")
		restores = append(restores, "pre-restore", "network-unlock", "pre-resume", "post-resume")
	}
	for _, engine := range []string{"criu", "runc"} {
		for _, hook := range dumps {
			t.Run(engine+"/dump/"+hook, func(t *testing.T) { newRun(t, engine, "skip").killedDump(hook) })
		}
		for _, hook := range restores {
			if engine == "runc" && hook != "post-restore" && !*everyHook {
				continue
			}
			t.Run(engine+"/restore/"+hook, func(t *testing.T) { newRun(t, engine, "skip").killedRestore(hook) })
		}
	}
}

// killedDump dumps, and CRIU is killed at a hook.
func (r *run) killedDump(hook string) {
	r.t.Helper()
	r.killAt = hook
	r.dump(hook, true)
	r.killAt = ""
	r.unlocks()
	if hook == "post-dump" {
		// CRIU had switched the sockets to TCP_REPAIR, and cannot switch them back:
		// the task's next read fails. The container has a network, not its connections.
		if err := r.probe("after CRIU was killed", r.e.Netns(), false); err != nil {
			r.t.Error(err)
		}
		return
	}
	r.flows("after CRIU was killed")
	// And the next dump is good.
	want(r.t, r.dump("", true), "pre-dump", "network-lock", "post-dump", "network-unlock")
	r.finish()
}

// killedRestore restores, and CRIU is killed at a hook.
func (r *run) killedRestore(hook string) {
	r.t.Helper()
	r.dump("", false)
	r.killAt = hook
	half := make(chan error, 1)
	if _, ok := r.e.(*testbed.Runc); ok {
		// runc waits for the tasks that CRIU has begun, and does not end before they do.
		r.after = sync.OnceFunc(func() {
			go func() { // when the guard has seen to them
				half <- errors.Join(r.noGuard(), r.killHalf(r.ctx))
			}()
		})
	} else {
		half <- nil
	}
	r.restore(hook)
	r.killAt, r.after = "", nil
	if err := <-half; err != nil {
		r.t.Fatal(err)
	}
	r.killHalfRestored()
	r.unguarded()
	if slices.Contains([]string{"network-unlock", "pre-resume", "post-resume"}, hook) {
		// It was unlocked by then: the peers know that the other end is gone.
		if !r.own() {
			r.unlocks()
		}
		return
	}
	r.dead()
	r.restore("")
	r.finish()
}

// unlocks waits until the guard has unlocked and is gone.
func (r *run) unlocks() {
	r.t.Helper()
	err := testbed.Poll(r.ctx, func() error {
		rules, err := r.l.Rules(r.ctx, r.e.Netns())
		if tables, _, _ := ours(rules); len(tables) != 0 {
			return fmt.Errorf("still locked:\n%s", rules)
		}
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	r.unguarded()
}

func (r *run) guards() ([]string, error) {
	ps, err := r.l.Run(r.ctx, "sh", "-c", `for p in /proc/[0-9]*; do tr '\0' ' ' 2>/dev/null < $p/cmdline | grep '^criu-netlock guard'; done; true`)
	return strings.Fields(ps), err
}

// unguarded waits until no guard is left.
func (r *run) unguarded() {
	r.t.Helper()
	if err := r.noGuard(); err != nil {
		r.t.Fatal(err)
	}
}

func (r *run) noGuard() error {
	return testbed.Poll(r.ctx, func() error {
		g, err := r.guards()
		if len(g) != 0 {
			err = fmt.Errorf("guards are left: %q", g)
		}
		return err
	})
}

// killHalfRestored kills the tasks that a killed CRIU has left behind, and removes what runc
// cannot.
func (r *run) killHalfRestored() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.ctx, 20*time.Second)
	defer cancel()
	err := r.killHalf(ctx)
	if e, ok := r.e.(*testbed.Runc); ok && err == nil {
		err = e.Clear(ctx)
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *run) killHalf(ctx context.Context) error {
	return testbed.Poll(ctx, func() error {
		if e, ok := r.e.(*testbed.Runc); ok {
			if err := e.Thaw(); err != nil {
				return err
			}
		}
		ps, err := r.l.Processes()
		if err != nil {
			return err
		}
		var left []string
		for _, p := range ps {
			pid, name, _ := strings.Cut(p, " ")
			if _, err := strconv.Atoi(pid); err != nil || !strings.Contains(name, "criu") && !strings.Contains(name, "workload") || strings.Contains(name, "netlock") {
				continue
			}
			left = append(left, p)
			_, _ = r.l.Run(ctx, "sh", "-c", "kill -KILL "+pid) // it may have gone meanwhile
		}
		if len(left) != 0 {
			return fmt.Errorf("half restored: %q", left)
		}
		return nil
	})
}

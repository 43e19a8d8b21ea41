package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// TestMigration dumps on one host and restores on another: sessions with a mount,
// pid and network namespace each, whose bridges are one network. The container's
// addresses move over, and the peer's connections go on.
func TestMigration(t *testing.T) {
	netlocktest.Need(t, testbed.Tools...)
	host := machine()
	open := func() *lab {
		l, err := newLab(testbed.Default(), (*testbed.Root).EnterApart, func(s string) { t.Log(s) })
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := l.close(host); err != nil {
				t.Error(err)
			}
		})
		return l
	}
	here, there := open(), open()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	n, err := here.NewLAN(ctx, "peer")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Peer.Close() }) // the rest goes with the sessions
	m, err := n.Extend(ctx, there.Session)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(here.rest(), there.rest()); err != nil {
		t.Fatal(err)
	}
	// A pid that no process has on the other host.
	if err := os.WriteFile(here.Path("/proc/sys/kernel/ns_last_pid"), []byte("1000"), 0); err != nil {
		t.Fatal(err)
	}
	on := func(l *lab, n *testbed.Net) *testbed.CLI {
		return &testbed.CLI{Container: testbed.Container{S: l.Session, Net: n, ID: "migrant",
			Scripts: []string{oursPath, relayPath}, Lock: "skip", Argv: []string{workloadPath}}}
	}
	r := &run{fixture: &fixture{t: t, ctx: ctx, l: here, net: n, e: on(here, n), skip: true}}
	r.start(func(context.Context) error { return nil })
	r.begin()
	want(t, r.dump("", false), "pre-dump", "network-lock", "post-dump")
	r.whole("between the hosts")
	e := on(there, m)
	if err := e.Take(here.Session); err != nil {
		t.Fatal(err)
	}
	r.l, r.net, r.e = there, m, e
	want(t, r.restore(""), "pre-restore", "setup-namespaces", "post-setup-namespaces", "post-restore", "network-unlock", "pre-resume", "post-resume")
	r.finish()
}

// TestTenInARow checkpoints one container again and again.
func TestTenInARow(t *testing.T) {
	for _, engine := range []string{"criu", "runc"} {
		t.Run(engine, func(t *testing.T) {
			r := newRun(t, engine, "skip")
			r.longer(t) // each round can wait for the peer's retransmission
			for i := range 10 {
				leaveRunning := i%3 == 2
				r.l.hooks.Handle(func(h testbed.Hook) error {
					if h.Action == "post-dump" && !leaveRunning {
						return r.unplug()
					}
					return nil
				})
				if err := r.e.Dump(r.ctx, leaveRunning); err != nil {
					t.Fatalf("dump %d: %v", i, err)
				}
				if !leaveRunning {
					if err := r.e.Restore(r.ctx); err != nil {
						t.Fatalf("restore %d: %v", i, err)
					}
				}
				r.flows(fmt.Sprintf("after checkpoint %d", i))
			}
			r.finish()
		})
	}
}

// TestTwoAtOnce checkpoints two containers at the same time: each has its lock while
// the other has, and each goes on when its own CRIU says so.
func TestTwoAtOnce(t *testing.T) {
	a := newRun(t, "criu", "skip")
	b := newRun(t, "runc", "skip")
	b.shared = true
	both := map[string]*run{strconv.Itoa(a.e.PID()): a, strconv.Itoa(b.e.PID()): b}
	// At this hook each waits for the other.
	var meet sync.WaitGroup
	meet.Add(2)
	met := make(chan struct{})
	go func() { meet.Wait(); close(met) }()
	a.l.hooks.Handle(func(h testbed.Hook) error {
		r := both[h.PID]
		switch {
		case r == nil:
			return fmt.Errorf("%s of pid %q, which is neither's", h.Action, h.PID)
		case h.Action == "post-dump":
			return r.unplug()
		case h.Action != "network-lock":
			return nil
		}
		meet.Done()
		select {
		case <-met:
		case <-a.ctx.Done():
			return a.ctx.Err()
		}
		return r.locked("both locked", "/proc/"+h.PID+"/ns/net")
	})
	each := func(what string, f func(*run) error) {
		t.Helper()
		var wg sync.WaitGroup
		var errs [2]error
		wg.Go(func() { errs[0] = f(a) })
		wg.Go(func() { errs[1] = f(b) })
		wg.Wait()
		if err := errors.Join(errs[:]...); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	each("dump", func(r *run) error { return r.e.Dump(r.ctx, false) })
	b.dead()
	a.whole("dumped and dead")
	a.l.hooks.Handle(nil)
	each("restore", func(r *run) error { return r.e.Restore(r.ctx) })
	a.finish()
	b.finish()
}

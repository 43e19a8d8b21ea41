package e2e

// The engine killed in the middle of a checkpoint: runc, which is CRIU's parent and its client;
// dockerd, whose client waits; conmon, which podman's restore runs under.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
)

// killEach is a script that kills every process of a name.
func killEach(name string) string {
	return `k=1; for p in /proc/[0-9]*; do [ "$(cat $p/comm 2>/dev/null)" != ` + name + ` ] || { kill -KILL ${p#/proc/} && k=0; }; done; exit $k`
}

// kills dumps or restores, and kills every process of a name when CRIU has come to a hook. It
// returns when CRIU and the guard have gone.
func (r *run) kills(comm, hook string, f func() error) {
	r.t.Helper()
	criu := 0
	r.errs = nil
	r.l.hooks.Handle(func(h testbed.Hook) error {
		err := r.watch(h)
		if h.Action == hook && criu == 0 {
			criu = h.CRIU
			_, e := r.l.Run(r.ctx, "sh", "-c", killEach(comm))
			err = errors.Join(err, e)
		}
		return err
	})
	err := f()
	r.t.Logf("%s killed at %s: %v", comm, hook, err)
	if criu == 0 {
		r.t.Fatalf("CRIU did not come to %s", hook)
	}
	// runc dies with conmon, and CRIU waits for ever for tasks that are runc's children.
	if comm == "conmon" {
		_, _ = r.l.Run(r.ctx, "sh", "-c", fmt.Sprint("kill -KILL ", criu)) // it may have gone
	}
	r.withoutCRIU()
	r.unguarded()
	r.l.hooks.Handle(nil)
	for _, e := range r.errs {
		r.t.Error(e)
	}
}

// workloads are the pids of the containers' tasks.
func (r *run) workloads() (pids []string) {
	r.t.Helper()
	ps, err := r.l.Processes()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, p := range ps {
		if pid, name, _ := strings.Cut(p, " "); name == "workload" {
			pids = append(pids, pid)
		}
	}
	return pids
}

// TestEngineKilled kills what is above runc, with containers whose namespace is there all the
// time. No task that lives stays locked, and one that is dead has left its lock there.
func TestEngineKilled(t *testing.T) {
	dumps, restores := []string{"network-lock"}, []string{"setup-namespaces"}
	if *everyHook {
		dumps = []string{"pre-dump", "network-lock", "post-dump", "network-unlock"}
		restores = []string{"pre-restore", "setup-namespaces", "post-setup-namespaces", "post-restore", "network-unlock", "post-resume"}
	}
	for _, c := range []struct {
		comm, setup string
		start       func(context.Context, *testbed.Session) error
		make        func(testbed.Container) testbed.Engine
		// again brings the engine back, when its tasks that it does not know of have gone.
		again func(r *run, unknown []string) error
	}{
		{comm: "dockerd", setup: "docker",
			start: func(ctx context.Context, s *testbed.Session) error { return s.StartDocker(ctx) },
			make:  func(c testbed.Container) testbed.Engine { return &testbed.Docker{Container: c, Keep: true} },
			again: func(r *run, unknown []string) error {
				// containerd's client in dockerd had paused the container for the dump; and nobody knows
				// of a task whose restore went on without dockerd.
				script := `for p in ` + strings.Join(unknown, " ") + `; do kill -KILL $p $(cut -d' ' -f4 /proc/$p/stat); done
				ctr -n moby tasks ls | while read id pid status; do [ "$status" != PAUSED ] || ctr -n moby tasks resume $id; done`
				_, err := r.l.Run(r.ctx, "sh", "-c", script)
				err = errors.Join(err, r.l.StartDockerd(r.ctx, "--live-restore"))
				// Another dockerd is there while no test runs.
				ps, e := r.l.Processes()
				is := func(p string) bool { return strings.HasSuffix(p, " dockerd") }
				r.l.processes = slices.DeleteFunc(r.l.processes, is)
				for _, p := range ps {
					if is(p) {
						r.l.processes = append(r.l.processes, p)
					}
				}
				slices.Sort(r.l.processes)
				return errors.Join(err, e)
			}},
		{comm: "conmon", setup: "podman",
			make: func(c testbed.Container) testbed.Engine {
				return &testbed.Podman{Container: c, Pod: true, Sibling: []string{"pause"}}
			},
			again: func(r *run, unknown []string) error {
				// What runc, killed, cannot remove itself.
				script := "kill -KILL " + strings.Join(append(unknown, "$$"), " ")
				if len(unknown) == 0 {
					script = ":"
				}
				_, err := r.l.Run(r.ctx, "sh", "-c", "for d in $(grep -o '/run/runc/[^ ]*/criu-root' /proc/mounts); do umount $d || exit; done; "+script)
				return err
			}},
	} {
		l, n := openEngine(t, c.setup, c.start)
		e := engine{name: c.comm, make: c.make}
		for _, hook := range dumps {
			t.Run(c.comm+"/dump/"+hook, func(t *testing.T) {
				r := e.run(t, l, n)
				r.kills(c.comm, hook, func() error { return r.e.Dump(r.ctx, true) })
				r.unlocks()
				if err := c.again(r, nil); err != nil {
					t.Fatal(err)
				}
				r.finish()
			})
		}
		for _, hook := range restores {
			t.Run(c.comm+"/restore/"+hook, func(t *testing.T) {
				r := e.run(t, l, n)
				r.dump("", false)
				keepers := r.workloads()
				r.kills(c.comm, hook, func() error { return r.e.Restore(r.ctx) })
				restored := slices.DeleteFunc(r.workloads(), func(p string) bool { return slices.Contains(keepers, p) })
				t.Logf("restored: %q", restored)
				switch {
				case len(restored) != 0:
					r.unlocks()
					r.flows("restored")
				case slices.Contains(lockedAt, hook) || hook == "pre-restore":
					r.dead()
					if out, err := l.Run(r.ctx, oursPath, "gc"); err != nil || !strings.Contains(out, "waiting for a restore, left alone") {
						t.Errorf("gc: %v\n%s", err, out)
					}
				}
				if err := c.again(r, restored); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

// runc killed, with action scripts alone: CRIU, whose client it is, gives up at its next
// notification, and what it cannot unlock any more its guard does.
func TestRuncKilled(t *testing.T) {
	dumps, restores := []string{"network-lock"}, []string{"post-restore"}
	if *everyHook {
		dumps = []string{"pre-dump", "network-lock", "post-dump", "network-unlock"}
		restores = []string{"pre-restore", "setup-namespaces", "post-setup-namespaces", "post-restore", "network-unlock", "pre-resume", "post-resume"}
	}
	for _, hook := range dumps {
		t.Run("dump/"+hook, func(t *testing.T) {
			r := newRun(t, "runc", "skip")
			r.kills("runc", hook, func() error { return r.e.Dump(r.ctx, true) })
			r.unlocks()
			r.flows("after runc was killed")
			want(t, r.dump("", true), "pre-dump", "network-lock", "post-dump", "network-unlock")
			r.finish()
		})
	}
	for _, hook := range restores {
		t.Run("restore/"+hook, func(t *testing.T) {
			r := newRun(t, "runc", "skip")
			r.dump("", false)
			r.kills("runc", hook, func() error { return r.e.Restore(r.ctx) })
			if restored := r.workloads(); len(restored) != 0 {
				t.Logf("restored: %q", restored)
				r.unlocks()
				r.flows("restored")
				r.killHalfRestored()
				return
			}
			r.dead()
			r.killHalfRestored()
			r.restore("")
			r.finish()
		})
	}
}

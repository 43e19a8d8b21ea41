package e2e

import (
	"context"
	"errors"
	"fmt"
	"go/doc/comment"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
)

// The interfaces over which package criurpc locks.
var rpcEngines = []string{"go-criu", "swrk", "service", "libcriu"}

// breaksOff tells whether the client leaves CRIU without an answer after a callback that
// has failed, so that CRIU can call no hook from there on.
func breaksOff(engine string) bool { return engine == "go-criu" || engine == "libcriu" }

// newRPCRun is newRun for a program that locks over RPC, without an action script of ours:
// the one that watches runs after each notification.
func newRPCRun(t *testing.T, engine, lock string) *run {
	t.Helper()
	if engine == "libcriu" {
		putLibcriu(t)
	}
	r := &run{fixture: begin(t, engine, lock, relayPath)}
	r.begin()
	return r
}

// client sets how the program that drives CRIU misbehaves from now on.
func (r *run) client(engine string, flags ...string) {
	client := append([]string{rpcClientPath}, append(flags, engine)...)
	if engine == "libcriu" {
		client = append([]string{libcriuPath}, flags...)
	}
	r.e.(*testbed.CLI).Client = client
}

func TestRPC(t *testing.T) {
	for _, engine := range rpcEngines {
		locks := []string{"skip"}
		if engine == "swrk" {
			locks = append(locks, "iptables", "nftables")
		}
		for _, lock := range locks {
			for _, c := range cases {
				if c.engine != "" {
					continue
				}
				t.Run(engine+"/"+lock+"/"+c.name, func(t *testing.T) {
					r := newRPCRun(t, engine, lock)
					c.run(r)
					r.finish()
				})
			}
		}
	}
}

// broken runs a dump or restore that fails without a hook of the test's being the cause,
// and returns its error.
func (r *run) broken(f func() error) error {
	r.t.Helper()
	r.l.hooks.Handle(nil)
	err := f()
	if err == nil {
		r.t.Fatal("it succeeded")
	}
	return err
}

// runsOn asserts that the container lives on, unlocked, with its connections.
func (r *run) runsOn() {
	r.t.Helper()
	rules, err := r.l.Rules(r.ctx, r.e.Netns())
	if tables, _, _ := ours(rules); err != nil || len(tables) != 0 {
		r.t.Fatalf("locked: %v\n%s", err, rules)
	}
	r.flows("after a dump that failed")
}

// A lock that is refused aborts the dump, and the container runs on.
func TestRPCRefused(t *testing.T) {
	for _, engine := range rpcEngines {
		t.Run(engine, func(t *testing.T) {
			r := newRPCRun(t, engine, "skip")
			r.client(engine, "-refuse")
			err := r.broken(func() error { return r.e.Dump(r.ctx, false) })
			if !strings.Contains(err.Error(), "refused on purpose") {
				t.Errorf("the error has not its cause: %v", err)
			}
			if log, err := r.e.Log(); err != nil || strings.Count(log, "action=network-lock ") != 1 || !strings.Contains(log, "err=refused") && !strings.Contains(log, `msg="network-lock failed"`) {
				t.Errorf("it was not network-lock that failed: %v\n%s", err, ofInterest(log))
			}
			r.runsOn()
			r.client(engine)
			want(t, r.dump("", true), "pre-dump", "network-lock", "post-dump", "network-unlock")
			r.finish()
		})
	}
}

// A callback of the caller's that fails leaves no task locked that lives on. With go-criu
// CRIU can call no hook from there on.
func TestRPCCallbackFails(t *testing.T) {
	for _, engine := range rpcEngines {
		for _, hook := range []string{"pre-dump", "network-lock", "post-dump"} {
			t.Run(engine+"/dump/"+hook, func(t *testing.T) {
				r := newRPCRun(t, engine, "skip")
				r.client(engine, "-fail", hook)
				if err := r.broken(func() error { return r.e.Dump(r.ctx, false) }); !strings.Contains(err.Error(), "failed on purpose") {
					t.Errorf("the error has not its cause: %v", err)
				}
				r.runsOn()
				r.client(engine)
				r.dump("", true)
				r.finish()
			})
		}
		for _, hook := range []string{"post-setup-namespaces", "post-restore"} {
			t.Run(engine+"/restore/"+hook, func(t *testing.T) {
				r := newRPCRun(t, engine, "skip")
				r.dump("", false)
				r.client(engine, "-fail", hook)
				// Its namespace goes with its tasks: no peer may reach it then.
				r.silence()
				if err := r.broken(func() error { return r.e.Restore(r.ctx) }); !strings.Contains(err.Error(), "failed on purpose") {
					t.Errorf("the error has not its cause: %v", err)
				}
				r.dead()
				r.client(engine)
				r.restore("")
				r.finish()
			})
		}
		// CRIU goes on in spite of these: the tasks run, and must not be locked.
		for _, hook := range []string{"network-unlock", "post-resume"} {
			t.Run(engine+"/restore/"+hook, func(t *testing.T) {
				r := newRPCRun(t, engine, "skip")
				pid := r.e.PID()
				r.dump("", false)
				r.client(engine, "-fail", hook)
				r.l.hooks.Handle(nil)
				err := r.e.Restore(r.ctx)
				if failed := err != nil; failed != breaksOff(engine) {
					t.Errorf("restore: %v", err)
				}
				rules, err := r.l.Rules(r.ctx, fmt.Sprintf("/proc/%d/ns/net", pid)) // restored tasks have the pids they had
				if err != nil || rules != r.rules {
					t.Errorf("the rule set was\n%s\nand is\n%s%v", r.rules, rules, err)
				}
				r.flows("after the restore")
				if r.e.PID() == 0 {
					r.killHalfRestored() // the engine does not know that it lives
				}
			})
		}
	}
}

// The client is killed at each notification. CRIU goes on to put the tasks back, or to let
// them run, and the guard unlocks what lives.
func TestRPCKilled(t *testing.T) {
	for _, engine := range rpcEngines {
		for _, hook := range []string{"pre-dump", "network-lock", "post-dump", "network-unlock"} {
			t.Run(engine+"/dump/"+hook, func(t *testing.T) {
				r := newRPCRun(t, engine, "skip")
				r.client(engine, "-kill", hook)
				r.killed(hook, func() error { return r.e.Dump(r.ctx, hook == "network-unlock") })
				r.unlocks()
				r.runsOn()
				r.client(engine)
				r.withoutCRIU()
				r.dump("", true)
				r.finish()
			})
		}
		for _, hook := range []string{"pre-restore", "setup-namespaces", "post-setup-namespaces", "post-restore"} {
			t.Run(engine+"/restore/"+hook, func(t *testing.T) {
				r := newRPCRun(t, engine, "skip")
				r.dump("", false)
				r.client(engine, "-kill", hook)
				r.silence() // until the restore that succeeds
				r.killed(hook, func() error { return r.e.Restore(r.ctx) })
				r.withoutCRIU("workload") // CRIU kills what it has restored
				r.unguarded()
				r.dead()
				r.client(engine)
				r.restore("")
				r.finish()
			})
		}
		for _, hook := range []string{"network-unlock", "post-resume"} {
			t.Run(engine+"/restore/"+hook, func(t *testing.T) {
				r := newRPCRun(t, engine, "skip")
				pid := r.e.PID()
				r.dump("", false)
				r.client(engine, "-kill", hook)
				r.killed(hook, func() error { return r.e.Restore(r.ctx) })
				r.withoutCRIU()
				r.unguarded()
				rules, err := r.l.Rules(r.ctx, fmt.Sprintf("/proc/%d/ns/net", pid)) // restored tasks have the pids they had
				if err != nil || rules != r.rules {
					t.Errorf("the rule set was\n%s\nand is\n%s%v", r.rules, rules, err)
				}
				r.flows("after the restore")
				r.killHalfRestored() // the engine does not know that it lives
			})
		}
	}
}

// killed runs a dump or restore whose client is killed at a hook.
func (r *run) killed(hook string, f func() error) {
	r.t.Helper()
	err := r.broken(f)
	log, e := r.e.Log()
	if e != nil || !strings.Contains(log, "Running "+hook+" scripts") || !strings.Contains(err.Error(), "killed") {
		r.t.Fatalf("the client was not killed at %s: %v, %v\n%s", hook, err, e, ofInterest(log))
	}
}

// withoutCRIU waits until CRIU, and what else is named, has gone.
func (r *run) withoutCRIU(others ...string) {
	r.t.Helper()
	err := testbed.Poll(r.ctx, func() error {
		ps, err := r.l.Processes()
		for _, p := range ps {
			if _, name, _ := strings.Cut(p, " "); name == "criu" || slices.Contains(others, name) {
				err = errors.Join(err, fmt.Errorf("%s is still there", p))
			}
		}
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

// A client whose time is up goes away in the middle of a dump.
func TestRPCGoesAway(t *testing.T) {
	for _, engine := range []string{"swrk", "service"} {
		for _, hook := range []string{"network-lock", "post-dump"} {
			t.Run(engine+"/"+hook, func(t *testing.T) {
				r := newRPCRun(t, engine, "skip")
				r.client(engine, "-go", hook)
				if err := r.broken(func() error { return r.e.Dump(r.ctx, false) }); !strings.Contains(err.Error(), "context canceled") {
					t.Errorf("the error has not its cause: %v", err)
				}
				r.runsOn()
				r.client(engine)
				r.dump("", true)
				r.finish()
			})
		}
	}
}

// The descriptor that comes with orphan-pts-master arrives, and is a terminal that works.
func TestRPCTerminal(t *testing.T) {
	l := openLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	dir := "/run/e2e/terminal"
	if err := os.Mkdir(filepath.Join(l.Work, "terminal"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Run(ctx, rpcClientPath, "terminal", dir); err != nil {
		t.Error(err)
	}
	(&fixture{t: t, l: l}).nothingLeft()
}

// The example in the package's documentation is a program that works.
func TestRPCExample(t *testing.T) {
	r := newRPCRun(t, "go-criu", "skip")
	dir := filepath.Join(r.l.Work, "example")
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, "main.go"), []byte(example(t)), 0o644)); err != nil {
		t.Fatal(err)
	}
	build := exec.CommandContext(r.ctx, "go", "build", "-o", filepath.Join(r.l.Work, "bin", "example"), filepath.Join(dir, "main.go"))
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// It sets no action script, so the one that watches is set for all of CRIU.
	conf := filepath.Join(r.l.Work, "criu/default.conf")
	if err := os.WriteFile(conf, []byte("action-script "+relayPath+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(conf)
	r.l.hooks.Handle(r.watch)
	out, err := r.l.RunIn(r.ctx, r.net.Path(), testbed.BinDir+"/example", strconv.Itoa(r.e.PID()), testbed.WorkDir+"/example")
	if err = errors.Join(append(r.errs, err)...); err != nil {
		t.Fatal(err)
	}
	var hooks []string
	for _, h := range r.l.hooks.Seen() {
		hooks = append(hooks, h.Action)
	}
	want(t, hooks, "pre-dump", "network-lock", "post-dump", "network-unlock")
	for _, line := range []string{"pre-dump: possible", "network-lock: locked", "network-unlock: unlocked"} {
		if !strings.Contains(out, line) {
			t.Errorf("it does not say %q:\n%s", line, out)
		}
	}
	r.l.hooks.Handle(nil)
	r.finish()
}

// example is the one program in the documentation of package criurpc.
func example(t *testing.T) string {
	t.Helper()
	const file = "../netlock/criurpc/criurpc.go"
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments|parser.PackageClauseOnly)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range new(comment.Parser).Parse(f.Doc.Text()).Content {
		if c, ok := b.(*comment.Code); ok && strings.HasPrefix(c.Text, "package main\n") {
			return c.Text
		}
	}
	t.Fatalf("%s has no program in its documentation", file)
	return ""
}

package e2e

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/e2e/traffic"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// engine is one that has a root and a session of its own.
type engine struct {
	name  string
	setup string // the engine's name for Setup
	// renewed: a checkpoint that stops the container ends its namespace, a restore
	// makes a new one, of which nothing is in the image.
	renewed bool
	// sibling: another container of the namespace, which is not checkpointed, has a
	// stream of its own.
	sibling bool
	// noRetry: after a restore that failed the engine cannot restore again.
	noRetry bool
	start   func(context.Context, *testbed.Session) error
	make    func(testbed.Container) testbed.Engine
}

var engines = []engine{
	{name: "lxc", setup: "lxc", make: func(c testbed.Container) testbed.Engine {
		return &testbed.LXC{Container: c}
	}},
	{name: "podman", setup: "podman", renewed: true, make: func(c testbed.Container) testbed.Engine {
		return &testbed.Podman{Container: c}
	}},
	{name: "podman pod", setup: "podman", sibling: true, make: func(c testbed.Container) testbed.Engine {
		return &testbed.Podman{Container: c, Pod: true, Sibling: []string{"stream", strconv.Itoa(siblingPort)}}
	}},
	// crun finds the cgroup of the failed restore: write to `devices.deny`: Invalid argument.
	{name: "podman with crun", setup: "crun", renewed: true, noRetry: true, make: func(c testbed.Container) testbed.Engine {
		return &testbed.Podman{Container: c, Runtime: "crun"}
	}},
	{name: "docker", setup: "docker", renewed: true,
		start: func(ctx context.Context, s *testbed.Session) error { return s.StartDocker(ctx) },
		make:  func(c testbed.Container) testbed.Engine { return &testbed.Docker{Container: c} }},
	{name: "docker in another's namespace", setup: "docker",
		start: func(ctx context.Context, s *testbed.Session) error { return s.StartDocker(ctx) },
		make:  func(c testbed.Container) testbed.Engine { return &testbed.Docker{Container: c, Keep: true} }},
}

// siblingPort is where the sibling in a pod has its streams.
const siblingPort = 7001

// openEngine opens a session for one engine, with a bridge and a peer, set up with more
// flags.
func openEngine(t *testing.T, setup string, start func(context.Context, *testbed.Session) error, flags ...string) (*lab, *testbed.Net) {
	t.Helper()
	netlocktest.Need(t, testbed.Tools...)
	host := machine()
	l, err := newLab(testbed.Engines(), (*testbed.Root).EnterApart, func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.close(host); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	n, err := l.NewLAN(ctx, "peer")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Peer.Close() }) // the rest goes with the session
	if len(flags) > 0 {
		// The session's root is read-only, and its daemons have their PATH from the start.
		_, err = l.Run(ctx, "mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/usr/local/sbin")
	}
	if start != nil {
		err = errors.Join(err, start(ctx, l.Session))
	}
	// Set up and undone is as it was.
	before, e := l.ConfigurationFiles()
	err = errors.Join(err, e, l.Setup(ctx, setup, flags...), l.Undo(ctx, setup))
	if after, e := l.ConfigurationFiles(); e != nil || !maps.Equal(before, after) {
		t.Errorf("/etc/criu was %q and is %q, %v", before, after, e)
	}
	if _, e := os.Lstat(l.Path("/usr/local/sbin/criu")); !errors.Is(e, os.ErrNotExist) {
		t.Errorf("the link: %v", e)
	}
	if err := errors.Join(err, l.Setup(ctx, setup, flags...), l.Relay(setup, relayPath), l.rest()); err != nil {
		t.Fatal(err)
	}
	return l, n
}

// TestEnginesKilled is TestKilled with LXC.
func TestEnginesKilled(t *testing.T) {
	dumps, restores := []string{"network-lock"}, []string{"post-setup-namespaces"}
	if *everyHook {
		dumps = []string{"pre-dump", "network-lock", "post-dump", "network-unlock"}
		restores = []string{"pre-restore", "setup-namespaces", "post-setup-namespaces", "post-restore", "network-unlock", "pre-resume", "post-resume"}
	}
	for _, e := range engines {
		if e.name != "lxc" {
			continue // they have CRIU through runc
		}
		l, n := openEngine(t, e.setup, e.start)
		for _, hook := range dumps {
			t.Run(e.name+"/dump/"+hook, func(t *testing.T) { e.run(t, l, n).killedDump(hook) })
		}
		for _, hook := range restores {
			t.Run(e.name+"/restore/"+hook, func(t *testing.T) { e.run(t, l, n).killedRestore(hook) })
		}
	}
}

// TestEngines is TestCheckpoint with the engines that people use: nothing of theirs
// is replaced, neither their networks nor their calls of CRIU.
func TestEngines(t *testing.T) {
	for _, e := range engines {
		t.Run(e.name, func(t *testing.T) { e.test(t) })
	}
}

// The same with criu-netlock in CRIU's place, as setup --as-criu puts it there.
func TestEnginesInCRIUsPlace(t *testing.T) {
	for _, e := range engines {
		if e.setup == "lxc" { // it runs CRIU's command line
			continue
		}
		t.Run(e.name, func(t *testing.T) { e.test(t, "--as-criu") })
	}
}

func (e engine) test(t *testing.T, flags ...string) {
	l, n := openEngine(t, e.setup, e.start, flags...)
	for _, c := range cases {
		if c.engine != "" || e.noRetry && strings.HasPrefix(c.name, "restore fails") {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			r := e.run(t, l, n)
			if e.renewed {
				r.keeps()
			}
			c.run(r)
			r.finish()
		})
	}
}

// keeps leaves the lock of a restore that fails on its namespace, which nobody is going to use again:
// until the engine has taken it away its kernel would reset the peer's connections.
func (r *run) keeps() {
	r.t.Helper()
	cfg := filepath.Join(r.l.Work, "criu/netlock.toml")
	if err := os.WriteFile(cfg, []byte("on-failed-restore = \"keep\"\n"), 0o644); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if err := os.Remove(cfg); err != nil {
			r.t.Error(err)
		}
	})
}

// run is a container with live connections.
func (e engine) run(t *testing.T, l *lab, n *testbed.Net) *run {
	t.Helper()
	r := &run{fixture: e.fixture(t, l, n), renewed: e.renewed}
	r.begin()
	if e.sibling {
		// It waits while the other is away, and loses nothing.
		r.streams["sibling"] = traffic.Start(r.dial("tcp4", siblingPort))
		r.flows("before, with the sibling")
	}
	return r
}

// fixture is a container that runs the workload.
func (e engine) fixture(t *testing.T, l *lab, n *testbed.Net, args ...string) *fixture {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	t.Cleanup(cancel)
	f := &fixture{t: t, ctx: ctx, l: l, net: n, skip: true}
	_, id, _ := strings.Cut(t.Name(), "/")
	f.e = e.make(testbed.Container{S: l.Session, Net: n, Hooks: l.hooks, Argv: append([]string{workloadPath}, args...),
		ID: strings.Trim(idBad.ReplaceAllString(strings.ToLower(id), "-"), "-")})
	f.start(func(context.Context) error { return nil })
	return f
}

// CRIU's client under podman, runc, is killed at a hook; and what else can go wrong there, a lock
// that is refused.
func TestEnginesClientKilled(t *testing.T) {
	for _, e := range engines {
		if e.name != "podman" {
			continue
		}
		l, n := openEngine(t, e.setup, e.start, "--as-criu")
		t.Run("refused", func(t *testing.T) {
			r := e.run(t, l, n)
			r.isRefused()
			r.finish()
		})
		for _, hook := range []string{"pre-dump", "network-lock", "post-dump", "network-unlock"} {
			t.Run("dump/"+hook, func(t *testing.T) {
				r := e.run(t, l, n)
				r.killsClient(hook, func() error { return r.e.Dump(r.ctx, true) })
				r.runsOn()
				r.finish()
			})
		}
		begin := func(t *testing.T) *run {
			r := e.run(t, l, n)
			r.dump("", false)
			r.silence()
			t.Cleanup(func() {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				defer cancel()
				// runc, killed, leaves what it cannot remove itself.
				_, err := l.Run(ctx, "sh", "-c", "for d in $(grep -o '/run/runc/[^ ]*/criu-root' /proc/mounts); do umount $d || exit; done")
				_, e := l.RunIn(ctx, n.Path(), "sh", "-c", "! nft list table inet silence >/dev/null 2>&1 || nft delete table inet silence")
				if err := errors.Join(err, e); err != nil {
					t.Error(err)
				}
			})
			return r
		}
		for _, hook := range []string{"pre-restore", "setup-namespaces", "post-setup-namespaces"} {
			t.Run("restore/"+hook, func(t *testing.T) {
				r := begin(t)
				r.killsClient(hook, func() error { return r.e.Restore(r.ctx) })
				r.withoutCRIU("workload")
			})
		}
		// From there on the tasks live on, without their engine. conmon waits for them, and CRIU, which
		// is conmon's child now, is a zombie until then.
		for _, hook := range []string{"post-restore", "network-unlock", "post-resume"} {
			t.Run("restore/"+hook, func(t *testing.T) {
				r := begin(t)
				killed, restored := r.killClientAt(hook, r.at), make(chan error, 1)
				go func() { restored <- r.e.Restore(r.ctx) }()
				select {
				case <-killed:
				case err := <-restored:
					t.Fatalf("the restore has ended before %s: %v", hook, err)
				}
				r.unguarded()
				r.flows("restored, by a client that was killed")
				pids := r.workloads()
				if len(pids) != 1 {
					t.Errorf("the restored tasks: %q", pids)
				}
				for _, pid := range pids {
					rules, err := l.Rules(r.ctx, "/proc/"+pid+"/ns/net")
					if tables, _, _ := ours(rules); err != nil || len(tables) != 0 {
						t.Errorf("the task is locked: %v\n%s", err, rules)
					}
				}
				r.killHalfRestored()
				if err := <-restored; err == nil {
					t.Error("the restore has succeeded")
				}
			})
		}
	}
}

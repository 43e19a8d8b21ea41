package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
)

// shimDir has criu-netlock under the name of criu.
const shimDir = testbed.BinDir + "/shim"

// putShim puts it there.
func putShim(t *testing.T) *lab {
	t.Helper()
	l := openLab(t)
	shim := filepath.Join(l.Work, "bin", "shim")
	if err := os.MkdirAll(shim, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(oursPath, filepath.Join(shim, "criu")); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
	return l
}

// newProxyRun is newRun for a program that knows nothing of us and finds us in CRIU's
// place; "go-criu", "deaf", which asks for no notifications, and "runc".
func newProxyRun(t *testing.T, client, lock string, scripts ...string) *run {
	t.Helper()
	putShim(t)
	engine := client
	if client == "deaf" {
		engine = "go-criu"
	}
	r := &run{fixture: begin(t, engine, lock, append(scripts, relayPath)...)}
	switch e := r.e.(type) {
	case *testbed.CLI:
		e.Client = plain(client)
	case *testbed.Runc:
		e.Env = []string{"PATH=" + shimDir + ":/usr/sbin:/usr/bin:/sbin:/bin"}
	}
	r.begin()
	return r
}

func plain(client string, flags ...string) []string {
	argv := append([]string{rpcClientPath, "-criu", shimDir + "/criu"}, flags...)
	if client == "deaf" {
		argv = append(argv, "-deaf")
	}
	return append(argv, "plain")
}

func TestProxy(t *testing.T) {
	for _, client := range []string{"go-criu", "deaf", "runc"} {
		for _, c := range cases {
			if c.engine != "" && c.engine != client {
				continue
			}
			t.Run(client+"/"+c.name, func(t *testing.T) {
				r := newProxyRun(t, client, "skip")
				c.run(r)
				r.finish()
			})
		}
	}
}

// With our action script beside it nothing is there twice.
func TestProxyAndScript(t *testing.T) {
	for _, client := range []string{"go-criu", "runc"} {
		t.Run(client, func(t *testing.T) {
			r := newProxyRun(t, client, "skip", oursPath)
			r.twice = true
			r.dump("", true)
			r.dump("", false)
			r.dead()
			r.restore("")
			r.finish()
		})
	}
}

// The client's callback fails, and go-criu closes the connection: the proxy takes the lock
// off, a moment later.
func TestProxyCallbackFails(t *testing.T) {
	for _, hook := range []string{"network-lock", "post-dump"} {
		t.Run(hook, func(t *testing.T) {
			r := newProxyRun(t, "go-criu", "skip")
			e := r.e.(*testbed.CLI)
			e.Client = plain("go-criu", "-fail", hook)
			if err := r.broken(func() error { return r.e.Dump(r.ctx, false) }); !strings.Contains(err.Error(), "failed on purpose") {
				t.Errorf("%v", err)
			}
			r.unlocks()
			r.runsOn()
			e.Client = plain("go-criu")
			r.dump("", true)
			r.finish()
		})
	}
}

// occupy takes both names of our tables in the container's namespace, for a process that
// lives until release: nobody else can change them.
func (r *run) occupy(path string) (release func(), err error) {
	cmd := r.l.CommandIn(r.ctx, path, "nft", "-i")
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	release = func() {
		_ = in.Close() // it ends with its input, and the tables with it
		_ = cmd.Wait()
	}
	if _, err = io.WriteString(in, "add table inet criu-netlock { flags owner; }\nadd table inet criu-netlock-2 { flags owner; }\n"); err == nil {
		err = testbed.Poll(r.ctx, func() error {
			rules, err := r.l.Rules(r.ctx, path)
			if tables, _, _ := ours(rules); err == nil && len(tables) != 2 {
				err = fmt.Errorf("not yet occupied:\n%s", rules)
			}
			return err
		})
	}
	if err != nil {
		release()
	}
	return release, err
}

// A lock that the kernel refuses aborts the dump, and the container runs on.
func TestProxyRefused(t *testing.T) {
	for _, client := range []string{"go-criu", "deaf", "runc"} {
		t.Run(client, func(t *testing.T) {
			r := newProxyRun(t, client, "skip")
			r.isRefused()
			r.finish()
		})
	}
}

// isRefused dumps with a lock that the kernel refuses, and then with one that it does not.
func (r *run) isRefused() {
	r.t.Helper()
	release := func() {}
	r.l.hooks.Handle(func(h testbed.Hook) (err error) {
		if h.Action == "pre-dump" { // all was well until now
			release, err = r.occupy("/proc/" + h.PID + "/ns/net")
		}
		return err
	})
	err := r.e.Dump(r.ctx, false)
	r.l.hooks.Handle(nil)
	release()
	log, e := r.e.Log()
	if err == nil || e != nil || !strings.Contains(log, `msg="network-lock failed" action=network-lock`) {
		r.t.Errorf("%v, %v\n%s", err, e, ofInterest(log))
	}
	r.runsOn()
	r.dump("", true)
}

// killsClient kills CRIU's client at a hook, after what it was notified of. With runc and
// podman that is runc, whose child CRIU is.
func (r *run) killsClient(hook string, f func() error) {
	r.t.Helper()
	killed := r.killClientAt(hook, nil)
	err := f()
	r.l.hooks.Handle(nil)
	if err == nil || len(killed) == 0 {
		r.t.Fatalf("killed at %s: %v, and the error is %v", hook, len(killed) != 0, err)
	}
	r.withoutCRIU()
	r.unguarded()
}

// killClientAt has CRIU's client killed when CRIU comes to a hook, and tells it. At the hooks
// before that it does what is given for them.
func (r *run) killClientAt(hook string, before map[string]func() error) (killed <-chan struct{}) {
	out := make(chan struct{}, 1)
	var once sync.Once
	r.l.hooks.Handle(func(h testbed.Hook) (err error) {
		if f := before[h.Action]; f != nil {
			return f()
		}
		if h.Action == hook {
			once.Do(func() {
				out <- struct{}{} // before it dies, and f returns
				_, err = r.l.Run(r.ctx, "sh", "-c", fmt.Sprintf("kill -KILL $(cut -d' ' -f4 /proc/%d/stat)", h.CRIU))
			})
		}
		return err
	})
	return out
}

// The client is killed, by whatever it was at a hook: the proxy stays, and takes the lock off
// what lives.
func TestProxyClientKilled(t *testing.T) {
	for _, client := range []string{"go-criu", "runc"} {
		for _, hook := range []string{"pre-dump", "network-lock", "post-dump", "network-unlock"} {
			t.Run(client+"/dump/"+hook, func(t *testing.T) {
				r := newProxyRun(t, client, "skip")
				r.killsClient(hook, func() error { return r.e.Dump(r.ctx, true) })
				r.runsOn()
				r.dump("", true)
				r.finish()
			})
		}
	}
}

// The same in a restore. CRIU kills the tasks, and a namespace that stays is locked as it was;
// or it lets them run, and they are not locked.
func TestProxyClientKilledInRestore(t *testing.T) {
	for _, client := range []string{"go-criu", "runc"} {
		begin := func(t *testing.T) (*run, int) {
			r := newProxyRun(t, client, "skip")
			pid := r.e.PID()
			r.dump("", false)
			if e, ok := r.e.(*testbed.Runc); ok {
				// runc, killed, leaves what it cannot remove itself.
				t.Cleanup(func() {
					ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
					defer cancel()
					if _, err := r.l.Run(ctx, "sh", "-c", `! mountpoint -q "$0" || umount "$0"`, "/run/runc/"+e.ID+"/criu-root"); err != nil {
						t.Error(err)
					}
				})
			}
			return r, pid
		}
		for _, hook := range []string{"pre-restore", "setup-namespaces", "post-setup-namespaces"} {
			t.Run(client+"/"+hook, func(t *testing.T) {
				r, _ := begin(t)
				if r.own() {
					r.silence() // such a namespace dies unlocked
				}
				r.killsClient(hook, func() error { return r.e.Restore(r.ctx) })
				r.withoutCRIU("workload")
				r.dead()
			})
		}
		for _, hook := range []string{"post-restore", "network-unlock", "post-resume"} {
			t.Run(client+"/"+hook, func(t *testing.T) {
				r, pid := begin(t)
				r.killsClient(hook, func() error { return r.e.Restore(r.ctx) })
				r.flows("restored, by a client that was killed")
				path := r.e.Netns()
				if path == "" { // the engine does not know that it lives
					path = fmt.Sprintf("/proc/%d/ns/net", pid)
				}
				if rules, err := r.l.Rules(r.ctx, path); err != nil || rules != r.rules {
					t.Errorf("the rule set was\n%s\nand is\n%s%v", r.rules, rules, err)
				}
				r.killHalfRestored()
			})
		}
	}
}

// The process in between is killed while the container is locked: the dump fails, and the
// guard takes the lock off.
func TestProxyKilled(t *testing.T) {
	r := newProxyRun(t, "go-criu", "skip")
	killed := false
	r.l.hooks.Handle(func(h testbed.Hook) error {
		if h.Action != "network-lock" {
			return nil
		}
		killed = true
		_, err := r.l.Run(r.ctx, "sh", "-c", `for p in /proc/[0-9]*; do case "$(tr '\0' ' ' 2>/dev/null <$p/cmdline)" in "criu-netlock swrk-proxy "*) kill -KILL "${p#/proc/}" && exit;; esac; done; exit 1`)
		return errors.Join(err, r.locked(h.Action, r.e.Netns()))
	})
	if err := r.e.Dump(r.ctx, false); err == nil || !killed {
		t.Fatalf("the dump: %v, killed: %v", err, killed)
	}
	r.l.hooks.Handle(nil)
	r.unlocks()
	r.runsOn()
	r.dump("", true)
	r.finish()
}

// What is no swrk is CRIU's alone: its output, its exit status.
func TestProxyPasses(t *testing.T) {
	l := putShim(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for _, argv := range [][]string{
		{shimDir + "/criu", "--version"}, {oursPath, "criu", "--version"},
		// The real one before ours, and no PATH at all.
		{"env", "PATH=/usr/sbin:" + shimDir, shimDir + "/criu", "--version"}, {"env", "-i", shimDir + "/criu", "--version"}, {"env", "-i", oursPath, "criu", "--version"},
	} {
		out, err := l.Run(ctx, argv...)
		if err != nil || !strings.HasPrefix(out, "Version: ") {
			t.Errorf("%q: %v\n%s", argv, err, out)
		}
	}
	want, err := l.Run(ctx, "sh", "-c", "criu no-such-verb; echo $?")
	if err != nil {
		t.Fatal(err)
	}
	// The shim first in PATH, twice, does not find itself.
	got, err := l.Run(ctx, "sh", "-c", "PATH="+shimDir+":"+shimDir+":$PATH; criu no-such-verb; echo $?")
	if err != nil || got != want {
		t.Errorf("%v\n%s\nwant\n%s", err, got, want)
	}
	if out, err := l.Run(ctx, "sh", "-c", "PATH="+shimDir+"; criu --version"); err == nil || !strings.Contains(out, "no criu in PATH") {
		t.Errorf("%v\n%s", err, out)
	}
	// One that is configured need not be in PATH.
	if err := os.WriteFile(filepath.Join(l.Work, "named.toml"), []byte("criu = \"/usr/sbin/criu\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := l.Run(ctx, "sh", "-c", "PATH="+shimDir+"; CRIU_NETLOCK_CONFIG="+testbed.WorkDir+"/named.toml criu --version"); err != nil || !strings.HasPrefix(out, "Version: ") {
		t.Errorf("configured: %v\n%s", err, out)
	}
	// A signal that ends CRIU ends what was started by our name.
	out, err := l.Run(ctx, "sh", "-c", shimDir+"/criu service --address /tmp/proxied.sock >/dev/null 2>&1 & until [ -S /tmp/proxied.sock ]; do kill -0 $! || exit; done; kill -TERM $!; wait $!; echo $?; rm /tmp/proxied.sock")
	if err != nil || !strings.HasSuffix("\n"+out, "\n143\n") { // the shell may say "Terminated" before
		t.Errorf("killed by SIGTERM: %v\n%s", err, out)
	}
}

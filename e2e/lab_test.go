// Package e2e tests criu-netlock with real CRIU, by its command line and through
// runc, on containers with live TCP connections.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/e2e/traffic"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// envBinary names a criu-netlock to test in place of the one in this checkout.
const envBinary = "CRIU_NETLOCK_BIN"

// Paths inside the testbed.
const (
	oursPath     = testbed.BinDir + "/criu-netlock"
	relayPath    = testbed.BinDir + "/relay"
	workloadPath = testbed.BinDir + "/workload"
	// rpcClientPath drives CRIU over RPC, by CRIU's own command line.
	rpcClientPath = testbed.BinDir + "/rpcclient"
	// libcriuPath is a C program that does it with the C library.
	libcriuPath = testbed.BinDir + "/libcriu"
)

// A lab is what all tests share: one session of the testbed.
type lab struct {
	*testbed.Session
	hooks *testbed.Hooks
	// What there is while no test runs.
	mounts    []string
	processes []string
	netns     []string
}

// theLab is opened by the first test that needs it and closed by TestMain.
var theLab struct {
	once sync.Once
	lab  *lab
	err  error
}

func TestMain(m *testing.M) {
	host := machine()
	code := m.Run()
	if l := theLab.lab; l != nil {
		if err := l.close(host); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// close ends the session and checks that the machine is as it was.
func (l *lab) close(host string) error {
	err := errors.Join(l.hooks.Close(), l.Close())
	if now := machine(); now != host {
		err = errors.Join(err, fmt.Errorf("the machine's own network was\n%s\nand is\n%s", host, now))
	}
	b, e := os.ReadFile("/proc/self/mountinfo")
	if e != nil || strings.Contains(string(b), l.Work) {
		err = errors.Join(err, e, fmt.Errorf("a mount of %s is left", l.Work))
	}
	return err
}

// machine is what of the machine's own network no test may change.
func machine() string {
	var out strings.Builder
	for _, f := range []string{"dev", "route", "ipv6_route", "ip_tables_names", "ip6_tables_names"} {
		b, err := os.ReadFile("/proc/net/" + f)
		if err != nil {
			continue // not every kernel has each
		}
		for line := range strings.Lines(string(b)) {
			switch f {
			case "dev": // the name alone, not the counts
				line, _, _ = strings.Cut(line, ":")
			case "ipv6_route":
				line = strings.Join(slices.DeleteFunc(strings.Fields(line), func(w string) bool { return len(w) == 8 }), " ")
			case "route":
				line = strings.Join(strings.Fields(line)[:3], " ")
			}
			out.WriteString(strings.TrimSpace(line) + "\n")
		}
	}
	return out.String()
}

func openLab(t *testing.T) *lab {
	t.Helper()
	netlocktest.Need(t, tools...)
	theLab.once.Do(func() {
		theLab.lab, theLab.err = newLab(recipe(), (*testbed.Root).Enter, func(s string) { t.Log(s) })
		if theLab.err == nil {
			theLab.err = theLab.lab.rest()
		}
	})
	if theLab.err != nil {
		t.Fatal(theLab.err)
	}
	return theLab.lab
}

func newLab(r testbed.Recipe, enter func(*testbed.Root, context.Context) (*testbed.Session, error), progress func(string)) (_ *lab, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	root, err := r.Ensure(ctx, progress)
	if err != nil {
		return nil, err
	}
	s, err := enter(root, ctx)
	if err != nil {
		return nil, err
	}
	l := &lab{Session: s}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	programs := map[string]string{"workload": "e2e/workload", "rpcclient": "e2e/rpcclient"}
	ours := os.Getenv(envBinary)
	if ours == "" {
		programs["criu-netlock"] = "cmd/criu-netlock"
	}
	if err := s.Build(ctx, programs); err != nil {
		return nil, err
	}
	bin := filepath.Join(s.Work, "bin")
	if ours != "" {
		if err := copyFile(ours, filepath.Join(bin, "criu-netlock")); err != nil {
			return nil, err
		}
	}
	if err := os.Link(filepath.Join(bin, "workload"), filepath.Join(bin, "relay")); err != nil {
		return nil, err
	}
	if l.hooks, err = s.ListenHooks(); err != nil {
		return nil, err
	}
	return l, nil
}

// rest notes what there is while no test runs.
func (l *lab) rest() (err error) {
	if l.mounts, err = l.Mounts(); err != nil {
		return err
	}
	if l.netns, err = filepath.Glob(l.Path("/run/netns/*")); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience*10*time.Second)
	defer cancel()
	return testbed.Poll(ctx, func() error { // until the last that comes and goes has gone
		before := l.processes
		if l.processes, err = l.Processes(); err == nil && !slices.Equal(before, l.processes) {
			err = fmt.Errorf("the processes change: %q, %q", before, l.processes)
		}
		return err
	})
}

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o755)
}

// A fixture is a container under test and its peer.
type fixture struct {
	t   *testing.T
	ctx context.Context
	l   *lab
	net *testbed.Net
	e   testbed.Engine
	// skip: CRIU has no lock of its own.
	skip bool
	// shared: another fixture has the session too, and ends after this one.
	shared bool
}

var idBad = regexp.MustCompile(`[^a-z0-9]+`)

// bySetup is the lock of an engine that nothing is told but by the files in /etc/criu, which
// the setup command has written.
const bySetup = "setup"

// begin starts a container with the engine, "criu" or "runc", with CRIU's own lock
// set as given; "criu-shared" and "runc-shared" put it into CRIU's own namespace. When the test ends, nothing may be left of it.
func begin(t *testing.T, engine, lock string, scripts ...string) *fixture {
	t.Helper()
	return beginWith(t, engine, lock, []string{workloadPath}, scripts...)
}

// longer gives a test that takes long two minutes from now.
func (f *fixture) longer(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), patience*2*time.Minute)
	t.Cleanup(cancel)
	f.ctx = ctx
}

// beginWith is begin for a container that runs something else.
func beginWith(t *testing.T, engine, lock string, argv []string, scripts ...string) *fixture {
	t.Helper()
	l := openLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience*20*time.Second)
	t.Cleanup(cancel)
	f := &fixture{t: t, ctx: ctx, l: l, skip: lock == "skip"}
	// The whole name: all tests of a run share the session and its folders.
	id := engine + "-" + lock + "-" + strings.Trim(idBad.ReplaceAllString(strings.ToLower(t.Name()), "-"), "-")
	if lock == bySetup {
		lock, f.skip = "", true
		if err := errors.Join(l.Setup(ctx, engine), l.Relay(engine, relayPath)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			dir := filepath.Join(l.Work, "criu")
			files, err := l.ConfigurationFiles()
			for name := range files {
				err = errors.Join(err, os.Remove(filepath.Join(dir, name)))
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	var err error
	if f.net, err = l.NewNet(ctx, "peer-"+id); err != nil {
		t.Fatal(err)
	}
	l.hooks.Handle(nil)
	c := testbed.Container{S: l.Session, Net: f.net, ID: id, Scripts: scripts, Lock: lock, Argv: argv}
	switch engine {
	case "criu":
		f.e = &testbed.CLI{Container: c}
	case "go-criu", "swrk", "service":
		f.e = &testbed.CLI{Container: c, Client: []string{rpcClientPath, engine}}
	case "libcriu":
		f.e = &testbed.CLI{Container: c, Client: []string{libcriuPath}}
	case "criu-shared":
		f.e = &testbed.CLI{Container: c, Shared: true}
	case "runc":
		f.e = &testbed.Runc{Container: c}
	case "runc-shared":
		f.e = &testbed.Runc{Container: c, Shared: true}
	}
	f.start(f.net.Close)
	return f
}

// start starts the container, and ends it with the test.
func (f *fixture) start(atLast func(context.Context) error) {
	f.t.Helper()
	f.t.Cleanup(func() {
		// t's context has ended by now.
		ctx, cancel := context.WithTimeout(context.Background(), patience*20*time.Second)
		defer cancel()
		f.l.hooks.Handle(nil)
		if f.t.Failed() {
			if log, err := f.e.Log(); err == nil {
				f.t.Logf("CRIU's last log:\n%s", ofInterest(log))
			}
		}
		if err := errors.Join(f.e.Destroy(ctx), atLast(ctx)); err != nil {
			f.t.Error(err)
		}
		f.nothingLeft()
	})
	if err := f.e.Start(f.ctx); err != nil {
		f.t.Fatal(err)
	}
}

// ofInterest is what of CRIU's log tells about a failure.
func ofInterest(log string) string {
	var out []string
	keep, drop := regexp.MustCompile(`Error|Warn|script|netlock|[Nn]etwork`), regexp.MustCompile(`type \w+ source|cg: |cgroup|RLIMIT_NOFILE`)
	for line := range strings.Lines(log) {
		if keep.MatchString(line) && !drop.MatchString(line) {
			out = append(out, line)
		}
	}
	return strings.Join(out, "")
}

// nothingLeft checks that the session is as it was before the first test.
func (f *fixture) nothingLeft() {
	f.t.Helper()
	if f.shared {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience*10*time.Second)
	defer cancel()
	err := testbed.Poll(ctx, func() error { // what was killed takes its time to go
		ps, err := f.l.Processes()
		if err == nil && !slices.Equal(ps, f.l.processes) {
			err = fmt.Errorf("processes left: %q", ps)
		}
		ms, e := f.l.Mounts()
		if e == nil && !slices.Equal(ms, f.l.mounts) {
			e = fmt.Errorf("mounts left: %q, before %q", ms, f.l.mounts)
		}
		names, e2 := filepath.Glob(f.l.Path("/run/netns/*"))
		if e2 == nil && !slices.Equal(names, f.l.netns) {
			e2 = fmt.Errorf("namespaces left: %v", names)
		}
		return errors.Join(err, e, e2)
	})
	if err != nil {
		f.t.Error(err)
	}
}

// dial connects to a port of the container, when it listens.
func (f *fixture) dial(family string, port int) net.Conn {
	f.t.Helper()
	addr := map[string]string{"tcp4": testbed.ContainerV4, "tcp6": testbed.ContainerV6}[family]
	var c net.Conn
	err := testbed.Poll(f.ctx, func() error {
		ctx, cancel := context.WithTimeout(f.ctx, 2*time.Second)
		defer cancel()
		var err error
		c, err = f.net.Dial(ctx, family, net.JoinHostPort(addr, strconv.Itoa(port)))
		return err
	})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { c.Close() })
	return c
}

// The namespace's rules, and what is ours of them.
var (
	tableRE   = regexp.MustCompile(`(?ms)^table (\w+) (\S+) \{.*?^\}\n`)
	counterRE = regexp.MustCompile(`counter packets (\d+) bytes \d+`)
)

// ours splits a rule set into our tables, without their counts, and the rest. dropped
// is how many packets ours have dropped.
func ours(rules string) (tables []string, rest string, dropped int) {
	rest = tableRE.ReplaceAllStringFunc(rules, func(tab string) string {
		if m := tableRE.FindStringSubmatch(tab); !strings.HasPrefix(m[2], "criu-netlock") {
			return tab
		}
		for _, m := range counterRE.FindAllStringSubmatch(tab, -1) {
			n, _ := strconv.Atoi(m[1])
			dropped += n
		}
		tables = append(tables, counterRE.ReplaceAllString(tab, "counter"))
		return ""
	})
	return tables, rest, dropped
}

// probe asserts what passes between the peer and the container, whose namespace is
// at a path of the session: everything, at the latest when the test's time ends, or
// nothing. The namespace is not kept open: it has to die with its last task.
func (f *fixture) probe(at, path string, locked bool) error {
	ns, err := netlock.FromPath(f.l.Path(path))
	if err != nil {
		return fmt.Errorf("%s: %w", at, err)
	}
	defer ns.Close()
	arrived0, err := testbed.Arrivals(ns)
	if err != nil {
		return fmt.Errorf("%s: %w", at, err)
	}
	if !locked {
		return testbed.Poll(f.ctx, func() error {
			got, err := f.net.Probe(f.ctx, ns, traffic.ControlPort, time.Second)
			for _, name := range testbed.Probes {
				if got[name] == "timeout" {
					err = errors.Join(err, fmt.Errorf("%s: %s does not get through", at, name))
				}
			}
			if n, e := testbed.Arrivals(ns); e != nil || n == arrived0 {
				err = errors.Join(err, e, fmt.Errorf("%s: nothing arrived", at))
			}
			return err
		})
	}
	got, err := f.net.Probe(f.ctx, ns, traffic.ControlPort, 100*time.Millisecond)
	for _, name := range testbed.Probes {
		if got[name] != "timeout" && (got[name] != "no address" || f.reachable(at)) {
			err = errors.Join(err, fmt.Errorf("%s: %s was %q in spite of the lock", at, name, got[name]))
		}
	}
	if n, e := testbed.Arrivals(ns); e != nil || n != arrived0 {
		err = errors.Join(err, e, fmt.Errorf("%s: %d packets arrived in spite of the lock", at, n-arrived0))
	}
	return err
}

// locked asserts that our lock, once and whole, is in force in the namespace at a
// path of the session, and that it is ours which stops what the peer sends.
func (f *fixture) locked(at, path string) error {
	before, err := f.l.Rules(f.ctx, path)
	if err != nil {
		return fmt.Errorf("%s: %w", at, err)
	}
	tables, rest, n0 := ours(before)
	if len(tables) != 1 {
		return fmt.Errorf("%s: want one table of ours, got %d:\n%s", at, len(tables), before)
	}
	if drops := strings.Count(tables[0], "policy drop"); drops != 2 || strings.Count(tables[0], "counter") != 2 {
		return fmt.Errorf("%s: want two chains that drop and count once each:\n%s", at, tables[0])
	}
	if f.skip && strings.Contains(rest, "drop") {
		return fmt.Errorf("%s: another lock is there:\n%s", at, before)
	}
	if err := f.probe(at, path, true); err != nil {
		return err
	}
	after, err := f.l.Rules(f.ctx, path)
	if err != nil {
		return fmt.Errorf("%s: %w", at, err)
	}
	// At prerouting, priority raw, ours is the first to see them: with another
	// lock beside it the count is what shows that ours dropped them.
	if _, _, n1 := ours(after); n1-n0 < 1 && f.reachable(at) {
		return fmt.Errorf("%s: our lock counted %d packets, then %d: it was not ours that dropped the probes", at, n0, n1)
	}
	return nil
}

// own tells whether the namespace is dumped, dies and is restored with the tasks.
func (f *fixture) own() bool {
	switch f.e.(type) {
	case *testbed.CLI, *testbed.LXC:
		return true
	}
	return false
}

// unplug keeps the peer away from a namespace that is going to die. The kernel takes
// its rules out before its devices, and answers what comes in between with a reset:
// no lock in a namespace helps there, CRIU's does not either. Without this one dump
// in five to ten loses a connection.
func (f *fixture) unplug() error {
	if !f.own() {
		return nil
	}
	return f.net.Unplug(f.ctx)
}

// reachable tells whether the container has its interface at a hook: a namespace
// that is only being restored has none before its contents are.
func (f *fixture) reachable(at string) bool {
	return !f.own() || !strings.HasSuffix(at, "setup-namespaces") || strings.HasSuffix(at, "post-setup-namespaces")
}

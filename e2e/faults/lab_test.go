package faults

// A container, its peers, and a CRIU that calls the hooks.

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/iptables"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft"
)

// backends are the ways to lock; the host of the last has no legacy iptables.
var backends = []backend{
	{"nft", `backend = "nft"`, ""},
	{"iptables-legacy", `backend = "iptables"`, ""},
	{"iptables-nft", `backend = "iptables"`, "/usr/sbin/xtables-legacy-multi"},
}

// keeping are the ways to lock that keep packets: the guard's affair.
func keeping() (out []backend) {
	for _, b := range backends {
		if b.name == "iptables-nft" && !*all {
			continue // the other one of iptables will do
		}
		out = append(out, backend{b.name + keeps, b.config + "\nmode = \"hold\"", b.hide})
	}
	return out
}

const keeps = "-hold"

func (l *lab) keeps() bool { return strings.HasSuffix(l.backend, keeps) }

// backend is a way to lock: its configuration, and the program that its host lacks.
type backend struct{ name, config, hide string }

// eachBackend runs a test on a host of its own for every backend, and some more.
func eachBackend(t *testing.T, body func(t *testing.T, l *lab), more ...backend) {
	together(t)
	for _, b := range slices.Concat(backends, more) {
		t.Run(b.name, func(t *testing.T) {
			inside(t, func(t *testing.T) { body(t, newLab(t, b.name, b.config)) }, "HIDE="+b.hide)
		})
	}
}

// together lets the hosts of a test run beside those of others.
func together(t *testing.T) {
	if os.Getenv(envInside) == "" {
		t.Parallel()
	}
}

// inside is onItsHost for one of several subtests.
func inside(t *testing.T, body func(*testing.T), env ...string) {
	t.Helper()
	if in := os.Getenv(envInside); in == "" || in == t.Name() {
		onItsHost(t, body, env...)
	}
}

// lab is a namespace with traffic, and what looks at it.
type lab struct {
	*netlocktest.Traffic
	t       *testing.T
	backend string
	// pid is the root task's.
	pid    string
	dir    string
	config string // the text of the configuration but for the guard
	look   *netlock.Locker
	wires  [2]*wire // IPv4, IPv6
	// log is CRIU's log, if it is not to be in dir, and without the capabilities that CRIU and
	// its hooks do not have.
	log     string
	without []int
	kept    [2]parcel // what mode hold is to keep, IPv4 and IPv6
}

func newLab(t *testing.T, backend, configured string) *lab {
	l := &lab{Traffic: netlocktest.NewTraffic(t), t: t, backend: backend, dir: t.TempDir(),
		config: configured + "\n"}
	l.pid = strconv.Itoa(l.Inside.PID())
	l.look = netlock.New(nft.New(), iptables.New(iptables.Auto))
	l.configure(l.config + "guard = false\n")
	for i, a := range [2][2]string{{netlocktest.InsideV4, netlocktest.PeerV4}, {netlocktest.InsideV6, netlocktest.PeerV6}} {
		w, err := newWire(l.Pair, a[0], a[1])
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(w.close)
		l.wires[i] = w
		if l.kept[i], err = newParcel(l.Pair, a[0]); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(l.kept[i].close)
	}
	return l
}

func (l *lab) configure(text string) {
	l.t.Helper()
	if err := os.WriteFile(l.dir+"/netlock.toml", []byte(text), 0o600); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) state() (netlock.State, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return l.look.State(ctx, l.Inside.Netns())
}

// unlocked makes the namespace ready for the next point.
func (l *lab) unlocked() {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := l.look.Unlock(ctx, l.Inside.Netns()); err != nil && netlock.KindOf(err) != netlock.KindTampered {
		l.t.Fatal(err)
	}
	if st, err := l.state(); err != nil || st.Found {
		l.t.Fatalf("not to be unlocked: %+v, %v", st, err)
	}
}

// mixture is a namespace in which one family is locked, whole, and the other not.
const mixture = "one family locked"

// delivering is a namespace whose guard was killed as it delivered what it had held: what
// goes out passes, what comes in does not yet.
const delivering = "killed in delivering"

// holds looks at the namespace and tells what is wrong with it: it is to be locked or
// not, and its packets are to know it. With iptables, whose two families are two commits,
// a process that was killed in between leaves a mixture of two whole halves.
func (l *lab) holds() (st netlock.State, seen string, err error) {
	st, err = l.state()
	if err != nil {
		return st, "", err
	}
	var open, out [2]bool
	for i, w := range l.wires {
		if open[i], out[i], err = w.passes(); err != nil {
			return st, "", fmt.Errorf("IPv%d: %w; %+v", 4+2*i, err, st)
		}
	}
	switch half := !st.Locked && st.Found; {
	case open == out && st.Locked == !open[0] && st.Locked == !open[1]:
		return st, "", nil
	case half && open == out && strings.HasPrefix(l.backend, "iptables"): // and one is not as the other
		return st, mixture, nil
	case half && l.keeps() && (out[0] || !open[0]) && (out[1] || !open[1]):
		return st, delivering, nil
	}
	return st, "", fmt.Errorf("IPv4 passes: %t, %t, IPv6 passes: %t, %t, but %+v", open[0], out[0], open[1], out[1], st)
}

// is checks that the namespace is locked by exactly one lock, or by none at all, and that
// packets know it.
func (l *lab) is(locked bool) error {
	st, _, err := l.holds()
	switch {
	case err != nil:
		return err
	case locked && !st.Intact, !locked && st.Found:
		return fmt.Errorf("locked: %t is wanted, and it is %+v", locked, st)
	}
	return nil
}

// criu is a process that runs hooks as CRIU does, and dies as it does.
type criu struct {
	*exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
	log string
}

// A hook begins when it is told to, so that a tracer can come first.
const criuScript = `while read action pid; do
	CRTOOLS_SCRIPT_ACTION=$action CRTOOLS_INIT_PID=$pid CRTOOLS_IMAGE_DIR=/proc/$$/fd/3 \
		sh -c 'echo $$; read go; exec "$0" <&-' "$1" 2>"$2"
	echo $?
done`

func (l *lab) newCRIU() *criu {
	l.t.Helper()
	c := &criu{log: cmp.Or(l.log, l.dir+"/log")}
	argv := []string{"sh"}
	if l.without != nil {
		var names []string
		for _, n := range l.without {
			names = append(names, capName(n))
		}
		argv = []string{"capsh", "--drop=" + strings.Join(names, ","), "--"} // and then a shell
	}
	argv = append(argv, "-c", criuScript, "criu", program, c.log)
	c.Cmd = exec.Command(argv[0], argv[1:]...)
	c.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/nonexistent", "CRIU_NETLOCK_CONFIG=" + l.dir + "/netlock.toml"}
	var err error
	if c.in, err = c.StdinPipe(); err != nil {
		l.t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	c.out = bufio.NewReader(out)
	if err := c.Start(); err != nil {
		l.t.Fatal(err)
	}
	return c
}

func (c *criu) die() {
	_ = c.Process.Kill()
	_ = c.Wait()
}

// result is how a hook ended.
type result struct {
	code int // 137 for SIGKILL
	log  string
	took time.Duration
}

func (r result) String() string { return fmt.Sprintf("exit %d after %v, %s", r.code, r.took, r.log) }

// unexpected is the error of a hook that did not end as it was to.
func unexpected(what string, r result, err error) error {
	return wrong(err, "%s: %v", what, r)
}

// wrong tells what was found, and an error if there was one besides.
func wrong(err error, format string, args ...any) error {
	return errors.Join(fmt.Errorf(format, args...), err)
}

// hook runs one hook, under the tracer if one is given.
func (l *lab) hook(c *criu, action string, tr *trace) (r result, err error) {
	if _, err := fmt.Fprintln(c.in, action, l.pid); err != nil {
		return r, err
	}
	pid, err := c.number()
	if err == nil && tr != nil {
		err = tr.begin(pid)
	}
	if err != nil {
		return r, err
	}
	start := time.Now()
	if _, err := fmt.Fprintln(c.in, "go"); err != nil {
		return r, err
	}
	hung := time.AfterFunc(patience, func() { _ = unix.Kill(pid, unix.SIGKILL) })
	r.code, err = c.number()
	hung.Stop()
	r.took = time.Since(start)
	if err != nil {
		return r, err
	}
	b, err := os.ReadFile(c.log)
	r.log = strings.TrimSpace(string(b))
	return r, err
}

func (c *criu) number() (int, error) {
	s, err := c.out.ReadString('\n')
	if err != nil {
		return 0, fmt.Errorf("CRIU is gone: %w", err)
	}
	return strconv.Atoi(strings.TrimSpace(s))
}

// before runs the hooks that come before the one that matters.
func (l *lab) before(c *criu, actions ...string) error {
	for _, a := range actions {
		if r, err := l.hook(c, a, nil); err != nil || r.code != 0 {
			return unexpected("before", r, err)
		}
	}
	return nil
}

// command runs the program as a command.
func (l *lab) command(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "CRIU_NETLOCK_CONFIG=" + l.dir + "/netlock.toml"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("criu-netlock %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), err
}

// processes are the pids of what runs on this host under a name, or with an argument.
func processes(is func(comm, cmdline string) bool) (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		comm, _ := os.ReadFile(d + "/comm")
		cmdline, _ := os.ReadFile(d + "/cmdline")
		// What is dead, or dying, has no command line any more.
		if pid, err := strconv.Atoi(filepath.Base(d)); err == nil && len(cmdline) > 0 && is(strings.TrimSpace(string(comm)), string(cmdline)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func tools(comm, _ string) bool { return strings.Contains(comm, "tables") }

// quiet waits until none of such processes is there.
func quiet(is func(comm, cmdline string) bool) error {
	return netlocktest.Until(func() (bool, error) { return len(processes(is)) == 0, nil })
}

package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/rpc"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/cmd/internal/wire"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/config"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft"
)

// line is a UDP flow into a namespace that hooks lock.
type line struct {
	t       *testing.T
	pid     string
	in, out net.Conn
}

func newLine(t *testing.T) *line {
	p := netlocktest.NewPair(t)
	l := &line{t: t, pid: strconv.Itoa(p.Inside.PID())}
	addr := net.JoinHostPort(netlocktest.InsideV4, "7802")
	// What IPv6 sends by itself is not to be counted.
	err := p.Peer.Do(func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0) })
	if err != nil {
		t.Fatal(err)
	}
	err = p.Inside.Do(func() error {
		c, err := net.ListenPacket("udp4", addr)
		if err == nil {
			l.in = c.(*net.UDPConn)
		}
		return err
	})
	if err == nil {
		err = p.Peer.Do(func() (err error) {
			l.out, err = net.Dial("udp4", addr)
			return err
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.in.Close(); l.out.Close() })
	return l
}

func (l *line) send(words ...string) {
	l.t.Helper()
	for _, w := range words {
		if _, err := l.out.Write([]byte(w)); err != nil {
			l.t.Fatal(err)
		}
	}
}

func (l *line) expect(words ...string) {
	l.t.Helper()
	b := make([]byte, 64)
	for _, w := range words {
		l.in.SetReadDeadline(time.Now().Add(10 * time.Second))
		if n, err := l.in.Read(b); err != nil || string(b[:n]) != w {
			l.t.Fatalf("got %q, %v; want %q", b[:n], err, w)
		}
	}
	l.in.SetReadDeadline(time.Now().Add(30 * time.Millisecond))
	if n, err := l.in.Read(b); err == nil {
		l.t.Fatalf("%q came", b[:n])
	}
}

func holdConfig(t *testing.T, mode string) string { return holdConfigOf(t, "auto", mode) }

func holdConfigOf(t *testing.T, backend, mode string) string {
	return config.EnvPath + "=" + file(t, "hold.toml", "backend = \""+backend+"\"\nmode = \""+mode+"\"\n")
}

// eachBackend runs a test with every backend.
func eachBackend(t *testing.T, f func(t *testing.T, backend string)) {
	for _, backend := range []string{"nft", "iptables"} {
		t.Run(backend, func(t *testing.T) { f(t, backend) })
	}
}

// In a dump the guard holds what comes, and delivers it at the unlock.
func TestHoldInADump(t *testing.T) { eachBackend(t, holdInADump) }

func holdInADump(t *testing.T, backend string) {
	l, c := newLine(t), newCRIU(t, holdConfigOf(t, backend, "hold"))
	if log := c.ok(t, l.pid, "pre-dump", "network-lock"); !strings.Contains(log, "mode=hold") || !strings.Contains(log, "level=INFO") {
		t.Errorf("network-lock: %s", log)
	}
	l.send("a", "b", "c")
	l.expect()
	run(t, "status", "--pid", l.pid, "--json").want(t, 0, `"mode": "hold"`, `"bound": true`, `"held": 3`, `"dropped_in": 0`)
	run(t, "status", "--pid", l.pid).want(t, 0, "mode       hold", "held       3 now, 0 delivered, 0 found the queue full")
	if log := c.ok(t, l.pid, "network-unlock"); !strings.Contains(log, "delivered=3 overflowed=0 lost=0") || !strings.Contains(log, "level=INFO") {
		t.Errorf("network-unlock: %s", log)
	}
	l.expect("a", "b", "c")
}

// In a restore the hook holds first, and then the guard: nothing is lost between them.
func TestHoldInARestore(t *testing.T) {
	for _, mode := range []string{"hold", "auto"} {
		l, c := newLine(t), newCRIU(t, holdConfig(t, mode))
		if log := c.ok(t, l.pid, "setup-namespaces"); !strings.Contains(log, "mode=hold") {
			t.Errorf("setup-namespaces: %s", log)
		}
		l.send("a", "b")
		c.placed(t, l.pid)
		l.send("c")
		c.ok(t, l.pid, "post-setup-namespaces", "post-restore")
		l.expect()
		if log := c.ok(t, l.pid, "network-unlock"); !strings.Contains(log, "delivered=3") || !strings.Contains(log, "guard=") {
			t.Errorf("network-unlock: %s", log)
		}
		l.expect("a", "b", "c")
		c.ok(t, l.pid, "post-resume")
	}
}

// Whoever unlocks, the guard delivers.
func TestHoldUnlockByHand(t *testing.T) { eachBackend(t, holdUnlockByHand) }

func holdUnlockByHand(t *testing.T, backend string) {
	l, c := newLine(t), newCRIU(t, holdConfigOf(t, backend, "hold"))
	c.ok(t, l.pid, "pre-dump", "network-lock")
	l.send("a", "b")
	run(t, "unlock", "--pid", l.pid).want(t, 0, "unlocked")
	l.expect("a", "b")
	l.send("c")
	l.expect("c")
}

// CRIU killed while the task lives: what is held is delivered.
func TestHoldCRIUKilled(t *testing.T) {
	l, c := newLine(t), newCRIU(t, holdConfig(t, "hold"))
	c.ok(t, l.pid, "pre-dump", "network-lock")
	l.send("a", "b")
	c.kill()
	l.expect("a", "b")
}

// The guard killed: nothing passes; the hook that unlocks does the work, and says that
// nothing was delivered.
func TestHoldGuardKilled(t *testing.T) {
	l, c := newLine(t), newCRIU(t, holdConfig(t, "hold"))
	c.ok(t, l.pid, "pre-dump", "network-lock")
	l.send("a", "b")
	g := c.guard(t)
	removeSockets(t, netnsOf(t, l.pid)) // a killed guard leaves it
	kill(t, g)
	l.send("c")
	l.expect()
	run(t, "status", "--pid", l.pid, "--json").want(t, 0, `"locked": true`, `"mode": "hold"`, `"bound": false`)
	if log := c.ok(t, l.pid, "network-unlock"); !strings.Contains(log, "not_delivered=") || !strings.Contains(log, "level=WARN") {
		t.Errorf("network-unlock: %s", log)
	}
	l.expect()
	l.send("d")
	l.expect("d")
}

// A dump that has killed its task has nobody to deliver to: the lock goes on as one of
// mode drop.
func TestHoldTaskKilled(t *testing.T) {
	c := newCRIU(t, holdConfig(t, "hold"))
	pid, kill := netlocktest.NewTask(t)
	p := strconv.Itoa(pid)
	ns, err := netlock.FromPID(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	mode := func() (netlock.Mode, bool) {
		st, err := nft.New().State(t.Context(), ns, netlock.Options{})
		if err != nil || !st.Locked {
			t.Fatalf("%+v, %v", st, err)
		}
		return st.Mode, st.Intact // there are two locks while one takes the place of the other
	}
	c.ok(t, p, "pre-dump", "network-lock", "post-dump")
	if m, intact := mode(); m != netlock.Hold || !intact {
		t.Fatalf("locked in mode %s, intact %v", m, intact)
	}
	kill()
	c.kill()
	eventually(t, "in mode drop", func() bool { m, intact := mode(); return m == netlock.Drop && intact })
	eventually(t, "without a guard", func() bool { return len(guards(t, c.Process.Pid)) == 0 })
}

// Without a guard nobody holds: the lock drops, and the log says why.
func TestHoldWithoutAGuard(t *testing.T) {
	l := newLine(t)
	c := newCRIU(t, config.EnvPath+"="+file(t, "hold.toml", "mode = \"hold\"\nguard = false\n"))
	for _, action := range []string{"network-lock", "setup-namespaces"} {
		if log := c.ok(t, l.pid, action); !strings.Contains(log, "not_held=") || !strings.Contains(log, "level=WARN") || !strings.Contains(log, "mode=drop") {
			t.Errorf("%s: %s", action, log)
		}
		l.send("a")
		l.expect()
		c.ok(t, l.pid, "network-unlock")
	}
}

func TestModeOf(t *testing.T) {
	for _, c := range []struct {
		mode  string
		phase guard.Phase
		want  netlock.Mode
	}{
		{"", guard.Dump, netlock.Drop},
		{"drop", guard.Restore, netlock.Drop},
		{"hold", guard.Dump, netlock.Hold},
		{"hold", guard.Restore, netlock.Hold},
		{"auto", guard.Restore, netlock.Hold},
		{"auto", guard.Dump, netlock.Drop}, // nobody says --leave-running
	} {
		if got, err := modeOf(config.Config{Mode: c.mode}, c.phase, 1, nil); got != c.want || err != nil {
			t.Errorf("%s in a %s: %s, %v", c.mode, c.phase, got, err)
		}
	}
	yes, net := true, uint32(unix.CLONE_NEWNET)
	for name, c := range map[string]struct {
		mode   string
		leaves bool
		opts   *rpc.CriuOpts
		want   netlock.Mode
	}{
		"hold":                     {"hold", false, &rpc.CriuOpts{}, netlock.Hold},
		"auto, killing":            {"auto", false, &rpc.CriuOpts{}, netlock.Drop},
		"auto, leaving running":    {"auto", true, &rpc.CriuOpts{LeaveRunning: &yes}, netlock.Hold},
		"auto, the namespace left": {"auto", true, &rpc.CriuOpts{LeaveRunning: &yes, EmptyNs: &net}, netlock.Hold},
		"drop":                     {"drop", true, &rpc.CriuOpts{}, netlock.Drop},
	} {
		if got, err := modeOfRequest(config.Config{Mode: c.mode}, nil, c.opts)(guard.Dump, c.leaves); got != c.want || err != nil {
			t.Errorf("%s: %s, %v", name, got, err)
		}
	}
	for image, want := range map[bool]netlock.Mode{true: netlock.Drop, false: netlock.Hold} {
		cfg := config.Config{Mode: "hold", Backend: config.IPTables}
		is := func() bool { return image }
		if got, err := wire.Mode(cfg, guard.Dump, nil, is, is); got != want || (err != nil) != image {
			t.Errorf("iptables, rules in the image %v: %s, %v", image, got, err)
		}
	}
	for line, want := range map[string]bool{
		"criu dump -t 1":                             true,
		"criu dump --empty-ns net":                   false,
		"criu dump --empty-ns ipc":                   true,
		"criu dump --external net[4026531840]:extns": false,
		"criu dump --external mnt[]":                 true,
		"criu swrk 3":                                false,
	} {
		if got := dumpsRules(strings.Fields(line)); got != want {
			t.Errorf("%s: rules in the image: %v", line, got)
		}
	}
}

func TestLeavesRunning(t *testing.T) {
	for line, want := range map[string]bool{
		"criu dump -t 1 --leave-running":   true,
		"criu dump -R -t 1":                true,
		"criu dump -v4R -t 1":              false, // of v's argument
		"criu dump -jR -t 1":               true,
		"criu dump -t1R":                   false,
		"criu dump -t 1 -Rv4":              true,
		"criu dump --leave-run -t 1":       true,
		"criu dump --leave-r":              true,
		"criu dump --leave-":               false,
		"criu dump --leave-stopped -t 1":   false,
		"criu dump --leave-running-on":     false,
		"criu dump -D -R -t 1":             false, // the folder's name
		"criu dump -vD -R -R":              true,  // v's argument is D
		"criu dump -o R -t 1":              false,
		"criu dump -t 1 -- -R":             false,
		"criu --leave-running dump -t 1":   true,
		"criu restore -d -D R --shell-job": false,
		"":                                 false,
	} {
		if got := criuLeavesRunning(strings.Fields(line)); got != want {
			t.Errorf("%s: leaves running %v", line, got)
		}
	}
	for line, want := range map[string]bool{
		"runc checkpoint --leave-running x": true, "runc checkpoint --leave-running=true x": true, "runc checkpoint --leave-running=false x": false, "runc checkpoint x": false,
	} {
		if got := runtimeLeavesRunning(strings.Fields(line)); got != want {
			t.Errorf("%s: leaves running %v", line, got)
		}
	}
}

// By hand: a process of its own holds until the unlock.
func TestHoldByHand(t *testing.T) {
	l := newLine(t)
	ino := netnsOf(t, l.pid)
	run(t, "lock", "--pid", l.pid, "--mode", "hold").want(t, 0, "locked (nft), holding")
	run(t, "lock", "--pid", l.pid, "--mode", "hold").want(t, 0, "already locked (nft), holding")
	for _, pid := range holdersIn(t, ino) {
		if err := onlyCaps(pid, threadCaps(capsOfUs, 0), "", ""); err != nil {
			t.Error(err)
		}
	}
	if len(holdersIn(t, ino)) == 0 {
		t.Error("nobody holds")
	}
	l.send("a", "b")
	l.expect()
	run(t, "status", "--pid", l.pid, "--json").want(t, 0, `"mode": "hold"`, `"bound": true`, `"held": 2`)
	run(t, "unlock", "--pid", l.pid).want(t, 0, "unlocked (nft)")
	l.expect("a", "b")
	eventually(t, "without a holder", func() bool { return len(holdersIn(t, ino)) == 0 })

	run(t, "lock", "--pid", l.pid, "--mode", "hold").want(t, 0)
	run(t, "lock", "--pid", l.pid, "--mode", "drop").want(t, 0, "locked (nft)")
	run(t, "status", "--pid", l.pid, "--json").want(t, 0, `"mode": "drop"`)
	eventually(t, "without a holder", func() bool { return len(holdersIn(t, ino)) == 0 })
	run(t, "unlock", "--pid", l.pid).want(t, 0)
	run(t, "lock", "--pid", l.pid, "--mode", "auto").want(t, 2, "")
}

// What is not delivered is told before the unlock and by it, though it succeeds.
func TestHoldWarnings(t *testing.T) { eachBackend(t, holdWarnings) }

func holdWarnings(t *testing.T, backend string) {
	l := newLine(t)
	removeSockets(t, netnsOf(t, l.pid)) // a killed holder leaves them
	env := []string{config.EnvPath + "=" + file(t, "hold.toml", "backend = \""+backend+"\"\nhold-packets = 5\n")}
	do := func(args ...string) result { return execute(t, env, append([]string{program}, args...)...) }
	inside := func(args ...string) {
		t.Helper()
		if r := execute(t, nil, append([]string{"nsenter", "-t", l.pid, "-n"}, args...)...); r.code != 0 {
			t.Fatal(r)
		}
	}
	ino := netnsOf(t, l.pid)
	inside("nft", "add table ip theirs; add chain ip theirs c { type filter hook postrouting priority 0; }")
	do("lock", "--pid", l.pid, "--mode", "hold").want(t, 0, "holding")
	l.send("a", "b", "c", "d", "e", "f", "g")
	do("status", "--pid", l.pid).want(t, 0, "5 now, 0 delivered, 2 found the queue full, 0 lost")
	inside("nft", "delete table ip theirs")
	do("status", "--pid", l.pid).want(t, 0, "0 now, 0 delivered, 2 found the queue full, 5 lost")
	do("status", "--pid", l.pid, "--json").want(t, 0, `"delivered": 0`, `"overflowed": 2`, `"lost": 5`, `"dropped_in": 7`)
	l.send("h")
	do("unlock", "--pid", l.pid).want(t, 0, "), 1 delivered; warning: 2 packets were dropped: the queue was full; 5 packets were held and lost: ")
	l.expect("h")

	do("lock", "--pid", l.pid, "--mode", "hold").want(t, 0, "holding")
	l.send("a", "b", "c", "d", "e", "f")
	do("unlock", "--pid", l.pid, "--json").want(t, 0, `"delivered": 5`, `"overflowed": 1`, `"lost": 0`)
	l.expect("a", "b", "c", "d", "e")

	for _, args := range [][]string{nil, {"--json"}} {
		do("lock", "--pid", l.pid, "--mode", "hold").want(t, 0, "holding")
		l.send("a")
		for _, pid := range holdersIn(t, ino) {
			kill(t, pid)
		}
		says := "; warning: what was held was dropped: "
		if args != nil {
			says = `"not_delivered": "`
		}
		do(append([]string{"unlock", "--pid", l.pid}, args...)...).want(t, 0, says)
	}
	l.expect()
}

// A holder by hand stays until the unlock is over, however long that takes.
func TestHoldByHandSlowUnlock(t *testing.T) {
	l := newLine(t)
	run(t, "lock", "--pid", l.pid, "--mode", "hold").want(t, 0, "holding")
	l.send("a", "b")
	name := fmt.Sprintf("%s/hold-%d-%d", guard.Dir, netnsOf(t, l.pid), 0xC114)
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: name, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, say := range []string{"release " + guard.Version, "opened 2"} {
		time.Sleep(400 * time.Millisecond)
		if _, err := c.Write([]byte(say)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 64)
		n, err := c.Read(b)
		if want := map[string]string{"opened 2": "done 2 0 0"}[say]; err != nil || !strings.HasPrefix(string(b[:n]), want) {
			t.Fatalf("to %q the holder says %q, %v", say, b[:n], err)
		}
	}
	l.expect("a", "b")
	run(t, "unlock", "--pid", l.pid).want(t, 0, "unlocked")
}

// named is a network namespace of ip netns with a veth, whose other end is in a namespace of the
// test's.
type named struct {
	t     *testing.T
	name  string
	ino   uint64
	other *netlocktest.NS
}

func newNamed(t *testing.T) *named {
	t.Helper()
	netlocktest.Need(t, "ip", "nsenter")
	n := &named{t: t, name: fmt.Sprintf("cn-hold-%d", os.Getpid()), other: netlocktest.NewNS(t)}
	n.ip("netns", "add", n.name)
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", n.name).Run() }) // where the test has not
	n.other.Run("", "ip", "link", "add", "outside", "type", "veth", "peer", "name", "inside", "netns", n.name)
	ns, err := netlock.FromPath(n.name)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	n.ino = ns.Inode()
	removeSockets(t, n.ino)
	return n
}

func (n *named) ip(args ...string) {
	n.t.Helper()
	if r := execute(n.t, nil, append([]string{"ip"}, args...)...); r.code != 0 {
		n.t.Fatal(r)
	}
}

// task starts one in the namespace.
func (n *named) task() (pid string, end func()) {
	n.t.Helper()
	c := exec.Command("nsenter", "--net="+netlock.NamedDir+"/"+n.name, "sleep", "600")
	if err := c.Start(); err != nil {
		n.t.Fatal(err)
	}
	end = sync.OnceFunc(func() { _ = c.Process.Kill(); _ = c.Wait() })
	n.t.Cleanup(end)
	pid = strconv.Itoa(c.Process.Pid)
	eventually(n.t, "a task inside", func() bool { return netnsOf(n.t, pid) == n.ino })
	return pid, end
}

// gone waits until the kernel has destroyed the namespace, and its devices with it.
func (n *named) gone() {
	n.t.Helper()
	eventually(n.t, "without the namespace", func() bool {
		out, err := n.other.TryRun("", "ip", "-o", "link")
		return err == nil && !strings.Contains(out, "outside")
	})
}

// A holder by hand stays while anybody else keeps the namespace, by its name or as a task in it,
// and no longer: it would never go away, and nobody could find it.
func TestHoldNamespaceDeleted(t *testing.T) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &st); err != nil || st.Ino != 0xEFFFFFFC { // PROC_PID_INIT_INO
		netlocktest.CannotRun(t, "not all processes of this machine can be seen")
	}
	n := newNamed(t)
	run(t, "lock", "--netns", n.name, "--mode", "hold").want(t, 0, "holding")
	stays := func(why string) {
		t.Helper()
		time.Sleep(2500 * time.Millisecond) // it looks every second, and goes after the second look
		if len(holdersIn(t, n.ino)) != 1 {
			t.Fatalf("nobody holds a namespace that has %s", why)
		}
	}
	stays("a name")
	_, end := n.task()
	n.ip("netns", "del", n.name)
	stays("a task")
	end()
	n.gone()
	if pids := holdersIn(t, n.ino); len(pids) != 0 {
		t.Errorf("still held by %v", pids)
	}
	if names, _ := filepath.Glob(fmt.Sprintf("%s/hold-%d-*", guard.Dir, n.ino)); names != nil {
		t.Errorf("left behind: %q", names)
	}
}

// The same with a guard whose CRIU is gone, and the task with it.
func TestHoldNamespaceDeletedUnderAGuard(t *testing.T) {
	n, c := newNamed(t), newCRIU(t, holdConfig(t, "hold"))
	pid, end := n.task()
	if log := c.ok(t, pid, "pre-dump", "network-lock"); !strings.Contains(log, "mode=hold") {
		t.Errorf("network-lock: %s", log)
	}
	c.ok(t, pid, "post-dump")
	n.ip("netns", "del", n.name)
	end()
	c.kill()
	n.gone()
	eventually(t, "without a guard", func() bool { return len(guards(t, c.Process.Pid)) == 0 })
}

// holders are the pids of the processes that hold for a lock by hand.
func holders(t *testing.T) (pids []int) {
	t.Helper()
	all, err := tasks()
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range all {
		if w := words(pid); len(w) == 3 && w[0] == "criu-netlock" && w[1] == guard.HoldArg {
			pids = append(pids, pid)
		}
	}
	return pids
}

// holdersIn are those that hold in one namespace.
func holdersIn(t *testing.T, netns uint64) (pids []int) {
	t.Helper()
	for _, pid := range holders(t) {
		dir := fmt.Sprintf("/proc/%d/fd/", pid)
		fds, _ := os.ReadDir(dir)
		for _, fd := range fds {
			var st unix.Stat_t
			if unix.Stat(dir+fd.Name(), &st) == nil && st.Ino == netns {
				pids = append(pids, pid)
				break
			}
		}
	}
	return pids
}

func netnsOf(t *testing.T, pid string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat("/proc/"+pid+"/ns/net", &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// removeSockets removes those of a namespace's holders at the end of the test.
func removeSockets(t *testing.T, netns uint64) {
	t.Helper()
	t.Cleanup(func() {
		names, _ := filepath.Glob(fmt.Sprintf("%s/hold-%d-*", guard.Dir, netns))
		for _, name := range names {
			_ = os.Remove(name)
		}
	})
}

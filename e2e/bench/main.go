// Command bench measures the lock beside what a user would use instead, in one
// run, and prints ratios in Markdown. It makes network namespaces of its own and
// leaves nothing. See make bench.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early/link"
	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/iptables"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/nft"
)

func main() {
	rounds := flag.Int("rounds", 60, "rounds of every measurement")
	parts := flag.String("parts", "hook,process,rules,namespaces,criu,restores,windows,runc,podman", "which parts to run")
	dumps := flag.Int("dumps", 15, "real dumps for each lock")
	times := flag.Int("windows", 5, "how often a lock of each length is felt")
	data := flag.String("data", "", "a file for what e2e/bench/plot draws")
	flag.Parse()
	if err := run(*parts, *rounds, *dumps, *times, *data); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(parts string, rounds, dumps, times int, data string) error {
	dir, err := os.MkdirTemp("", "criu-netlock-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "criu-netlock")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w "+link.Flag, "-o", program, "./cmd/criu-netlock")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w: %s", err, out)
	}
	// The first and the last base chain of a hook on the whole machine patch the
	// kernel's text, 200 µs each. A server with any firewall never sees that; to
	// measure the lock and not the patching, another namespace keeps the hooks in use.
	keep, err := newNS()
	if err != nil {
		return err
	}
	defer keep.close()
	if err := keep.nft("table inet keep { chain p { type filter hook prerouting priority 0; }; chain o { type filter hook output priority 0; }; }"); err != nil {
		return err
	}
	uts := unix.Utsname{}
	_ = unix.Uname(&uts)
	fmt.Printf("Linux %s, %d CPUs, %s, medians of %d rounds\n", unix.ByteSliceToString(uts.Release[:]), runtime.NumCPU(), runtime.Version(), rounds)
	bare := func(part func(context.Context, *testbed.Session, int) error) error {
		return inTestbed(program, testbed.Default(), (*testbed.Root).Enter, func(ctx context.Context, s *testbed.Session) error { return part(ctx, s, dumps) })
	}
	for _, p := range strings.Split(parts, ",") {
		fmt.Println()
		switch p {
		case "hook":
			err = hooks(program, dir, rounds)
		case "process":
			err = inProcess(rounds * 4)
		case "rules":
			err = withRules(rounds * 4)
		case "namespaces":
			err = manyNamespaces()
		case "criu":
			err = bare(inCRIU)
		case "restores":
			err = bare(restores)
		case "windows":
			err = feltWindows(dir, times, data)
		case "runc":
			err = bare(feltRunc)
		case "podman":
			err = inTestbed(program, testbed.Engines(), (*testbed.Root).EnterApart, func(ctx context.Context, s *testbed.Session) error { return feltPodman(ctx, s, dumps) })
		default:
			err = fmt.Errorf("unknown part %q", p)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	return nil
}

// benchNS is a network namespace with one sleeping process in it.
type benchNS struct {
	child *exec.Cmd
	ns    *netlock.Namespace
}

func newNS() (*benchNS, error) {
	// Only while threads are sent about: a caller of Lock is bound to no thread, and a
	// bound one would be measured with two switches of threads more.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	own, err := netns.Get()
	if err != nil {
		return nil, err
	}
	defer own.Close()
	fresh, err := netns.New()
	if err != nil {
		return nil, err
	}
	fresh.Close()
	n := &benchNS{child: exec.Command("sleep", "3600")}
	err = n.child.Start()
	if e := netns.Set(own); e != nil {
		return nil, e
	}
	if err != nil {
		return nil, err
	}
	n.ns, err = netlock.FromPID(n.child.Process.Pid)
	if err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

func (n *benchNS) pid() string { return strconv.Itoa(n.child.Process.Pid) }

func (n *benchNS) close() {
	if n.ns != nil {
		n.ns.Close()
	}
	_ = n.child.Process.Kill()
	_ = n.child.Wait()
}

func (n *benchNS) nft(rules string) error {
	return n.run(context.Background(), rules, "nft", "-f", "-")
}

// run runs a program in the namespace.
func (n *benchNS) run(ctx context.Context, stdin string, argv ...string) error {
	return n.ns.Do(func() error {
		c := exec.CommandContext(ctx, argv[0], argv[1:]...)
		c.Stdin = strings.NewReader(stdin)
		if out, err := c.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", argv[0], err, out)
		}
		return nil
	})
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

func us(d time.Duration) string { return fmt.Sprintf("%.0f µs", float64(d.Nanoseconds())/1e3) }
func ms(d time.Duration) string { return fmt.Sprintf("%.2f ms", float64(d.Nanoseconds())/1e6) }

// spawn runs a program from exec to exit.
func spawn(env []string, argv ...string) (time.Duration, error) {
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	start := time.Now()
	pid, err := syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{Env: env, Files: []uintptr{null.Fd(), null.Fd(), null.Fd()}})
	if err != nil {
		return 0, err
	}
	var st syscall.WaitStatus
	for {
		if _, err = syscall.Wait4(pid, &st, 0, nil); err != syscall.EINTR {
			break
		}
	}
	took := time.Since(start)
	if err == nil && st.ExitStatus() != 0 {
		err = fmt.Errorf("%s: exit %d", strings.Join(argv, " "), st.ExitStatus())
	}
	return took, err
}

func lookPath(name string) (string, error) {
	for _, d := range []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin"} {
		if _, err := os.Stat(filepath.Join(d, name)); err == nil {
			return filepath.Join(d, name), nil
		}
	}
	return "", fmt.Errorf("%s not found", name)
}

const nftLock = `table inet bench {
 chain i { type filter hook prerouting priority raw; policy drop; meta mark 0xc114 accept; }
 chain o { type filter hook output priority raw; policy drop; meta mark 0xc114 accept; }
}
`

const iptLock = "*filter\n:BENCH - [0:0]\n-A BENCH -m mark --mark 0xc114 -j ACCEPT\n-A BENCH -j DROP\n-I INPUT -j BENCH\n-I OUTPUT -j BENCH\nCOMMIT\n"
const iptUnlock = "*filter\n-D INPUT -j BENCH\n-D OUTPUT -j BENCH\n-F BENCH\n-X BENCH\nCOMMIT\n"

// hooks: a whole process, from exec to exit, in the container's namespace.
func hooks(program, dir string, rounds int) error {
	n, err := newNS()
	if err != nil {
		return err
	}
	defer n.close()
	file := func(name, text string) string {
		p := filepath.Join(dir, name)
		_ = os.WriteFile(p, []byte(text), 0o600)
		return p
	}
	tool := map[string]string{}
	for _, t := range []string{"nft", "iptables-legacy-restore", "ip6tables-legacy-restore", "iptables-nft-restore", "ip6tables-nft-restore", "true"} {
		if tool[t], err = lookPath(t); err != nil {
			return err
		}
	}
	hook := func(action string, env ...string) func() (time.Duration, error) {
		return func() (time.Duration, error) {
			return spawn(append(env, "CRTOOLS_SCRIPT_ACTION="+action, "CRTOOLS_INIT_PID="+n.pid(), "CRIU_NETLOCK_CONFIG=/dev/null"), program)
		}
	}
	// This process plays CRIU for the guard: its child's hooks are its own.
	guarded := fmt.Sprintf("CRTOOLS_IMAGE_DIR=/proc/%d/fd/0", os.Getpid())
	inside := func(argvs ...[]string) func() (time.Duration, error) {
		return func() (sum time.Duration, err error) {
			err = n.ns.Do(func() error {
				for _, a := range argvs {
					d, err := spawn([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, a...)
					if sum += d; err != nil {
						return err
					}
				}
				return nil
			})
			return sum, err
		}
	}
	lock4, unlock4 := file("lock", iptLock), file("unlock", iptUnlock)
	pair := func(kind, f string) func() (time.Duration, error) {
		return inside([]string{tool["iptables-"+kind+"-restore"], "--noflush", f}, []string{tool["ip6tables-"+kind+"-restore"], "--noflush", f})
	}
	rows := []struct {
		name         string
		lock, unlock func() (time.Duration, error)
		before       func() (time.Duration, error) // not measured
	}{
		{name: "`/bin/true`", lock: inside([]string{tool["true"]}), unlock: inside([]string{tool["true"]})},
		{name: "a hook with nothing to do", lock: hook("post-dump"), unlock: hook("pre-resume")},
		{name: "**criu-netlock**", lock: hook("network-lock", guarded), unlock: hook("network-unlock", guarded), before: hook("pre-dump", guarded)},
		{name: "criu-netlock without its guard", lock: hook("network-lock"), unlock: hook("network-unlock")},
		{name: "`nft -f`", lock: inside([]string{tool["nft"], "-f", file("nftlock", nftLock)}), unlock: inside([]string{tool["nft"], "delete", "table", "inet", "bench"})},
		{name: "`iptables-restore` pair, legacy", lock: pair("legacy", lock4), unlock: pair("legacy", unlock4)},
		{name: "`iptables-restore` pair, nft", lock: pair("nft", lock4), unlock: pair("nft", unlock4)},
	}
	lock, unlock := make([][]time.Duration, len(rows)), make([][]time.Duration, len(rows))
	for range rounds {
		for i, r := range rows {
			if r.before != nil {
				if _, err := r.before(); err != nil {
					return err
				}
			}
			d, err := r.lock()
			if err != nil {
				return err
			}
			lock[i] = append(lock[i], d)
			if d, err = r.unlock(); err != nil {
				return err
			}
			unlock[i] = append(unlock[i], d)
			settle(n.ns)
		}
	}
	fmt.Println("| a process a hook, exec to exit | lock | × true | unlock | × true |\n|---|---|---|---|---|")
	base := [2]time.Duration{median(lock[0]), median(unlock[0])}
	for i, r := range rows {
		l, u := median(lock[i]), median(unlock[i])
		fmt.Printf("| %s | %s | %.2f | %s | %.2f |\n", r.name, ms(l), ratio(l, base[0]), ms(u), ratio(u, base[1]))
	}
	return nil
}

func ratio(a, b time.Duration) float64 { return float64(a) / float64(b) }

// settle waits until the kernel has cleaned up after the last delete in the
// namespace, which the next batch there would have to wait for.
func settle(ns *netlock.Namespace) {
	b := nft.New(nft.WithRelease(func(fd int) { unix.Close(fd) }))
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, _ = b.Lock(ctx, ns, netlock.Options{})
	_, _ = b.Unlock(ctx, ns, netlock.Options{})
}

// cycle measures Lock and Unlock to the acknowledgement, in this process.
func cycle(b netlock.Backend, ns *netlock.Namespace, wait func()) (lock, unlock time.Duration, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	t0 := time.Now()
	if _, err = b.Lock(ctx, ns, netlock.Options{}); err != nil {
		return
	}
	t1 := time.Now()
	if _, err = b.Unlock(ctx, ns, netlock.Options{}); err != nil {
		return
	}
	t2 := time.Now()
	wait() // the background close
	return t1.Sub(t0), t2.Sub(t1), nil
}

// inProcess goes round many namespaces, so that no lock has to wait for the clean-up
// after the unlock before it in the same one, and no processor goes to sleep.
func inProcess(rounds int) error {
	var all []*benchNS
	for range 40 {
		n, err := newNS()
		if err != nil {
			return err
		}
		defer n.close()
		all = append(all, n)
	}
	nb := nft.New()
	rows := []struct {
		name   string
		b      netlock.Backend
		wait   func()
		rounds int
	}{
		{"nft", nb, nb.Wait, rounds/len(all) + 2},
		{"iptables, legacy", iptables.New(iptables.Legacy), func() {}, 1},
		{"iptables, nft", iptables.New(iptables.NFT), func() {}, 1},
	}
	fmt.Println("| in a process that lives on, to the acknowledgement | lock | unlock |\n|---|---|---|")
	for _, r := range rows {
		var l, u []time.Duration
		timed := func(f func(context.Context, *netlock.Namespace) error) ([]time.Duration, error) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			var out []time.Duration
			for _, n := range all {
				start := time.Now()
				if err := f(ctx, n.ns); err != nil {
					return nil, err
				}
				out = append(out, time.Since(start))
			}
			return out, nil
		}
		for range r.rounds {
			d, err := timed(func(ctx context.Context, ns *netlock.Namespace) error {
				_, err := r.b.Lock(ctx, ns, netlock.Options{})
				return err
			})
			if err != nil {
				return err
			}
			l = append(l, d...)
			if d, err = timed(func(ctx context.Context, ns *netlock.Namespace) error {
				_, err := r.b.Unlock(ctx, ns, netlock.Options{})
				return err
			}); err != nil {
				return err
			}
			u = append(u, d...)
			r.wait()
		}
		fmt.Printf("| %s | %s | %s |\n", r.name, us(median(l)), us(median(u)))
	}
	return nil
}

// withRules: unrelated rules in the same namespace.
func withRules(rounds int) error {
	type place struct {
		n     *benchNS
		count int
		l, u  []time.Duration
	}
	var places []*place
	for _, count := range []int{0, 10000, 50000} {
		n, err := newNS()
		if err != nil {
			return err
		}
		defer n.close()
		var b bytes.Buffer
		b.WriteString("table inet unrelated { chain c {\n")
		for i := range count {
			fmt.Fprintf(&b, "ip saddr 10.%d.%d.%d tcp dport %d accept\n", i>>16&255, i>>8&255, i&255, i%65535+1)
		}
		b.WriteString("}\n}\n")
		if err := n.nft(b.String()); err != nil {
			return err
		}
		places = append(places, &place{n: n, count: count})
	}
	b := nft.New()
	for range rounds {
		for _, p := range places {
			l, u, err := cycle(b, p.n.ns, b.Wait)
			if err != nil {
				return err
			}
			p.l, p.u = append(p.l, l), append(p.u, u)
		}
	}
	fmt.Println("| unrelated rules in the namespace | lock | × | unlock | × |\n|---|---|---|---|---|")
	l0, u0 := median(places[0].l), median(places[0].u)
	for _, p := range places {
		l, u := median(p.l), median(p.u)
		fmt.Printf("| %d | %s | %.2f | %s | %.2f |\n", p.count, us(l), ratio(l, l0), us(u), ratio(u, u0))
	}
	return nil
}

// manyNamespaces: all locked, then all unlocked, closes last.
func manyNamespaces() error {
	fmt.Println("| namespaces | all locked | all unlocked | all sockets closed |\n|---|---|---|---|")
	for _, count := range []int{1, 100, 1000} {
		if err := many(count); err != nil {
			return err
		}
	}
	return nil
}

func many(count int) error {
	all := make([]*netlock.Namespace, 0, count)
	defer func() {
		for _, ns := range all {
			ns.Close()
		}
	}()
	runtime.LockOSThread()
	own, err := netns.Get()
	if err != nil {
		return err
	}
	defer own.Close()
	for range count {
		h, err := netns.New()
		if e := netns.Set(own); e != nil {
			return e
		}
		if err != nil {
			return err
		}
		ns, err := netlock.FromFD(int(h))
		h.Close()
		if err != nil {
			return err
		}
		all = append(all, ns)
	}
	runtime.UnlockOSThread()
	b := nft.New()
	var locks, unlocks, closes []time.Duration
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for range 5 {
		t0 := time.Now()
		if err := each(all, func(ns *netlock.Namespace) error { _, err := b.Lock(ctx, ns, netlock.Options{}); return err }); err != nil {
			return err
		}
		t1 := time.Now()
		if err := each(all, func(ns *netlock.Namespace) error { _, err := b.Unlock(ctx, ns, netlock.Options{}); return err }); err != nil {
			return err
		}
		t2 := time.Now()
		b.Wait()
		locks, unlocks, closes = append(locks, t1.Sub(t0)), append(unlocks, t2.Sub(t1)), append(closes, time.Since(t2))
	}
	fmt.Printf("| %d | %s | %s | %s |\n", count, ms(median(locks)), ms(median(unlocks)), ms(median(closes)))
	return nil
}

// each runs f over all namespaces, one worker a CPU.
func each(all []*netlock.Namespace, f func(*netlock.Namespace) error) error {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		next  int
		first error
	)
	for range runtime.NumCPU() {
		wg.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				mu.Unlock()
				if i >= len(all) {
					return
				}
				if err := f(all[i]); err != nil {
					mu.Lock()
					first = err
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return first
}

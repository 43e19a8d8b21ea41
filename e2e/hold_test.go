package e2e

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/e2e/traffic"
	"github.com/criu-netlock/criu-netlock/netlock/config"
)

// holding is a container that counts what comes, under hooks of ours in some mode.
type holding struct {
	*fixture
	*traffic.Numbers
	client *traffic.Client
	late   uint64 // how many numbers may be
	unheld int    // dumps whose hook locked without its guard, which was too slow: such a lock drops
}

func newHolding(t *testing.T, lock, mode string, scripts ...string) *holding {
	t.Helper()
	return newHoldingOf(t, "runc", lock, mode, scripts...)
}

func newHoldingOf(t *testing.T, engine, lock, mode string, scripts ...string) *holding {
	t.Helper()
	return holdingOn(beginWith(t, engine, lock, []string{workloadPath, "numbers"}, scripts...), mode)
}

func holdingOn(f *fixture, mode string) *holding {
	t := f.t
	t.Helper()
	h := &holding{fixture: f}
	h.configure("mode = \"" + mode + "\"\n")
	if r, ok := h.e.(*testbed.Runc); ok {
		r.Options = []string{"skip-in-flight"} // connections that the frozen server has not accepted
	}
	var err error
	if h.client, err = traffic.NewClient(h.ctx, h.net.Peer, testbed.ContainerV4); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.client.Close() })
	h.Numbers = h.client.Numbers()
	return h
}

func (h *holding) configure(text string) {
	h.t.Helper()
	file := h.l.Path(config.DefaultPath)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { os.Remove(file) })
}

// whole asserts that all numbers have come, once and in order, but for those that a stream may
// overtake.
func (h *holding) whole(when string) {
	h.t.Helper()
	var n traffic.Count
	if err := testbed.Poll(h.ctx, func() (err error) { // a link that comes up loses the first question
		n, err = h.Count()
		want := traffic.Count{Came: h.Sent, Last: h.Sent, Late: min(n.Late, h.late)}
		if h.unheld > 0 {
			want.Came, want.Last = n.Came, n.Last
		}
		if err == nil && n != want {
			err = fmt.Errorf("of %d datagrams %d came, %d late, %d twice", h.Sent, n.Came, n.Late, n.Twice)
		}
		return err
	}); err != nil {
		h.t.Errorf("%s: %v", when, err)
	}
	if n.Late > 0 {
		h.t.Logf("%s: %d late", when, n.Late)
	}
}

// dump dumps, and the tasks run on; it tells whether what came was held, which of several dumps all but
// one must.
func (h *holding) dump() bool {
	h.t.Helper()
	if err := h.e.Dump(h.ctx, true); err != nil {
		h.t.Fatal(err)
	}
	log, err := h.e.Log()
	if err != nil {
		h.t.Fatal(err)
	}
	if !strings.Contains(log, "not_held=") {
		return true
	}
	h.unheld++
	h.t.Logf("a dump did not hold:\n%s", ofInterest(log))
	if h.unheld > 1 {
		h.t.Fatal("nor does another")
	}
	return false
}

// inCRIUsPlace has runc find criu-netlock under the name of criu.
func (h *holding) inCRIUsPlace() {
	h.t.Helper()
	putShim(h.t)
	h.e.(*testbed.Runc).Env = []string{"PATH=" + shimDir + ":/usr/sbin:/usr/bin:/sbin:/bin"}
}

// A checkpoint that the peers do not notice: no connection is begun twice, and a request
// takes no longer than the freeze. Under the lock that drops they wait for their
// retransmissions.
func TestHoldDump(t *testing.T) {
	for _, c := range []struct {
		mode  string
		proxy bool
	}{{"drop", false}, {"hold", false}, {"auto", false}, {"auto", true}} {
		mode := c.mode
		t.Run(fmt.Sprintf("%s,proxy=%v", mode, c.proxy), func(t *testing.T) {
			scripts := []string{oursPath}
			if c.proxy {
				scripts = nil
			}
			h := newHolding(t, "skip", mode, scripts...)
			if c.proxy {
				h.inCRIUsPlace()
			}
			h.longer(t)
			// A SYN is sent again after a second, and on a busy machine a dump can take longer.
			const enough, most, limit = 3, 30, 800 * time.Millisecond
			dumps, resent, lost, late := 0, uint64(0), uint64(0), limit
			for tries := 0; dumps < enough && tries < most; tries++ {
				end, err := h.client.Feel(h.ctx)
				if err != nil {
					t.Fatal(err)
				}
				start := time.Now()
				held := h.dump()
				took := time.Since(start)
				f, err := end()
				if err != nil {
					t.Fatal(err)
				}
				freeze, err := h.e.(*testbed.Runc).Freeze()
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("%s: dump %v, freeze %v: %+v", mode, took.Round(time.Millisecond), freeze, f)
				if held && took < limit {
					dumps++
					resent += f.SYNs
					lost += f.Lost
					late = min(late, f.Gap()-freeze)
				}
				if f.Broken+int(f.Twice) != 0 {
					t.Errorf("%d connections broken, %v; %d datagrams came twice", f.Broken, f.Why, f.Twice)
				}
			}
			if dumps < enough {
				t.Fatalf("%d of %d dumps took less than %v", dumps, most, limit)
			}
			if mode == "drop" {
				if resent == 0 || lost == 0 {
					t.Errorf("under the lock that drops %d SYNs were sent again, %d datagrams lost: this test cannot fail", resent, lost)
				}
				return
			}
			// A connection whose SYN-ACK the lock meets on its way out waits for its next SYN.
			if resent > 1 || lost != 0 {
				t.Errorf("%d SYNs were sent again, %d datagrams lost", resent, lost)
			}
			// Some milliseconds, but on a busy machine one of three may be late.
			if late > 150*time.Millisecond {
				t.Errorf("an open connection stood still for %v and more beyond the freeze", late)
			}
			if log, err := h.e.Log(); err != nil || !strings.Contains(log, "mode=hold") {
				t.Errorf("CRIU's log does not tell of mode hold, %v:\n%s", err, ofInterest(log))
			}
		})
	}
}

// Numbered datagrams go on through twenty dumps. What was held passes CRIU's own lock, where
// that is in force too.
func TestHoldNumbers(t *testing.T) {
	for lock, dumps := range map[string]int{"skip": 20, "nftables": 5, "iptables": 5} {
		t.Run(lock, func(t *testing.T) { holdNumbers(t, lock, dumps) })
	}
}

func holdNumbers(t *testing.T, lock string, dumps int) {
	if lock != "skip" {
		holdBesideCRIUs(t, lock, dumps)
		return
	}
	h := newHolding(t, lock, "hold", oursPath)
	h.longer(t)
	h.stream(dumps)
	h.whole(fmt.Sprintf("after %d dumps", dumps))
	t.Logf("%d datagrams", h.Sent)
}

// holdBesideCRIUs sends what is held and nothing else: CRIU's own lock comes off after ours, and drops
// what comes in between. All that was held comes.
func holdBesideCRIUs(t *testing.T, lock string, dumps int) {
	h := newHolding(t, lock, "hold", oursPath, relayPath)
	if err := h.Send(10); err != nil {
		t.Fatal(err)
	}
	h.whole("before")
	h.sendAt("network-lock") // 50, behind our hook
	for n := range dumps {
		sent := h.Sent
		if !h.dump() {
			continue
		}
		h.whole(fmt.Sprintf("after %d dumps", n+1))
		// IPv6 sends something by itself.
		var delivered uint64
		log, err := h.e.Log()
		if _, text, ok := strings.Cut(log, "mode=hold delivered="); ok {
			_, err = fmt.Sscanf(text, "%d overflowed=0 lost=0", &delivered)
		}
		if err != nil || h.Sent != sent+50 || delivered < 50 {
			t.Errorf("%d sent in the lock, %d delivered, %v; CRIU's log:\n%s", h.Sent-sent, delivered, err, ofInterest(log))
		}
	}
	h.l.hooks.Handle(func(testbed.Hook) error { return nil })
	h.stream(1)
	if n, err := h.Count(); err != nil || n.Late > h.late || n.Twice != 0 {
		t.Errorf("of %d datagrams %d came, %d late, %d twice; %v", h.Sent, n.Came, n.Late, n.Twice, err)
	}
}

// stream sends numbered datagrams, one every millisecond, through dumps after which the tasks
// run on. What comes as a lock opens may overtake what it held: as many as come while the delivering
// thread's processor is taken away. A lock that delivered only when it is open would make late all
// that come in the freeze, some 40 a dump.
func (h *holding) stream(dumps int) {
	h.t.Helper()
	h.late += uint64(10 * dumps)
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				stopped <- nil
				return
			case <-time.After(time.Millisecond):
				if err := h.Send(1); err != nil {
					stopped <- err
					return
				}
			}
		}
	}()
	for range dumps {
		h.dump()
	}
	close(stop)
	if err := <-stopped; err != nil {
		h.t.Fatal(err)
	}
}

// What is sent to a container while it is restored reaches the restored socket. Of a dump
// that kills its tasks the lock goes on as one that drops.
func TestHoldRestore(t *testing.T) {
	for _, c := range []struct {
		mode  string
		proxy bool
	}{{"hold", false}, {"auto", false}, {"hold", true}} {
		t.Run(fmt.Sprintf("%s,proxy=%v", c.mode, c.proxy), func(t *testing.T) {
			scripts := []string{oursPath, relayPath}
			if c.proxy {
				scripts = scripts[1:]
			}
			h := newHolding(t, "skip", c.mode, scripts...)
			if c.proxy {
				h.inCRIUsPlace()
			}
			if err := h.Send(10); err != nil {
				t.Fatal(err)
			}
			h.whole("before")
			if err := h.e.Dump(h.ctx, false); err != nil {
				t.Fatal(err)
			}
			if err := testbed.Poll(h.ctx, func() error {
				rules, err := h.l.Rules(h.ctx, h.e.Netns())
				if err == nil && (strings.Contains(rules, "queue") || !strings.Contains(rules, "criu-netlock")) {
					err = fmt.Errorf("not locked in mode drop:\n%s", rules)
				}
				return err
			}); err != nil {
				t.Fatal(err)
			}
			h.sendAt(holds...)
			if err := h.e.Restore(h.ctx); err != nil {
				t.Fatal(err)
			}
			h.whole("after the restore")
			log, err := h.e.Log()
			if err != nil || !strings.Contains(log, "mode=hold") {
				t.Errorf("CRIU's log, %v:\n%s", err, ofInterest(log))
			}
		})
	}
}

// sendAt sends at hooks of a restore.
func (h *holding) sendAt(hooks ...string) {
	h.l.hooks.Handle(func(hook testbed.Hook) error {
		if !slices.Contains(hooks, hook.Action) {
			return nil
		}
		// The kernel sees a new link's carrier a while after CRIU has made it.
		err := testbed.Poll(h.ctx, func() error {
			out, err := h.l.RunIn(h.ctx, fmt.Sprintf("/proc/%s/ns/net", hook.PID), "ip", "link", "show", "up")
			if err == nil && !strings.Contains(out, "BROADCAST,MULTICAST,UP,LOWER_UP") {
				err = fmt.Errorf("no carrier:\n%s", out)
			}
			if err == nil && h.own() { // nor does the bridge send to its port until then
				err = h.net.Forwards(h.ctx)
			}
			return err
		})
		if err != nil {
			return err
		}
		return h.Send(50)
	})
}

// holds are the hooks at which a restored namespace that is there already holds.
var holds = []string{"setup-namespaces", "post-setup-namespaces", "post-restore"}

// The same through the engines that people use: what is sent meanwhile reaches the sockets.
func TestHoldEngines(t *testing.T) {
	for _, e := range engines {
		if e.name != "lxc" && e.name != "podman" {
			continue
		}
		t.Run(e.name, func(t *testing.T) {
			l, n := openEngine(t, e.setup, e.start)
			h := holdingOn(e.fixture(t, l, n, "numbers"), "hold")
			if e.name == "podman" { // what LXC dumps has the rules in it
				h.stream(3)
				h.whole("after 3 dumps")
			} else {
				if err := h.Send(10); err != nil {
					t.Fatal(err)
				}
				h.whole("before")
			}
			if err := h.e.Dump(h.ctx, false); err != nil {
				t.Fatal(err)
			}
			at := holds
			if h.own() { // until its contents are there, nothing can reach it
				at = []string{"post-restore"}
			}
			h.sendAt(at...)
			if err := h.e.Restore(h.ctx); err != nil {
				t.Fatal(err)
			}
			h.whole("after the restore")
			// IPv6 sends something by itself.
			var delivered int
			log, err := h.e.Log()
			if _, text, ok := strings.Cut(log, "mode=hold delivered="); ok {
				_, err = fmt.Sscan(text, &delivered)
			}
			if err != nil || delivered < 50*len(at) {
				t.Errorf("CRIU's log of the restore, %v:\n%s", err, ofInterest(log))
			}
		})
	}
}

// What does not fit is dropped, and CRIU's log has a warning that counts it.
func TestHoldOverflow(t *testing.T) {
	for _, proxy := range []bool{false, true} {
		t.Run(fmt.Sprintf("proxy=%v", proxy), func(t *testing.T) {
			scripts := []string{oursPath, relayPath}
			if proxy {
				scripts = scripts[1:]
			}
			h := newHolding(t, "skip", "hold", scripts...)
			if proxy {
				h.inCRIUsPlace()
			}
			h.configure("mode = \"hold\"\nhold-packets = 20\n")
			if err := h.Send(10); err != nil {
				t.Fatal(err)
			}
			h.whole("before")
			h.sendAt("network-lock") // 50
			if !h.dump() {
				h.dump()
			}
			// IPv6 sends something by itself, which may be among those that fit.
			var delivered, overflowed uint64
			log, err := h.e.Log()
			for line := range strings.Lines(log) {
				if _, text, ok := strings.Cut(line, "mode=hold delivered="); ok && strings.Contains(line, "level=WARN") {
					_, err = fmt.Sscanf(text, "%d overflowed=%d lost=0", &delivered, &overflowed)
				}
			}
			if err != nil || delivered < 20 || delivered > 25 || overflowed < 30 {
				t.Errorf("delivered %d, overflowed %d, %v; CRIU's log:\n%s", delivered, overflowed, err, ofInterest(log))
			}
			if n, err := h.Count(); err != nil || n.Came > 10+20 || n.Came < 10+15 || n.Late+n.Twice != 0 {
				t.Errorf("of %d datagrams %d came, %d late, %d twice; %v", h.Sent, n.Came, n.Late, n.Twice, err)
			}
		})
	}
}

// TestHoldDump and TestHoldRestore by the other backend.
func TestHoldIPTables(t *testing.T) {
	h := newHolding(t, "skip", "hold", oursPath, relayPath)
	h.configure("mode = \"hold\"\nbackend = \"iptables\"\n")
	const dumps = 3
	h.stream(dumps)
	// It takes iptables milliseconds to open the lock, of a freeze of some 170.
	h.late = 40 * dumps
	h.whole("after the dumps")
	if log, err := h.e.Log(); err != nil || !strings.Contains(log, "backend=iptables-legacy") || !strings.Contains(log, "mode=hold") {
		t.Errorf("CRIU's log of a dump, %v:\n%s", err, ofInterest(log))
	}
	if err := h.e.Dump(h.ctx, false); err != nil {
		t.Fatal(err)
	}
	h.sendAt(holds...)
	if err := h.e.Restore(h.ctx); err != nil {
		t.Fatal(err)
	}
	h.whole("after the restore")
}

// Plain CRIU puts the rules of a namespace into the image. What nft prints of our queue
// could not be restored on a kernel without nft_queue, so a dump does not hold there; the
// restore holds, though the image's lock comes back beside the new one.
func TestHoldImage(t *testing.T) {
	h := newHoldingOf(t, "criu", least, "hold", oursPath, relayPath)
	if err := h.Send(10); err != nil {
		t.Fatal(err)
	}
	h.whole("before")
	if err := h.e.Dump(h.ctx, false); err != nil {
		t.Fatal(err)
	}
	log, err := h.e.Log()
	// On a busy machine the hook may have gone without its guard, which is another reason.
	held, why := strings.Contains(log, "mode=hold"), "no nft_queue"
	if _, line, _ := strings.Cut(log, "action=network-lock "); !strings.Contains(strings.SplitN(line, "\n", 2)[0], "guard=") {
		why = "not_held="
	}
	if err != nil || held == strings.Contains(log, why) {
		t.Errorf("CRIU's log of the dump, %v:\n%s", err, ofInterest(log))
	}
	h.sendAt("post-restore")
	if err := h.e.Restore(h.ctx); err != nil {
		t.Fatal(err)
	}
	h.whole("after the restore")
	if log, err := h.e.Log(); err != nil || !strings.Contains(log, "mode=hold") {
		t.Errorf("CRIU's log of the restore, %v:\n%s", err, ofInterest(log))
	}
}

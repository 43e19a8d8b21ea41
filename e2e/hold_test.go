package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/e2e/traffic"
	"github.com/criu-netlock/criu-netlock/netlock/config"
)

// holding is a container that counts what comes, under hooks of ours in some mode.
type holding struct {
	*fixture
	udp  net.Conn
	next uint64
}

func newHolding(t *testing.T, lock, mode string, scripts ...string) *holding {
	t.Helper()
	return newHoldingOf(t, "runc", lock, mode, scripts...)
}

func newHoldingOf(t *testing.T, engine, lock, mode string, scripts ...string) *holding {
	t.Helper()
	h := &holding{fixture: beginWith(t, engine, lock, []string{workloadPath, "numbers"}, scripts...)}
	h.configure(mode)
	if r, ok := h.e.(*testbed.Runc); ok {
		r.Options = []string{"skip-in-flight"} // connections that the frozen server has not accepted
	}
	var err error
	if h.udp, err = h.net.Dial(h.ctx, "udp4", h.addr()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.udp.Close() })
	// The server is there when it answers.
	if err := testbed.Poll(h.ctx, func() error { _, err := h.count(); return err }); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *holding) configure(mode string) {
	h.t.Helper()
	file := h.l.Path(config.DefaultPath)
	if err := os.WriteFile(file, []byte("mode = \""+mode+"\"\n"), 0o644); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { os.Remove(file) })
}

func (h *holding) addr() string {
	return net.JoinHostPort(testbed.ContainerV4, strconv.Itoa(traffic.EchoPort))
}

// send sends n numbered datagrams.
func (h *holding) send(n int) error {
	for range n {
		h.next++
		if _, err := h.udp.Write(traffic.Numbered(h.next)); err != nil {
			return err
		}
	}
	return nil
}

// count asks what became of them.
func (h *holding) count() (traffic.Count, error) {
	if err := h.udp.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return traffic.Count{}, err
	}
	defer h.udp.SetDeadline(time.Time{})
	if _, err := h.udp.Write([]byte(traffic.Report)); err != nil {
		return traffic.Count{}, err
	}
	b := make([]byte, 64)
	n, err := h.udp.Read(b)
	if err != nil {
		return traffic.Count{}, err
	}
	return traffic.ParseCount(string(b[:n]))
}

// whole asserts that all numbers have come, once and in order.
func (h *holding) whole(when string) {
	h.t.Helper()
	n, err := h.count()
	if want := (traffic.Count{Came: h.next, Last: h.next}); err != nil || n != want {
		h.t.Errorf("%s: of %d datagrams %d came, %d late, %d twice; %v", when, h.next, n.Came, n.Late, n.Twice, err)
	}
}

// inCRIUsPlace has runc find criu-netlock under the name of criu.
func (h *holding) inCRIUsPlace() {
	h.t.Helper()
	putShim(h.t)
	h.e.(*testbed.Runc).Env = []string{"PATH=" + shimDir + ":/usr/sbin:/usr/bin:/sbin:/bin"}
}

// felt is what a client feels of a dump.
type felt struct {
	gap, connect time.Duration // the longest
	slow         int           // connects over 500 ms
	resent       int64         // SYNs
}

// feel is a client of the container: a request every millisecond on one connection, and a
// new connection every 5 ms. It returns what tells what it felt.
func (h *holding) feel() (end func() felt) {
	h.t.Helper()
	c := h.dial("tcp4", traffic.EchoPort)
	var (
		f    felt
		mu   sync.Mutex
		wg   sync.WaitGroup
		stop = make(chan struct{})
		fail = make(chan error, 1)
	)
	failed := func(err error) {
		select {
		case fail <- err:
		default:
		}
	}
	before := h.synRetrans()
	every := func(pause time.Duration, f func() error) {
		wg.Go(func() {
			tick := time.NewTicker(pause)
			defer tick.Stop()
			for {
				select {
				case <-stop:
					return
				case <-tick.C:
				}
				if err := f(); err != nil {
					failed(err)
					return
				}
			}
		})
	}
	every(time.Millisecond, func() error {
		b := [8]byte{1}
		start := time.Now()
		_ = c.SetDeadline(start.Add(10 * time.Second))
		if _, err := c.Write(b[:]); err != nil {
			return err
		}
		if _, err := c.Read(b[:]); err != nil {
			return err
		}
		f.gap = max(f.gap, time.Since(start))
		return nil
	})
	var connects sync.WaitGroup
	every(5*time.Millisecond, func() error {
		connects.Go(func() {
			ctx, cancel := context.WithTimeout(h.ctx, 10*time.Second)
			defer cancel()
			start := time.Now()
			c, err := h.net.Dial(ctx, "tcp4", h.addr())
			if err != nil {
				failed(err)
				return
			}
			c.Close()
			mu.Lock()
			defer mu.Unlock()
			took := time.Since(start)
			f.connect = max(f.connect, took)
			if took > 500*time.Millisecond {
				f.slow++
			}
		})
		return nil
	})
	return func() felt {
		h.t.Helper()
		close(stop)
		wg.Wait()
		connects.Wait()
		select {
		case err := <-fail:
			h.t.Fatal(err)
		default:
		}
		f.resent = h.synRetrans() - before
		return f
	}
}

// synRetrans is how many SYNs the peer's kernel has sent again.
func (h *holding) synRetrans() (n int64) {
	h.t.Helper()
	err := h.net.Peer.Do(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/netstat")
		if err != nil {
			return err
		}
		lines := strings.Split(string(b), "\n")
		names, values := strings.Fields(lines[0]), strings.Fields(lines[1])
		for i, name := range names {
			if name == "TCPSynRetrans" && i < len(values) {
				n, err = strconv.ParseInt(values[i], 10, 64)
				return err
			}
		}
		return fmt.Errorf("no TCPSynRetrans in netstat")
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return n
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
			// A SYN is sent again after a second, and on a busy machine a dump can take longer.
			const enough, most, limit = 3, 30, 800 * time.Millisecond
			dumps, resent := 0, int64(0)
			for tries := 0; dumps < enough && tries < most; tries++ {
				end := h.feel()
				start := time.Now()
				if err := h.e.Dump(h.ctx, true); err != nil {
					t.Fatal(err)
				}
				took := time.Since(start)
				f := end()
				t.Logf("%s: dump %v: longest request %v, longest connect %v, %d connects over 500 ms, %d SYNs sent again",
					mode, took.Round(time.Millisecond), f.gap.Round(time.Millisecond), f.connect.Round(time.Millisecond), f.slow, f.resent)
				if took < limit {
					dumps++
					resent += f.resent
				}
			}
			if dumps < enough {
				t.Fatalf("%d of %d dumps took less than %v", dumps, most, limit)
			}
			if mode == "drop" {
				if resent == 0 {
					t.Error("no SYN was sent again under the lock that drops: this test cannot fail")
				}
				return
			}
			if resent != 0 {
				t.Errorf("%d SYNs were sent again", resent)
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
	h := newHolding(t, lock, "hold", oursPath)
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				stopped <- nil
				return
			case <-time.After(time.Millisecond):
				if err := h.send(1); err != nil {
					stopped <- err
					return
				}
			}
		}
	}()
	for range dumps {
		if err := h.e.Dump(h.ctx, true); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	if lock == "skip" {
		h.whole(fmt.Sprintf("after %d dumps", dumps))
	} else if n, err := h.count(); err != nil || n.Late+n.Twice != 0 || n.Came < h.next*3/4 {
		// CRIU's own lock comes off after ours, and drops what comes in between.
		t.Errorf("after %d dumps: of %d datagrams %d came, %d late, %d twice; %v", dumps, h.next, n.Came, n.Late, n.Twice, err)
	}
	t.Logf("%d datagrams", h.next)
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
			if err := h.send(10); err != nil {
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
			h.l.hooks.Handle(func(hook testbed.Hook) error {
				switch hook.Action {
				case "setup-namespaces", "post-setup-namespaces", "post-restore":
					return h.send(50)
				}
				return nil
			})
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

// Plain CRIU puts the rules of a namespace into the image. What nft prints of our queue
// could not be restored on a kernel without nft_queue, so a dump does not hold there; the
// restore holds, though the image's lock comes back beside the new one.
func TestHoldImage(t *testing.T) {
	h := newHoldingOf(t, "criu", "skip", "hold", oursPath, relayPath)
	if err := h.send(10); err != nil {
		t.Fatal(err)
	}
	h.whole("before")
	if err := h.e.Dump(h.ctx, false); err != nil {
		t.Fatal(err)
	}
	log, err := h.e.Log()
	held := strings.Contains(log, "mode=hold")
	if err != nil || held == strings.Contains(log, "no nft_queue") {
		t.Errorf("CRIU's log of the dump, %v:\n%s", err, ofInterest(log))
	}
	h.l.hooks.Handle(func(hook testbed.Hook) error {
		if hook.Action != "post-restore" {
			return nil
		}
		// The kernel sees the new link's carrier a while after CRIU has made it.
		err := testbed.Poll(h.ctx, func() error {
			out, err := h.l.RunIn(h.ctx, fmt.Sprintf("/proc/%s/ns/net", hook.PID), "ip", "link", "show", "up")
			if err == nil && !strings.Contains(out, "BROADCAST,MULTICAST,UP,LOWER_UP") {
				err = fmt.Errorf("no carrier:\n%s", out)
			}
			return err
		})
		if err != nil {
			return err
		}
		return h.send(50)
	})
	if err := h.e.Restore(h.ctx); err != nil {
		t.Fatal(err)
	}
	h.whole("after the restore")
	if log, err := h.e.Log(); err != nil || !strings.Contains(log, "mode=hold") {
		t.Errorf("CRIU's log of the restore, %v:\n%s", err, ofInterest(log))
	}
}

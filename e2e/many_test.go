package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/e2e/traffic"
)

// Checkpoints of many containers at once, each in a namespace of its own: dumps that leave them
// running, dumps that do not, and restores. Each lock is there at its hooks and nowhere else, and
// every connection lives through all of it.
func TestManyCheckpoints(t *testing.T) {
	n, patience := 4, 30*time.Second
	if *everyHook {
		n, patience = 50, 5*time.Minute
	}
	l := openLab(t)
	t.Cleanup(func() { (&fixture{t: t, l: l}).nothingLeft() })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	if err := errors.Join(l.Setup(ctx, "runc"), l.Relay("runc", relayPath)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		files, err := l.ConfigurationFiles()
		for name := range files {
			err = errors.Join(err, os.Remove(filepath.Join(l.Work, "criu", name)))
		}
		if err != nil {
			t.Error(err)
		}
	})
	runs := map[string]*one{}
	for i := range n {
		id := fmt.Sprint("many-", i)
		peer, err := l.NewNet(ctx, "peer-"+id)
		if err != nil {
			t.Fatal(err)
		}
		f := &fixture{t: t, ctx: ctx, l: l, net: peer, skip: true, shared: true,
			e: &testbed.Runc{Container: testbed.Container{S: l.Session, Net: peer, ID: id, Argv: []string{workloadPath, "numbers"}}}}
		f.start(peer.Close)
		m := &one{fixture: f}
		if m.rules, err = l.Rules(ctx, f.e.Netns()); err != nil {
			t.Fatal(err)
		}
		m.echo(f.dial("tcp4", traffic.EchoPort))
		runs[id] = m
	}
	var mu sync.Mutex
	calls := map[string]int{} // of hooks
	l.hooks.Handle(func(h testbed.Hook) error {
		m := runs[filepath.Base(filepath.Dir(h.Dir))]
		if m == nil {
			return fmt.Errorf("a hook in %s", h.Dir)
		}
		mu.Lock()
		calls[h.Action]++
		mu.Unlock()
		return m.watch(h)
	})
	defer l.hooks.Handle(nil)
	all := func(what string, f func(*one) error) {
		t.Helper()
		start := time.Now()
		var wg sync.WaitGroup
		errs := make(chan error, n)
		for id, m := range runs {
			wg.Go(func() {
				if err := f(m); err != nil {
					errs <- fmt.Errorf("%s: %s: %w", id, what, err)
				}
			})
		}
		wg.Wait()
		close(errs)
		for err := range errs {
			t.Error(err)
		}
		if t.Failed() {
			t.FailNow()
		}
		t.Logf("%d at once: %s, %v", n, what, time.Since(start).Round(time.Millisecond))
	}
	all("dump, left running", func(m *one) error { return m.e.Dump(ctx, true) })
	all("dump", func(m *one) error { return errors.Join(m.e.Dump(ctx, false), m.locked("dumped and dead", m.e.Netns())) })
	if out, err := l.Run(ctx, oursPath, "list"); err != nil || strings.Count(out, "use        waiting for a restore") != n {
		t.Errorf("list: %v\n%s", err, out)
	}
	all("restore", func(m *one) error { return m.e.Restore(ctx) })
	for hook, want := range map[string]int{"network-lock": 2 * n, "network-unlock": 2 * n, "setup-namespaces": n, "post-restore": n} {
		if calls[hook] != want {
			t.Errorf("%d calls of %s, want %d", calls[hook], hook, want)
		}
	}
	for id, m := range runs {
		if err := m.end(); err != nil {
			t.Errorf("%s, its connection: %v", id, err)
		}
		if rules, err := l.Rules(ctx, m.e.Netns()); err != nil || rules != m.rules {
			t.Errorf("%s: the rule set was\n%s\nand is\n%s%v", id, m.rules, rules, err)
		}
	}
	(&run{fixture: &fixture{t: t, ctx: ctx, l: l}}).unguarded()
}

// one is one of many containers, with a connection over which something goes now and then.
type one struct {
	*fixture
	rules string
	end   func() error
}

// echo sends a byte every few milliseconds and wants it back. The first is back when it returns: CRIU
// does not dump a connection that nobody has accepted.
func (m *one) echo(c net.Conn) {
	stop, ended := make(chan struct{}), make(chan struct{})
	var echoed atomic.Int32
	var failed error
	go func() {
		defer close(ended)
		for tick := time.NewTicker(20 * time.Millisecond); ; {
			select {
			case <-stop:
				tick.Stop()
				return
			case <-tick.C:
			}
			got, sent := [1]byte{}, byte(echoed.Load())
			if _, failed = c.Write([]byte{sent}); failed == nil {
				_, failed = io.ReadFull(c, got[:])
			}
			if failed == nil && got[0] != sent {
				failed = fmt.Errorf("%d came back for %d", got[0], sent)
			}
			if failed != nil {
				return
			}
			echoed.Add(1)
		}
	}()
	if err := testbed.Poll(m.ctx, func() error {
		if echoed.Load() == 0 {
			return errors.New("nothing comes back")
		}
		return nil
	}); err != nil {
		m.t.Fatal(err)
	}
	m.end = func() error {
		deadline, _ := m.ctx.Deadline()
		_ = c.SetDeadline(deadline)
		before := echoed.Load()
		err := testbed.Poll(m.ctx, func() error { // it goes on
			select {
			case <-ended:
				return nil
			default:
			}
			if echoed.Load() < before+5 {
				return errors.New("it stands still")
			}
			return nil
		})
		close(stop)
		<-ended
		return errors.Join(err, failed)
	}
}

// watch is told of every hook after criu-netlock has handled it.
func (m *one) watch(h testbed.Hook) error {
	locked := slices.Contains(lockedAt, h.Action)
	if !locked && h.Action != "network-unlock" && h.Action != "pre-dump" && h.Action != "post-resume" {
		return nil
	}
	rules, err := m.l.Rules(m.ctx, "/proc/"+h.PID+"/ns/net")
	if tables, _, _ := ours(rules); err == nil && len(tables) != map[bool]int{true: 1}[locked] {
		err = fmt.Errorf("%s: %d tables of ours:\n%s", h.Action, len(tables), rules)
	}
	return err
}

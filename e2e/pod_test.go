package e2e

// Two containers of one network namespace, as a pod's are, checkpointed at once.

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/e2e/traffic"
)

// While the second is frozen the first ends: the namespace stays locked until the second ends
// too, and a connection lives through both.
func TestTwoOfAPod(t *testing.T) {
	for _, way := range []string{"action scripts", "in CRIU's place"} {
		t.Run(way, func(t *testing.T) { twoOfAPod(t, way == "in CRIU's place") })
	}
}

func twoOfAPod(t *testing.T, asCRIU bool) {
	l := openLab(t)
	t.Cleanup(func() { (&fixture{t: t, l: l}).nothingLeft() })
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	var env []string
	if asCRIU {
		putShim(t)
		env = []string{"PATH=" + shimDir + ":/usr/sbin:/usr/bin:/sbin:/bin"}
	}
	n, err := l.NewNet(ctx, "peer-pod")
	if err != nil {
		t.Fatal(err)
	}
	scripts := []string{oursPath, relayPath}
	if asCRIU {
		scripts = scripts[1:]
	}
	container := func(id, does string) *testbed.Runc {
		return &testbed.Runc{Env: env, Container: testbed.Container{S: l.Session, Net: n, ID: id, Lock: "skip", Scripts: scripts, Argv: []string{workloadPath, does}}}
	}
	first, second := container("pod-first", "numbers"), container("pod-second", "pause")
	second.Pod = first
	f := &fixture{t: t, ctx: ctx, l: l, net: n, skip: true, shared: true, e: first}
	f.start(n.Close)
	if err := second.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := second.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
	})
	before, err := l.Rules(ctx, first.Netns())
	if err != nil {
		t.Fatal(err)
	}
	m := &one{fixture: f}
	m.echo(f.dial("tcp4", traffic.EchoPort))

	inside, over, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	wait := func(c <-chan struct{}) error {
		select {
		case <-c:
			return nil
		case <-time.After(20 * time.Second):
			return errors.New("the other one does not come")
		}
	}
	l.hooks.Handle(func(h testbed.Hook) error {
		if h.Action != "post-dump" {
			return nil
		}
		if strings.Contains(h.Dir, first.ID) {
			go func() { done <- second.Dump(ctx, true) }()
			return wait(inside)
		}
		close(inside)
		return wait(over)
	})
	defer l.hooks.Handle(nil)
	err = first.Dump(ctx, true)
	rules, e := l.Rules(ctx, first.Netns())
	if tables, _, _ := ours(rules); len(tables) != 1 {
		e = errors.Join(e, fmt.Errorf("the second is frozen, and the namespace has the rules\n%s", rules))
	}
	close(over)
	if err := errors.Join(err, e, <-done); err != nil {
		t.Fatal(err)
	}
	if rules, err := l.Rules(ctx, first.Netns()); err != nil || rules != before {
		t.Errorf("the rule set was\n%s\nand is\n%s%v", before, rules, err)
	}
	if err := m.end(); err != nil {
		t.Errorf("the connection: %v", err)
	}
	(&run{fixture: &fixture{t: t, ctx: ctx, l: l}}).unguarded()
}

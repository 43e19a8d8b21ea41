package e2e

import (
	"strings"
	"testing"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
)

// TestSharedNamespace: CRIU calls hooks for a task in its own network namespace
// too, all but the two that lock and unlock. There is nothing for us to do then,
// and nothing that may fail.
func TestSharedNamespace(t *testing.T) {
	for engine, hooks := range map[string]struct{ dump, restore []string }{
		"criu-shared": {[]string{"pre-dump", "post-dump"},
			[]string{"pre-restore", "post-restore", "pre-resume", "post-resume"}},
		"runc-shared": {[]string{"pre-dump", "post-dump"},
			[]string{"pre-restore", "setup-namespaces", "post-setup-namespaces", "post-restore", "pre-resume", "post-resume"}},
	} {
		t.Run(engine, func(t *testing.T) { sharedNamespace(t, engine, hooks.dump, hooks.restore) })
	}
}

func sharedNamespace(t *testing.T, engine string, dump, restore []string) {
	f := begin(t, engine, "iptables", oursPath, relayPath)
	rules := func() string {
		t.Helper()
		s, err := f.l.Rules(f.ctx, f.net.Path())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	before := rules()
	check := func(what string, err error, actions []string) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		var got []string
		for _, h := range f.l.hooks.Seen() {
			got = append(got, h.Action)
			t.Logf("%s: %s, pid %q (set: %t)", what, h.Action, h.PID, h.PIDSet)
		}
		want(t, got, actions...)
		if after := rules(); after != before {
			t.Errorf("%s: the rule set was\n%s\nand is\n%s", what, before, after)
		}
		if log, err := f.e.Log(); err != nil || strings.Contains(log, "level=ERROR") {
			t.Errorf("%s: %v\n%s", what, err, ofInterest(log))
		}
	}
	f.l.hooks.Handle(func(testbed.Hook) error { return nil })
	check("dump", f.e.Dump(f.ctx, false), dump)
	f.l.hooks.Handle(func(testbed.Hook) error { return nil })
	check("restore", f.e.Restore(f.ctx), restore)
}

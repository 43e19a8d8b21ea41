package e2e

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/e2e/traffic"
)

// saves are the commands that together print every rule of iptables.
var saves = []string{"iptables-legacy-save", "ip6tables-legacy-save", "iptables-nft-save", "ip6tables-nft-save"}

// TestIPTables dumps and restores under the lock of the other backend, chosen by
// the configuration file.
func TestIPTables(t *testing.T) {
	for _, engine := range []string{"criu", "runc"} {
		t.Run(engine, func(t *testing.T) {
			f := begin(t, engine, "skip", oursPath, relayPath)
			cfg := filepath.Join(f.l.Work, "criu/netlock.toml")
			if err := os.WriteFile(cfg, []byte("backend = \"iptables\"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.Remove(cfg) })
			streams := map[string]*traffic.Stream{}
			for _, family := range []string{"tcp4", "tcp6"} {
				var c net.Conn = f.dial(family, traffic.StreamPort)
				streams[family] = traffic.Start(c)
			}
			flows := func(when string) {
				t.Helper()
				for family, s := range streams {
					if err := s.Advance(f.ctx, 100); err != nil {
						t.Fatalf("%s, %s: %v", when, family, err)
					}
				}
			}
			flows("before")
			// ours asserts whether rules of ours are in a namespace.
			ours := func(at, path string, wanted bool) error {
				var all strings.Builder
				for _, save := range saves {
					s, err := f.l.RunIn(f.ctx, path, save)
					if err != nil {
						return err
					}
					all.WriteString(s)
				}
				if got := strings.Contains(strings.ToLower(all.String()), "criu-netlock"); got != wanted {
					return fmt.Errorf("%s: rules of ours: %t, want %t:\n%s", at, got, wanted, &all)
				}
				return nil
			}
			var (
				errs []error
				path string
				fail bool // at post-dump
				dies bool // the namespace, with the tasks
			)
			f.l.hooks.Handle(func(h testbed.Hook) error {
				if h.PIDSet {
					path = "/proc/" + h.PID + "/ns/net"
				}
				switch {
				case slices.Contains(lockedAt, h.Action):
					errs = append(errs, f.probe(h.Action, path, true), ours(h.Action, path, true))
				case h.PIDSet:
					errs = append(errs, ours(h.Action, path, false))
				}
				switch {
				case h.Action != "post-dump":
				case fail:
					return errOnPurpose
				case dies:
					return f.unplug()
				}
				return nil
			})
			if err := f.e.Dump(f.ctx, true); err != nil {
				t.Fatal(err)
			}
			flows("after a dump that leaves it running")
			fail = true
			if err := f.e.Dump(f.ctx, false); err == nil {
				t.Fatal("a dump succeeded whose post-dump had failed")
			}
			fail = false
			if err := ours("after a dump that failed", path, false); err != nil {
				t.Error(err)
			}
			flows("after a dump that failed")
			dies = true
			if err := f.e.Dump(f.ctx, false); err != nil {
				t.Fatal(err)
			}
			if path := f.e.Netns(); path != "" {
				if err := f.probe("dumped and dead", path, true); err != nil {
					t.Error(err)
				}
			}
			if err := f.e.Restore(f.ctx); err != nil {
				t.Fatal(err)
			}
			f.l.hooks.Handle(nil)
			if err := errors.Join(errs...); err != nil {
				t.Error(err)
			}
			flows("after")
			for family, s := range streams {
				if _, err := s.Finish(f.ctx); err != nil {
					t.Errorf("%s: %v", family, err)
				}
			}
		})
	}
}

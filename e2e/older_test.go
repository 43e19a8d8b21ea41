//go:build older

package e2e

// What package e2e/older runs in its virtual machine: CRIU 3.17.1, which knows neither
// `network-lock skip` nor action scripts beside RPC. By its command line it has TestCheckpoint.

import (
	"slices"
	"strings"
	"testing"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
)

// The root is the one that was booted: nothing is to be built there.
var (
	recipe = testbed.Debian12
	tools  = slices.DeleteFunc(slices.Clone(testbed.Tools), func(s string) bool { return s == "debootstrap" })
)

// patience: the processor is emulated.
const patience = 10

// least: there is no doing without.
const least = "nftables"

// TestOlderRPC dumps and restores over RPC, each way in, with a program that calls the script that watches.
func TestOlderRPC(t *testing.T) {
	clients := map[string][]string{
		"go-criu":         {rpcClientPath, "-calls", "go-criu"},
		"swrk":            {rpcClientPath, "-calls", "swrk"},
		"service":         {rpcClientPath, "-calls", "service"},
		"in CRIU's place": plain("go-criu", "-calls"),
	}
	for _, name := range []string{"go-criu", "swrk", "service", "in CRIU's place"} {
		for _, lock := range []string{"iptables", "nftables"} {
			t.Run(name+"/"+lock, func(t *testing.T) {
				putShim(t)
				r := &run{fixture: begin(t, "go-criu", lock, relayPath)}
				r.e.(*testbed.CLI).Client = clients[name]
				r.begin()
				dump, restore := []string{"pre-dump", "network-lock", "post-dump"}, []string{"pre-restore", "setup-namespaces", "post-setup-namespaces", "post-restore", "network-unlock", "post-resume"}
				if strings.HasPrefix(name, "in ") {
					restore = slices.DeleteFunc(restore, func(h string) bool { return h == "network-unlock" || h == "pre-restore" })
				}
				r.dump("", true)
				r.flows("dumped and running")
				want(t, r.dump("", false), dump...)
				want(t, r.restore(""), restore...)
				r.finish()
			})
		}
	}
}

// TestOlderRunc dumps and restores with runc, and criu-netlock in CRIU's place; no script can watch
// that. It restores in a new namespace, as on another host: in the old one the lock of CRIU's that
// the dump has left would stay, which this CRIU does not find again, with us or without.
func TestOlderRunc(t *testing.T) {
	putShim(t)
	r := &run{fixture: begin(t, "runc", "nftables")}
	r.e.(*testbed.Runc).Env = []string{"PATH=" + shimDir + ":/usr/sbin:/usr/bin:/sbin:/bin"}
	r.begin()
	does := func(what string, err error, hooks ...string) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		log, err := r.e.Log()
		for _, h := range hooks {
			if n := strings.Count(log, " action="+h+" "); n != 1 || err != nil {
				t.Errorf("%s: %d lines of ours at %s, %v", what, n, h, err)
			}
		}
	}
	does("leave running", r.e.Dump(r.ctx, true), "pre-dump", "network-lock", "network-unlock")
	r.unlocks()
	r.flows("dumped and running")
	does("dump", r.e.Dump(r.ctx, false), "pre-dump", "network-lock")
	if err := r.locked("dumped and dead", r.e.Netns()); err != nil {
		t.Error(err)
	}
	r.renew()
	if _, err := r.l.Run(r.ctx, oursPath, "lock", "--netns", r.e.Netns()); err != nil {
		t.Fatal(err)
	}
	if err := r.net.Attach(r.ctx, r.e.(*testbed.Runc).ID, r.e.Netns()); err != nil {
		t.Fatal(err)
	}
	r.dead()
	does("restore", r.e.Restore(r.ctx), "pre-restore", "setup-namespaces", "post-setup-namespaces", "post-restore", "network-unlock", "post-resume")
	r.finish()
}

// The versions are those that were to be tested.
func TestOlderVersions(t *testing.T) {
	l := openLab(t)
	out, err := l.Run(t.Context(), "sh", "-c", "criu --version; uname -r")
	if err != nil || !strings.Contains(out, "Version: 3.17") || !strings.Contains(out, "\n6.1.") {
		t.Errorf("%v\n%s", err, out)
	}
}

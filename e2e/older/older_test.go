// Package older runs the tests that talk to the kernel and to CRIU with those of an older
// Debian, in a virtual machine: Linux 6.1, and CRIU 3.17.1, which does not start on newer ones.
package older

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

const module = "github.com/criu-netlock/criu-netlock/"

var all = flag.Bool("older.all", false, "run all that can be run in the virtual machine; give -timeout 40m")

// suites are test programs, and what of them is run. The machine's processor is emulated, and
// takes ten times as long: so a part of it is enough without -older.all.
func suites() []suite {
	short := []suite{
		{pkg: "nft/nfnl", run: ".", passes: []string{"TestQueueApart"}},
		{pkg: "netlock", run: "^Test", passes: []string{"TestNamespace"}},
		// What is on a processor's way when the lock goes is lost or late in a flood or a stream, and an emulated
		// one takes its time; UDP has no room for many on a small machine.
		{pkg: "netlock/hold", run: "./^nft", skip: "TestFlood|TestMany|TestStream", passes: []string{"TestHold/nft", "TestMark/nftables/nft"}},
		{pkg: "nft", run: "TestConformance/(cycle|replay|side)|TestNoDestroy|TestHold|TestGolden", passes: []string{"TestConformance/cycle", "TestNoDestroy"}},
		{pkg: "e2e", run: "TestOlderVersions", passes: []string{"TestOlderVersions"}},
		{pkg: "e2e", run: "TestOlderRPC/swrk/iptables|TestOlderRPC/in_CRIU/nftables",
			passes: []string{"TestOlderRPC/swrk/iptables", "TestOlderRPC/in_CRIU's_place/nftables"}},
		{pkg: "e2e", run: "TestHoldImage", passes: []string{"TestHoldImage"}},
		{pkg: "e2e", run: "TestOlderRunc", passes: []string{"TestOlderRunc"}},
		{pkg: "e2e", run: "TestCheckpoint/^criu$/^nftables$/(kill_and_restore|leave_running)",
			passes: []string{"TestCheckpoint/criu/nftables/kill_and_restore", "TestCheckpoint/criu/nftables/leave_running"}},
	}
	if !*all {
		return short
	}
	return append(short[:3:3],
		// An orphan is made by the flag persist, which is newer.
		suite{pkg: "nft", run: "TestConformance|TestHostile|TestHold|TestGolden|TestNoDestroy|Noted", skip: "TestHostile/orphan", passes: []string{"TestHostile/doubled"}},
		suite{pkg: "iptables", run: "TestGolden|TestPackets|TestHold|TestLeftovers", passes: []string{"TestPackets"}},
		suite{pkg: "e2e", run: "TestHoldImage", passes: []string{"TestHoldImage"}},
		suite{pkg: "e2e", run: "TestOlder", passes: []string{"TestOlderRPC/service/nftables", "TestOlderRunc"}},
		suite{pkg: "e2e", run: "TestCheckpoint/^criu$/^(iptables|nftables)$", passes: []string{"TestCheckpoint/criu/iptables/restore_fails_at_post-restore"}},
	)
}

// hooksInUse has a namespace with base chains at all hooks until the end. The first and the last one
// of a machine patch the kernel's code, and under qemu's emulation a processor can stay in the
// breakpoint of that for ever (a soft lockup in ip6_xmit, with three of seventeen runs of TestOlderRunc).
const hooksInUse = `unshare -n sh -c 'for h in prerouting input forward output postrouting; do echo "add chain inet t $h { type filter hook $h priority 0; }"; done |
	{ echo "add table inet t"; cat; } | nft -f - && touch /run/hooks && exec sleep 100000' </dev/null >/dev/null &
for i in $(seq 300); do [ -e /run/hooks ] && break; sleep 0.1; done
[ -e /run/hooks ] || { echo 'the hooks are not in use'; exit 1; }
`

// section begins what a test program says.
const section = "=== package "

type suite struct {
	pkg, run string
	skip     string // what cannot be there
	// passes are some that must be among those that were run: of a pattern that meets nothing a
	// test program says nothing.
	passes []string
}

// TestOlder fails as the tests in the virtual machine do, and if one was not run there.
func TestOlder(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		netlocktest.CannotRun(t, "the virtual machine is an amd64")
	}
	netlocktest.Need(t, append(testbed.BootTools, testbed.Tools...)...)
	ctx, cancel := t.Context(), func() {}
	if end, ok := t.Deadline(); ok { // when the test is ended, nothing is cleaned up
		ctx, cancel = context.WithDeadline(ctx, end.Add(-time.Minute))
	}
	defer cancel()
	root, err := testbed.Debian12().Ensure(ctx, func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	folder := t.TempDir()
	bin := filepath.Join(folder, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := testbed.BuildTo(ctx, bin, map[string]string{"workload": "e2e/workload", "rpcclient": "e2e/rpcclient", "criu-netlock": "cmd/criu-netlock"}); err != nil {
		t.Fatal(err)
	}
	var script strings.Builder
	fmt.Fprintf(&script, `code=0; export CI=true %s=%s/bin %s=/run/root
mkdir /run/root-debian12; mount --bind / /run/root-debian12
%s`, testbed.EnvPrograms, testbed.BootDir, testbed.EnvDir, hooksInUse)
	for _, s := range suites() {
		name := strings.ReplaceAll(s.pkg, "/", "-") + ".test"
		dir := filepath.Join("src", s.pkg)
		if _, err := os.Stat(filepath.Join(folder, name)); err != nil {
			build := exec.CommandContext(ctx, "go", "test", "-c", "-tags", "older", "-o", filepath.Join(folder, name), module+s.pkg)
			build.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if err := os.CopyFS(filepath.Join(folder, dir, "testdata"), os.DirFS("../../"+s.pkg+"/testdata")); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
		fmt.Fprintf(&script, "echo '%s%s'; mkdir -p %s; (cd %[3]s && %s/%s -test.v -test.timeout 900s -test.run %s -test.skip %s) || code=1\n", section, s.pkg, dir, testbed.BootDir, name, quote(s.run), quote(s.skip))
	}
	script.WriteString("exit $code\n")
	if err := os.WriteFile(filepath.Join(folder, "run"), []byte(script.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	said := &logger{t: t, passed: map[string]bool{}}
	late, err := boot(ctx, root, folder, said)
	if late && ctx.Err() == nil {
		// Its processors wait for each other ("soft lockup"), in qemu's emulation: once more.
		t.Log("the virtual machine stands still: once more")
		said = &logger{t: t, passed: map[string]bool{}}
		_, err = boot(ctx, root, folder, said)
	}
	if err != nil {
		t.Error(err)
	}
	for _, failed := range said.failed { // last, where nobody has to look for it
		t.Error(failed)
	}
	for _, s := range suites() {
		for _, name := range s.passes {
			if !said.passed[s.pkg+" "+name] {
				t.Errorf("%s: %s has not passed", s.pkg, name)
			}
		}
	}
}

// boot is one run of the virtual machine, which takes 2 to 4 minutes, or 12 with -older.all. It tells
// whether that was too long.
func boot(ctx context.Context, root *testbed.Root, folder string, said *logger) (late bool, err error) {
	limit := 12 * time.Minute
	if *all {
		limit = 40 * time.Minute
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err = root.Boot(ctx, folder, said)
	return ctx.Err() != nil, err
}

// quote makes a word of the shell's.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// logger logs each line when it comes, and notes what has passed, and what a test said that has failed.
type logger struct {
	t      *testing.T
	pkg    string
	passed map[string]bool
	test   []string // the lines of the one that runs
	failed []string
}

func (l *logger) Write(b []byte) (int, error) {
	line := strings.TrimSpace(string(b))
	l.t.Log(line)
	if pkg, ok := strings.CutPrefix(line, section); ok {
		l.pkg = pkg
	}
	if name, ok := strings.CutPrefix(line, "=== RUN   "); ok && !strings.Contains(name, "/") {
		l.test = nil
	}
	l.test = append(l.test, line)
	if name, ok := strings.CutPrefix(line, "--- FAIL: "); ok && !strings.Contains(name, "/") {
		l.failed = append(l.failed, l.pkg+": "+strings.Join(l.test, "\n"))
		l.test = nil
	}
	if name, ok := strings.CutPrefix(line, "--- PASS: "); ok {
		name, _, _ = strings.Cut(name, " ")
		l.passed[l.pkg+" "+name] = true
	}
	return len(b), nil
}

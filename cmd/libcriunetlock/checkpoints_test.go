package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/criurpc"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// One checkpoint, its log, and what is said when it is used wrongly.
func TestCheckpoints(t *testing.T) {
	pid, _ := netlocktest.NewTask(t)
	conf, log := filepath.Join(t.TempDir(), "netlock.toml"), filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(conf, []byte("log-level = \"info\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var all checkpoints
	for _, failed := range []int{0, -52} {
		id, err := all.begin(opts{pid: pid, leaveRunning: true, logFD: int(f.Fd()), config: conf, guard: criurpc.NoGuard})
		if err != nil || id == 0 {
			t.Fatal(id, err)
		}
		for _, name := range []string{"pre-dump", "network-lock", "post-dump"} {
			if err := all.notify(id, name, 0); err != nil {
				t.Fatal(name, err)
			}
		}
		if st := state(t, pid); !st.Locked || !st.Intact {
			t.Errorf("%+v", st)
		}
		if err := all.notify(id, "network-lock", pid+1); netlock.KindOf(err) != netlock.KindInput {
			t.Errorf("another pid: %v", err)
		}
		if err := all.end(id, failed); err != nil {
			t.Errorf("%d: %v", failed, err)
		}
		if st := state(t, pid); st.Found {
			t.Errorf("%d: %+v", failed, st)
		}
		if err := all.notify(id, "network-lock", 0); netlock.KindOf(err) != netlock.KindInput {
			t.Errorf("closed: %v", err)
		}
	}
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"level=INFO msg=locked action=network-lock pid=", " result=possible ", "level=ERROR msg=\"network-lock failed\""} {
		if strings.Count(string(b), want) != 2 {
			t.Errorf("want %q twice:\n%s", want, b)
		}
	}
	// Held is what CRIU does not put into an image from which it could not be restored.
	if err := os.WriteFile(conf, []byte("mode = \"hold\"\nbackend = \"iptables\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for dumped, want := range map[bool]string{true: "level=WARN msg=locked action=network-lock", false: "level=INFO msg=unlocked action=network-unlock"} {
		if err := f.Truncate(0); err != nil {
			t.Fatal(err)
		}
		id, err := all.begin(opts{pid: pid, leaveRunning: true, rulesNotDumped: !dumped, logFD: int(f.Fd()), config: conf, guard: criurpc.NoGuard})
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"network-lock", "network-unlock"} {
			if err := all.notify(id, name, 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := all.end(id, 0); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(log)
		if err != nil || !strings.Contains(string(b), want) || strings.Contains(string(b), "not_held=") != dumped || strings.Contains(string(b), "delivered=0") == dumped {
			t.Errorf("mode hold, rules in the image %v: %v\n%s", dumped, err, b)
		}
	}
	if err := os.WriteFile(conf, []byte("nonsense = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := all.begin(opts{pid: pid, config: conf}); netlock.KindOf(err) != netlock.KindInput {
		t.Errorf("a configuration that is wrong: %v", err)
	}
}

package e2e

import (
	"os"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// A session in which a container was left paused ends as any other.
func TestSessionEndsFrozen(t *testing.T) {
	netlocktest.Need(t, testbed.Tools...)
	root, err := testbed.Default().Ensure(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	s, err := root.Enter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	top, file, freeze, thaw := "/sys/fs/cgroup/freezer", "freezer.state", "FROZEN", "THAWED"
	if _, err := os.Stat(top); err != nil { // version 2 alone
		top, file, freeze, thaw = "/sys/fs/cgroup", "cgroup.freeze", "1", "0"
	}
	dir := top + s.CgroupParent()
	const script = `mkdir $1 && cd $1 && sleep 600 </dev/null >/dev/null 2>&1 & sleep=$!; until echo $sleep >$1/cgroup.procs; do :; done 2>/dev/null; echo $3 >$1/$2`
	if out, err := s.Run(t.Context(), "sh", "-c", script, "sh", dir, file, freeze); err != nil {
		t.Fatal(err, out)
	}
	if b, err := os.ReadFile(dir + "/cgroup.procs"); err != nil || len(b) == 0 {
		t.Errorf("nothing is frozen: %v", err)
	}
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	select {
	case err = <-closed:
	case <-time.After(20 * time.Second):
		t.Error("it does not end")
		_ = os.WriteFile(dir+"/"+file, []byte(thaw), 0)
		err = <-closed
	}
	if err != nil {
		t.Error(err)
	}
}

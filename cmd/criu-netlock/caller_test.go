package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/criurpc"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft"
)

// lonely is a CRIU that begins a hook and then waits to be killed. late is a shell's words in which
// $0 is the program.
type lonely struct {
	*exec.Cmd
	log string
}

func newLonely(t *testing.T, s *space, action, late string) *lonely {
	t.Helper()
	log := filepath.Join(t.TempDir(), "log")
	script := "export CRTOOLS_IMAGE_DIR=/proc/$$/fd/3\n(" + late + `; echo "exit $?" >>"$LOG") 2>"$LOG" & exec sleep 600`
	l := &lonely{exec.Command("sh", "-c", script, program), log}
	l.Env = append(os.Environ(), "CRIU_NETLOCK_CONFIG=/dev/null", "CRTOOLS_SCRIPT_ACTION="+action, "CRTOOLS_INIT_PID="+s.pid, "LOG="+log)
	if err := l.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.kill)
	return l
}

func (l *lonely) kill() {
	_ = l.Process.Kill() // it may be dead
	_ = l.Wait()
}

// said waits for the hook's end, and returns its log and what the shell says of its exit.
func (l *lonely) said(t *testing.T) (log string) {
	t.Helper()
	eventually(t, "the hook's end", func() bool {
		b, err := os.ReadFile(l.log)
		log = string(b)
		return err == nil && strings.Contains(log, "exit ")
	})
	return log
}

// What a hook of a CRIU that was killed would lock nobody would unlock: it locks nothing, and takes
// off what it has locked while CRIU died.
func TestHookOfADeadCRIU(t *testing.T) {
	netlocktest.Need(t, "strace", "unshare", "mount")
	for _, action := range []string{"network-lock", "setup-namespaces"} {
		t.Run(action, func(t *testing.T) {
			t.Parallel()
			s := newSpace(t)
			before := s.rules(t)
			// It has locked by then, and does not know yet.
			l := newLonely(t, s, action, `strace -f -o /dev/null -e trace=sendto -e inject=sendto:delay_exit=400000 "$0"`)
			eventually(t, "locked", func() bool { return s.isLocked(t) })
			l.kill()
			if log := l.said(t); !strings.Contains(log, "CRIU is gone") || !strings.Contains(log, "exit 1\n") {
				t.Error(log)
			}
			if after := s.rules(t); after != before {
				t.Errorf("this is left:\n%s", after)
			}
		})
	}
	t.Run("taken in by init", func(t *testing.T) {
		t.Parallel()
		const script = `mount -t tmpfs tmpfs /run
unshare -n sleep 600 & task=$!
until [ "$(readlink /proc/$task/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do :; done
export CRTOOLS_SCRIPT_ACTION=network-lock CRTOOLS_INIT_PID=$task
sh -c 'export CRTOOLS_IMAGE_DIR=/proc/$$/fd/3; (: >/run/ready; until [ -e /run/go ]; do :; done; exec "$0" 2>/run/log) & exec sleep 600' "$0" & criu=$!
until [ -e /run/ready ]; do :; done; kill -KILL $criu; wait $criu; : >/run/go
until [ -s /run/log ]; do :; done; cat /run/log; "$0" status --pid $task`
		r := execute(t, nil, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script, program)
		r.want(t, 0, "CRIU is gone", "): not locked")
	})
}

// A hook that names a pid which is nobody's, and whose parent lives, does what it is for: nobody
// watches, that is all.
func TestHookOfNoCRIU(t *testing.T) {
	s := newSpace(t)
	for _, action := range []string{"pre-dump", "network-lock", "network-unlock", "setup-namespaces", "post-restore", "network-unlock", "post-resume"} {
		hook(t, action, s.pid, "CRTOOLS_IMAGE_DIR=/proc/"+zombie(t)+"/fd/6").want(t, 0, "action="+action)
		hook(t, action, s.pid, "CRTOOLS_IMAGE_DIR=/proc/4194303/fd/6").want(t, 0, "action="+action)
		if lock := action == "network-lock" || action == "setup-namespaces" || action == "post-restore"; s.isLocked(t) != lock {
			t.Errorf("after %s: locked is %v", action, !lock)
		}
	}
}

// Who names a directory in place of a descriptor of CRIU's is known by being our parent.
func TestGuardOfAParent(t *testing.T) {
	s, c := newSpace(t), newCRIU(t, "IMAGES="+t.TempDir())
	c.ok(t, s.pid, "pre-dump")
	if log := c.ok(t, s.pid, "network-lock"); !strings.Contains(log, fmt.Sprint("guard=", c.guard(t))) {
		t.Errorf("network-lock: %s", log)
	}
	run(t, "status", "--json", "--pid", s.pid).want(t, 0, fmt.Sprintf(`"pid": %d`, c.Process.Pid))
	c.kill()
	eventually(t, "unlocked", func() bool { return !s.isLocked(t) })

	// Who names nothing tries the hook.
	s, c = newSpace(t), newCRIU(t, "IMAGES=")
	c.ok(t, s.pid, "pre-dump", "network-lock")
	if g := guards(t, c.Process.Pid); len(g) != 0 {
		t.Errorf("guards %v", g)
	}
	c.ok(t, s.pid, "network-unlock")
}

// A CRIU that is killed when its restore has locked and has no guard yet gets one, which sees
// that it is gone.
func TestCRIUKilledBeforeItsGuard(t *testing.T) {
	netlocktest.Need(t, "strace")
	s := newSpace(t)
	before := s.rules(t)
	l := newLonely(t, s, "setup-namespaces", `strace -f -o /dev/null -e trace=socketpair -e inject=socketpair:delay_enter=2000000 "$0"`)
	eventually(t, "locked", func() bool { return s.isLocked(t) })
	time.Sleep(time.Second) // for the hook to look at its CRIU for the last time
	l.kill()
	if log := l.said(t); !strings.Contains(log, "result=locked") || !strings.Contains(log, "exit 0\n") {
		t.Error(log)
	}
	eventually(t, "unlocked", func() bool { return s.rules(t) == before })
	eventually(t, "without a guard", func() bool { return len(guards(t, l.Process.Pid)) == 0 })
}

// stubborn is a backend that cannot unlock from some time on.
type stubborn struct {
	netlock.Backend
	now bool
}

func (s *stubborn) Unlock(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (netlock.State, error) {
	if s.now {
		return netlock.State{}, errors.New("not today")
	}
	return s.Backend.Unlock(ctx, ns, o)
}

// What a client that lives on could not unlock in the end its guard unlocks.
func TestClientLeavesAnUnlockToItsGuard(t *testing.T) {
	s := newSpace(t)
	before := s.rules(t)
	criu := exec.Command("sleep", "600")
	if err := criu.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = criu.Process.Kill(); _ = criu.Wait() })
	pid, err := strconv.Atoi(s.pid)
	if err != nil {
		t.Fatal(err)
	}
	b := &stubborn{Backend: nft.New()}
	c := criurpc.NewDump(pid, true, criurpc.Options{Locker: netlock.New(b), Guard: program})
	c.SetCRIU(criu.Process.Pid)
	for _, name := range []action.Name{action.PreDump, action.NetworkLock} {
		if _, err := c.Handle(t.Context(), name, pid); err != nil {
			t.Fatal(err)
		}
	}
	s.wantLocked(t, true)
	b.now = true
	if err := c.End(errors.New("the dump failed")); err == nil || !strings.Contains(err.Error(), "not today") {
		t.Fatal(err)
	}
	eventually(t, "unlocked", func() bool { return s.rules(t) == before })
	eventually(t, "without a guard", func() bool { return len(guards(t, criu.Process.Pid)) == 0 })
}

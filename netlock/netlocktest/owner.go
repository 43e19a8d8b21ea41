package netlocktest

import (
	"os"
	"os/exec"
	"testing"

	"github.com/criu-netlock/criu-netlock/netlock"
)

// owner: the lock that a checkpoint has left which is over becomes the next one's, since by its
// metadata whoever looks for stale ones would take it off. Nobody else's changes hands.
func (c Config) owner(t *testing.T) {
	task := exec.Command("sleep", "600")
	if err := task.Start(); err != nil {
		t.Fatal(err)
	}
	dead := netlock.CallerOf(task.Process.Pid).For(os.Getpid())
	_ = task.Process.Kill() // it is alive
	_ = task.Wait()         // it was killed
	living := netlock.CallerOf(os.Getppid()).For(os.Getpid())
	next := netlock.CallerOf(os.Getpid()).For(os.Getppid())
	with := func(way netlock.Fallback, c netlock.Caller) netlock.Caller { c.Fallback = way; return c }
	n := NewNS(t)
	for name, by := range map[string]struct {
		caller netlock.Caller
		fresh  bool
	}{
		"a restore, dead":         {with(netlock.FallbackUnlock, dead), true},
		"a restore, alive":        {with(netlock.FallbackUnlock, living), false},
		"a restore that is kept":  {with(netlock.FallbackKeep, dead), false},
		"a dump, over":            {dead, true},
		"a dump, its task dead":   {dead.For(dead.PID), false},
		"by hand, who knows when": {netlock.Caller{PID: dead.PID, Name: "sh"}, false},
	} {
		for _, mode := range []netlock.Mode{netlock.Drop, netlock.Hold} { // nobody holds
			t.Run(name+", "+string(mode), func(t *testing.T) {
				s := c.on(t, n)
				s.o.Caller = by.caller
				s.lock()
				s.o.Caller, s.o.Mode = next, mode
				if res := s.lock(); res.Already == by.fresh {
					t.Errorf("%+v", res)
				}
				want := by.caller.PID
				if by.fresh {
					want = next.PID
				}
				if st := s.state(); !st.Intact || st.Caller.PID != want {
					t.Errorf("%+v; pid %d's is wanted", st, want)
				}
				s.unlock()
				s.none()
			})
		}
	}
}

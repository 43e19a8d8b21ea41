package nft

import (
	"context"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// The lock that a restore has made and not taken off becomes the next one's, once it is dead: by
// its metadata whoever looks later would take it off. Nobody else's changes hands.
func TestLockOfAFailedRestore(t *testing.T) {
	n := netlocktest.NewNS(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	task := exec.Command("sleep", "600")
	if err := task.Start(); err != nil {
		t.Fatal(err)
	}
	dead := netlock.CallerOf(task.Process.Pid).For(os.Getpid())
	_ = task.Process.Kill() // it is alive
	_ = task.Wait()         // it was killed
	living := netlock.CallerOf(os.Getppid()).For(os.Getpid())
	next := netlock.CallerOf(os.Getpid()).For(os.Getppid())
	for name, c := range map[string]struct {
		by    netlock.Caller
		way   netlock.Fallback
		fresh bool
	}{
		"a restore, dead":         {dead, netlock.FallbackUnlock, true},
		"a restore, alive":        {living, netlock.FallbackUnlock, false},
		"a restore that is kept":  {dead, netlock.FallbackKeep, false},
		"a dump, over":            {dead, "", false},
		"by hand, who knows when": {netlock.Caller{PID: dead.PID, Name: "sh"}, "", false},
	} {
		for mode, o := range map[string]netlock.Options{
			"drop":              {Caller: next},
			"nobody that holds": {Caller: next, Mode: netlock.Hold},
		} {
			t.Run(name+", "+mode, func(t *testing.T) {
				b := New()
				defer b.Wait()
				c.by.Fallback = c.way
				if _, err := b.Lock(ctx, n.Netns(), netlock.Options{Caller: c.by}); err != nil {
					t.Fatal(err)
				}
				res, err := b.Lock(ctx, n.Netns(), o)
				if err != nil || res.Already == c.fresh {
					t.Errorf("%+v, %v", res, err)
				}
				want := c.by.PID
				if c.fresh {
					want = next.PID
				}
				if st, err := b.State(ctx, n.Netns(), o); err != nil || !st.Intact || st.Caller.PID != want {
					t.Errorf("%+v, %v; want pid %d's", st, err, want)
				}
				if _, err := b.Unlock(ctx, n.Netns(), o); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

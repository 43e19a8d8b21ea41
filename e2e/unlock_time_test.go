//go:build faults

package e2e

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"
)

// The tasks of a restore wait while it is unlocked: hardly longer than where there is no lock at
// all. It is a matter of milliseconds, so make faults alone has it.
func TestUnlockTime(t *testing.T) {
	const rounds, longer = 11, 2 * time.Millisecond
	for _, engine := range []string{"criu", "runc"} {
		t.Run(engine, func(t *testing.T) {
			f := begin(t, engine, "skip")
			took := map[bool][]time.Duration{}
			for i := range 2 * (rounds + 1) {
				ours := i%2 == 1
				c := (&run{fixture: f}).container()
				if c.Scripts = nil; ours {
					c.Scripts = []string{oursPath}
				}
				ctx := t.Context()
				if err := f.e.Dump(ctx, false); err != nil {
					t.Fatal(err)
				}
				if err := f.e.Restore(ctx); err != nil {
					t.Fatal(err)
				}
				log, err := f.e.Log()
				if err != nil {
					t.Fatal(err)
				}
				d, err := unlockTime(log)
				if err != nil {
					t.Fatal(err)
				}
				if i > 1 { // the first ones read their programs from the disk
					took[ours] = append(took[ours], d)
				}
			}
			(&run{fixture: f}).unguarded()
			slices.Sort(took[false])
			slices.Sort(took[true])
			without, with := took[false][rounds/2], took[true][rounds/2]
			t.Logf(`"Unlock network" to "pre-resume" in a restore, medians of %d: %v without a lock, %v with ours`, rounds, without, with)
			if with-without > longer {
				t.Errorf("%v longer, and %v are allowed: %v, %v", with-without, longer, took[false], took[true])
			}
		})
	}
}

// unlockTime finds in a restore's log, whose lines begin with seconds in brackets, how long it
// took from the unlock to the next hook.
func unlockTime(log string) (time.Duration, error) {
	at := func(line string) (time.Duration, error) {
		m := regexp.MustCompile(`(?m)^\((\d+\.\d+)\) *` + line).FindStringSubmatch(log)
		if m == nil {
			return 0, fmt.Errorf("CRIU's log has no %q", line)
		}
		s, err := strconv.ParseFloat(m[1], 64)
		return time.Duration(s * float64(time.Second)), err
	}
	unlock, err := at("net: Unlock network")
	if err != nil {
		return 0, err
	}
	next, err := at("Running pre-resume scripts")
	return (next - unlock).Round(time.Microsecond), err
}

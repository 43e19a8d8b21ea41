package netlocktest

import (
	"strings"
	"testing"
	"time"
)

// A flood has to tell a lock from what leaks, opens late or loses packets.
func TestFloodCatches(t *testing.T) {
	Need(t, "nft")
	p := NewPair(t)
	nothing := func() error { return nil }
	feed := func(rules string) func() error {
		return func() error { _, err := p.Inside.TryRun(rules, "nft", "-f", "-"); return err }
	}
	on, off := feed(whole), feed("delete table inet lock")
	both := func(a, b func() error) func() error {
		return func() error {
			if err := a(); err != nil {
				return err
			}
			return b()
		}
	}
	for _, c := range []struct {
		name string
		f    flood
		want string // part of the error
	}{
		{"whole", flood{lock: on, locked: nothing, unlock: off}, ""},
		{"no lock", flood{lock: nothing, locked: nothing, unlock: nothing}, "came through a lock"},
		{"outwards only", flood{lock: feed("table inet lock { chain c { type filter hook output priority raw; policy drop; }; }"), locked: nothing, unlock: off}, "came through a lock"},
		{"a gap", flood{lock: on, locked: both(off, on), unlock: off}, "came through a lock"},
		{"one port only", flood{lock: feed("table inet lock { chain c { type filter hook prerouting priority raw; udp dport 7000 drop; }; }"), locked: nothing, unlock: off}, "came through a lock"},
		{"one packet in 4", flood{lock: feed("table inet lock { chain c { type filter hook prerouting priority raw; policy drop; numgen inc mod 4 0 accept; }; }"), locked: nothing, unlock: off}, "came through a lock"},
		{"never off", flood{lock: on, locked: nothing, unlock: nothing}, "has not come"},
		{"one lost in 4", flood{lock: on, locked: nothing, unlock: both(off, feed("table inet loses { chain c { type filter hook prerouting priority raw; numgen inc mod 4 0 drop; }; }"))}, "has not come"},
	} {
		t.Run(c.name, func(t *testing.T) {
			defer p.Inside.Run("flush ruleset", "nft", "-f", "-")
			c.f.cycles, c.f.wait = 3, untilTime
			if c.want == "has not come" {
				c.f.wait = 300 * time.Millisecond
			}
			got, err := c.f.run(t, p)
			if err == nil {
				err = got.fault(c.f.cycles)
			}
			switch {
			case c.want == "" && err != nil:
				t.Errorf("a lock that is whole: %v", err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("not noticed: %+v, %v", got, err)
			}
		})
	}
}

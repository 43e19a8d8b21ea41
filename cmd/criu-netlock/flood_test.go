package main

import (
	"errors"
	"fmt"
	"strconv"
	"testing"

	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// The hooks as CRIU runs them, a process each, under a flood of numbered packets:
// none comes while locked, none is lost while not.
func TestFlood(t *testing.T) {
	netlocktest.Need(t)
	p := netlocktest.NewPair(t)
	pid := strconv.Itoa(p.Inside.PID())
	do := func(action string) func() error {
		return func() error {
			if r := hook(t, action, pid); r.code != 0 || r.stdout != "" {
				return errors.New(fmt.Sprint(action, ": ", r))
			}
			return nil
		}
	}
	netlocktest.FloodFunc(t, p, do("network-lock"), do("network-unlock"), 200)
}

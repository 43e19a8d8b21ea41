package iptables_test

import (
	"testing"

	"github.com/criu-netlock/criu-netlock/iptables"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

func TestConformance(t *testing.T) {
	for _, v := range []iptables.Variant{iptables.Legacy, iptables.NFT} {
		t.Run(string(v), func(t *testing.T) {
			netlocktest.Conformance(t, netlocktest.IPTables(t, string(v), func() netlock.Backend { return iptables.New(v) }))
		})
	}
}

func TestFlood(t *testing.T) {
	for _, v := range []iptables.Variant{iptables.Legacy, iptables.NFT} {
		t.Run(string(v), func(t *testing.T) {
			c := netlocktest.IPTables(t, string(v), func() netlock.Backend { return iptables.New(v) })
			netlocktest.Flood(t, c.New, 100)
			netlocktest.FloodRepair(t, c, 20, 1)
		})
	}
}

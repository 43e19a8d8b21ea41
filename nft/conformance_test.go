package nft_test

import (
	"testing"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft"
)

func newBackend() netlock.Backend { return nft.New() }

func TestConformance(t *testing.T) {
	c := netlocktest.NFT(t, newBackend)
	netlocktest.Conformance(t, c)
	t.Run("with handles that keep sockets", func(t *testing.T) {
		c.Keep = true
		netlocktest.Conformance(t, c)
	})
}

func TestFlood(t *testing.T) { netlocktest.Flood(t, newBackend, 2000) }

func TestFloodRepair(t *testing.T) {
	netlocktest.FloodRepair(t, netlocktest.NFT(t, newBackend), 100, 1)
}

func TestHostile(t *testing.T) { netlocktest.HostileNFT(t, netlocktest.NFT(t, newBackend)) }

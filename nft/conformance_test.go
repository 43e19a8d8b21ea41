package nft_test

import (
	"testing"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft"
)

func newBackend() netlock.Backend { return nft.New() }

func TestConformance(t *testing.T) {
	netlocktest.Conformance(t, netlocktest.NFT(t, newBackend))
}

func TestFlood(t *testing.T) { netlocktest.Flood(t, newBackend, 2000) }

func TestFloodRepair(t *testing.T) {
	netlocktest.FloodRepair(t, netlocktest.NFT(t, newBackend), 100, 1)
}

func TestHostile(t *testing.T) { netlocktest.HostileNFT(t, newBackend) }

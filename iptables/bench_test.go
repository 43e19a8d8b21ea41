package iptables

import (
	"testing"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// What every lock and unlock of another backend pays for looking here.
func BenchmarkNothingThere(b *testing.B) {
	n := netlocktest.NewNS(b)
	be := New(Auto)
	for b.Loop() {
		if st, err := be.Unlock(b.Context(), n.Netns(), netlock.Options{}); err != nil || st.Found {
			b.Fatal(st, err)
		}
	}
}

func BenchmarkLockUnlock(b *testing.B) {
	for _, v := range variants {
		b.Run(string(v), func(b *testing.B) {
			n := netlocktest.NewNS(b)
			be := New(v)
			for b.Loop() {
				if _, err := be.Lock(b.Context(), n.Netns(), options); err != nil {
					b.Fatal(err)
				}
				if _, err := be.Unlock(b.Context(), n.Netns(), options); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

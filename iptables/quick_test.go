package iptables

import (
	"context"
	"fmt"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock"
	"golang.org/x/sys/unix"
)

func newNS(t testing.TB) *netlock.Namespace {
	var ns *netlock.Namespace
	var err error
	done := make(chan bool)
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return
		}
		fd, _ := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		ns, err = netlock.FromFD(fd)
		unix.Close(fd)
	}()
	<-done
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

func sh(t testing.TB, ns *netlock.Namespace, cmd string) string {
	var out []byte
	err := ns.Do(func() error {
		var err error
		out, err = exec.Command("bash", "-c", cmd).CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("%s: %v: %s", cmd, err, out)
	}
	return string(out)
}

func TestQuick(t *testing.T) {
	for _, v := range []Variant{Legacy, NFT, Auto} {
		ns := newNS(t)
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		b := New(v)
		r, _ := netlock.ParseRule("tcp dport 22")
		o := netlock.Options{Caller: netlock.Caller{PID: 7, Name: "x y"}, Allow: []netlock.Rule{r}}
		p := func(a any, err error) { fmt.Printf("%s %+v %v\n", v, a, err) }
		for range 2 {
			for _, op := range []string{"state", "lock", "lock", "state", "unlock", "unlock"} {
				t0 := time.Now()
				switch op {
				case "state":
					st, err := b.State(ctx, ns, o)
					p(st, err)
				case "lock":
					st, err := b.Lock(ctx, ns, o)
					p(st, err)
				default:
					st, err := b.Unlock(ctx, ns, o)
					p(st, err)
				}
				fmt.Println(op, time.Since(t0))
			}
		}
		fmt.Println(sh(t, ns, "iptables-legacy-save; iptables-nft-save"))
	}
}

func BenchmarkNothing(b *testing.B) {
	ns := newNS(b)
	be := New(Auto)
	ctx := context.Background()
	for range b.N {
		if st, err := be.Unlock(ctx, ns, netlock.Options{}); err != nil || st.Found {
			b.Fatal(st, err)
		}
	}
}

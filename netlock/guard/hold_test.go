package guard

import (
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/iptables"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft"
)

// Another process has what is held delivered. One that ends in the middle of it leaves
// the lock as it was, but for what had come by then.
func TestHolderIsAsked(t *testing.T) {
	n := nft.New()
	defer n.Wait()
	for _, b := range []netlock.Backend{n, iptables.New(iptables.Auto)} {
		t.Run(b.Name(), func(t *testing.T) { holderIsAsked(t, b) })
	}
}

func holderIsAsked(t *testing.T, b netlock.Backend) {
	p := netlocktest.NewPair(t)
	dir := filepath.Join(t.TempDir(), "run")
	holds, asks := &Holder{Stays: true, Dir: dir}, &Holder{Dir: dir}
	defer holds.Holder.Close()
	ns := p.Inside.Netns()
	// What IPv6 sends by itself is not to be counted.
	o := netlock.Options{Mode: netlock.Hold, Holder: holds, Allow: []netlock.Rule{{Proto: "icmpv6"}}}
	if res, err := b.Lock(t.Context(), ns, o); err != nil || res.Mode != netlock.Hold {
		t.Fatalf("%+v, %v", res, err)
	}
	var out net.Conn
	if err := p.Peer.Do(func() (err error) {
		out, err = net.Dial("udp4", net.JoinHostPort(netlocktest.InsideV4, "7803"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	send := func(n uint64) uint16 {
		t.Helper()
		for range n {
			if _, err := out.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		var q netlock.Queue
		if err := netlocktest.Until(func() (bool, error) {
			st, err := b.State(t.Context(), ns, o)
			q = st.Queue
			return q.Held >= n, err
		}); err != nil {
			t.Fatalf("%+v: %v", q, err)
		}
		return q.Number
	}
	num := send(3)
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: filepath.Join(dir, holdName(ns.Inode(), num)), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := say(c, sayRelease); err != nil {
		t.Fatal(err)
	}
	if err := hear(c, sayOpen); err != nil {
		t.Fatal(err)
	}
	c.Close()
	send(2)
	if st, err := b.State(t.Context(), ns, o); err != nil || !st.Intact || st.Queue.Held != 2 || st.Queue.Delivered != 3 {
		t.Errorf("after who asked has ended: %+v, %v", st, err)
	}
	o.Holder = asks
	if st, err := b.State(t.Context(), ns, o); err != nil || st.Queue.Held != 2 || st.Queue.Delivered != 3 || st.Queue.Lost != 0 {
		t.Errorf("the same for another process: %+v, %v", st, err)
	}
	st, err := b.Unlock(t.Context(), ns, o)
	if err != nil || st.NotDelivered != nil || st.Queue.Delivered != 5 || st.Queue.Held+st.Queue.Lost != 0 {
		t.Errorf("unlock: %+v, %v", st, err)
	}
	if names, _ := filepath.Glob(dir + "/hold-*"); names != nil {
		t.Errorf("left behind: %q", names)
	}
}

package criurpc

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/rpc"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// proxied is a proxy with a client's and CRIU's side of it.
type proxied struct {
	client, criu criuSide
	done         chan error
}

func newProxied(t testing.TB, ctx context.Context, f *fake) *proxied {
	t.Helper()
	return newProxiedWith(t, ctx, f.options)
}

func newProxiedWith(t testing.TB, ctx context.Context, options func() Options) *proxied {
	t.Helper()
	ends := func() (ours int, theirs *conn) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if theirs, err = newConn(fds[1]); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { theirs.close() })
		return fds[0], theirs
	}
	p := Proxy{ClientPID: os.Getpid(), Begin: func(*rpc.CriuOpts) Options { return options() }}
	x := &proxied{done: make(chan error, 1)}
	var client, criu *conn
	p.Client, client = ends()
	p.CRIU, criu = ends()
	x.client, x.criu = criuSide{t, client}, criuSide{t, criu}
	go func() { x.done <- p.Run(ctx) }()
	return x
}

func (x *proxied) ask(req *rpc.CriuReq) {
	x.client.t.Helper()
	b, err := req.MarshalVT()
	if err == nil {
		err = x.client.c.send(bg, b)
	}
	if err != nil {
		x.client.t.Error(err)
	}
}

// hears is what the client gets next.
func (x *proxied) hears() (*rpc.CriuResp, []*os.File) {
	x.client.t.Helper()
	b, files, err := x.client.c.receive(bg)
	resp := new(rpc.CriuResp)
	if err != nil || resp.UnmarshalVT(b) != nil {
		x.client.t.Fatalf("the client got %q, %v", b, err)
	}
	return resp, files
}

func dumpRequest(pid int, wants bool) *rpc.CriuReq {
	return &rpc.CriuReq{Type: ptr(rpc.CriuReqType_DUMP), Opts: &rpc.CriuOpts{ImagesDirFd: ptr(int32(-1)), Pid: ptr(int32(pid)), NotifyScripts: &wants}}
}

func (x *proxied) answers(success bool) {
	x.client.t.Helper()
	x.ask(&rpc.CriuReq{Type: ptr(rpc.CriuReqType_NOTIFY), NotifySuccess: &success})
}

// say sends a notification from CRIU.
func (x *proxied) say(name string, fds ...int) {
	x.criu.t.Helper()
	if err := x.criu.c.send(bg, marshal(x.criu.t, notification(name, 0)), fds...); err != nil {
		x.criu.t.Error(err)
	}
}

// A dump through the proxy: what the client hears and when, and that CRIU gets the client's
// descriptors, which are not the client's numbers.
func TestProxy(t *testing.T) {
	task, f := newSleeper(t), newFake()
	ctx, cancel := context.WithTimeout(bg, 30*time.Second)
	defer cancel()
	x := newProxied(t, ctx, f)
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	req := dumpRequest(task.pid(), true)
	*req.Opts.ImagesDirFd = int32(dir.Fd())
	x.ask(req)
	got := x.criu.request().GetOpts()
	if got == nil || got.GetImagesDirFd() == int32(dir.Fd()) || int(got.GetPid()) != task.pid() {
		t.Fatalf("CRIU got %v", got)
	}
	var want, have unix.Stat_t
	if unix.Fstat(int(dir.Fd()), &want) != nil || unix.Fstat(int(got.GetImagesDirFd()), &have) != nil || want.Ino != have.Ino {
		t.Error("another folder")
	}
	for _, c := range []struct {
		name                  string
		heard, answered, fine bool // locked when the client hears it, and when CRIU has the answer
	}{
		{"pre-dump", false, false, true}, {"network-lock", true, true, true}, {"query-ext-files", true, true, true}, {"post-dump", true, true, true}, {"network-unlock", true, false, true},
	} {
		x.say(c.name, 2)
		resp, files := x.hears()
		if resp.GetNotify().GetScript() != c.name || len(files) != 1 || f.is(task.ino) != c.heard {
			t.Errorf("%s: the client heard %v with %d files, locked: %v", c.name, resp, len(files), f.is(task.ino))
		}
		closeAll(files)
		x.answers(true)
		if a := x.criu.request(); !a.GetNotifySuccess() || f.is(task.ino) != c.answered {
			t.Errorf("%s: CRIU heard %v, locked: %v", c.name, a, f.is(task.ino))
		}
	}
	x.criu.respond(rpc.CriuReqType_DUMP, true, "", 0)
	if resp, _ := x.hears(); !resp.GetSuccess() || resp.GetType() != rpc.CriuReqType_DUMP {
		t.Errorf("the client heard %v", resp)
	}
	x.criu.c.close()
	if err := <-x.done; err != nil {
		t.Error(err)
	}
	if _, _, err := x.client.c.receive(bg); err != io.EOF {
		t.Errorf("the client's connection: %v", err)
	}
}

// slow is a second backend, whose Unlock takes as long as it is let.
type slow struct {
	*fake
	wait atomic.Pointer[chan struct{}]
}

func (s *slow) Name() string { return "slow" }

func (s *slow) Unlock(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (netlock.State, error) {
	if w := s.wait.Load(); w != nil {
		<-*w
	}
	return s.fake.Unlock(ctx, ns, o)
}

// CRIU goes on when packets pass, and not when all is looked through; of an unlock that finds no
// lock it hears at the end.
func TestProxyGoesOn(t *testing.T) {
	for _, c := range []struct {
		name    string
		present bool
	}{{"locked", true}, {"the lock is not the first one's", false}} {
		t.Run(c.name, func(t *testing.T) {
			task, f := newSleeper(t), newFake()
			s := &slow{fake: newFake()}
			ctx, cancel := context.WithTimeout(bg, 30*time.Second)
			defer cancel()
			x := newProxiedWith(t, ctx, func() Options {
				o := f.options()
				o.Locker = netlock.New(f, s)
				return o
			})
			x.ask(dumpRequest(task.pid(), true))
			x.criu.request()
			for _, name := range []string{"pre-dump", "network-lock"} {
				x.say(name)
				x.hears()
				x.answers(true)
				x.criu.request()
			}
			if !c.present {
				f.mu.Lock()
				delete(f.locked, task.ino)
				f.mu.Unlock()
			}
			before := len(s.seen())
			wait := make(chan struct{})
			s.wait.Store(&wait)
			x.say("network-unlock")
			x.hears()
			x.answers(true)
			answered := make(chan struct{})
			go func() {
				x.criu.request()
				close(answered)
			}()
			early := false
			select {
			case <-answered:
				early = true
			case <-time.After(map[bool]time.Duration{true: 5 * time.Second, false: 200 * time.Millisecond}[c.present]):
			}
			if early != c.present || f.is(task.ino) {
				t.Errorf("CRIU was answered before the end: %v; locked: %v", early, f.is(task.ino))
			}
			s.wait.Store(nil)
			close(wait)
			<-answered
			// One answer, and no other, when all is looked through.
			if err := netlocktest.Until(func() (bool, error) { return slices.Contains(s.seen()[before:], "unlock"), nil }); err != nil {
				t.Error(err)
			}
			again, cancelAgain := context.WithTimeout(bg, 100*time.Millisecond)
			if b, _, err := x.criu.c.receive(again); err == nil {
				t.Errorf("CRIU was answered once more: %q", b)
			}
			cancelAgain()
			x.criu.respond(rpc.CriuReqType_DUMP, true, "", 0)
			x.hears()
			x.criu.c.close()
			if err := <-x.done; err != nil {
				t.Error(err)
			}
		})
	}
}

// A context that ends ends it, whoever is silent, and leaves no lock; and the log has what was
// unlocked in CRIU's place.
func TestProxyEnded(t *testing.T) {
	task, f := newSleeper(t), newFake()
	var said []string
	f.log = func(e Entry) { said = append(said, string(e.Event.Action)+": "+e.Report.Result) }
	ctx, cancel := context.WithCancelCause(bg)
	x := newProxied(t, ctx, f)
	x.ask(dumpRequest(task.pid(), false))
	x.criu.request()
	x.criu.notify("network-lock", 0)
	if !f.is(task.ino) {
		t.Fatal("not locked")
	}
	why := errors.New("enough")
	cancel(why)
	if err := <-x.done; !errors.Is(err, why) {
		t.Errorf("ended with %v", err)
	}
	if f.is(task.ino) {
		t.Error("still locked")
	}
	if want := []string{"network-lock: locked", "end of the dump: unlocked"}; !slices.Equal(said, want) {
		t.Errorf("the log has %q, want %q", said, want)
	}
}

// Every way in which a dump through the proxy can fail leaves the task unlocked.
func TestProxyFails(t *testing.T) {
	for name, c := range map[string]struct {
		wants bool
		err   string
		f     func(t *testing.T, x *proxied)
	}{
		"the client goes": {true, "", func(_ *testing.T, x *proxied) {
			x.say("network-lock")
			x.hears()
			x.client.c.close()
			if _, _, err := x.criu.c.receive(bg); err != io.EOF {
				x.criu.t.Errorf("CRIU sees %v", err)
			}
			x.criu.c.close()
		}},
		"CRIU goes": {true, "", func(_ *testing.T, x *proxied) {
			x.say("network-lock")
			x.hears()
			x.criu.c.close()
			if _, _, err := x.client.c.receive(bg); err != io.EOF {
				x.criu.t.Errorf("the client sees %v", err)
			}
		}},
		"CRIU fails": {false, "", func(_ *testing.T, x *proxied) {
			if !x.criu.notify("network-lock", 0).GetNotifySuccess() {
				x.criu.t.Error("refused")
			}
			x.criu.respond(rpc.CriuReqType_DUMP, false, "no", 0)
			x.hears()
			x.criu.c.close()
		}},
		"the lock fails": {true, "lock", func(_ *testing.T, x *proxied) {
			if x.criu.notify("network-lock", 0).GetNotifySuccess() {
				x.criu.t.Error("a lock that failed was answered with success")
			}
			x.criu.respond(rpc.CriuReqType_DUMP, false, "scripts failed", 0)
			if resp, _ := x.hears(); resp.GetType() != rpc.CriuReqType_DUMP {
				x.criu.t.Errorf("the client heard %v", resp)
			}
			x.criu.c.close()
		}},
		"no message of CRIU's": {true, "", func(_ *testing.T, x *proxied) {
			x.say("network-lock")
			x.hears()
			_ = x.criu.c.send(bg, []byte("\xff\xff\xff"))
			if _, _, err := x.client.c.receive(bg); err != io.EOF {
				x.criu.t.Errorf("the client sees %v", err)
			}
			x.criu.c.close()
		}},
	} {
		t.Run(name, func(t *testing.T) {
			task, f := newSleeper(t), newFake()
			if c.err != "" {
				f.err[c.err] = errBroken
			}
			ctx, cancel := context.WithTimeout(bg, 30*time.Second)
			defer cancel()
			x := newProxied(t, ctx, f)
			x.ask(dumpRequest(task.pid(), c.wants))
			if !x.criu.request().GetOpts().GetNotifyScripts() {
				t.Error("CRIU is not asked for notifications")
			}
			c.f(t, x)
			<-x.done
			if ctx.Err() != nil || f.is(task.ino) {
				t.Errorf("%v, locked: %v", ctx.Err(), f.is(task.ino))
			}
		})
	}
}

// What is no dump and no restore passes as it is; a descriptor that the client has not is
// said to be none.
func TestProxyPasses(t *testing.T) {
	ctx, cancel := context.WithTimeout(bg, 30*time.Second)
	defer cancel()
	x := newProxied(t, ctx, newFake())
	msg := []byte("no request at all")
	if err := x.client.c.send(bg, msg); err != nil {
		t.Fatal(err)
	}
	if got, _, err := x.criu.c.receive(bg); string(got) != string(msg) || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	x.ask(&rpc.CriuReq{Type: ptr(rpc.CriuReqType_VERSION), KeepOpen: ptr(true)})
	if req := x.criu.request(); req.GetType() != rpc.CriuReqType_VERSION {
		t.Errorf("%v", req)
	}
	req := dumpRequest(1, true)
	*req.Opts.ImagesDirFd = 12345
	x.ask(req)
	if resp, _ := x.hears(); resp.GetSuccess() || !strings.Contains(resp.GetCrErrmsg(), "images_dir_fd") {
		t.Errorf("%v", resp)
	}
	x.client.c.close()
	if _, _, err := x.criu.c.receive(bg); err != io.EOF {
		t.Errorf("%v", err)
	}
	x.criu.c.close()
	if err := <-x.done; err != nil && !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

// Files that a client sends with a request come to CRIU, whatever the request, as they are, and
// none is left with us.
func TestProxyPassesFiles(t *testing.T) {
	task := newSleeper(t)
	ctx, cancel := context.WithTimeout(bg, 30*time.Second)
	defer cancel()
	x := newProxied(t, ctx, newFake())
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	for _, c := range []struct {
		name string
		req  *rpc.CriuReq
	}{
		{"a version", &rpc.CriuReq{Type: ptr(rpc.CriuReqType_VERSION)}},
		{"a pre-dump", &rpc.CriuReq{Type: ptr(rpc.CriuReqType_PRE_DUMP), Opts: &rpc.CriuOpts{ImagesDirFd: ptr(int32(-1)), Pid: ptr(int32(task.pid()))}}},
		{"a dump", dumpRequest(task.pid(), true)},
		{"an answer", &rpc.CriuReq{Type: ptr(rpc.CriuReqType_NOTIFY), NotifySuccess: ptr(true)}},
	} {
		b, err := c.req.MarshalVT()
		if err != nil {
			t.Fatal(err)
		}
		if err := x.client.c.send(bg, b, p[1], p[1]); err != nil {
			t.Fatal(err)
		}
		_, files, err := x.criu.c.receive(bg)
		if err != nil || len(files) != 2 {
			t.Errorf("%s came with %d files, %v", c.name, len(files), err)
		}
		for _, f := range files {
			var want, have unix.Stat_t
			flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
			if err != nil || flags&unix.O_NONBLOCK == 0 || unix.Fstat(p[1], &want) != nil || unix.Fstat(int(f.Fd()), &have) != nil || want.Ino != have.Ino {
				t.Errorf("%s came with another file, flags %#x, %v", c.name, flags, err)
			}
		}
		closeAll(files)
	}
	unix.Close(p[1])
	p[1] = -1
	// The reader sees the end: nobody has it any more.
	fds := []unix.PollFd{{Fd: int32(p[0]), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, 5000); n != 1 || fds[0].Revents&unix.POLLHUP == 0 {
		t.Errorf("the files are still open: %v, %v", fds, err)
	}
	x.criu.c.close()
	<-x.done
}

// A descriptor that the client has not is an error where CRIU opens it, and nowhere else; it is
// never one of ours.
func TestProxyWithoutDescriptor(t *testing.T) {
	ctx, cancel := context.WithTimeout(bg, 30*time.Second)
	defer cancel()
	x := newProxied(t, ctx, newFake())
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	const none = 12345
	for typ := range rpc.CriuReqType_name {
		typ := rpc.CriuReqType(typ)
		req := &rpc.CriuReq{Type: &typ, Opts: &rpc.CriuOpts{ImagesDirFd: ptr(int32(none)), WorkDirFd: ptr(int32(dir.Fd()))}}
		before := openFDs(t)
		x.ask(req)
		switch typ {
		case rpc.CriuReqType_EMPTY, rpc.CriuReqType_CHECK:
			got := x.criu.request().GetOpts()
			if fd := int(got.GetImagesDirFd()); fd >= 0 {
				if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
					t.Errorf("%v: CRIU got images_dir_fd %d, %v", typ, fd, err)
				}
			}
			if fd := got.GetWorkDirFd(); fd == int32(dir.Fd()) || fd == none {
				t.Errorf("%v: CRIU got work_dir_fd %d", typ, fd)
			}
		case rpc.CriuReqType_VERSION, rpc.CriuReqType_FEATURE_CHECK, rpc.CriuReqType_WAIT_PID, rpc.CriuReqType_NOTIFY:
			if got := x.criu.request().GetOpts(); got.GetImagesDirFd() != none || got.GetWorkDirFd() != int32(dir.Fd()) || got.Pid != nil {
				t.Errorf("%v: CRIU got %v", typ, got)
			}
			if now := openFDs(t); now > before {
				t.Errorf("%v: %d descriptors, %d before", typ, now, before)
			}
		default:
			if resp, _ := x.hears(); resp.GetSuccess() || resp.GetType() != typ || !strings.Contains(resp.GetCrErrmsg(), "images_dir_fd") {
				t.Errorf("%v: %v", typ, resp)
			}
		}
	}
	x.client.c.close()
	if _, _, err := x.criu.c.receive(bg); err != io.EOF {
		t.Errorf("%v", err)
	}
	x.criu.c.close()
	<-x.done
}

// FuzzProxy is a client and a CRIU that say what they like, in both directions at once.
func FuzzProxy(f *testing.F) {
	task := newSleeper(f)
	pack := func(ms ...[]byte) (out []byte) {
		for _, m := range ms {
			out = append(binary.BigEndian.AppendUint16(out, uint16(len(m))), m...)
		}
		return out
	}
	req := dumpRequest(task.pid(), true)
	*req.Opts.ImagesDirFd = 2 // no folder, but there
	dump, err := req.MarshalVT()
	if err != nil {
		f.Fatal(err)
	}
	yes, err := (&rpc.CriuReq{Type: ptr(rpc.CriuReqType_NOTIFY), NotifySuccess: ptr(true)}).MarshalVT()
	if err != nil {
		f.Fatal(err)
	}
	lock, unlock := marshal(f, notification("network-lock", 0)), marshal(f, notification("network-unlock", 0))
	f.Add(pack(dump, yes, yes), pack(lock, unlock), uint8(0))
	f.Add(pack(dump), pack(lock), uint8(1))
	f.Add(pack(dump[:len(dump)-1], yes), pack(lock, lock[:3]), uint8(100))
	f.Add([]byte{}, []byte{}, uint8(maxFiles))
	pair(f) // the runtime opens what it needs for the first one
	f.Fuzz(func(t *testing.T, client, criu []byte, files uint8) {
		b := newFake()
		before := openFDs(t)
		ctx, cancel := context.WithTimeout(bg, 20*time.Second)
		defer cancel()
		x := newProxied(t, ctx, b)
		var sides sync.WaitGroup
		for _, side := range []struct {
			c      *conn
			stream []byte
		}{{x.client.c, client}, {x.criu.c, criu}} {
			sides.Go(func() { // reads until the proxy has gone
				for {
					_, files, err := side.c.receive(ctx)
					closeAll(files)
					if err != nil {
						return
					}
				}
			})
			sides.Go(func() { sendAll(ctx, side.c, side.stream, int(files)) })
		}
		<-x.done
		sides.Wait()
		x.client.c.close()
		x.criu.c.close()
		if ctx.Err() != nil {
			t.Fatal("it hangs")
		}
		if b.is(task.ino) && !succeeds(criu) { // a dump that kills, and has, leaves its lock
			t.Error("locked")
		}
		if now := openFDs(t); now != before {
			t.Errorf("%d descriptors, %d before", now, before)
		}
	})
}

// sendAll sends the messages in a stream, each with files, and then the end; what is sent to it
// can still be read.
func sendAll(ctx context.Context, c *conn, stream []byte, files int) {
	fds := make([]int, min(max(files, 0), maxFiles))
	for i := range fds {
		fds[i] = 2 // stderr
	}
	for len(stream) > 2 {
		n := min(int(binary.BigEndian.Uint16(stream)), len(stream)-2)
		if n > 0 && c.send(ctx, stream[2:2+n], fds...) != nil {
			break
		}
		stream = stream[2+n:]
	}
	_ = c.u.CloseWrite()
}

// succeeds tells whether a response among the messages says so.
func succeeds(stream []byte) bool {
	for len(stream) > 2 {
		n := min(int(binary.BigEndian.Uint16(stream)), len(stream)-2)
		resp := new(rpc.CriuResp)
		if resp.UnmarshalVT(stream[2:2+n]) == nil && resp.GetType() != rpc.CriuReqType_NOTIFY && resp.GetSuccess() {
			return true
		}
		stream = stream[2+n:]
	}
	return false
}

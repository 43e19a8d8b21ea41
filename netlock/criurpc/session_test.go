package criurpc

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/rpc"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock/action"
)

// pair is a connection, and its other end.
func pair(t testing.TB) (*conn, *conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var c [2]*conn
	for i := range c {
		if c[i], err = newConn(fds[i]); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c[i].close() })
	}
	return c[0], c[1]
}

// openFDs counts this process's descriptors.
func openFDs(t testing.TB) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func TestConn(t *testing.T) {
	a, b := pair(t)
	for _, size := range []int{1, 4096, 8193, 1 << 20} {
		msg := bytes.Repeat([]byte{byte(size), 7}, size)[:size]
		sent := make(chan error, 1)
		go func() { sent <- a.send(bg, msg) }()
		got, files, err := b.receive(bg)
		if err != nil || len(files) != 0 || !bytes.Equal(got, msg) {
			t.Errorf("%d bytes came as %d, %d files, %v", size, len(got), len(files), err)
		}
		if err := <-sent; err != nil {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	if err := a.send(bg, nil); err == nil {
		t.Error("an empty message was sent")
	}
	a.close()
	if _, _, err := b.receive(bg); err != io.EOF {
		t.Errorf("after the end: %v", err)
	}
	if err := b.send(bg, []byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("to nobody: %v", err)
	}
}

// Many descriptors: each arrives, close-on-exec, and none is left.
func TestConnFiles(t *testing.T) {
	a, b := pair(t)
	before := openFDs(t)
	const n = 100
	var fds []int
	for i := range n {
		fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Write(fd, []byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
		fds = append(fds, fd)
	}
	if err := a.send(bg, []byte("x"), fds...); err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
	_, files, err := b.receive(bg)
	if err != nil || len(files) != n {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for i, f := range files {
		var got [1]byte
		if _, err := f.ReadAt(got[:], 0); err != nil || got[0] != byte(i) {
			t.Fatalf("file %d: %v, %v", i, got, err)
		}
		if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Fatalf("file %d: flags %#x, %v", i, flags, err)
		}
	}
	closeAll(files)
	if now := openFDs(t); now != before {
		t.Errorf("%d descriptors, %d before", now, before)
	}
}

func TestConnContext(t *testing.T) {
	a, b := pair(t)
	ctx, cancel := context.WithCancel(bg)
	go cancel()
	if _, _, err := a.receive(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	ctx, cancel = context.WithTimeout(bg, time.Millisecond)
	defer cancel()
	if _, _, err := a.receive(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	// Nor does a full buffer hold anybody.
	var err error
	for err == nil {
		ctx, cancel := context.WithTimeout(bg, 20*time.Millisecond)
		err = a.send(ctx, make([]byte, 4096))
		cancel()
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	// What came before can still be used.
	if _, _, err := b.receive(bg); err != nil {
		t.Error(err)
	}
	if err := a.send(bg, []byte("x")); err != nil {
		t.Error(err)
	}
}

// criu plays CRIU: it sends what it is told to, and says what it got.
type criuSide struct {
	t testing.TB
	c *conn
}

func (s criuSide) request() *rpc.CriuReq {
	s.t.Helper()
	b, files, err := s.c.receive(bg)
	closeAll(files)
	req := new(rpc.CriuReq)
	if err != nil || req.UnmarshalVT(b) != nil || req.Type == nil {
		s.t.Errorf("request: %q, %v", b, err)
	}
	return req
}

func marshal(t testing.TB, resp *rpc.CriuResp) []byte {
	t.Helper()
	b, err := resp.MarshalVT()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func notification(name string, pid int) *rpc.CriuResp {
	n := &rpc.CriuNotify{Script: ptr(name)}
	if pid != 0 {
		n.Pid = ptr(int32(pid))
	}
	return &rpc.CriuResp{Type: ptr(rpc.CriuReqType_NOTIFY), Success: ptr(true), Notify: n}
}

// notify sends a notification and returns the answer.
func (s criuSide) notify(name string, pid int, fds ...int) *rpc.CriuReq {
	s.t.Helper()
	if err := s.c.send(bg, marshal(s.t, notification(name, pid)), fds...); err != nil {
		s.t.Errorf("%s: %v", name, err)
	}
	req := s.request()
	if req.GetType() != rpc.CriuReqType_NOTIFY || req.NotifySuccess == nil {
		s.t.Errorf("%s was answered by %v", name, req)
	}
	return req
}

func (s criuSide) respond(typ rpc.CriuReqType, success bool, msg string, no int32) {
	s.t.Helper()
	resp := &rpc.CriuResp{Type: &typ, Success: &success}
	if msg != "" {
		resp.CrErrmsg, resp.CrErrno = &msg, &no
	}
	if err := s.c.send(bg, marshal(s.t, resp)); err != nil {
		s.t.Error(err)
	}
}

// against is a session whose CRIU is f.
func against(t *testing.T, f func(criuSide)) *Session {
	t.Helper()
	ours, theirs := pair(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer theirs.close()
		f(criuSide{t, theirs})
	}()
	s := &Session{c: ours}
	t.Cleanup(func() {
		if err := s.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		<-done
	})
	return s
}

func TestSession(t *testing.T) {
	task, f := newSleeper(t), newFake()
	dir := t.TempDir()
	s := against(t, func(c criuSide) {
		req := c.request()
		if o := req.GetOpts(); req.GetType() != rpc.CriuReqType_DUMP || int(o.GetPid()) != task.pid() || !o.GetNotifyScripts() || o.ImagesDirFd == nil {
			t.Errorf("request %v", req)
		}
		for _, n := range []string{"pre-dump", "network-lock", "query-ext-files", "post-dump", "of-the-future", "status-ready", "network-unlock"} {
			answer := c.notify(n, 0)
			if !answer.GetNotifySuccess() {
				t.Errorf("%s was refused", n)
			}
			if n == "query-ext-files" {
				if o := answer.GetOpts(); len(o.GetExternal()) != 1 || o.GetExternal()[0] != "file[1:2]" || o.ImagesDirFd == nil {
					t.Errorf("external: %v", answer)
				}
			} else if answer.Opts != nil {
				t.Errorf("%s: %v", n, answer)
			}
			if locked := n == "network-lock" || n == "query-ext-files" || n == "post-dump" || n == "of-the-future" || n == "status-ready"; f.is(task.ino) != locked {
				t.Errorf("%s: locked: %v", n, !locked)
			}
		}
		// 100 descriptors, of which the callback takes one.
		var (
			fds  []int
			open []*os.File
		)
		for i := range 100 {
			file, err := os.Create(filepath.Join(dir, fmt.Sprint(i)))
			if err != nil {
				t.Error(err)
			}
			open = append(open, file)
			fds = append(fds, int(file.Fd()))
		}
		if !c.notify("orphan-pts-master", 0, fds...).GetNotifySuccess() {
			t.Error("orphan-pts-master was refused")
		}
		closeAll(open)
		c.respond(rpc.CriuReqType_DUMP, true, "", 0)
	})
	before := openFDs(t)
	var names []string
	resp, err := s.Dump(bg, &rpc.CriuOpts{Pid: ptr(int32(task.pid())), LeaveRunning: ptr(true)}, func(_ context.Context, n *Notification) error {
		names = append(names, string(n.Action))
		switch n.Action {
		case action.QueryExtFiles:
			n.External = []string{"file[1:2]"}
		case action.OrphanPtsMaster:
			file := n.TakeFile()
			defer file.Close()
			if _, err := file.WriteString("hello"); err != nil {
				t.Error(err)
			}
		default:
			if n.TakeFile() != nil {
				t.Errorf("%s brought a file", n.Action)
			}
		}
		return nil
	}, f.options())
	if err != nil || !resp.GetSuccess() || len(names) != 8 {
		t.Errorf("%v, %v, %q", resp, err, names)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "0")); string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
	if now := openFDs(t); now > before {
		t.Errorf("%d descriptors, %d before", now, before)
	}
}

// Everything that can go wrong in a dump: the tasks are unlocked, and the error has its
// cause.
func TestSessionFails(t *testing.T) {
	for name, c := range map[string]struct {
		criu     func(criuSide)
		callback Callback
		break_   string // what the backend fails at
		want     string
		is       error
	}{
		"CRIU fails": {func(c criuSide) {
			c.notify("network-lock", 0)
			c.respond(rpc.CriuReqType_DUMP, false, "Can't dump\nthis", int32(syscall.EBADR))
		}, nil, "", "Can't dump this", syscall.EBADR},
		"CRIU fails without a word": {func(c criuSide) {
			c.notify("network-lock", 0)
			c.respond(rpc.CriuReqType_EMPTY, false, "", 0)
		}, nil, "", "criu dump: refused or failed; CRIU's log says more", nil},
		"CRIU goes": {func(c criuSide) { c.notify("network-lock", 0) }, nil, "", "closed the connection without an answer", nil},
		"CRIU goes at once": {func(criuSide) {
		}, nil, "", "closed the connection without an answer", nil},
		"another response": {func(c criuSide) {
			c.notify("network-lock", 0)
			c.respond(rpc.CriuReqType_RESTORE, true, "", 0)
		}, nil, "", "answered by a response to restore", nil},
		"no message of CRIU's": {func(c criuSide) {
			c.notify("network-lock", 0)
			_ = c.c.send(bg, []byte("\xff\xff\xff"))
		}, nil, "", "none of CRIU's", nil},
		"half a message": {func(c criuSide) {
			c.notify("network-lock", 0)
			b := marshal(c.t, notification("post-dump", 0))
			_ = c.c.send(bg, b[:len(b)-1])
		}, nil, "", "none of CRIU's", nil},
		"a message of another kind": {func(c criuSide) {
			c.notify("network-lock", 0)
			_ = c.c.send(bg, []byte{0x38, 0x01}) // cr_errno alone
		}, nil, "", "required field", nil},
		"1 MiB of nothing": {func(c criuSide) {
			c.notify("network-lock", 0)
			_ = c.c.send(bg, make([]byte, 1<<20))
		}, nil, "", "a message of 1048576 bytes is none of CRIU's", nil},
		"the callback fails": {func(c criuSide) {
			c.notify("network-lock", 0)
			if c.notify("post-dump", 0).GetNotifySuccess() {
				c.t.Error("a callback that failed was answered with success")
			}
			// As CRIU does it, but for network-unlock.
			c.respond(rpc.CriuReqType_DUMP, false, "scripts failed", 0)
		}, func(_ context.Context, n *Notification) error {
			if n.Action == action.PostDump {
				return errBroken
			}
			return nil
		}, "", "broken", errBroken},
		"the lock fails": {func(c criuSide) {
			if c.notify("network-lock", 0).GetNotifySuccess() {
				c.t.Error("a lock that failed was answered with success")
			}
			if !c.notify("network-unlock", 0).GetNotifySuccess() {
				c.t.Error("network-unlock without a lock was refused")
			}
			c.respond(rpc.CriuReqType_DUMP, false, "scripts failed", 0)
		}, nil, "lock", "broken", errBroken},
		"a notification without a name": {func(c criuSide) {
			c.notify("network-lock", 0)
			if c.notify("", 0).GetNotifySuccess() || c.notify("post-dump", -5).GetNotifySuccess() {
				c.t.Error("a malformed notification was answered with success")
			}
			c.respond(rpc.CriuReqType_DUMP, false, "scripts failed", 0)
		}, nil, "", "none of CRIU's", nil},
	} {
		t.Run(name, func(t *testing.T) {
			task, f := newSleeper(t), newFake()
			if c.break_ != "" {
				f.err[c.break_] = errBroken
			}
			s := against(t, func(side criuSide) {
				side.request()
				c.criu(side)
			})
			ctx, cancel := context.WithTimeout(bg, 30*time.Second)
			defer cancel()
			_, err := s.Dump(ctx, &rpc.CriuOpts{Pid: ptr(int32(task.pid()))}, c.callback, f.options())
			if err == nil || !strings.Contains(err.Error(), c.want) || c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("%v; want %q", err, c.want)
			}
			if f.is(task.ino) {
				t.Error("locked")
			}
		})
	}
}

// A caller who does not want to wait any more: the connection is closed, which is what
// makes CRIU give up, and the task is unlocked.
func TestSessionCancel(t *testing.T) {
	task, f := newSleeper(t), newFake()
	ctx, cancel := context.WithCancel(bg)
	s := against(t, func(c criuSide) {
		c.request()
		c.notify("network-lock", 0)
		if !f.is(task.ino) {
			t.Error("not locked")
		}
		cancel()
		if _, _, err := c.c.receive(bg); err != io.EOF {
			t.Errorf("CRIU sees %v", err)
		}
	})
	if _, err := s.Dump(ctx, &rpc.CriuOpts{Pid: ptr(int32(task.pid()))}, nil, f.options()); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if f.is(task.ino) {
		t.Error("locked")
	}
}

// FuzzSession is CRIU saying what it likes, split into messages: nothing panics or hangs,
// and no task that lives is left locked if the dump or restore has failed.
func FuzzSession(f *testing.F) {
	task := newSleeper(f)
	var good []byte
	for _, m := range []*rpc.CriuResp{
		notification("pre-dump", 0), notification("network-lock", 0), notification("setup-namespaces", task.pid()), notification("post-restore", task.pid()),
		notification("post-dump", 0), notification("network-unlock", 0), {Type: ptr(rpc.CriuReqType_DUMP), Success: ptr(false), CrErrmsg: ptr("x")},
	} {
		b := marshal(f, m)
		good = append(binary.BigEndian.AppendUint16(good, uint16(len(b))), b...)
	}
	f.Add(good, false, 0)
	f.Add(good, true, 3)
	f.Add(good[:len(good)/2], true, 200)
	f.Add([]byte("\x00\x03\x08\x06\x10"), false, 1)
	pair(f) // the runtime opens what it needs for the first one
	f.Fuzz(func(t *testing.T, stream []byte, restore bool, files int) {
		b := newFake()
		o := b.options()
		before := openFDs(t)
		ours, theirs := pair(t)
		var criu sync.WaitGroup
		criu.Go(func() { // reads what it is sent until we are gone
			for {
				msg, _, err := theirs.receive(bg)
				if err != nil {
					return
				}
				req := new(rpc.CriuReq)
				if req.UnmarshalVT(msg) != nil || req.Type == nil {
					t.Errorf("sent %q", msg)
				}
			}
		})
		criu.Go(func() { sendAll(bg, theirs, stream, files) })
		s := &Session{c: ours}
		ctx, cancel := context.WithTimeout(bg, 20*time.Second)
		defer cancel()
		opts := &rpc.CriuOpts{Pid: ptr(int32(task.pid()))}
		var err error
		if restore {
			_, err = s.Restore(ctx, opts, nil, o)
		} else {
			_, err = s.Dump(ctx, opts, nil, o)
		}
		_ = s.Close()
		criu.Wait()
		theirs.close()
		if ctx.Err() != nil {
			t.Error("it hangs")
		}
		if err != nil && b.is(task.ino) {
			t.Errorf("locked after %v", err)
		}
		if now := openFDs(t); now != before {
			t.Errorf("%d descriptors, %d before", now, before)
		}
	})
}

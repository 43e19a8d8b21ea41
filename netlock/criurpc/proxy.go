package criurpc

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"

	"github.com/checkpoint-restore/go-criu/v8/rpc"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
)

// Proxy stands between CRIU and a client that knows nothing of it: it passes every
// message on, with its files, and does what CRIU notifies before the client hears of it;
// at network-unlock and post-resume after the client has answered. A client that does not
// ask for notifications gets none, and the lock all the same.
//
// CRIU takes for its client whoever has made its socket, and opens that one's
// descriptors by their numbers: so those that a request names are fetched from the client.
type Proxy struct {
	// Client and CRIU are descriptors of the two connections, which the Proxy owns.
	Client, CRIU int
	// ClientPID and CRIUPID are whose they are.
	ClientPID, CRIUPID int
	// Begin says how to lock at each dump or restore, whose options it is given, with
	// descriptors of this process.
	Begin func(*rpc.CriuOpts) Options
}

type fromPeer struct {
	msg   []byte
	files []*os.File
}

// relay is a Proxy at work.
type relay struct {
	Proxy
	client, criu *conn
	imported     []int // descriptors fetched for CRIU

	turn  sync.Mutex
	gone  bool  // the client
	cause error // why CRIU's work comes to no good end, if it does

	// One dump or restore, between its request and its response.
	c       *Checkpoint
	wants   bool        // the client wants notifications
	pending action.Name // what it has been notified of, until it answers
	log     later
}

var errClientGone = errors.New("the client has closed its connection")

// Run passes messages on until CRIU has gone, or ctx is done, which is no different. When the
// client goes first, CRIU is told so and waited for.
func (p Proxy) Run(ctx context.Context) (err error) {
	r := &relay{Proxy: p, cause: errors.New("CRIU has closed the connection without an answer")}
	if r.client, err = newConn(p.Client); err != nil {
		unix.Close(p.CRIU)
		return err
	}
	defer func() { _ = r.client.close() }()
	if r.criu, err = newConn(p.CRIU); err != nil {
		return err
	}
	defer func() { _ = r.criu.close() }()
	defer r.closeImported()

	// Who reads a message also does what it asks for: handing it on takes time of the freeze.
	done := make(chan struct{})
	go func() {
		defer close(done)
		for r.fromClient(ctx) {
		}
	}()
	for r.fromCRIU(ctx) {
	}
	waitExit(ctx, r.CRIUPID)
	if ctx.Err() != nil {
		r.cause = context.Cause(ctx)
	}
	err = r.end(r.cause)
	_ = r.client.close()
	r.turn.Unlock() // fromCRIU has left it to us
	<-done
	return err
}

// fromClient waits for a message of the client's and passes it on. It tells whether there
// can be another.
func (r *relay) fromClient(ctx context.Context) bool {
	msg, files, err := r.client.receive(ctx)
	r.turn.Lock()
	defer r.turn.Unlock()
	defer closeAll(files)
	if r.gone {
		return false
	}
	if err == nil {
		err = r.request(ctx, fromPeer{msg, files})
		r.log.say()
	}
	if err != nil {
		r.noClient(errClientGone)
	}
	return err == nil
}

// fromCRIU does the same for CRIU's. When CRIU has gone it keeps the turn.
func (r *relay) fromCRIU(ctx context.Context) bool {
	msg, files, err := r.criu.receive(ctx)
	r.turn.Lock()
	if err != nil {
		return false
	}
	defer r.turn.Unlock()
	defer closeAll(files)
	if err := r.notification(ctx, fromPeer{msg, files}, !r.gone); err != nil {
		r.noClient(err)
		_ = r.client.close()
	}
	r.log.say()
	return true
}

// noClient goes on without the client: CRIU ends its work when it next wants something of it.
func (r *relay) noClient(cause error) {
	r.cause, r.gone = cause, true
	_ = r.criu.u.CloseWrite()
}

// end is that of a dump or restore, if there is one.
func (r *relay) end(err error) error {
	if r.c == nil {
		return nil
	}
	c := r.c
	r.c, r.pending = nil, ""
	defer r.log.say()
	r.log.say()
	return c.End(err)
}

// waitExit waits until CRIU, which has lost its connection, is gone: until then it may
// hold the task.
func waitExit(ctx context.Context, pid int) {
	if pid <= 0 {
		return
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return // it is gone
	}
	defer unix.Close(fd)
	ctx, cancel := context.WithTimeout(ctx, closeTime)
	defer cancel()
	for ctx.Err() == nil && !netlock.Dead(fd) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		_, _ = unix.Poll(p, 100)
	}
}

// request passes on what the client says.
func (r *relay) request(ctx context.Context, m fromPeer) error {
	req := new(rpc.CriuReq)
	if err := req.UnmarshalVT(m.msg); err != nil {
		return r.pass(ctx, r.criu, m) // for CRIU to refuse
	}
	if req.GetType() == rpc.CriuReqType_NOTIFY {
		pass := sync.OnceValue(func() error { return r.pass(ctx, r.criu, m) })
		if op := action.OpOf(r.pending); r.c != nil && (op == action.Unlock || op == action.Sweep) {
			// CRIU takes no notice of what becomes of it, and goes on as soon as packets pass; End tries again.
			_, _ = r.c.handle(ctx, r.pending, 0, func() { _ = pass() })
		}
		r.pending = ""
		return pass()
	}
	opens := opensOf(req.GetType())
	if req.Opts == nil || opens == never {
		return r.pass(ctx, r.criu, m)
	}
	if err := r.translate(req.Opts, opens == always); err != nil {
		return r.refuse(ctx, req.GetType(), err)
	}
	// A request that follows a dump without its response is CRIU's to refuse.
	if typ := req.GetType(); r.c == nil && (typ == rpc.CriuReqType_DUMP || typ == rpc.CriuReqType_RESTORE) {
		r.wants = req.Opts.GetNotifyScripts()
		o := r.Begin(req.Opts)
		r.log.put(&o.Log)
		if typ == rpc.CriuReqType_DUMP {
			r.c = NewDump(int(req.Opts.GetPid()), req.Opts.GetLeaveRunning(), o)
		} else {
			r.c = NewRestore(o)
		}
		r.c.SetCRIU(r.CRIUPID)
		req.Opts.NotifyScripts = ptr(true)
	}
	b, err := req.MarshalVT()
	if err != nil {
		return err
	}
	return r.pass(ctx, r.criu, fromPeer{b, m.files})
}

func (r *relay) pass(ctx context.Context, to *conn, m fromPeer) error {
	fds := make([]int, len(m.files))
	for i, f := range m.files {
		fds[i] = int(f.Fd())
	}
	return to.send(ctx, m.msg, fds...)
}

// opens is whether CRIU opens the descriptors that a request names.
type opens int

const (
	perhaps opens = iota // by its options and CRIU's version (CHECK); or nobody knows yet
	never
	always
)

func opensOf(typ rpc.CriuReqType) opens {
	switch typ {
	case rpc.CriuReqType_VERSION, rpc.CriuReqType_FEATURE_CHECK, rpc.CriuReqType_WAIT_PID:
		return never
	case rpc.CriuReqType_DUMP, rpc.CriuReqType_RESTORE, rpc.CriuReqType_PRE_DUMP, rpc.CriuReqType_SINGLE_PRE_DUMP,
		rpc.CriuReqType_PAGE_SERVER, rpc.CriuReqType_PAGE_SERVER_CHLD, rpc.CriuReqType_CPUINFO_DUMP, rpc.CriuReqType_CPUINFO_CHECK:
		return always
	}
	return perhaps
}

// noFD is a descriptor that nobody has: fs.nr_open cannot be that high.
const noFD = math.MaxInt32

// translate makes a request mean to CRIU what it would mean from the client itself. A
// descriptor that cannot be had is an error where it is needed, and CRIU's to miss elsewhere.
func (r *relay) translate(o *rpc.CriuOpts, needed bool) error {
	r.closeImported()
	if o.Pid == nil {
		o.Pid = ptr(int32(r.ClientPID))
	}
	for name, fd := range map[string]*int32{"images_dir_fd": o.ImagesDirFd, "work_dir_fd": o.WorkDirFd, "status_fd": o.StatusFd, "pidfd_store_sk": o.PidfdStoreSk} {
		if fd == nil || *fd < 0 {
			continue
		}
		got, err := fetch(r.ClientPID, int(*fd))
		switch {
		case err == nil:
			r.imported = append(r.imported, got)
		case needed:
			return fmt.Errorf("fetch the client's %s, descriptor %d of pid %d: %w", name, *fd, r.ClientPID, err)
		default:
			got = noFD
		}
		*fd = int32(got)
	}
	return nil
}

// fetch duplicates another process's descriptor.
func fetch(pid, fd int) (int, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(pidfd)
	got, err := unix.PidfdGetfd(pidfd, fd, 0)
	return got, os.NewSyscallError("pidfd_getfd", err)
}

func (r *relay) closeImported() {
	for _, fd := range r.imported {
		unix.Close(fd)
	}
	r.imported = nil
}

// refuse answers the client in CRIU's place.
func (r *relay) refuse(ctx context.Context, typ rpc.CriuReqType, why error) error {
	b, err := (&rpc.CriuResp{Type: &typ, Success: ptr(false), CrErrmsg: ptr("criu-netlock: " + why.Error())}).MarshalVT()
	if err != nil {
		return err
	}
	return r.client.send(ctx, b)
}

// notification does what CRIU notifies and passes on what it says.
func (r *relay) notification(ctx context.Context, m fromPeer, hears bool) error {
	resp := new(rpc.CriuResp)
	if err := resp.UnmarshalVT(m.msg); err != nil {
		return fmt.Errorf("a message of %d bytes is none of CRIU's: %w", len(m.msg), err)
	}
	toClient := func() error {
		if !hears {
			return nil
		}
		return r.pass(ctx, r.client, m)
	}
	if resp.GetType() != rpc.CriuReqType_NOTIFY {
		var err error
		if !resp.GetSuccess() {
			err = verdict(opName(resp.GetType()), resp)
		}
		// Before the client goes on: it may act on a container that still was locked.
		_ = r.end(err)
		return toClient()
	}
	if r.c == nil {
		return toClient()
	}
	name, pid := action.Name(resp.GetNotify().GetScript()), int(resp.GetNotify().GetPid())
	op := action.OpOf(name)
	if op == action.Unlock || op == action.Sweep {
		if r.wants && hears {
			r.pending = name
			return toClient()
		}
		_, err := r.c.Handle(ctx, name, pid)
		return r.answer(ctx, err == nil)
	}
	if name == "" || pid < 0 || !hears {
		return r.answer(ctx, false)
	}
	if _, err := r.c.Handle(ctx, name, pid); err != nil {
		return r.answer(ctx, false) // the client hears of it in the response
	}
	if r.wants {
		r.pending = name
		return toClient()
	}
	return r.answer(ctx, true)
}

// answer answers CRIU in the client's place.
func (r *relay) answer(ctx context.Context, success bool) error {
	b, err := (&rpc.CriuReq{Type: ptr(rpc.CriuReqType_NOTIFY), NotifySuccess: &success}).MarshalVT()
	if err != nil {
		return err
	}
	_ = r.criu.send(ctx, b) // if it has gone, or was told that the client has, its end follows
	return nil
}

package criurpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/rpc"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
)

// Session is a connection to CRIU: requests, notifications, responses. It is for one
// goroutine at a time; Close is for any. CRIU takes one dump or restore a connection.
type Session struct {
	c *conn

	// Of criu swrk alone.
	criu   *os.Process
	exited chan struct{}

	closing sync.Once
	err     error
}

// Swrk starts `criu swrk` on a connection of its own. cmd is CRIU's program with what
// goes before the verb, exec.Command("criu"); its output, environment and ExtraFiles are
// the caller's to set. The descriptors of a request, images_dir_fd and the like, are the
// calling process's; those of inherit_fd are CRIU's, 3 and up as in ExtraFiles.
func Swrk(cmd *exec.Cmd) (*Session, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("start criu swrk: socketpair: %w", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "criu swrk")
	defer theirs.Close()
	c, err := newConn(pair[0])
	if err != nil {
		return nil, fmt.Errorf("start criu swrk: %w", err)
	}
	cmd.ExtraFiles = append(cmd.ExtraFiles, theirs)
	cmd.Args = append(cmd.Args, "swrk", strconv.Itoa(2+len(cmd.ExtraFiles)))
	if err := cmd.Start(); err != nil {
		_ = c.close() // the error before it is the one to tell
		return nil, fmt.Errorf("start criu swrk: %w", err)
	}
	s := &Session{c: c, criu: cmd.Process, exited: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // its responses say what became of its work
		close(s.exited)
	}()
	return s, nil
}

// Dial connects to the socket of `criu service`. The service's process is to be in our
// pid namespace.
func Dial(ctx context.Context, socket string) (*Session, error) {
	var d net.Dialer
	u, err := d.DialContext(ctx, "unixpacket", socket)
	if err != nil {
		return nil, fmt.Errorf("connect to criu service: %w", err)
	}
	c, err := fromUnix(u.(*net.UnixConn))
	if err != nil {
		return nil, fmt.Errorf("connect to criu service: %w", err)
	}
	return &Session{c: c}, nil
}

// closeTime is how long CRIU may take to end when its connection is gone. It has to put
// back what it has taken apart; killed in the midst of that, it leaves tasks whose
// connections are lost.
const closeTime = 10 * time.Second

// Close ends the connection. A dump or restore that is going on fails at its next
// notification. Close waits until CRIU has ended, and kills it after 10 s; what a criu
// service does is not waited for.
func (s *Session) Close() error {
	s.closing.Do(func() {
		s.err = s.c.close()
		if s.exited == nil {
			return
		}
		t := time.NewTimer(closeTime)
		defer t.Stop()
		select {
		case <-s.exited:
		case <-t.C:
			_ = s.criu.Kill() // by its pidfd or not at all: it may be ending now, and its pid another's
			<-s.exited
			s.err = errors.Join(s.err, fmt.Errorf("criu swrk, pid %d, had not ended %v after its connection: killed", s.criu.Pid, closeTime))
		}
	})
	return s.err
}

// Error is a response of CRIU's that says no.
type Error struct {
	Op  string
	Msg string        // CRIU's first error message; may be empty
	No  syscall.Errno // 0 if CRIU gave none
}

func (e *Error) Error() string {
	text := "criu " + e.Op + ": refused or failed"
	if e.Msg != "" {
		text += ": " + oneLine(e.Msg)
	}
	if e.No != 0 {
		text += ": " + e.No.Error()
	}
	return text + "; CRIU's log says more"
}

func (e *Error) Unwrap() error {
	if e.No == 0 {
		return nil
	}
	return e.No
}

// oneLine keeps what CRIU says on one line.
func oneLine(s string) string {
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s))
}

// Notification is what CRIU notifies a callback of.
type Notification struct {
	Action action.Name
	// PID is the root task's; 0 where CRIU gives none.
	PID int
	// External, if set at query-ext-files, is CRIU's answer: what is external, in the words
	// of criu dump --external.
	External []string

	files []*os.File
}

// TakeFile returns the next file that came with the notification, nil if there is none:
// at orphan-pts-master the master of a restored terminal. It is the caller's from here
// on; what nobody takes is closed when the callback has returned.
func (n *Notification) TakeFile() *os.File {
	if len(n.files) == 0 {
		return nil
	}
	f := n.files[0]
	n.files = n.files[1:]
	return f
}

// Callback is a program's own part in a notification; the package's comment says when
// it runs. An error is answered with notify_success=false, which aborts a dump or a restore
// before network-unlock; CRIU ignores it from there on.
type Callback func(context.Context, *Notification) error

// Request makes a request that brings no notifications: version, feature_check, check,
// pre_dump. Several can follow one another where CRIU keeps the connection open.
func (s *Session) Request(ctx context.Context, req *rpc.CriuReq) (*rpc.CriuResp, error) {
	op := opName(req.GetType())
	if err := s.send(ctx, op, req); err != nil {
		return nil, err
	}
	resp, files, err := s.receive(ctx, op)
	closeAll(files)
	if err != nil {
		return nil, err
	}
	return resp, verdict(op, resp)
}

// Dump dumps, with the lock. callback may be nil. When it returns with an error the tasks
// are unlocked if they live on; after one that is no *Error the session is closed.
func (s *Session) Dump(ctx context.Context, opts *rpc.CriuOpts, callback Callback, o Options) (*rpc.CriuResp, error) {
	return s.run(ctx, rpc.CriuReqType_DUMP, opts, callback, NewDump(int(opts.GetPid()), opts.GetLeaveRunning(), o))
}

// Restore restores, with the lock. callback may be nil. What Dump says of errors goes for
// it too.
func (s *Session) Restore(ctx context.Context, opts *rpc.CriuOpts, callback Callback, o Options) (*rpc.CriuResp, error) {
	return s.run(ctx, rpc.CriuReqType_RESTORE, opts, callback, NewRestore(o))
}

func (s *Session) run(ctx context.Context, typ rpc.CriuReqType, opts *rpc.CriuOpts, callback Callback, c *Checkpoint) (_ *rpc.CriuResp, err error) {
	if s.criu != nil {
		c.SetCRIU(s.criu.Pid)
	}
	whole := false // a response has come, so CRIU has ended its work
	err = errors.New("a callback has panicked")
	defer func() {
		if !whole {
			err = errors.Join(err, s.Close())
		}
		err = c.End(err)
	}()
	var resp *rpc.CriuResp
	resp, err = s.converse(ctx, typ, opts, callback, c)
	var refused *Error
	whole = err == nil || errors.As(err, &refused)
	return resp, err
}

func (s *Session) converse(ctx context.Context, typ rpc.CriuReqType, opts *rpc.CriuOpts, callback Callback, c *Checkpoint) (*rpc.CriuResp, error) {
	op := opName(typ)
	var withNotify rpc.CriuOpts
	if opts != nil {
		withNotify = *opts
	}
	withNotify.NotifyScripts = ptr(true)
	if withNotify.ImagesDirFd == nil { // a required field
		withNotify.ImagesDirFd = ptr(int32(-1))
	}
	if err := s.send(ctx, op, &rpc.CriuReq{Type: &typ, Opts: &withNotify}); err != nil {
		return nil, err
	}
	var causes []error // CRIU's own error says no more than that a callback has failed
	for {
		resp, files, err := s.receive(ctx, op)
		if err != nil {
			return nil, errors.Join(append(causes, err)...)
		}
		if resp.GetType() != rpc.CriuReqType_NOTIFY {
			closeAll(files)
			if resp.GetSuccess() && resp.GetType() != typ {
				return nil, fmt.Errorf("criu %s: answered by a response to %s", op, opName(resp.GetType()))
			}
			if err := verdict(op, resp); err != nil {
				return resp, errors.Join(append(causes, err)...)
			}
			return resp, nil
		}
		answer, err := c.Answer(ctx, resp, files, callback)
		if err != nil {
			causes = append(causes, err)
		}
		if err := s.send(ctx, op, answer); err != nil {
			return nil, errors.Join(append(causes, err)...)
		}
	}
}

// Answer does what a NOTIFY message of CRIU's asks for, with the callback, which may be
// nil, and returns the request that answers it, and why if it says no. The files that came with the message are
// closed, but for those that the callback takes.
func (c *Checkpoint) Answer(ctx context.Context, resp *rpc.CriuResp, files []*os.File, callback Callback) (*rpc.CriuReq, error) {
	n := &Notification{Action: action.Name(resp.GetNotify().GetScript()), PID: int(resp.GetNotify().GetPid()), files: files}
	defer func() { closeAll(n.files) }()
	answer := &rpc.CriuReq{Type: ptr(rpc.CriuReqType_NOTIFY), NotifySuccess: ptr(false)}
	if resp.GetType() != rpc.CriuReqType_NOTIFY || n.Action == "" || n.PID < 0 {
		return answer, &netlock.Error{Kind: netlock.KindInput, Op: "notification", Err: errors.New("a message that is none of CRIU's")}
	}
	var theirs func() error
	if callback != nil {
		theirs = func() error { return callback(ctx, n) }
	}
	ourErr, theirErr := c.step(ctx, n.Action, n.PID, theirs)
	*answer.NotifySuccess = ourErr == nil && theirErr == nil
	if n.Action == action.QueryExtFiles && len(n.External) > 0 {
		// images_dir_fd is a required field; CRIU reads no other than external.
		answer.Opts = &rpc.CriuOpts{ImagesDirFd: ptr(int32(-1)), External: n.External}
	}
	return answer, errors.Join(theirErr, ourErr)
}

func (s *Session) send(ctx context.Context, op string, req *rpc.CriuReq) error {
	b, err := req.MarshalVT()
	if err == nil {
		err = s.c.send(ctx, b)
	}
	if err != nil {
		return fmt.Errorf("criu %s: send: %w", op, err)
	}
	return nil
}

func (s *Session) receive(ctx context.Context, op string) (*rpc.CriuResp, []*os.File, error) {
	b, files, err := s.c.receive(ctx)
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = errors.New("CRIU has closed the connection without an answer; its log says more")
		}
		return nil, nil, fmt.Errorf("criu %s: %w", op, err)
	}
	resp := new(rpc.CriuResp)
	if err := resp.UnmarshalVT(b); err != nil {
		closeAll(files)
		return nil, nil, fmt.Errorf("criu %s: a message of %d bytes is none of CRIU's: %w", op, len(b), err)
	}
	return resp, files, nil
}

func verdict(op string, resp *rpc.CriuResp) error {
	if resp.GetSuccess() {
		return nil
	}
	e := &Error{Op: op, Msg: resp.GetCrErrmsg()}
	if no := resp.GetCrErrno(); no > 0 {
		e.No = syscall.Errno(no)
	}
	return e
}

func opName(t rpc.CriuReqType) string {
	return strings.ReplaceAll(strings.ToLower(t.String()), "_", "-")
}

func ptr[T any](v T) *T { return &v }

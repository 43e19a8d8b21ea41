package guard

// How a hook finds the guard of its checkpoint, and what they say to each other: one
// packet each way on a Unix socket in a directory that root alone can enter.

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock/internal/proc"
)

// Dir is where the sockets are. Package early has it too, and a test holds them together.
const Dir = "/run/criu-netlock"

// Version is the version of the messages. A guard of another version does not answer,
// and the hook does its work itself.
const Version = "1"

// notDone is the code of an answer that says: do it yourself.
const notDone = 255

// maxMessage bounds a message, either way.
const maxMessage = 8192

// fresh is how old a request may be when the guard begins with it. The hook waits
// longer: one that a stopped guard finds later must not lock or unlock anything.
const fresh = 200 * time.Millisecond

// ErrTaken tells that another guard watches this checkpoint already.
var ErrTaken = errors.New("another guard is there")

// Request is one call of a hook.
type Request struct {
	Action, PID, ImageDir, Config string
	// Sent is the hook's CLOCK_MONOTONIC, in ns.
	Sent int64
	// Leave and Orphan are the guard's: the unlock is left to another checkpoint in the namespace;
	// CRIU is dead, and nobody would take off what the hook locks.
	Leave, Orphan bool
}

// Answer is what the hook has to say and its exit code.
type Answer struct {
	Code int
	// Line goes to CRIU's log.
	Line string
	// Fresh: the hook has made a lock where there was none. It is not sent.
	Fresh bool

	over bool
}

func (r Request) expired() bool {
	age := time.Duration(monotonic() - r.Sent)
	return age < 0 || age > fresh
}

func monotonic() int64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) != nil {
		return 0
	}
	return ts.Nano()
}

// encode writes a request as package early does.
func (r Request) encode() []byte {
	return []byte(strings.Join([]string{Version, strconv.FormatInt(r.Sent, 10), r.Action, r.PID, r.ImageDir, r.Config}, "\x00"))
}

func parseRequest(b []byte) (r Request, err error) {
	f := strings.Split(string(b), "\x00")
	if len(f) != 6 || f[0] != Version {
		return r, errors.New("not a request of this version")
	}
	if r.Sent, err = strconv.ParseInt(f[1], 10, 64); err != nil {
		return r, errors.New("a request without a time")
	}
	r.Action, r.PID, r.ImageDir, r.Config = f[2], f[3], f[4], f[5]
	return r, nil
}

// encode writes an answer: the code in three digits, a blank, the line.
func (a Answer) encode() []byte {
	b := fmt.Appendf(nil, "%03d %s", a.Code, a.Line)
	return b[:min(len(b), maxMessage)]
}

// nameOf is a guard's name in Dir. CRIU's pid is one of its pid namespace's, and the
// directory may be shared between several.
func nameOf(netns uint64, criu int) string {
	var st unix.Stat_t
	_ = unix.Stat("/proc/self/ns/pid", &st) // 0 then, for the hook as well
	return strconv.FormatUint(netns, 10) + "." + strconv.FormatUint(st.Ino, 10) + "." + strconv.Itoa(criu)
}

// place makes the directory, and refuses one that another user could have made.
func place(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return trusted(dir)
}

func trusted(dir string) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return fmt.Errorf("%s is not a directory of our own with mode 0700", dir)
	}
	return nil
}

type server struct {
	l    *net.UnixListener
	path string
}

// listen binds a name. A socket that nobody listens on is a dead guard's.
func listen(dir, name string) (*server, error) {
	if err := place(dir); err != nil {
		return nil, err
	}
	// One at a time, so that no two take a dead guard's place.
	t, err := takeTurn(dir, 0, time.Now().Add(turnTime))
	if err != nil {
		return nil, err
	}
	defer t.done()
	path := filepath.Join(dir, name)
	if alive(path) {
		return nil, ErrTaken
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	return &server{l, path}, nil
}

func alive(path string) bool {
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return errors.Is(err, unix.EAGAIN) // its backlog is full
	}
	c.Close()
	return true
}

// placesBeside are those of the namespace's other guards, dead ones among them.
func placesBeside(dir string, netns uint64, criu int) (paths []string) {
	own := nameOf(netns, criu)
	names, _ := filepath.Glob(filepath.Join(dir, strconv.FormatUint(netns, 10)+".*.*"))
	for _, path := range names {
		if filepath.Base(path) != own {
			paths = append(paths, path)
		}
	}
	return paths
}

// Sweep takes away the places of guards that were killed, and whose CRIU is dead too.
func Sweep() { sweep(Dir) }

func sweep(dir string) {
	if trusted(dir) != nil {
		return
	}
	t, err := takeTurn(dir, 0, time.Now().Add(turnTime)) // nobody is between bind and listen
	if err != nil {
		return
	}
	defer t.done()
	holders, _ := filepath.Glob(filepath.Join(dir, "hold-*-*"))
	for _, path := range holders {
		if !alive(path) {
			_ = os.Remove(path) // it is in nobody's way
		}
	}
	names, _ := filepath.Glob(filepath.Join(dir, "*.*.*"))
	for _, path := range names {
		f := strings.Split(filepath.Base(path), ".")
		netns, err := strconv.ParseUint(f[0], 10, 64)
		criu, err2 := strconv.Atoi(f[2])
		if err != nil || err2 != nil || filepath.Base(path) != nameOf(netns, criu) || alive(path) {
			continue
		}
		if st, err := proc.StatOf(criu); err == nil && st.State != 'Z' {
			continue
		}
		_ = os.Remove(path) // it is in nobody's way
	}
}

// close unlinks the socket. Dir stays: another guard may be about to bind there.
func (s *server) close() { s.l.Close() }

// idle is how long a connection may say nothing.
const idle = time.Second

func (s *server) serve(do func(Request) Answer, over func()) {
	s.accept(func(c *net.UnixConn) {
		go func() {
			defer c.Close()
			b := make([]byte, maxMessage+1)
			if c.SetDeadline(time.Now().Add(idle)) != nil {
				return
			}
			n, err := c.Read(b)
			if err != nil || n == 0 || n > maxMessage {
				return
			}
			r, err := parseRequest(b[:n])
			if err != nil {
				return
			}
			a := do(r)
			if c.SetDeadline(time.Now().Add(idle)) == nil {
				_, _ = c.Write(a.encode()) // a hook that is gone asks nobody
			}
			if a.over { // not before: the process ends then
				over()
			}
		}()
	})
}

// accept calls f with every connection of our own user's until close; f closes it.
func (s *server) accept(f func(*net.UnixConn)) {
	for {
		c, err := s.l.AcceptUnix()
		switch {
		case err == nil && ours(c):
			f(c)
		case err == nil:
			c.Close()
		case errors.Is(err, net.ErrClosed):
			return
		default:
			time.Sleep(10 * time.Millisecond) // out of descriptors: somebody's leak, or a flood
		}
	}
}

// ours tells whether the peer is of our own user.
func ours(c *net.UnixConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	ok := false
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		ok = err == nil && int(cred.Uid) == os.Geteuid()
	})
	return err == nil && ok
}

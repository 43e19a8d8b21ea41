// The client drives CRIU over RPC with the lock of package criurpc: by go-criu, by a
// session of our own over criu swrk, or over criu service. It takes what CRIU's command
// line takes, so that the tests run it in CRIU's place:
//
//	rpcclient [-fail HOOK] [-kill HOOK] [-go HOOK] [-refuse] go-criu|swrk|service dump|restore OPTION…
//	rpcclient [-fail HOOK] [-criu PROGRAM] [-deaf] plain dump|restore OPTION…
//
// With -calls it calls the action scripts itself, when ours has done its part: CRIU runs none beside
// RPC before 3.19. plain calls none at network-unlock, where what is in CRIU's place comes after it.
// -kill kills it when ours has done its part, but at network-unlock before that. plain is a go-criu program that knows nothing of us.
// What our part has done it appends to CRIU's log.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	criu "github.com/checkpoint-restore/go-criu/v8"
	"github.com/checkpoint-restore/go-criu/v8/rpc"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/criurpc"
	"github.com/criu-netlock/criu-netlock/nft"
)

var (
	failAt = flag.String("fail", "", "the `hook` whose callback fails")
	refuse = flag.Bool("refuse", false, "the backend refuses to lock")
	path   = flag.String("criu", "criu", "the `program`, for plain")
	deaf   = flag.Bool("deaf", false, "plain asks for no notifications")
	killAt = flag.String("kill", "", "the `hook` at which it is killed")
	goAway = flag.String("go", "", "the `hook` at which the client's context ends")
	calls  = flag.Bool("calls", false, "it calls the action scripts itself")
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("rpcclient: ")
	flag.Parse()
	if flag.Arg(0) == "terminal" {
		if err := terminal(flag.Arg(1)); err != nil {
			log.Fatal(err)
		}
		return
	}
	if flag.NArg() < 2 {
		log.Fatal("want an interface and a verb")
	}
	if err := run(flag.Arg(0), flag.Arg(1), flag.Args()[2:]); err != nil {
		log.Fatal(err)
	}
}

// job is a dump or restore, from CRIU's command line.
type job struct {
	opts    rpc.CriuOpts
	work    string
	logFile string
	pidFile string
	scripts []string
	images  string
}

// call calls the action scripts as CRIU would, with -calls.
func (j *job) call(hook string, pid int) error {
	if !*calls {
		return nil
	}
	if pid == 0 {
		pid = int(j.opts.GetPid())
	}
	for _, s := range j.scripts {
		cmd := exec.Command(s)
		cmd.Dir = j.work
		cmd.Env = append(os.Environ(), "CRTOOLS_SCRIPT_ACTION="+hook, "CRTOOLS_IMAGE_DIR="+j.images)
		if pid != 0 {
			cmd.Env = append(cmd.Env, fmt.Sprint("CRTOOLS_INIT_PID=", pid))
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s at %s: %w: %s", s, hook, err, out)
		}
	}
	return nil
}

func ptr[T any](v T) *T { return &v }

var lockMethods = map[string]rpc.CriuNetworkLockMethod{
	"skip": rpc.CriuNetworkLockMethod_SKIP, "iptables": rpc.CriuNetworkLockMethod_IPTABLES, "nftables": rpc.CriuNetworkLockMethod_NFTABLES,
}

func parse(verb string, args []string) (*job, error) {
	j := &job{}
	f := flag.NewFlagSet(verb, flag.ContinueOnError)
	f.StringVar(&j.images, "images-dir", "", "")
	f.StringVar(&j.work, "work-dir", "", "")
	f.StringVar(&j.logFile, "log-file", "", "")
	f.StringVar(&j.pidFile, "pidfile", "", "")
	lock := f.String("network-lock", "", "")
	established := f.Bool("tcp-established", false, "")
	running := f.Bool("leave-running", false, "")
	tree := f.Int("tree", 0, "")
	f.Bool("restore-detached", false, "") // over RPC it always is
	f.Bool("v4", false, "")
	f.Func("external", "", func(s string) error { j.opts.External = append(j.opts.External, s); return nil })
	f.Func("action-script", "", func(s string) error { j.scripts = append(j.scripts, s); return nil })
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	imagesDir, err := os.Open(j.images)
	if err != nil {
		return nil, err
	}
	workDir, err := os.Open(j.work)
	if err != nil {
		return nil, err
	}
	method, ok := lockMethods[*lock]
	if !ok {
		return nil, fmt.Errorf("network-lock %q", *lock)
	}
	j.opts.ImagesDirFd, j.opts.WorkDirFd = ptr(int32(imagesDir.Fd())), ptr(int32(workDir.Fd()))
	j.opts.LogFile, j.opts.LogLevel = &j.logFile, ptr(int32(4))
	j.opts.TcpEstablished, j.opts.LeaveRunning, j.opts.NetworkLock = established, running, &method
	if *tree != 0 {
		if err := os.WriteFile(filepath.Join(filepath.Dir(j.work), "root.pid"), []byte(fmt.Sprint(*tree)), 0o644); err != nil {
			return nil, err
		}
		j.opts.Pid = ptr(int32(*tree))
	}
	// Scripts cannot be named over RPC, only in a file.
	config := filepath.Join(j.work, "criu.conf")
	var b strings.Builder
	for _, s := range j.scripts {
		if !*calls {
			b.WriteString("action-script " + s + "\n")
		}
	}
	j.opts.ConfigFile = &config
	return j, os.WriteFile(config, []byte(b.String()), 0o644)
}

// refusing is a backend that cannot lock, which shows only when it is to.
type refusing struct{ netlock.Backend }

// killed is a backend under a program that is killed before it unlocks.
type killed struct{ netlock.Backend }

func (k killed) Unlock(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (netlock.State, error) {
	if !trial(ns) {
		die()
	}
	return k.Backend.Unlock(ctx, ns, o)
}

// trial tells the throwaway namespace of a check.
func trial(ns *netlock.Namespace) bool { return strings.Contains(ns.String(), "(fd ") }

// die is a kill -KILL.
func die() {
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

// dies is for the hooks of which ours does not know.
func dies(hook string) {
	if hook == *killAt && action.OpOf(action.Name(hook)) == action.Nothing {
		die()
	}
}

var errRefused = errors.New("refused on purpose")

func (r refusing) Lock(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (netlock.Result, error) {
	if o.Caller.Task != 0 && !trial(ns) {
		return netlock.Result{}, errRefused
	}
	return r.Backend.Lock(ctx, ns, o)
}

func run(via, verb string, args []string) error {
	j, err := parse(verb, args)
	if err != nil {
		return err
	}
	var backend netlock.Backend = nft.New()
	if *refuse {
		backend = refusing{backend}
	}
	if *killAt == "network-unlock" {
		backend = killed{backend}
	}
	var heard []criurpc.Entry // told at the end, when nothing is frozen
	done := map[action.Name]bool{}
	o := criurpc.Options{Locker: netlock.New(backend), Guard: testbed.BinDir + "/criu-netlock", Log: func(e criurpc.Entry) {
		if string(e.Event.Action) == *killAt {
			die()
		}
		// Once a hook is what the tests count; around a callback setup-namespaces is twice.
		if name := e.Event.Action; e.Err == nil && done[name] {
			return
		}
		done[e.Event.Action] = true
		heard = append(heard, e)
		if err := j.call(string(e.Event.Action), e.Event.PID); err != nil {
			log.Print(err) // the test knows
		}
	}}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	pid := 0
	switch via {
	case "go-criu":
		pid, err = byGoCriu(j, verb, o)
	case "swrk":
		var s *criurpc.Session
		if s, err = criurpc.Swrk(exec.Command("criu")); err == nil {
			pid, err = bySession(ctx, cancel, s, j, verb, o)
		}
	case "plain":
		pid, err = plain(j, verb)
	case "service":
		pid, err = byService(ctx, cancel, j, verb, o)
	default:
		err = fmt.Errorf("interface %q", via)
	}
	if pid != 0 && j.pidFile != "" {
		err = errors.Join(err, os.WriteFile(j.pidFile, []byte(fmt.Sprint(pid)), 0o644))
	}
	var said strings.Builder
	for _, e := range heard {
		fmt.Fprintf(&said, "rpcclient: action=%s pid=%d netns=%d result=%q took=%v err=%v guard_err=%v\n", e.Event.Action, e.Event.PID, e.Report.Netns, e.Report.Result, e.Took, e.Err, e.Unguarded)
	}
	return errors.Join(err, appendTo(filepath.Join(j.work, j.logFile), said.String()))
}

func appendTo(name, text string) error {
	f, err := os.OpenFile(name, os.O_APPEND|os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

var errOnPurpose = errors.New("the callback has failed on purpose")

func bySession(ctx context.Context, cancel func(), s *criurpc.Session, j *job, verb string, o criurpc.Options) (pid int, err error) {
	defer func() { err = errors.Join(err, s.Close()) }()
	var callback criurpc.Callback
	if *failAt != "" || *goAway != "" || *killAt != "" || *calls {
		callback = func(_ context.Context, n *criurpc.Notification) error {
			dies(string(n.Action))
			if n.Action == action.PostDump {
				if err := j.call(string(n.Action), 0); err != nil {
					return err
				}
			}
			switch string(n.Action) {
			case *failAt:
				return errOnPurpose
			case *goAway:
				cancel()
			}
			return nil
		}
	}
	if verb == "dump" {
		_, err := s.Dump(ctx, &j.opts, callback, o)
		return 0, err
	}
	resp, err := s.Restore(ctx, &j.opts, callback, o)
	return int(resp.GetRestore().GetPid()), err
}

func byService(ctx context.Context, cancel func(), j *job, verb string, o criurpc.Options) (pid int, err error) {
	socket := filepath.Join(j.work, "service.sock")
	service := exec.Command("criu", "service", "--address", socket)
	// The service is to end with us, however that is; what it forked for us is not.
	runtime.LockOSThread() // whose end the kernel means
	service.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := service.Start(); err != nil {
		return 0, err
	}
	defer func() {
		err = errors.Join(err, service.Process.Kill())
		_ = service.Wait() // killed
	}()
	var s *criurpc.Session
	if err := testbed.Poll(ctx, func() (err error) {
		s, err = criurpc.Dial(ctx, socket)
		return err
	}); err != nil {
		return 0, err
	}
	return bySession(ctx, cancel, s, j, verb, o)
}

// callbacks are a go-criu program's own.
type callbacks struct {
	criu.NoNotify
	pid int
	// call calls the action scripts at what ours does nothing at, or at all hooks.
	call func(hook string, pid int) error
	all  bool
}

func (c *callbacks) fail(hook string) error {
	dies(hook)
	if hook == "post-dump" || c.all && hook != "network-unlock" {
		if err := c.call(hook, c.pid); err != nil {
			return err
		}
	}
	if hook == *failAt {
		return errOnPurpose
	}
	return nil
}

func (c *callbacks) PreDump() error       { return c.fail("pre-dump") }
func (c *callbacks) NetworkLock() error   { return c.fail("network-lock") }
func (c *callbacks) PostDump() error      { return c.fail("post-dump") }
func (c *callbacks) NetworkUnlock() error { return c.fail("network-unlock") }
func (c *callbacks) PostResume() error    { return c.fail("post-resume") }
func (c *callbacks) PostRestore(pid int32) error {
	c.pid = int(pid) // go-criu does not return it
	return c.fail("post-restore")
}
func (c *callbacks) PostSetupNamespaces() error { return c.fail("post-setup-namespaces") }

// SetupNamespaces is there for -calls: ours runs twice around it.
func (c *callbacks) SetupNamespaces(pid int32) error {
	c.pid = int(pid)
	return c.fail("setup-namespaces")
}

func byGoCriu(j *job, verb string, o criurpc.Options) (int, error) {
	theirs := &callbacks{call: j.call}
	c := criu.MakeCriu()
	if verb == "dump" {
		return 0, criurpc.Dump(c, &j.opts, theirs, o)
	}
	err := criurpc.Restore(c, &j.opts, theirs, o)
	return theirs.pid, err
}

func plain(j *job, verb string) (int, error) {
	theirs := &callbacks{call: j.call, all: true}
	var nfy criu.Notify = theirs
	if *deaf {
		nfy = nil
	}
	c := criu.MakeCriu()
	c.SetCriuPath(*path)
	if verb == "dump" {
		return 0, c.Dump(&j.opts, nfy)
	}
	err := c.Restore(&j.opts, nfy)
	if *deaf && err == nil {
		// go-criu tells the pid to callbacks alone; a restored task has the one it had.
		b, e := os.ReadFile(filepath.Join(filepath.Dir(j.work), "root.pid"))
		if e != nil {
			return 0, e
		}
		fmt.Sscan(string(b), &theirs.pid)
	}
	return theirs.pid, err
}

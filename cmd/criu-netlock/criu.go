package main

// The program in the place of criu: everything goes to the real one, which this process
// becomes, so that its pid, its parent, its exit status and its signals are CRIU's own.
// Of `criu swrk`, by which runc, podman, Docker and the programs that use go-criu or
// libcriu run it, the connection to the client goes through a process of ours. That is
// no child of CRIU's, which watches its children in a restore.

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/rpc"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early"
	"github.com/criu-netlock/criu-netlock/cmd/internal/wire"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/config"
	"github.com/criu-netlock/criu-netlock/netlock/criurpc"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
	"github.com/criu-netlock/criu-netlock/nft"
)

const (
	criuName = "criu"
	// proxyArg is the program's first argument when it is the process in between, and
	// proxyStartArg when it starts that one and ends, so that it is nobody's child.
	proxyArg      = "swrk-proxy"
	proxyStartArg = "swrk-proxy-start"
)

// asCRIU is the command line behind the verb or the name criu, if we were called so.
func asCRIU(args []string) ([]string, bool) {
	switch {
	case len(args) > 0 && early.IsCRIU(args[0], ""):
		return args[1:], true
	case len(args) > 1 && early.IsCRIU("", args[1]):
		return args[2:], true
	}
	return nil, false
}

// Exec hands on what is the calling thread's: its mask of signals, and the signal for the
// parent's end, which is the main thread's alone. So that is the one to call it, and whoever
// waits for main to lock it is too late.
var _ = onMainThread()

func onMainThread() bool {
	_, is := asCRIU(os.Args)
	if is {
		runtime.LockOSThread()
	}
	return is
}

// runCRIU becomes the real criu. It returns only where it cannot.
func runCRIU(args []string) int {
	// A configuration that is wrong is no reason to do without CRIU; locks are refused for it.
	cfg, _ := loadConfig(config.Path(os.LookupEnv))
	tried := triedBefore()
	path, again, err := realCRIU(cfg.CRIU, searchPath(), tried)
	if fd := swrkFD(args); err == nil && fd >= 0 {
		err = between(fd)
	}
	if err == nil && (again || len(tried) > 0) {
		list := append([]string{strconv.Itoa(os.Getpid())}, append(tried, path)...)
		err = os.Setenv(envTried, strings.Join(list, string(filepath.ListSeparator)))
	}
	if err == nil {
		early.AsStarted()
		err = os.NewSyscallError("exec "+path, syscall.Exec(path, append([]string{criuName}, args...), os.Environ()))
	}
	early.Say("criu-netlock criu: " + wire.OneLine(err.Error()) + "\n")
	return 1
}

// envTried has this process's pid, which exec leaves, and what it has been in search of the real
// criu. With another pid it is the search of who started us, which is over.
const envTried = "CRIU_NETLOCK_TRIED"

func triedBefore() []string {
	list := filepath.SplitList(os.Getenv(envTried))
	_ = os.Unsetenv(envTried) // never fails
	if len(list) == 0 || list[0] != strconv.Itoa(os.Getpid()) {
		return nil
	}
	return list[1:]
}

// searchPath is PATH, or where a shell looks without one.
func searchPath() string {
	if path := os.Getenv("PATH"); path != "" {
		return path
	}
	return "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}

// realCRIU is the configured one, or the first criu in PATH behind ourselves, or else the first
// before. It is never this program: neither by this name nor, should a copy of it be
// there, by turns. Who only goes on in PATH comes to its end; a step that may lead back is
// tried once: again says that it is to be remembered.
func realCRIU(configured, path string, tried []string) (found string, again bool, err error) {
	self, err := os.Stat("/proc/self/exe")
	if err != nil {
		return "", false, err
	}
	if configured != "" {
		st, err := os.Stat(configured)
		switch {
		case err != nil:
			return "", false, fmt.Errorf("the key criu: %w", err)
		case os.SameFile(st, self):
			return "", false, fmt.Errorf("the key criu, %s: that is criu-netlock itself", configured)
		}
		return configured, false, nil
	}
	var before, behind string
	here := false // in PATH
	for _, dir := range filepath.SplitList(path) {
		if dir == "" {
			dir = "."
		}
		name := filepath.Join(dir, criuName)
		st, err := os.Stat(name)
		switch {
		case err != nil || !st.Mode().IsRegular() || st.Mode()&0o111 == 0:
		case os.SameFile(st, self):
			if before == "" {
				before = behind
			}
			here, behind = true, "" // it may be another of us, which looks behind itself
		case slices.Contains(tried, name):
		case here && behind == "":
			behind = name
		case !here && before == "":
			before = name
		}
	}
	switch {
	case behind != "":
		return behind, false, nil
	case before != "":
		return before, true, nil
	}
	return "", false, errors.New("there is no criu in PATH but criu-netlock itself; the key criu in " + config.DefaultPath + " can name it")
}

// swrkFD is the client's connection, if there is one. CRIU takes options before the verb, and
// behind it.
func swrkFD(args []string) int {
	for i := 1; i < len(args); i++ {
		if args[i-1] == "swrk" {
			if fd, err := strconv.Atoi(args[i]); err == nil && isSeqpacket(fd) {
				return fd
			}
		}
	}
	return -1
}

func isSeqpacket(fd int) bool {
	typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	return err == nil && typ == unix.SOCK_SEQPACKET
}

// proxyTime is how long the process in between may take to be in its place.
const proxyTime = 10 * time.Second

// between puts a process of ours between fd, the client's connection, and the CRIU that
// we are about to be, and its end of the new connection in fd's place. The socket pair has
// to be that process's: CRIU opens the descriptors of who made it.
func between(fd int) error {
	fail := func(err error) error { return fmt.Errorf("stand between criu swrk and its client: %w", err) }
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return fail(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(pair[0])
	pid, err := startProxy(proxyStartArg, []string{strconv.Itoa(int(peer.Pid)), strconv.Itoa(os.Getpid())}, uintptr(fd), uintptr(pair[1]))
	unix.Close(pair[1])
	if err != nil {
		return fail(err)
	}
	var st syscall.WaitStatus
	for {
		if _, err := syscall.Wait4(pid, &st, 0, nil); err != syscall.EINTR {
			break // its handover will tell
		}
	}
	limit := unix.NsecToTimeval(proxyTime.Nanoseconds())
	if err := unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		return fail(err)
	}
	var b [1]byte
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(pair[0], b[:], oob, unix.MSG_CMSG_CLOEXEC)
	for end := time.Now().Add(proxyTime); err == unix.EINTR && time.Now().Before(end); { // with a time limit the kernel never restarts it
		n, oobn, _, _, err = unix.Recvmsg(pair[0], b[:], oob, unix.MSG_CMSG_CLOEXEC)
	}
	if err != nil || n != 1 {
		return fail(fmt.Errorf("its process does not answer: %w", errors.Join(err, errEnded)))
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		return fail(errors.Join(err, errors.New("its process has sent no connection")))
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return fail(errors.Join(err, errors.New("its process has sent no connection")))
	}
	defer unix.Close(fds[0])
	if err := unix.Dup3(fds[0], fd, 0); err != nil {
		return fail(err)
	}
	return nil
}

var errEnded = errors.New("it has ended, or was too slow")

// startProxy starts this program with a part of its own. It keeps the standard error: what
// cannot be written to CRIU's log goes there.
func startProxy(arg string, args []string, fds ...uintptr) (pid int, err error) {
	// Not /dev/null: runc has put us into the container's cgroup, and for a moment no device
	// may be opened there.
	fd, err := unix.MemfdCreate("nothing", unix.MFD_CLOEXEC)
	if err != nil {
		return 0, os.NewSyscallError("memfd_create", err)
	}
	null := os.NewFile(uintptr(fd), "nothing")
	defer null.Close()
	pid, _, err = syscall.StartProcess("/proc/self/exe", append([]string{"criu-netlock", arg}, args...), &syscall.ProcAttr{
		Dir: "/", Env: os.Environ(), Files: append([]uintptr{null.Fd(), null.Fd(), 2}, fds...), Sys: &syscall.SysProcAttr{Setsid: true},
	})
	return pid, err
}

// The descriptors that the process in between is started with.
const (
	fdClient = 3 + iota
	fdHandover
	fdFree // the first that is none of them
)

// runProxyStart starts the process in between and leaves it alone, with none of the descriptors
// that CRIU is given: the client's connection may be one more of them.
func runProxyStart(args []string) int {
	err := guard.CloseOnExecFrom(fdFree)
	if err == nil {
		_, err = startProxy(proxyArg, args, fdClient, fdHandover)
	}
	if err != nil {
		early.Say("criu-netlock: " + wire.OneLine(err.Error()) + "\n")
		return 1
	}
	return 0
}

// runProxy is the life of the process in between.
func runProxy(args []string) int {
	runtime.GOMAXPROCS(1) // one thing after another; to wake a second thread takes longer than the thing
	if err := shedAsRoot(); err != nil {
		early.Say("criu-netlock: between criu swrk and its client, with all capabilities: " + wire.OneLine(err.Error()) + "\n")
	}
	if err := proxy(args); err != nil {
		early.Say("criu-netlock: between criu swrk and its client: " + wire.OneLine(err.Error()) + "\n")
		return netlock.ExitCode(err)
	}
	return 0
}

func proxy(args []string) error {
	if len(args) != 2 {
		return errors.New("criu-netlock as criu starts this, nobody else")
	}
	var pids [2]int
	for i, s := range args {
		pid, err := action.ParsePID(s)
		if err != nil {
			return err
		}
		pids[i] = pid
	}
	for fd := fdClient; fd <= fdHandover; fd++ {
		unix.CloseOnExec(fd)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Sendmsg(fdHandover, []byte{0}, unix.UnixRights(pair[1]), nil, unix.MSG_NOSIGNAL); err != nil {
		return err
	}
	unix.Close(fdHandover)
	unix.Close(pair[1])
	cfg, cfgErr := loadConfig(config.Path(os.LookupEnv))
	p := criurpc.Proxy{Client: fdClient, CRIU: pair[0], ClientPID: pids[0], CRIUPID: pids[1]}
	kernel := &nft.Kernel{}
	locker := stayingLocker(wire.Holder(cfg), nft.WithKernel(kernel))
	p.Begin = func(opts *rpc.CriuOpts) criurpc.Options {
		o := criurpc.Options{
			Locker: locker(cfg, netlock.Caller{}), Timeout: cfg.Timeout, OnFailedRestore: guard.Policy(cfg.OnFailedRestore), Refuse: cfgErr,
			Mode: modeOfRequest(cfg, kernel, opts),
		}
		// Should we be killed, nobody else would end the lock.
		if o.Guard = "/proc/self/exe"; !cfg.Guard {
			o.Guard = criurpc.NoGuard
		}
		log := criuLog(opts)
		o.Log = func(e criurpc.Entry) {
			done := e.Err == nil && e.Report.Result != "" || e.Err != nil && netlock.KindOf(e.Err) == netlock.KindTampered
			log(hookCall{start: time.Now().Add(-e.Took)}.line(cfg.LogLevel, e.Event, e.Report, done, e.Err, e.Unguarded, nil))
		}
		return o
	}
	return p.Run(context.Background())
}

// criuLog appends to the log that CRIU keeps of a request, where it is to be found, and
// writes to the standard error otherwise.
func criuLog(opts *rpc.CriuOpts) func(string) {
	name, dir := opts.GetLogFile(), opts.GetImagesDirFd()
	if opts.WorkDirFd != nil {
		dir = opts.GetWorkDirFd()
	}
	if name == "" {
		name = "criu.log"
	}
	if opts.GetLogToStderr() || dir < 0 || strings.Contains(name, "/") {
		return early.Say
	}
	held, err := unix.FcntlInt(uintptr(dir), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return early.Say
	}
	return func(line string) { // once a notification has come CRIU has opened it
		fd, err := unix.Openat(held, name, unix.O_WRONLY|unix.O_APPEND|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			early.Say(line)
			return
		}
		defer unix.Close(fd)
		if write(fd, line) != nil {
			early.Say(line)
		}
	}
}

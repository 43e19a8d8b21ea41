package testbed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/stats"
)

// Engine runs one container with the workload, and checkpoints it.
type Engine interface {
	// Start runs the workload, attached to the Net.
	Start(context.Context) error
	// Dump checkpoints; unless leaveRunning the tasks are dead afterwards.
	Dump(ctx context.Context, leaveRunning bool) error
	// Restore restores the last dump. It can be tried again after a failure.
	Restore(context.Context) error
	// PID is the root task's in the session, 0 while there is none.
	PID() int
	// Netns is the path in the session of the container's network namespace,
	// empty while it has none.
	Netns() string
	// Log is CRIU's log of the last dump or restore.
	Log() (string, error)
	// Destroy ends the container and removes what belongs to it.
	Destroy(context.Context) error
}

// Container is what the engines have in common.
type Container struct {
	S   *Session
	Net *Net
	// ID names the container, its folder and, with runc, its namespace.
	ID string
	// Scripts are action scripts, in the order in which they are to run.
	Scripts []string
	// Lock is CRIU's own lock: "skip", "iptables" or "nftables"; empty if that, and the
	// scripts, are as the files in /etc/criu say.
	Lock string
	// Argv is the workload as the session sees it.
	Argv []string
	// Options are more lines of CRIU's configuration, where runc is the engine.
	Options []string
	// Hooks have the log where an engine removes it.
	Hooks *Hooks
	// Images is a folder of the session for the images, in place of one of the container's.
	Images string

	log string // host path of the last log
	ops int
}

// dir is the container's folder, as the machine and as the session see it.
func (c *Container) dir(sub ...string) (host, inside string) {
	rel := filepath.Join(append([]string{c.ID}, sub...)...)
	return filepath.Join(c.S.Work, rel), WorkDir + "/" + rel
}

// workloadArgv is the workload as a container with a root of its own sees it.
func (c *Container) workloadArgv() []string {
	return append([]string{"/workload"}, c.Argv[1:]...)
}

// putWorkload copies the workload's program into a container's root.
func (c *Container) putWorkload(rootfs string) error {
	program, err := os.ReadFile(filepath.Join(c.S.Work, strings.TrimPrefix(c.Argv[0], WorkDir)))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(rootfs, "workload"), program, 0o755)
}

// quietly runs a command whose daemons live on: they would keep a pipe to us open.
func (c *Container) quietly(ctx context.Context, argv ...string) (string, error) {
	host, inside := c.dir()
	if err := os.MkdirAll(host, 0o755); err != nil {
		return "", err
	}
	_, err := c.S.Run(ctx, append([]string{"sh", "-c", `out=$0; exec "$@" </dev/null >"$out" 2>&1`, inside + "/said"}, argv...)...)
	said, e := os.ReadFile(filepath.Join(host, "said"))
	if err != nil {
		return "", fmt.Errorf("%s: %w", strings.Join(argv, " "), errOutput(errors.Unwrap(err), said))
	}
	return strings.TrimSpace(string(said)), e
}

// images is the folder of a dump's images, as the machine and as the session see it.
func (c *Container) images() (host, inside string) {
	if c.Images != "" {
		return c.S.Path(c.Images), c.Images
	}
	return c.dir("images")
}

// newImages makes an empty folder for a dump's images.
func (c *Container) newImages() (inside string, err error) {
	host, inside := c.images()
	if c.Images == "" {
		if err := os.RemoveAll(host); err != nil {
			return "", err
		}
		return inside, os.MkdirAll(host, 0o700)
	}
	// It may be a file system of its own.
	old, err := filepath.Glob(filepath.Join(host, "*"))
	for _, name := range old {
		err = errors.Join(err, os.RemoveAll(name))
	}
	return inside, err
}

// newWork makes CRIU's work folder for one operation.
func (c *Container) newWork(op string) (inside string, err error) {
	c.ops++
	host, inside := c.dir(fmt.Sprintf("%d-%s", c.ops, op))
	c.log = filepath.Join(host, op+".log")
	return inside, os.MkdirAll(host, 0o700)
}

// Log is CRIU's log of the last dump or restore.
func (c *Container) Log() (string, error) {
	if c.log == "" && c.Hooks != nil {
		return c.Hooks.Log(), nil
	}
	b, err := os.ReadFile(c.log)
	return string(b), err
}

// Freeze is how long the tasks stood still in the last dump, as CRIU has counted it: from
// the first attempt to freeze them on.
func (c *Container) Freeze() (time.Duration, error) {
	dir, err := os.Open(filepath.Dir(c.log))
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	st, err := stats.CriuGetDumpStats(dir)
	if err != nil {
		return 0, fmt.Errorf("CRIU's statistics: %w", err)
	}
	return time.Duration(st.GetFreezingTime()+st.GetFrozenTime()) * time.Microsecond, nil
}

// withLog adds the log's errors to an engine's error.
func (c *Container) withLog(err error) error {
	if err == nil {
		return nil
	}
	log, _ := c.Log()
	var lines []string
	for line := range strings.Lines(log) {
		// Harmless where CAP_SYS_RESOURCE is missing: RLIMIT_NOFILE.
		if strings.Contains(line, "Error") && !strings.Contains(line, "RLIMIT_NOFILE") {
			lines = append(lines, strings.TrimRight(line, "\n"))
		}
	}
	return fmt.Errorf("%w\nCRIU's log %s says:\n%s", err, c.log, strings.Join(lines, "\n"))
}

// lastFirst is Scripts in the order in which CRIU wants them: it runs the one
// given last first.
func (c *Container) lastFirst() []string {
	var out []string
	for i := len(c.Scripts) - 1; i >= 0; i-- {
		out = append(out, c.Scripts[i])
	}
	return out
}

// CLI is CRIU by its command line, on a process tree in a network namespace of
// its own: the namespace is dumped and restored with the tasks. CRIU itself runs
// where the bridge is, to which it puts the other end of the veth.
type CLI struct {
	Container
	// Shared puts the workload into CRIU's own namespace instead, the way a container
	// on the host's network is: there is nothing to attach and nothing to lock.
	Shared bool
	// Client, if set, is a program that takes CRIU's command line and has CRIU do it.
	Client []string
	// Flags, if set, are CRIU's for a dump that leaves the tasks, in place of --leave-running.
	Flags []string
	pid   int
}

// PID is the workload's.
func (e *CLI) PID() int { return e.pid }

// Netns is the workload's.
func (e *CLI) Netns() string {
	if e.pid == 0 {
		return ""
	}
	return fmt.Sprintf("/proc/%d/ns/net", e.pid)
}

// Start runs the workload as a session leader without a terminal.
func (e *CLI) Start(ctx context.Context) error {
	_, inside := e.dir()
	host, _ := e.dir()
	if err := os.MkdirAll(host, 0o755); err != nil {
		return err
	}
	// A command in the background leads no process group, so that setsid and unshare
	// keep its pid. The session's pid 1 becomes its parent.
	script := `out=$1; shift; exec </dev/null >/dev/null 2>&1; setsid "$@" & echo $! >"$out/pid"`
	argv := append([]string{"sh", "-c", script, "sh", inside}, e.Argv...)
	if !e.Shared {
		argv = slices.Insert(argv, 5, "unshare", "--net", "--")
	}
	if _, err := e.S.RunIn(ctx, e.Net.host, argv...); err != nil {
		return err
	}
	pid, err := readPid(filepath.Join(host, "pid"))
	if err != nil {
		return err
	}
	e.pid = pid
	err = Poll(ctx, func() error {
		b, err := os.ReadFile(e.S.Path(fmt.Sprintf("/proc/%d/cmdline", pid)))
		if err == nil && !strings.HasPrefix(string(b), e.Argv[0]+"\x00") {
			err = fmt.Errorf("pid %d is not yet %s", pid, e.Argv[0])
		}
		return err
	})
	if err != nil || e.Shared {
		return err
	}
	return e.Net.Attach(ctx, strconv.Itoa(pid), e.Netns())
}

func (e *CLI) criu(ctx context.Context, verb string, args ...string) error {
	work, err := e.newWork(verb)
	if err != nil {
		return err
	}
	_, images := e.images()
	client := e.Client
	if client == nil {
		client = []string{"criu"}
	}
	argv := append(slices.Concat(client, []string{verb, "--images-dir", images, "--work-dir", work, "--log-file", verb + ".log", "-v4",
		"--tcp-established"}), args...)
	if e.Lock != "" {
		argv = append(argv, "--network-lock", e.Lock)
	}
	for _, s := range e.lastFirst() {
		argv = append(argv, "--action-script", s)
	}
	_, err = e.S.RunIn(ctx, e.Net.host, argv...)
	return e.withLog(err)
}

// Take copies the images of a dump that another session made of a container with the
// same ID, as a migration would.
func (c *Container) Take(from *Session) error {
	host, _ := c.images()
	if err := os.RemoveAll(host); err != nil {
		return err
	}
	return os.CopyFS(host, os.DirFS(filepath.Join(from.Work, c.ID, "images")))
}

// Dump is criu dump.
func (e *CLI) Dump(ctx context.Context, leaveRunning bool) error {
	if _, err := e.newImages(); err != nil {
		return err
	}
	args := []string{"--tree", strconv.Itoa(e.pid)}
	switch {
	case leaveRunning && e.Flags != nil:
		args = append(args, e.Flags...)
	case leaveRunning:
		args = append(args, "--leave-running")
	}
	err := e.criu(ctx, "dump", args...)
	if err == nil && !leaveRunning {
		e.pid = 0
	}
	return err
}

// Restore is criu restore.
func (e *CLI) Restore(ctx context.Context) error {
	// What a namespace that died leaves of its veth would be in the new one's way.
	if err := e.Net.Detached(ctx); err != nil {
		return err
	}
	host, inside := e.dir()
	os.Remove(filepath.Join(host, "pid"))
	args := []string{"--restore-detached", "--pidfile", inside + "/pid"}
	if !e.Shared {
		args = append(args, "--external", "veth["+Eth+"]:"+Port+"@"+Bridge)
	}
	if err := e.criu(ctx, "restore", args...); err != nil {
		return err
	}
	var err error
	e.pid, err = readPid(filepath.Join(host, "pid"))
	return err
}

// Destroy kills the workload; its namespace goes with it.
func (e *CLI) Destroy(ctx context.Context) error {
	var err error
	if e.pid != 0 {
		_, err = e.S.Run(ctx, "sh", "-c", "kill -KILL "+strconv.Itoa(e.pid))
		e.pid = 0
	}
	return errors.Join(err, e.Net.Detach(ctx))
}

func readPid(name string) (int, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// Runc is runc on a network namespace made beforehand: CRIU dumps nothing of it,
// and it is there before, between and after.
type Runc struct {
	Container
	// Shared puts the container, and runc with CRIU, into the peer's namespace: it
	// plays a container on the host's network.
	Shared bool
	// Pod is the container whose namespace it joins, if any.
	Pod *Runc
	// Env is put before runc: variables that it, and CRIU, are to have.
	Env     []string
	running bool
}

// Netns is the namespace's name in /run/netns.
func (e *Runc) Netns() string {
	switch {
	case e.Shared:
		return e.Net.Path()
	case e.Pod != nil:
		return e.Pod.Netns()
	}
	return NetnsPath(e.ID)
}

// ownNetns tells whether the namespace is made for the container.
func (e *Runc) ownNetns() bool { return !e.Shared && e.Pod == nil }

// PID is the container's first process.
func (e *Runc) PID() int {
	if !e.running {
		return 0
	}
	host, _ := e.dir()
	pid, err := readPid(filepath.Join(host, "pid"))
	if err != nil {
		return 0
	}
	return pid
}

// Start makes the namespace and a bundle, and runs it.
func (e *Runc) Start(ctx context.Context) error {
	if e.ownNetns() {
		if _, err := e.S.Run(ctx, "ip", "netns", "add", e.ID); err != nil {
			return err
		}
		if err := e.Net.Attach(ctx, e.ID, e.Netns()); err != nil {
			return err
		}
	}
	if err := e.bundle(ctx); err != nil {
		return err
	}
	_, inside := e.dir()
	err := e.quiet(ctx, "run", "--detach", "--bundle", inside, "--pid-file", inside+"/pid", e.ID)
	e.running = err == nil
	return err
}

// quiet runs runc with its input and output on the session's /dev/null, and its
// words in a file: a detached container keeps what runc had, and CRIU could follow
// neither a pipe to us nor a file that the container does not see.
func (e *Runc) quiet(ctx context.Context, args ...string) error {
	host, inside := e.dir()
	os.Remove(filepath.Join(host, "runc.log"))
	argv := slices.Concat([]string{"env"}, e.Env, []string{"sh", "-c", `exec runc "$@" </dev/null >/dev/null 2>&1`, "sh", "--log", inside + "/runc.log"}, args)
	run := func() (string, error) { return e.S.Run(ctx, argv...) }
	if e.Shared {
		run = func() (string, error) { return e.S.RunIn(ctx, e.Net.Path(), argv...) }
	}
	if _, err := run(); err != nil {
		log, _ := os.ReadFile(filepath.Join(host, "runc.log"))
		var said []byte
		for line := range strings.Lines(string(log)) {
			if strings.Contains(line, "level=error") { // the warnings repeat CRIU's log
				said = append(said, line...)
			}
		}
		return fmt.Errorf("runc %s: %w", args[0], errOutput(err, said))
	}
	return nil
}

// bundle writes an OCI bundle: what runc spec makes, with a root that holds the
// workload alone.
func (e *Runc) bundle(ctx context.Context) error {
	host, inside := e.dir()
	rootfs := filepath.Join(host, "rootfs")
	// A test that runs twice finds the first time's.
	if err := os.RemoveAll(host); err != nil {
		return err
	}
	if err := os.MkdirAll(rootfs, 0o755); err != nil {
		return err
	}
	if err := e.putWorkload(rootfs); err != nil {
		return err
	}
	if _, err := e.S.Run(ctx, "runc", "spec", "--bundle", inside); err != nil {
		return err
	}
	name := filepath.Join(host, "config.json")
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	var spec map[string]any
	if err := json.Unmarshal(b, &spec); err != nil {
		return err
	}
	process, _ := spec["process"].(map[string]any)
	linux, _ := spec["linux"].(map[string]any)
	namespaces, _ := linux["namespaces"].([]any)
	if process == nil || len(namespaces) == 0 {
		return fmt.Errorf("runc spec made a configuration without process or namespaces")
	}
	process["terminal"] = false
	process["args"] = e.workloadArgv()
	// CRIU makes a temporary folder in the root for its pivot_root.
	spec["root"] = map[string]any{"path": "rootfs", "readonly": false}
	linux["cgroupsPath"] = e.S.CgroupParent() + "/" + e.ID
	linux["namespaces"] = slices.DeleteFunc(namespaces, func(n any) bool {
		ns, ok := n.(map[string]any)
		if !ok || ns["type"] != "network" {
			return false
		}
		ns["path"] = e.Netns()
		return e.Shared
	})
	if e.Lock != "" {
		spec["annotations"] = map[string]string{"org.criu.config": inside + "/criu.conf"}
	}
	if b, err = json.MarshalIndent(spec, "", "  "); err != nil {
		return err
	}
	return os.WriteFile(name, b, 0o644)
}

// configure writes what runc cannot say over RPC: the scripts into the file that
// the annotation names; the network lock where it is safe, in default.conf.
func (e *Runc) configure() error {
	if e.Lock == "" {
		return nil
	}
	host, _ := e.dir()
	var b strings.Builder
	for _, s := range e.lastFirst() {
		b.WriteString("action-script " + s + "\n")
	}
	for _, s := range e.Options {
		b.WriteString(s + "\n")
	}
	if err := os.WriteFile(filepath.Join(host, "criu.conf"), []byte(b.String()), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(e.S.Work, "criu/default.conf"), []byte("network-lock "+e.Lock+"\n"), 0o644)
}

func (e *Runc) runc(ctx context.Context, verb, op string, args ...string) error {
	if err := e.configure(); err != nil {
		return err
	}
	if e.Lock != "" {
		defer os.Remove(filepath.Join(e.S.Work, "criu/default.conf"))
	}
	work, err := e.newWork(op)
	if err != nil {
		return err
	}
	_, images := e.images()
	err = e.quiet(ctx, append(append([]string{verb, "--tcp-established", "--image-path", images, "--work-path", work}, args...), e.ID)...)
	return e.withLog(err)
}

// Dump is runc checkpoint.
func (e *Runc) Dump(ctx context.Context, leaveRunning bool) error {
	if _, err := e.newImages(); err != nil {
		return err
	}
	var args []string
	if leaveRunning {
		args = append(args, "--leave-running")
	}
	err := e.runc(ctx, "checkpoint", "dump", args...)
	if err == nil && !leaveRunning {
		e.running = false
	}
	return err
}

// Restore is runc restore.
func (e *Runc) Restore(ctx context.Context) error {
	_, inside := e.dir()
	err := e.runc(ctx, "restore", "restore", "--detach", "--bundle", inside, "--pid-file", inside+"/pid")
	if err == nil {
		e.running = true
	}
	return err
}

// Destroy removes the container, its namespace and its cgroups.
func (e *Runc) Destroy(ctx context.Context) error {
	_, err := e.S.Run(ctx, "runc", "delete", "--force", e.ID)
	e.running = false
	if e.Pod != nil {
		return err
	}
	var err2 error
	if e.ownNetns() {
		_, err2 = e.S.Run(ctx, "ip", "netns", "del", e.ID)
	}
	return errors.Join(err, err2, e.Net.Detach(ctx))
}

// Renew replaces the namespace of a container that is not running by a new one,
// as there would be on another host, which is not attached yet.
func (e *Runc) Renew(ctx context.Context) error {
	// A namespace that dies loses its rules before its devices, and what comes in between is reset.
	if err := e.Net.Detach(ctx); err != nil {
		return err
	}
	if _, err := e.S.Run(ctx, "ip", "netns", "del", e.ID); err != nil {
		return err
	}
	_, err := e.S.Run(ctx, "ip", "netns", "add", e.ID)
	return err
}

// Thaw lets the tasks in the container's cgroups go on: those of a restore whose CRIU was
// killed are frozen, and cannot die.
func (e *Runc) Thaw() error {
	for name, text := range map[string]string{"/sys/fs/cgroup/freezer%s/%s/freezer.state": "THAWED", "/sys/fs/cgroup%s/%s/cgroup.freeze": "0"} {
		err := os.WriteFile(fmt.Sprintf(name, e.S.CgroupParent(), e.ID), []byte(text), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Clear removes what runc itself cannot after a restore whose CRIU was killed: mounts of
// CRIU's, and with them the container that runc believes in. Its tasks are dead by now.
func (e *Runc) Clear(ctx context.Context) error {
	ms, err := e.S.Mounts()
	if err != nil {
		return err
	}
	slices.Reverse(ms) // what is below first
	_, inside := e.dir()
	for _, m := range ms {
		if strings.Contains(m, "/.criu.") && strings.HasPrefix(m, inside+"/") || m == "/run/runc/"+e.ID+"/criu-root" {
			if _, err := e.S.Run(ctx, "umount", m); err != nil {
				return err
			}
		}
	}
	e.running = false
	_, err = e.S.Run(ctx, "runc", "delete", "--force", e.ID) // forced, it minds no container that is not there
	return err
}

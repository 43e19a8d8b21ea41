package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// LXC is a container of LXC, with a veth on the session's bridge. CRIU runs by its
// command line, and the network namespace is dumped and restored with the tasks.
type LXC struct {
	Container
	pid int
}

// PID is the container's first process.
func (e *LXC) PID() int { return e.pid }

// Netns is the container's.
func (e *LXC) Netns() string {
	if e.pid == 0 {
		return ""
	}
	return fmt.Sprintf("/proc/%d/ns/net", e.pid)
}

// lxc runs one of LXC's programs on the container. Their words are in a file: LXC
// prints them twice, and its daemons keep what they were given.
func (e *LXC) lxc(ctx context.Context, program string, args ...string) error {
	host, inside := e.dir()
	os.Remove(filepath.Join(host, "lxc.log"))
	argv := append([]string{program, "-n", e.ID, "-l", "INFO", "-o", inside + "/lxc.log"}, args...)
	_, err := e.quietly(ctx, argv...)
	if err == nil {
		return nil
	}
	log, _ := os.ReadFile(filepath.Join(host, "lxc.log"))
	var said []byte
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, " ERROR ") {
			said = append(said, line...)
		}
	}
	return errOutput(err, said)
}

// running waits for the container and notes its process.
func (e *LXC) running(ctx context.Context) error {
	return Poll(ctx, func() error {
		out, err := e.S.Run(ctx, "lxc-info", "-n", e.ID, "-p", "-H")
		if err == nil {
			e.pid, err = strconv.Atoi(strings.TrimSpace(out))
		}
		return err
	})
}

// Start writes a configuration and starts the container.
func (e *LXC) Start(ctx context.Context) error {
	host, inside := e.dir()
	for _, d := range []string{"dev", "proc", "sys"} {
		if err := os.MkdirAll(filepath.Join(host, "rootfs", d), 0o755); err != nil {
			return err
		}
	}
	if err := e.putWorkload(filepath.Join(host, "rootfs")); err != nil {
		return err
	}
	config := []string{
		"lxc.uts.name = workload",
		"lxc.rootfs.path = dir:" + inside + "/rootfs",
		"lxc.init.cmd = " + strings.Join(e.workloadArgv(), " "),
		"lxc.mount.auto = proc:mixed sys:ro",
		"lxc.tty.max = 0",
		"lxc.console.path = none",
		"lxc.net.0.type = veth",
		"lxc.net.0.link = " + Bridge,
		"lxc.net.0.veth.pair = " + Port,
		"lxc.net.0.name = " + Eth,
		"lxc.net.0.flags = up",
		"lxc.net.0.hwaddr = " + ContainerMAC,
		"lxc.net.0.ipv4.address = " + ContainerV4 + "/24",
	}
	if err := writeFiles(e.state(), map[string]string{"config": strings.Join(config, "\n") + "\n"}); err != nil {
		return err
	}
	if err := e.lxc(ctx, "lxc-start", "-d"); err != nil {
		return err
	}
	if err := e.running(ctx); err != nil {
		return err
	}
	// Not by LXC, which would leave duplicate address detection on: CRIU does not wait for
	// it when it restores an address, and cannot bind its sockets to a tentative one.
	return e.S.batch(ctx, e.Netns(), "addr add "+ContainerV6+"/64 dev "+Eth+" nodad")
}

// state is where the machine sees LXC's folder of the container.
func (e *LXC) state() string { return filepath.Join(e.S.Work, "state/var/lib/lxc", e.ID) }

func (e *LXC) checkpoint(ctx context.Context, log string, args ...string) error {
	host, inside := e.images()
	e.log = filepath.Join(host, log)
	args = append(args, "-D", inside, "-v")
	for _, s := range e.lastFirst() {
		args = append(args, "-A", s)
	}
	return e.withLog(e.lxc(ctx, "lxc-checkpoint", args...))
}

// Dump is lxc-checkpoint; -s stops the container.
func (e *LXC) Dump(ctx context.Context, leaveRunning bool) error {
	if _, err := e.newImages(); err != nil {
		return err
	}
	var args []string
	if !leaveRunning {
		args = append(args, "-s")
	}
	err := e.checkpoint(ctx, "dump.log", args...)
	if err != nil || leaveRunning {
		return err
	}
	e.pid = 0
	// Its monitor goes after the command does.
	return e.lxc(ctx, "lxc-wait", "-s", "STOPPED")
}

// Restore is lxc-checkpoint -r.
func (e *LXC) Restore(ctx context.Context) error {
	if err := e.Net.Detached(ctx); err != nil {
		return err
	}
	if err := e.checkpoint(ctx, "restore.log", "-r", "-d"); err != nil {
		return err
	}
	return e.running(ctx)
}

// Destroy ends the container.
func (e *LXC) Destroy(ctx context.Context) error {
	var err error
	if e.pid != 0 {
		err = e.lxc(ctx, "lxc-stop", "-k")
		e.pid = 0
	}
	return errors.Join(err, e.Net.Detach(ctx), os.RemoveAll(e.state()))
}

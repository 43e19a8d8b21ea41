package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
)

// dockerImage and dockerNet are made when the first container needs them.
const dockerImage, dockerNet = "workload", "testbed"

// Docker is a container of Docker with runc. A checkpoint that stops it ends its
// network namespace, and a restore makes a new one, with the same addresses.
type Docker struct {
	Container
	// Keep puts it into the network namespace of another container, which is there all
	// the time.
	Keep        bool
	started     bool
	pid         int
	keeper      int    // the pid of the container that keeps the namespace
	last        string // the last checkpoint's name
	checkpoints int
}

// StartDocker starts containerd and dockerd; they end with the session.
func (s *Session) StartDocker(ctx context.Context) error {
	if err := s.Daemon(ctx, s.answers(ctx, "ctr", "version"), "containerd"); err != nil {
		return err
	}
	return s.StartDockerd(ctx)
}

// StartDockerd starts dockerd alone, after one that was killed.
func (s *Session) StartDockerd(ctx context.Context, flags ...string) error {
	return s.Daemon(ctx, s.answers(ctx, "docker", "version"), append([]string{"dockerd", "--containerd", "/run/containerd/containerd.sock"}, flags...)...)
}

// answers tells whether a daemon does, by its client.
func (s *Session) answers(ctx context.Context, argv ...string) func() error {
	return func() error {
		_, err := s.Run(ctx, argv...)
		return err
	}
}

func (e *Docker) docker(ctx context.Context, args ...string) (string, error) {
	return e.quietly(ctx, append([]string{"docker"}, args...)...)
}

// PID is the container's first process.
func (e *Docker) PID() int { return e.pid }

// Netns is the container's.
func (e *Docker) Netns() string {
	switch {
	case e.keeper != 0:
		return fmt.Sprintf("/proc/%d/ns/net", e.keeper)
	case e.pid == 0:
		return ""
	}
	return fmt.Sprintf("/proc/%d/ns/net", e.pid)
}

func (e *Docker) pidOf(ctx context.Context, name string) (pid int, err error) {
	out, err := e.docker(ctx, "inspect", "--format", "{{.State.Pid}}", name)
	if err == nil {
		pid, err = strconv.Atoi(out)
	}
	if err == nil && pid == 0 {
		err = fmt.Errorf("docker: %s does not run", name)
	}
	return pid, err
}

// Start runs the container, on a network of Docker's.
func (e *Docker) Start(ctx context.Context) error {
	if err := e.importImage(ctx, "docker", dockerImage); err != nil {
		return err
	}
	if _, err := e.docker(ctx, "network", "inspect", dockerNet); err != nil {
		if _, err := e.docker(ctx, "network", "create", "--opt", "com.docker.network.bridge.name="+Bridge, "--ipv6",
			"--subnet", SubnetV4, "--gateway", GatewayV4, "--subnet", SubnetV6, "--gateway", GatewayV6, dockerNet); err != nil {
			return err
		}
	}
	e.started = true
	network := []string{"--network", dockerNet, "--ip", ContainerV4, "--ip6", ContainerV6, "--mac-address", ContainerMAC}
	run := func(name string, argv ...string) (pid int, err error) {
		// Under seccomp CRIU would need more privileges than this machine may give.
		args := append([]string{"run", "--detach", "--name", name, "--security-opt", "seccomp=unconfined"}, network...)
		if _, err := e.docker(ctx, append(append(args, dockerImage), argv...)...); err != nil {
			return 0, err
		}
		return e.pidOf(ctx, name)
	}
	var err error
	if e.Keep {
		if e.keeper, err = run(e.ID+"-net", "/workload", "pause"); err != nil {
			return err
		}
		network = []string{"--network", "container:" + e.ID + "-net"}
	}
	e.pid, err = run(e.ID, e.workloadArgv()...)
	return err
}

// Dump is docker checkpoint create.
func (e *Docker) Dump(ctx context.Context, leaveRunning bool) error {
	e.checkpoints++
	e.last = fmt.Sprintf("cp%d", e.checkpoints)
	args := []string{"checkpoint", "create", e.ID, e.last}
	if leaveRunning {
		args = append(args, "--leave-running")
	}
	_, err := e.docker(ctx, args...)
	if err == nil && !leaveRunning {
		e.pid = 0
	}
	return e.withLog(err)
}

// Restore is docker start --checkpoint.
func (e *Docker) Restore(ctx context.Context) error {
	// The daemon puts the checkpoint's files into containerd's store again, where those
	// of the dump still are, and fails on the first that is there.
	if _, err := e.S.Run(ctx, "sh", "-c", "ctr -n moby content ls -q | xargs -r ctr -n moby content rm"); err != nil {
		return err
	}
	if _, err := e.docker(ctx, "start", "--checkpoint", e.last, e.ID); err != nil {
		return e.withLog(err)
	}
	pid, err := e.pidOf(ctx, e.ID)
	e.pid = pid
	return err
}

// Destroy removes the container.
func (e *Docker) Destroy(ctx context.Context) error {
	if !e.started {
		return nil
	}
	args := []string{"rm", "--force", e.ID}
	if e.keeper != 0 {
		args = append(args, e.ID+"-net")
	}
	e.started, e.pid, e.keeper = false, 0, 0
	_, err := e.docker(ctx, args...)
	host, _ := e.dir()
	return errors.Join(err, os.RemoveAll(host))
}

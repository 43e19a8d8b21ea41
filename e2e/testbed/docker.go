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
	started     bool
	pid         int
	last        string // the last checkpoint's name
	checkpoints int
}

// StartDocker starts containerd and dockerd; they end with the session.
func (s *Session) StartDocker(ctx context.Context) error {
	ready := func(argv ...string) func() error {
		return func() error {
			_, err := s.Run(ctx, argv...)
			return err
		}
	}
	if err := s.Daemon(ctx, ready("ctr", "version"), "containerd"); err != nil {
		return err
	}
	return s.Daemon(ctx, ready("docker", "version"), "dockerd", "--containerd", "/run/containerd/containerd.sock")
}

func (e *Docker) docker(ctx context.Context, args ...string) (string, error) {
	return e.quietly(ctx, append([]string{"docker"}, args...)...)
}

// PID is the container's first process.
func (e *Docker) PID() int { return e.pid }

// Netns is the container's.
func (e *Docker) Netns() string {
	if e.pid == 0 {
		return ""
	}
	return fmt.Sprintf("/proc/%d/ns/net", e.pid)
}

func (e *Docker) running(ctx context.Context) error {
	out, err := e.docker(ctx, "inspect", "--format", "{{.State.Pid}}", e.ID)
	if err == nil {
		e.pid, err = strconv.Atoi(out)
	}
	if err == nil && e.pid == 0 {
		err = errors.New("docker: the container does not run")
	}
	return err
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
	if _, err := e.docker(ctx, append([]string{"run", "--detach", "--name", e.ID, "--security-opt", "seccomp=unconfined",
		"--network", dockerNet, "--ip", ContainerV4, "--ip6", ContainerV6, "--mac-address", ContainerMAC, dockerImage}, e.workloadArgv()...)...); err != nil {
		return err
	}
	return e.running(ctx)
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
	return e.running(ctx)
}

// Destroy removes the container.
func (e *Docker) Destroy(ctx context.Context) error {
	if !e.started {
		return nil
	}
	e.started, e.pid = false, 0
	_, err := e.docker(ctx, "rm", "--force", e.ID)
	host, _ := e.dir()
	return errors.Join(err, os.RemoveAll(host))
}

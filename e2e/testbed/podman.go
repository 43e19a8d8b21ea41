package testbed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// podmanNet and podmanImage are made when the first container needs them.
const (
	podmanNet   = "testbed"
	podmanImage = "localhost/workload"
)

// Podman is a container of podman with runc. A checkpoint that stops it ends its
// network namespace, and a restore makes a new one, with the same addresses.
type Podman struct {
	Container
	// Pod puts it into a pod, whose namespace is there all the time, with a sibling
	// that shares it and is not checkpointed.
	Pod bool
	// Sibling is the sibling's argv.
	Sibling []string
	// Runtime is used in place of runc.
	Runtime string
	// Stats: dumps are asked for what Freeze tells.
	Stats   bool
	started bool // and not yet removed
	running bool
	stats   string
}

func (e *Podman) podman(ctx context.Context, args ...string) (string, error) {
	argv := []string{"podman"}
	if e.Runtime != "" {
		argv = append(argv, "--runtime", e.Runtime)
	}
	return e.quietly(ctx, append(argv, args...)...)
}

// PID is the container's first process.
func (e *Podman) PID() int {
	if !e.running {
		return 0
	}
	out, err := e.S.Run(context.Background(), "podman", "inspect", "--type", "container", "--format", "{{.State.Pid}}", e.ID)
	if err != nil {
		return 0
	}
	pid, _ := strconv.Atoi(strings.TrimSpace(out))
	return pid
}

// Netns is the pod's namespace or, while it runs, the container's.
func (e *Podman) Netns() string {
	if !e.started || !e.running && !e.Pod {
		return ""
	}
	name := e.ID
	if e.Pod {
		name += "-infra"
	}
	out, err := e.S.Run(context.Background(), "podman", "inspect", "--type", "container", "--format", "{{.NetworkSettings.SandboxKey}}", name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(out)
}

// importImage makes an image that holds the workload alone.
func (c *Container) importImage(ctx context.Context, engine, image string) error {
	if _, err := c.S.Run(ctx, engine, "image", "inspect", image); err == nil {
		return nil
	}
	host, inside := c.dir("image")
	if err := os.MkdirAll(host, 0o755); err != nil {
		return err
	}
	if err := c.putWorkload(host); err != nil {
		return err
	}
	_, err := c.S.Run(ctx, "sh", "-c", `tar -C "$1" -c workload | "$2" import - "$3"`, "sh", inside, engine, image)
	return errors.Join(err, os.RemoveAll(host))
}

// Start runs the container, on a network of podman's.
func (e *Podman) Start(ctx context.Context) error {
	if err := e.importImage(ctx, "podman", podmanImage); err != nil {
		return err
	}
	if _, err := e.podman(ctx, "network", "exists", podmanNet); err != nil {
		if _, err := e.podman(ctx, "network", "create", "--interface-name", Bridge, "--disable-dns", "--ipv6",
			"--subnet", SubnetV4, "--gateway", GatewayV4, "--subnet", SubnetV6, "--gateway", GatewayV6, podmanNet); err != nil {
			return err
		}
	}
	network := []string{"--network", podmanNet, "--ip", ContainerV4, "--ip6", ContainerV6, "--mac-address", ContainerMAC}
	e.started = true
	if e.Pod {
		create := append([]string{"pod", "create", "--name", e.ID + "-pod", "--infra-name", e.ID + "-infra",
			"--infra-image", podmanImage, "--infra-command", "/workload pause"}, network...)
		network = []string{"--pod", e.ID + "-pod"}
		if _, err := e.podman(ctx, create...); err != nil {
			return err
		}
	}
	run := func(name string, argv []string) error {
		// Under seccomp CRIU would need more privileges than this machine may give.
		args := append([]string{"run", "--detach", "--name", name, "--security-opt", "seccomp=unconfined"}, network...)
		_, err := e.podman(ctx, append(append(args, podmanImage), argv...)...)
		return err
	}
	if err := run(e.ID, e.workloadArgv()); err != nil {
		return err
	}
	e.running = true
	if !e.Pod {
		return nil
	}
	return run(e.ID+"-sibling", append([]string{"/workload"}, e.Sibling...))
}

// Dump is podman container checkpoint.
func (e *Podman) Dump(ctx context.Context, leaveRunning bool) error {
	args := []string{"container", "checkpoint", "--tcp-established", "--keep"}
	if e.Stats {
		args = append(args, "--print-stats")
	}
	if leaveRunning {
		args = append(args, "--leave-running")
	}
	var err error
	e.stats, err = e.podman(ctx, append(args, e.ID)...)
	if err == nil && !leaveRunning {
		e.running = false
	}
	return e.withLog(err)
}

// Freeze is how long the tasks stood still in the last dump, as CRIU has counted it and
// podman prints it.
func (e *Podman) Freeze() (time.Duration, error) {
	var said struct {
		Containers []struct {
			CRIU struct {
				Freezing int64 `json:"freezing_time"`
				Frozen   int64 `json:"frozen_time"`
			} `json:"criu_statistics"`
		} `json:"container_statistics"`
	}
	if err := json.Unmarshal([]byte(e.stats), &said); err != nil || len(said.Containers) != 1 {
		return 0, fmt.Errorf("podman's statistics %q: %w", e.stats, err)
	}
	st := said.Containers[0].CRIU
	return time.Duration(st.Freezing+st.Frozen) * time.Microsecond, nil
}

// Restore is podman container restore.
func (e *Podman) Restore(ctx context.Context) error {
	_, err := e.podman(ctx, "container", "restore", "--tcp-established", "--keep", e.ID)
	if err == nil {
		e.running = true
	}
	return e.withLog(err)
}

// Destroy removes the container, and its pod.
func (e *Podman) Destroy(ctx context.Context) error {
	if !e.started {
		return nil
	}
	e.started, e.running = false, false
	args := []string{"rm", "--force", "--time", "0", e.ID}
	if e.Pod {
		args = []string{"pod", "rm", "--force", "--time", "0", e.ID + "-pod"}
	}
	_, err := e.podman(ctx, args...)
	host, _ := e.dir()
	return errors.Join(err, os.RemoveAll(filepath.Join(host, "said")))
}

package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early/link"
	"github.com/criu-netlock/criu-netlock/netlock"
)

// The addresses on the two sides of a Net. Duplicate address detection is off, or
// every IPv6 test would begin with a second of waiting.
const (
	PeerV4, ContainerV4 = "10.200.7.1", "10.200.7.2"
	PeerV6, ContainerV6 = "fd00:c21f::1", "fd00:c21f::2"
	// Bridge is the peer's bridge, Port its port, Eth the container's interface.
	Bridge, Port, Eth = "br0", "veth0", "eth0"
	// GatewayV4, GatewayV6 and ContainerMAC are for engines that make the network.
	GatewayV4, GatewayV6 = "10.200.7.254", "fd00:c21f::254"
	SubnetV4, SubnetV6   = "10.200.7.0/24", "fd00:c21f::/64"
	ContainerMAC         = "02:00:00:00:00:02"
	peerPort, trunk      = "peer0", "trunk0"
)

// Net is a peer: a network namespace with a bridge, to which a container's veth
// is attached. It plays the host that the engine runs on and the client as well.
type Net struct {
	s    *Session
	name string
	// host is the path of the namespace with the bridge.
	host string
	// Peer is the peer's namespace.
	Peer *netlock.Namespace
}

// NewLAN makes a peer in a session apart: the bridge is in the session's own network
// namespace, the host, and the peer is another machine on it. The bridge has no
// address: engines that want it for a gateway give it one.
func (s *Session) NewLAN(ctx context.Context, name string) (_ *Net, err error) {
	n := &Net{s: s, name: name, host: "/proc/1/ns/net"}
	if _, err := s.Run(ctx, "ip", "netns", "add", name); err != nil {
		return nil, err
	}
	err = errors.Join(
		s.batch(ctx, n.host,
			"link set lo up",
			"link add "+Bridge+" type bridge forward_delay 0 mcast_snooping 0",
			"link set "+Bridge+" up",
			"link add "+peerPort+" type veth peer name "+Eth+" address 02:00:00:00:00:01 netns "+name,
			"link set "+peerPort+" master "+Bridge+" up"),
		s.batch(ctx, n.Path(),
			"link set lo up",
			"link set "+Eth+" up",
			"addr add "+PeerV4+"/24 dev "+Eth,
			"addr add "+PeerV6+"/64 dev "+Eth+" nodad"))
	return n.opened(ctx, err)
}

// Extend makes a bridge in another session apart and joins it to this one: two hosts
// on one network. The peer is the same.
func (n *Net) Extend(ctx context.Context, to *Session) (*Net, error) {
	if !n.s.apart || !to.apart {
		return nil, errors.New("extend a network: both sessions must be apart")
	}
	if err := to.batch(ctx, "/proc/1/ns/net",
		"link set lo up",
		"link add "+Bridge+" type bridge forward_delay 0 mcast_snooping 0",
		"link set "+Bridge+" up"); err != nil {
		return nil, err
	}
	// From the machine, which alone sees the processes of both.
	cmd := exec.CommandContext(ctx, "nsenter", "--net="+n.s.Path(n.host), "ip", "-batch", "-")
	cmd.Stdin = strings.NewReader("link add " + trunk + " type veth peer name " + trunk + " netns " + strconv.Itoa(to.init.Process.Pid) + "\n" +
		"link set " + trunk + " master " + Bridge + " up\n")
	if _, err := output(cmd, cmd.Args); err != nil {
		return nil, err
	}
	if err := to.batch(ctx, "/proc/1/ns/net", "link set "+trunk+" master "+Bridge+" up"); err != nil {
		return nil, err
	}
	return &Net{s: to, name: n.name, host: "/proc/1/ns/net", Peer: n.Peer}, nil
}

// NewNet makes a peer.
func (s *Session) NewNet(ctx context.Context, name string) (*Net, error) {
	n := &Net{s: s, name: name, host: NetnsPath(name)}
	if _, err := s.Run(ctx, "ip", "netns", "add", name); err != nil {
		return nil, err
	}
	err := s.batch(ctx, n.Path(),
		"link set lo up",
		"link add "+Bridge+" address 02:00:00:00:00:01 type bridge forward_delay 0 mcast_snooping 0",
		"link set "+Bridge+" up",
		"addr add "+PeerV4+"/24 dev "+Bridge,
		"addr add "+PeerV6+"/64 dev "+Bridge+" nodad",
	)
	return n.opened(ctx, err)
}

// opened is the Net with its peer's handle, or, after an error, nothing.
func (n *Net) opened(ctx context.Context, err error) (*Net, error) {
	if err == nil {
		n.Peer, err = netlock.FromPath(n.s.Path(n.Path()))
	}
	if err != nil {
		n.s.Run(ctx, "ip", "netns", "del", n.name)
		return nil, err
	}
	return n, nil
}

// Path is where the session sees the peer's namespace.
func (n *Net) Path() string { return NetnsPath(n.name) }

// NetnsPath is where the session sees a namespace made with ip netns.
func NetnsPath(name string) string { return "/run/netns/" + name }

// Attach joins the namespace of a pid or a name of the session to the bridge.
func (n *Net) Attach(ctx context.Context, target, netns string) error {
	if err := n.s.batch(ctx, n.host,
		"link add "+Port+" type veth peer name "+Eth+" address "+ContainerMAC+" netns "+target,
		"link set "+Port+" master "+Bridge+" up",
	); err != nil {
		return err
	}
	return n.s.batch(ctx, netns,
		"link set lo up",
		"link set "+Eth+" up",
		"addr add "+ContainerV4+"/24 dev "+Eth,
		"addr add "+ContainerV6+"/64 dev "+Eth+" nodad",
	)
}

// Unplug takes the bridge's port down: what the peer sends gets no farther.
func (n *Net) Unplug(ctx context.Context) error {
	return n.s.batch(ctx, n.host, "link set "+Port+" down")
}

// Forwards tells whether the bridge's port is at work.
func (n *Net) Forwards(ctx context.Context) error {
	out, err := n.s.RunIn(ctx, n.host, "ip", "-d", "link", "show", "dev", Port)
	if err == nil && !strings.Contains(out, "state forwarding") {
		err = fmt.Errorf("the bridge's port does not forward:\n%s", out)
	}
	return err
}

// Detached waits until the bridge's port is gone: a network namespace dies some
// time after its last process.
func (n *Net) Detached(ctx context.Context) error {
	return Poll(ctx, func() error {
		out, err := n.s.RunIn(ctx, n.host, "ip", "-o", "link", "show", "type", "veth")
		for line := range strings.Lines(out) {
			if err == nil && !strings.Contains(line, ": "+peerPort+"@") && !strings.Contains(line, ": "+trunk+"@") {
				err = fmt.Errorf("still there: %s", strings.TrimSpace(line))
			}
		}
		return err
	})
}

// Detach removes the bridge's port, if there is one. Sockets that a dead task left
// half closed can keep a namespace, and its end of the veth, for minutes.
func (n *Net) Detach(ctx context.Context) error {
	n.s.RunIn(ctx, n.host, "ip", "link", "del", Port)
	return n.Detached(ctx)
}

// Close removes the peer.
func (n *Net) Close(ctx context.Context) error {
	n.Peer.Close()
	_, err := n.s.Run(ctx, "ip", "netns", "del", n.name)
	return err
}

// batch runs ip commands in a namespace.
func (s *Session) batch(ctx context.Context, netns string, lines ...string) error {
	_, err := s.Feed(ctx, netns, strings.Join(lines, "\n")+"\n", "ip", "-batch", "-")
	return err
}

// Feed is RunIn with a standard input.
func (s *Session) Feed(ctx context.Context, netns, input string, argv ...string) (string, error) {
	cmd := s.CommandIn(ctx, netns, argv...)
	cmd.Stdin = strings.NewReader(input)
	return output(cmd, argv)
}

// Rules is the whole nft rule set of a namespace.
func (s *Session) Rules(ctx context.Context, netns string) (string, error) {
	return s.RunIn(ctx, netns, "nft", "list", "ruleset")
}

// program is criu-netlock itself, which is linked in a way of its own.
const program = "cmd/criu-netlock"

// Build compiles programs of this module into the session's BinDir, static, as
// NAME: package path below the module.
func (s *Session) Build(ctx context.Context, programs map[string]string) error {
	return BuildTo(ctx, s.programs(), programs)
}

// EnvPrograms names a folder of programs that were built before, for a machine without Go.
const EnvPrograms = "CRIU_NETLOCK_PROGRAMS"

// BuildTo compiles programs of this module to a folder.
func BuildTo(ctx context.Context, dir string, programs map[string]string) error {
	for name, pkg := range programs {
		if built := os.Getenv(EnvPrograms); built != "" {
			b, err := os.ReadFile(filepath.Join(built, name))
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, name), b, 0o755)
			}
			if err != nil {
				return err
			}
			continue
		}
		flags := "-s -w"
		if pkg == program {
			flags += " " + link.Flag
		}
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", flags, "-o", filepath.Join(dir, name), "github.com/criu-netlock/criu-netlock/"+pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w", pkg, errOutput(err, out))
		}
	}
	return nil
}

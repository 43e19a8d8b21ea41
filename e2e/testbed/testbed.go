// Package testbed runs real checkpoint engines on this machine: a Debian root
// that carries them is built once with debootstrap, outside of the checkout, and
// entered by pivot_root in a mount and a pid namespace of its own. The kernel is
// the machine's; its network namespace, its processes and its mounts are not touched.
package testbed

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// EnvDir names the variable that overrides where the root is kept.
const EnvDir = "CRIU_NETLOCK_TESTBED"

// Recipe is what a root is made from. A change of any part makes another root.
type Recipe struct {
	// Name tells the roots apart that are not the default one.
	Name string `json:",omitempty"`
	// Suite is Debian's name of the release.
	Suite string
	// Script is the debootstrap script to use: older debootstraps do not know
	// newer releases, but those are all made the way sid is.
	Script   string
	Packages []string
	// Older are packages that come, with what they need, from an older release.
	Older *Older `json:",omitempty"`
	// Files are put into the root, by path.
	Files map[string]string `json:",omitempty"`
	// Writable are folders that a session can write to; each has its own.
	Writable []string `json:",omitempty"`
	// Checks are commands that must succeed inside for the root to be whole.
	Checks [][]string
}

// Older names packages of an older release.
type Older struct {
	Suite    string
	Packages []string
}

// Default is the root that the tests run in: CRIU 4.2 or newer, because 4.1.1
// cannot dump an inet socket on Linux 6.18.
func Default() Recipe {
	return Recipe{
		Suite:    "forky",
		Script:   "/usr/share/debootstrap/scripts/sid",
		Packages: []string{"criu", "runc", "nftables", "iptables", "iproute2", "libcriu-dev"},
		Checks: [][]string{
			{"criu", "--version"},
			{"runc", "--version"},
			{"nft", "--version"},
			{"iptables-nft", "--version"},
			{"ip", "-Version"},
			{"ss", "-V"},
			{"test", "-f", "/usr/include/criu/criu.h"},
		},
	}
}

// Engines is the root of the tests with LXC, podman and Docker. It is apart from the
// default one because it takes twice as long to make and four times the room, which
// the demo need not wait for.
func Engines() Recipe {
	r := Default()
	r.Name = "engines"
	r.Packages = append(r.Packages, "ca-certificates", "crun", "libcriu2", "lxc", "podman", "netavark")
	// Docker 28 cannot restore: its daemon fails before CRIU runs. Trixie's 26 can.
	r.Older = &Older{"trixie", []string{"docker.io", "docker-cli", "containerd", "tini"}}
	r.Files = map[string]string{
		// Of the hierarchies of cgroup v1 LXC needs one, to freeze by.
		"etc/lxc/lxc.conf": "lxc.cgroup.use = freezer\n",
		// Images and networks are made by the tests, and none is fetched.
		"etc/containers/containers.conf": `[containers]
log_driver = "none"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
[network]
network_config_dir = "/var/lib/containers/networks"
`,
		"etc/containers/policy.json":     `{"default": [{"type": "insecureAcceptAnything"}]}` + "\n",
		"etc/containers/registries.conf": "unqualified-search-registries = []\n",
		"etc/containerd/config.toml":     "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n",
		"etc/docker/daemon.json": `{
	"experimental": true,
	"exec-opts": ["native.cgroupdriver=cgroupfs"],
	"storage-driver": "overlay2",
	"bridge": "none",
	"userland-proxy": false,
	"log-driver": "none"
}
`,
	}
	r.Writable = []string{"var/lib/containerd", "var/lib/containers", "var/lib/docker", "var/lib/lxc", "var/tmp"}
	r.Checks = append(r.Checks,
		[]string{"lxc-checkpoint", "--version"},
		[]string{"podman", "--version"},
		[]string{"/usr/lib/podman/netavark", "--version"},
		[]string{"dockerd", "--version"},
		[]string{"docker", "--version"},
		[]string{"containerd", "--version"},
	)
	return r
}

// Debian12 is a root with a kernel to boot (Root.Boot), for what is older than the other
// roots and this machine: CRIU 3.17.1, which knows neither action scripts beside RPC nor
// `network-lock skip` and does not start on newer kernels, and Linux 6.1, whose netfilter is
// in modules and has nft_queue.
func Debian12() Recipe {
	r := Default()
	r.Name = "debian12"
	r.Suite = "bookworm"
	r.Packages = append(slices.DeleteFunc(r.Packages, func(p string) bool { return p == "libcriu-dev" }), "linux-image-cloud-amd64")
	r.Files = map[string]string{bootScript: boot}
	r.Checks = append(slices.DeleteFunc(r.Checks, func(c []string) bool { return c[0] == "test" }), []string{"test", "-e", "/initrd.img"})
	return r
}

// format is raised when the way a root is made changes.
const format = 1

func (r Recipe) hash() string {
	b, err := json.Marshal(struct {
		Recipe
		Format int
	}{r, format})
	if err != nil {
		panic(err) // a struct of strings
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:6])
}

// Dir is where the recipe's root is or will be.
func (r Recipe) Dir() string {
	name := ""
	if r.Name != "" {
		name = "-" + r.Name
	}
	if d := os.Getenv(EnvDir); d != "" {
		return d + name
	}
	return "/var/cache/criu-netlock/testbed" + name + "-" + r.hash()
}

// Root is a root that is whole.
type Root struct {
	dir      string
	writable []string
}

// stamp is the last file written into a root.
const stamp = "etc/criu-netlock-testbed"

// Tools are the programs of the machine that building and entering a root needs.
var Tools = []string{"debootstrap", "mount", "pivot_root", "nsenter", "unshare"}

// Ensure returns the recipe's root and builds it if it is missing or broken.
// Processes that do so at the same time wait for one another. progress is told
// in words what takes long; it may be nil.
func (r Recipe) Ensure(ctx context.Context, progress func(string)) (*Root, error) {
	if progress == nil {
		progress = func(string) {}
	}
	dir, err := filepath.Abs(r.Dir())
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return nil, err
	}
	unlock, err := lockFile(ctx, dir+".lock")
	if err != nil {
		return nil, fmt.Errorf("testbed %s: %w", dir, err)
	}
	defer unlock()

	why := r.check(ctx, dir)
	if why == nil {
		return &Root{dir, r.Writable}, nil
	}
	if err := r.ours(dir); err != nil {
		return nil, err
	}
	progress(fmt.Sprintf("testbed: %v; building %s (a minute or two)", why, dir))
	if err := r.build(ctx, dir); err != nil {
		return nil, fmt.Errorf("testbed %s: %w", dir, err)
	}
	if err := r.check(ctx, dir); err != nil {
		return nil, fmt.Errorf("testbed %s: built, but %w", dir, err)
	}
	return &Root{dir, r.Writable}, nil
}

// ours refuses to replace what was not made here: the folder is the user's choice.
func (r Recipe) ours(dir string) error {
	if _, err := os.Lstat(filepath.Join(dir, stamp)); err == nil {
		return nil
	}
	entries, err := os.ReadDir(dir)
	switch {
	case os.IsNotExist(err), err == nil && len(entries) == 0:
		return nil
	case err != nil:
		return err
	}
	return fmt.Errorf("testbed: %s is not empty and was not made by this program; set %s to another folder", dir, EnvDir)
}

// check says what is wrong with the root in dir.
func (r Recipe) check(ctx context.Context, dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, stamp))
	if os.IsNotExist(err) {
		return fmt.Errorf("no finished root there")
	} else if err != nil {
		return err
	}
	if got := strings.TrimSpace(string(b)); got != r.hash() {
		return fmt.Errorf("the root there is of another recipe, %s", got)
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	s, err := (&Root{dir, r.Writable}).Enter(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	for _, argv := range r.Checks {
		if out, err := s.Command(ctx, argv...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s does not run inside: %w", argv[0], errOutput(err, out))
		}
	}
	return nil
}

// build makes the root beside dir and moves it there when it is whole.
func (r Recipe) build(ctx context.Context, dir string) (err error) {
	mirror, err := Mirror()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	tmp, err := os.MkdirTemp(filepath.Dir(dir), filepath.Base(dir)+".new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	// debootstrap mounts /proc and /sys inside: in a mount namespace of its own
	// these go when it ends, however it ends.
	cmd := exec.CommandContext(ctx, "debootstrap", "--variant=minbase", "--include="+strings.Join(r.Packages, ","), r.Suite, tmp, mirror, r.Script)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
	ownMounts(cmd)
	if out, err := cmd.CombinedOutput(); err != nil {
		log, _ := os.ReadFile(filepath.Join(tmp, "debootstrap/debootstrap.log"))
		return fmt.Errorf("debootstrap: %w", errOutput(err, append(out, log...)))
	}
	if err := writeFiles(tmp, map[string]string{
		// A mirror that is behind has release files past their date.
		"etc/apt/apt.conf.d/90testbed": "Acquire::Check-Valid-Until \"false\";\nAPT::Install-Recommends \"false\";\n",
		"etc/hostname":                 "testbed\n",
	}); err != nil {
		return err
	}
	if r.Older != nil {
		if err := r.Older.install(ctx, tmp, mirror); err != nil {
			return err
		}
	}
	if err := writeFiles(tmp, r.Files); err != nil {
		return err
	}
	for _, d := range append([]string{"etc/criu"}, r.Writable...) {
		if err := os.MkdirAll(filepath.Join(tmp, d), 0o755); err != nil {
			return err
		}
	}
	if debs, err := filepath.Glob(filepath.Join(tmp, "var/cache/apt/archives/*.deb")); err == nil {
		for _, d := range debs {
			os.Remove(d)
		}
	}
	if err := os.WriteFile(filepath.Join(tmp, stamp), []byte(r.hash()+"\n"), 0o644); err != nil {
		return err
	}
	if _, err := os.Lstat(dir); err == nil {
		old := tmp + ".old"
		if err := os.Rename(dir, old); err != nil {
			return err
		}
		defer os.RemoveAll(old)
	}
	return os.Rename(tmp, dir)
}

// install installs the packages in the root: what the older release alone has is
// taken from there, and nothing else is.
func (o *Older) install(ctx context.Context, root, mirror string) error {
	files := map[string]string{
		"etc/apt/sources.list.d/older.list": "deb " + mirror + " " + o.Suite + " main\n",
		"etc/apt/preferences.d/older":       "Package: *\nPin: release n=" + o.Suite + "\nPin-Priority: 100\n",
		// No service is started while packages are installed.
		"usr/sbin/policy-rc.d": "#!/bin/sh\nexit 101\n",
	}
	if err := writeFiles(root, files); err != nil {
		return err
	}
	if err := os.Chmod(filepath.Join(root, "usr/sbin/policy-rc.d"), 0o755); err != nil {
		return err
	}
	script := `set -e; root=$1 suite=$2; shift 2
mount -t proc proc "$root/proc"
chroot "$root" apt-get update -q
chroot "$root" apt-get install -y -q -t "$suite" "$@"`
	cmd := exec.CommandContext(ctx, "/bin/sh", append([]string{"-c", script, "sh", root, o.Suite}, o.Packages...)...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
	ownMounts(cmd)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("install packages of %s: %w", o.Suite, errOutput(err, out))
	}
	for name := range files {
		if err := os.Remove(filepath.Join(root, name)); err != nil {
			return err
		}
	}
	return os.RemoveAll(filepath.Join(root, "var/lib/apt/lists"))
}

// writeFiles writes files by their path below a folder.
func writeFiles(dir string, files map[string]string) error {
	for name, text := range files {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// lockFile takes an flock(2), for as long as ctx allows.
func lockFile(ctx context.Context, name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			f.Close()
			return nil, fmt.Errorf("flock %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("another process holds %s: %w", name, ctx.Err())
		case <-time.After(200 * time.Millisecond):
		}
	}
}

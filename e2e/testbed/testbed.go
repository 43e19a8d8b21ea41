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
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// EnvDir names the variable that overrides where the root is kept.
const EnvDir = "CRIU_NETLOCK_TESTBED"

// Recipe is what a root is made from. A change of any part makes another root.
type Recipe struct {
	// Suite is Debian's name of the release.
	Suite string
	// Script is the debootstrap script to use: older debootstraps do not know
	// newer releases, but those are all made the way sid is.
	Script   string
	Packages []string
	// Checks are commands that must succeed inside for the root to be whole.
	Checks [][]string
}

// Default is the root that the tests run in: CRIU 4.2 or newer, because 4.1.1
// cannot dump an inet socket on Linux 6.18.
func Default() Recipe {
	return Recipe{
		Suite:    "forky",
		Script:   "/usr/share/debootstrap/scripts/sid",
		Packages: []string{"criu", "runc", "nftables", "iptables", "iproute2"},
		Checks: [][]string{
			{"criu", "--version"},
			{"runc", "--version"},
			{"nft", "--version"},
			{"iptables-nft", "--version"},
			{"ip", "-Version"},
			{"ss", "-V"},
		},
	}
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
	if d := os.Getenv(EnvDir); d != "" {
		return d
	}
	return "/var/cache/criu-netlock/testbed-" + r.hash()
}

// Root is a root that is whole.
type Root struct{ dir string }

// stamp is the last file written into a root.
const stamp = "etc/criu-netlock-testbed"

// Tools are the programs of the machine that building and entering a root needs.
var Tools = []string{"debootstrap", "mount", "pivot_root", "nsenter"}

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
		return &Root{dir}, nil
	}
	if err := r.ours(dir); err != nil {
		return nil, err
	}
	progress(fmt.Sprintf("testbed: %v; building %s (about a minute)", why, dir))
	if err := r.build(ctx, dir); err != nil {
		return nil, fmt.Errorf("testbed %s: %w", dir, err)
	}
	if err := r.check(ctx, dir); err != nil {
		return nil, fmt.Errorf("testbed %s: built, but %w", dir, err)
	}
	return &Root{dir}, nil
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
	s, err := (&Root{dir}).Enter(ctx)
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
	for name, text := range map[string]string{
		// A mirror that is behind has release files past their date.
		"etc/apt/apt.conf.d/90testbed": "Acquire::Check-Valid-Until \"false\";\nAPT::Install-Recommends \"false\";\n",
		"etc/hostname":                 "testbed\n",
	} {
		if err := os.WriteFile(filepath.Join(tmp, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Join(tmp, "etc/criu"), 0o755); err != nil {
		return err
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

package main

// setup --as-criu: a link by the name of criu, earlier in PATH than the real one. That it is
// ours, and for whom, stands in the engines' files.

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/setup"
)

// defaultLink comes before /usr/sbin in the PATH of root and of systemd's services.
const defaultLink = "/usr/local/sbin/criu"

// users are the engines that a link was made for.
func (c *cli) users(link string) (engines []string, err error) {
	for _, path := range []string{setup.RuncConf, setup.CrunConf} {
		f, err := setup.ReadFile(filepath.Join(c.setupFlags.root, path))
		if err != nil {
			return nil, err
		}
		links, err := setup.Links(f.Text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Path, err)
		}
		for engine, l := range links {
			if l == link {
				engines = append(engines, engine)
			}
		}
	}
	return engines, nil
}

// makeLink is the change that makes the link; record says that it is setup's, and to go
// with it.
func (c *cli) makeLink(link, program string) (ch change, record bool, err error) {
	path := filepath.Join(c.setupFlags.root, link)
	users, err := c.users(link)
	if err != nil {
		return ch, false, err
	}
	ours := len(users) > 0
	to := fmt.Sprintf("%s -> %s\n", path, program)
	target, err := os.Readlink(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return change{path: path, diff: "+link " + to, do: func() error { return os.Symlink(program, path) }}, true, nil
	case err != nil:
		return ch, false, fmt.Errorf("%s is there and is not criu-netlock: give --as-criu another place, earlier in PATH than that", path)
	case target == program, sameFile(path, program):
		return ch, ours, nil // if not ours, somebody made it by hand
	case !ours:
		return ch, false, fmt.Errorf("%s is there, a link to %s, which is not this program: give --as-criu another place, earlier in PATH than that", path, target)
	}
	return change{path: path, diff: "-link " + path + " -> " + target + "\n+link " + to, do: func() error {
		tmp := path + ".criu-netlock"
		if err := os.Symlink(program, tmp); err != nil {
			return err
		}
		return os.Rename(tmp, path)
	}}, true, nil
}

// removeLink is the change that takes the link away, if no other engine needs it.
func (c *cli) removeLink(link, engine string) (ch change, err error) {
	users, err := c.users(link)
	if err != nil || len(users) != 1 || users[0] != engine {
		return ch, err
	}
	path := filepath.Join(c.setupFlags.root, link)
	target, err := os.Readlink(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ch, nil
	case err != nil || filepath.Base(target) != "criu-netlock" && !sameFile(path, "/proc/self/exe"):
		return ch, fmt.Errorf("%s is no longer the link that setup made: look what it is, and move it away", path)
	}
	return change{path: path, diff: fmt.Sprintf("-link %s -> %s\n", path, target), do: func() error { return os.Remove(path) }}, nil
}

func sameFile(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// linkNotes are what the user has to know of a link.
func (c *cli) linkNotes(link string) (notes []string) {
	dirs := filepath.SplitList(os.Getenv("PATH"))
	if _, _, err := realCRIU("", strings.Join(append(dirs, sbin[:]...), string(filepath.ListSeparator)), nil); err != nil {
		notes = append(notes, "no real criu was found: install it, or name it by the key criu in /etc/criu/netlock.toml")
	}
	for _, dir := range dirs {
		if dir == filepath.Dir(link) {
			return notes
		}
		if p := filepath.Join(dir, criuName); runnable(p) == "" && !sameProgram(p) {
			return append(notes, fmt.Sprintf("%s comes before %s in PATH here: an engine with this PATH does not find the link", p, link))
		}
	}
	return append(notes, fmt.Sprintf("%s is not in PATH here: an engine with this PATH does not find the link", filepath.Dir(link)))
}

// inPlace is where criu-netlock stands in CRIU's place for who looks in our PATH; "" if
// it does not.
func inPlace() string {
	if p := lookPath(criuName); p != "" && sameFile(p, "/proc/self/exe") {
		return p
	}
	return ""
}

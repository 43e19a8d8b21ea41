package setup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// File is a configuration file as it was read.
type File struct {
	Path   string // behind all links
	Text   string
	Exists bool
	// DirExists tells whether its folder is there.
	DirExists bool

	stat unix.Stat_t
}

// maxSize bounds a configuration file.
const maxSize = 1 << 20

// ReadFile reads a file, or finds that there is none. Links are followed: what they lead to is
// what CRIU reads, and the link stays.
func ReadFile(path string) (File, error) {
	f := File{Path: path}
	real, err := filepath.EvalSymlinks(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, e := os.Lstat(path); e == nil {
			return f, fmt.Errorf("%s is a link to a file that does not exist", path)
		}
		st, e := os.Stat(filepath.Dir(path))
		if e == nil && !st.IsDir() {
			return f, fmt.Errorf("%s is not a folder", filepath.Dir(path))
		}
		f.DirExists = e == nil
		return f, nil
	case err != nil:
		return f, err
	}
	f.Path, f.Exists, f.DirExists = real, true, true
	if err := unix.Stat(real, &f.stat); err != nil {
		return f, &fs.PathError{Op: "stat", Path: real, Err: err}
	}
	if f.stat.Mode&unix.S_IFMT != unix.S_IFREG {
		return f, fmt.Errorf("%s is not a regular file", real)
	}
	if f.stat.Size > maxSize {
		return f, fmt.Errorf("%s is larger than %d bytes", real, maxSize)
	}
	if f.stat.Nlink > 1 {
		return f, fmt.Errorf("%s has %d names (hard links): replacing it would part them", real, f.stat.Nlink)
	}
	b, err := os.ReadFile(real)
	f.Text = string(b)
	return f, err
}

// Made is what writing the file makes.
func (f File) Made() Made { return Made{File: !f.Exists, Dir: !f.DirExists} }

// Write replaces the file in one step, with its mode and its owner. It refuses if the
// file is no longer what was read.
func (f File) Write(text string) (err error) {
	dir := filepath.Dir(f.Path)
	if !f.DirExists {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		defer func() {
			if err != nil {
				_ = os.Remove(dir) // if it is empty
			}
		}()
	}
	unlock, err := f.hold()
	if err != nil {
		return err
	}
	defer unlock()
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(f.Path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = tmp.Close()
			_ = os.Remove(tmp.Name())
		}
	}()
	mode := os.FileMode(0o644)
	if f.Exists {
		mode = os.FileMode(f.stat.Mode & 0o777)
		if err := tmp.Chown(int(f.stat.Uid), int(f.stat.Gid)); err != nil {
			return err
		}
	}
	if err := tmp.Chmod(mode); err != nil {
		return err
	}
	if _, err := tmp.WriteString(text); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), f.Path); err != nil {
		return err
	}
	return syncDir(dir)
}

// Delete removes the file, and its folder if that was made for it and is empty.
func (f File) Delete(made Made) error {
	dir := filepath.Dir(f.Path)
	unlock, err := f.hold()
	if err != nil {
		return err
	}
	defer unlock()
	if err := os.Remove(f.Path); err != nil {
		return err
	}
	if made.Dir {
		_ = os.Remove(dir) // somebody else's files keep it
		return nil
	}
	return syncDir(dir)
}

// hold keeps other setups from writing there until it is given back. The file has to be
// what was read.
func (f File) hold() (unlock func(), err error) {
	dir := filepath.Dir(f.Path)
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("another setup is at work in %s: %w", dir, err)
	}
	b, err := os.ReadFile(f.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !f.Exists:
	case err != nil:
		return nil, err
	case !f.Exists || string(b) != f.Text:
		return nil, fmt.Errorf("%s was changed meanwhile; run it again", f.Path)
	}
	return func() { d.Close() }, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Runnable says why CRIU, which is root, should not be told to run a program; nil if it
// can be.
func Runnable(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%q is not an absolute path", path)
	}
	if strings.ContainsAny(path, " \t\r\n\"#\\") {
		return fmt.Errorf("%q has characters that CRIU's configuration cannot hold: install it elsewhere", path)
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	st, err := os.Stat(real)
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
		return fmt.Errorf("%s is not an executable file", path)
	}
	for p := real; ; p = filepath.Dir(p) {
		var s unix.Stat_t
		if err := unix.Stat(p, &s); err != nil {
			return &fs.PathError{Op: "stat", Path: p, Err: err}
		}
		sticky := p != real && s.Mode&unix.S_ISVTX != 0
		if s.Uid != 0 && int(s.Uid) != os.Geteuid() || s.Mode&0o022 != 0 && !sticky {
			return fmt.Errorf("%s can be changed by others than root, and CRIU would run it as root: install the program elsewhere", p)
		}
		if p == "/" {
			return nil
		}
	}
}

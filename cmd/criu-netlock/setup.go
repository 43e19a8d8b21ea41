package main

// The command setup: makes an engine call us, and takes that back.

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/setup"
	"github.com/criu-netlock/criu-netlock/netlock"
)

// setupFlags are the command's own.
type setupFlags struct {
	undo, dryRun, yes           bool
	tcpEstablished, replaceLock bool
	program, root               string
}

func (c *cli) setup(args []string) error {
	f := &c.setupFlags
	if len(args) != 1 {
		return inputError("name one engine: criu, runc, crun, podman, docker or lxc")
	}
	e, err := setup.Find(args[0])
	switch {
	case err != nil:
		return inputError("%v", err)
	case f.undo && (f.tcpEstablished || f.replaceLock || f.program != ""):
		return inputError("--undo takes back all that setup %s wrote: give no other option of it", e.Name)
	case f.tcpEstablished && !e.RPC:
		return inputError("--tcp-established is for runc, crun, podman and docker: %s is given it on its command line", e.Name)
	case f.replaceLock && e.RPC:
		return inputError("--replace-criu-lock is for criu and lxc: network-lock in %s crashes CRIU 3.16 to 4.2", e.File)
	}
	file, err := setup.ReadFile(filepath.Join(f.root, e.File))
	if err != nil {
		return setupError(err)
	}
	if f.undo {
		return c.undoSetup(e, file)
	}
	w := setup.Want{Engine: e.Name, Program: f.program, Script: true, TCPEstablished: f.tcpEstablished, ReplaceLock: f.replaceLock}
	if w.Program == "" {
		if w.Program, err = os.Executable(); err != nil {
			return setupError(err)
		}
	}
	if err := setup.Runnable(w.Program); err != nil {
		return inputError("%v", err)
	}
	notes, err := c.suits(e, &w)
	if err != nil {
		return err
	}
	after, err := setup.Apply(file.Text, w, file.Made())
	if err != nil {
		return inputError("%s: %v: undo by hand what was changed, or remove the block", file.Path, err)
	}
	return c.change(e, file, after, notes, func() error { return file.Write(after) })
}

// suits looks whether CRIU and the other files go with what is wanted, and returns what
// the user has to know.
func (c *cli) suits(e setup.Engine, w *setup.Want) (notes []string, err error) {
	v := (&checker{}).criu()
	note := func(format string, a ...any) { notes = append(notes, fmt.Sprintf(format, a...)) }
	switch {
	case !v.known():
		note("no CRIU was found whose version could be asked; 3.19 or newer is needed for this")
	case e.RPC && v.below(3, 19):
		return nil, inputError("CRIU %d.%d does not run action scripts of a file for %s: use 3.19 or newer, or a client that locks by RPC notifications (package netlock/action)", v.major, v.minor, e.Name)
	case w.ReplaceLock && v.below(3, 19):
		return nil, inputError("CRIU %d.%d does not know network-lock skip: use 3.19 or newer, or leave --replace-criu-lock out", v.major, v.minor)
	}
	if e.RPC {
		// CRIU reads default.conf for every client, and a script that stands there too would
		// run twice at each hook.
		if f, err := setup.ReadFile(filepath.Join(c.setupFlags.root, setup.DefaultConf)); err == nil && names(f.Text, w.Program) {
			w.Script = false
			note("%s names the program already, and CRIU reads that for %s too", setup.DefaultConf, e.Name)
		}
	} else {
		for _, path := range []string{setup.RuncConf, setup.CrunConf} {
			if f, err := setup.ReadFile(filepath.Join(c.setupFlags.root, path)); err == nil && names(f.Text, w.Program) {
				note("%s names the program too: each hook runs twice there, which is sound but slower; criu-netlock setup --undo takes it out", path)
			}
		}
	}
	switch e.Name {
	case "docker":
		if !experimental(filepath.Join(c.setupFlags.root, "/etc/docker/daemon.json")) {
			note(`docker checkpoint needs an experimental daemon: put "experimental": true into /etc/docker/daemon.json and restart docker`)
		}
		fallthrough
	case "podman", "runc", "crun":
		if !w.TCPEstablished && e.Name == "docker" {
			note("docker checkpoint cannot be told --tcp-established: with live connections, run setup docker --tcp-established")
		}
	case "lxc":
		note("or, without this file: lxc-checkpoint -A %s -s -n NAME -D DIR, and -A with -r too; not both", w.Program)
	}
	if !w.ReplaceLock && !e.RPC {
		note("CRIU's own lock stays in use beside ours, which is sound but slower; --replace-criu-lock turns it off")
	}
	return notes, nil
}

func names(text, program string) bool {
	for line := range strings.Lines(text) {
		if name, value := setup.Option(line); name == "action-script" && value == program {
			return true
		}
	}
	return false
}

// experimental tells whether Docker's daemon is configured to be.
func experimental(path string) bool {
	b, err := os.ReadFile(path)
	var conf struct {
		Experimental bool `json:"experimental"`
	}
	return err == nil && json.Unmarshal(b, &conf) == nil && conf.Experimental
}

func (c *cli) undoSetup(e setup.Engine, file setup.File) error {
	after, made, err := setup.Remove(file.Text, e.Name)
	if err != nil {
		return inputError("%s: %v: take out by hand what is not wanted", file.Path, err)
	}
	return c.change(e, file, after, nil, func() error {
		if made.File {
			return file.Delete(made)
		}
		return file.Write(after)
	})
}

// change shows a change, asks, makes it, and says what follows.
func (c *cli) change(e setup.Engine, file setup.File, after string, notes []string, do func() error) error {
	f := &c.setupFlags
	diff := setup.Diff(file.Path, file.Text, after)
	said := ""
	for _, n := range notes {
		said += "note: " + n + "\n"
	}
	switch {
	case diff == "" && f.undo:
		return printText(fmt.Sprintf("%s: nothing of criu-netlock setup %s is there\n", file.Path, e.Name))
	case diff == "":
		return printText(fmt.Sprintf("%s: nothing to change\n%s", file.Path, said))
	case f.dryRun:
		return printText(diff + said)
	case !f.yes && !isTerminal(unix.Stdin):
		return inputError("standard input is not a terminal, so nobody can be asked: give --yes to write, or --dry-run to see the change")
	}
	if err := printText(diff + said); err != nil {
		return err
	}
	if !f.yes && !confirmed() {
		return printText("nothing was changed\n")
	}
	if err := do(); err != nil {
		return setupError(err)
	}
	if f.undo {
		return printText(file.Path + ": undone\n")
	}
	return printText(file.Path + ": written; criu-netlock check tells whether all is well\n")
}

func confirmed() bool {
	if printText("Write this? [y/N] ") != nil {
		return false
	}
	line, _ := bufio.NewReader(os.Stdin).ReadString('\n') // none is no
	answer := strings.ToLower(strings.TrimSpace(line))
	return answer == "y" || answer == "yes"
}

func isTerminal(fd int) bool {
	_, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	return err == nil
}

// setupError gives an error of the file system its exit code.
func setupError(err error) error {
	kind, hint := netlock.KindInput, ""
	var path *fs.PathError
	switch {
	case errors.Is(err, fs.ErrPermission):
		kind, hint = netlock.KindPrivilege, "run it as root"
	case errors.As(err, &path):
		kind = netlock.KindOther
	}
	return &netlock.Error{Kind: kind, Op: "setup", Err: err, Hint: hint}
}

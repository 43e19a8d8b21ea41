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
	asCRIU, program, root       string
}

func (c *cli) setup(args []string) error {
	f := &c.setupFlags
	if len(args) != 1 {
		return inputError("name one engine: %s", strings.Join(setup.Names(), ", "))
	}
	e, err := setup.Find(args[0])
	switch {
	case err != nil:
		return inputError("%v", err)
	case f.undo && (f.tcpEstablished || f.replaceLock || f.asCRIU != "" || f.program != ""):
		return inputError("--undo takes back all that setup %s wrote: give no other option of it", e.Name)
	case f.tcpEstablished && !e.RPC:
		return inputError("--tcp-established is for runc, crun, podman and docker: %s is given it on its command line", e.Name)
	}
	switch {
	case f.asCRIU == "":
	case !e.RPC:
		return inputError("--as-criu is for runc, crun, podman and docker, which talk to criu swrk: what %s runs goes to CRIU unchanged", e.Name)
	case !filepath.IsAbs(f.asCRIU) || filepath.Base(f.asCRIU) != criuName || strings.ContainsAny(f.asCRIU, " \t\r\n,()"):
		return inputError("--as-criu: %.80q is not an absolute path that ends in /criu", f.asCRIU)
	}
	// network-lock in a file that is read over RPC crashes CRIU 3.16 to 4.2.
	paths := []string{e.File}
	if e.RPC && (f.replaceLock || f.undo) {
		paths = append(paths, setup.DefaultConf)
	}
	var files []setup.File
	for _, p := range paths {
		file, err := setup.ReadFile(filepath.Join(f.root, p))
		if err != nil {
			return setupError(netlock.KindInput, err)
		}
		files = append(files, file)
	}
	if f.undo {
		return c.undoSetup(e, files)
	}
	w := setup.Want{Engine: e.Name, Program: f.program, Script: f.asCRIU == "", TCPEstablished: f.tcpEstablished, ReplaceLock: f.replaceLock}
	if w.Program == "" {
		if w.Program, err = os.Executable(); err != nil {
			return setupError(netlock.KindOther, err)
		}
	}
	if err := setup.Runnable(w.Program); err != nil {
		return inputError("%v", err)
	}
	w.Aliases = c.aliases(w.Program)
	notes, err := c.suits(e, &w)
	if err != nil {
		return err
	}
	var changes []change
	var link change
	if f.asCRIU != "" {
		links, err := setup.Links(files[0].Text)
		if l := links[e.Name]; err == nil && l != "" && l != f.asCRIU {
			err = fmt.Errorf("%s was set up with --as-criu=%s: run setup --undo %s first", e.Name, l, e.Name)
		}
		record := false
		if err == nil {
			link, record, err = c.makeLink(f.asCRIU, w.Program)
		}
		if err != nil {
			return inputError("%v", err)
		}
		if record {
			w.Link = f.asCRIU
		}
		notes = append(notes, c.linkNotes(f.asCRIU)...)
	}
	for i, file := range files {
		one := w
		if i > 0 {
			one.Link = ""
		}
		if e.RPC {
			one.ReplaceLock = i > 0
			one.Script, one.TCPEstablished = w.Script && i == 0, w.TCPEstablished && i == 0
		}
		made := file.Made()
		made.Dir = made.Dir && i == 0
		after, err := setup.Apply(file.Text, one, made)
		if err != nil {
			return inputError("%s: %v", file.Path, err)
		}
		changes = append(changes, fileChange(file, after, func() error { return file.Write(after) }))
	}
	// The link comes last: the file says whose it is.
	return c.apply(e, append(changes, link), notes)
}

// aliases are the other names by which CRIU's files call the program: links to it.
func (c *cli) aliases(program string) (out []string) {
	own, err := os.Stat(program)
	if err != nil {
		return nil
	}
	for _, path := range []string{setup.DefaultConf, setup.RuncConf, setup.CrunConf} {
		f, err := setup.ReadFile(filepath.Join(c.setupFlags.root, path))
		if err != nil {
			continue
		}
		for _, o := range setup.Parse(f.Text) {
			if st, err := os.Stat(o.Value); o.Name == "action-script" && err == nil && o.Value != program && os.SameFile(own, st) {
				out = append(out, o.Value)
			}
		}
	}
	return out
}

// suits looks whether CRIU and the other files go with what is wanted, and returns what
// the user has to know.
func (c *cli) suits(e setup.Engine, w *setup.Want) (notes []string, err error) {
	v := (&checker{}).criu()
	note := func(format string, a ...any) { notes = append(notes, fmt.Sprintf(format, a...)) }
	switch {
	case !v.known() && c.setupFlags.asCRIU != "":
	case !v.known():
		note("no CRIU was found whose version could be asked; 3.19 or newer is needed for this")
	case w.Script && e.RPC && v.below(3, 19):
		return nil, inputError("CRIU %d.%d does not run action scripts of a file for %s: use 3.19 or newer, or --as-criu", v.major, v.minor, e.Name)
	case w.ReplaceLock && v.below(3, 19):
		return nil, inputError("CRIU %d.%d does not know network-lock skip: use 3.19 or newer, or leave --replace-criu-lock out", v.major, v.minor)
	}
	switch {
	case e.RPC && !w.Script:
		for _, path := range []string{setup.DefaultConf, e.File} {
			if hasOption(filepath.Join(c.setupFlags.root, path), "action-script", append(w.Aliases, w.Program)...) {
				note("%s names the program too: each hook runs besides, which is sound but slower", path)
			}
		}
	case e.RPC:
		// CRIU reads default.conf for every client, and a script that stands there too would
		// run twice at each hook.
		if hasOption(filepath.Join(c.setupFlags.root, setup.DefaultConf), "action-script", append(w.Aliases, w.Program)...) {
			w.Script = false
			note("%s names the program already, and CRIU reads that for %s too", setup.DefaultConf, e.Name)
		}
	default:
		for _, path := range []string{setup.RuncConf, setup.CrunConf} {
			if hasOption(filepath.Join(c.setupFlags.root, path), "action-script", append(w.Aliases, w.Program)...) {
				note("%s names the program too: each hook runs twice there, which is sound but slower; criu-netlock setup --undo takes it out", path)
			}
		}
	}
	switch e.Name {
	case "docker":
		if !experimental(filepath.Join(c.setupFlags.root, "/etc/docker/daemon.json")) {
			note(`docker checkpoint needs an experimental daemon: put "experimental": true into /etc/docker/daemon.json and restart docker`)
		}
		if !w.TCPEstablished {
			note("docker checkpoint cannot be told --tcp-established: with live connections, run setup docker --tcp-established")
		}
	case "lxc":
		note("or, without this file: lxc-checkpoint -A %s -s -n NAME -D DIR, and -A with -r too; not both", w.Program)
	}
	if !e.RPC {
		note("an image of a container with a network namespace of its own contains the lock: a host that restores it needs criu-netlock too, or it stays locked there")
	}
	if !w.ReplaceLock {
		note("CRIU's own lock stays in use beside ours, which is sound but slower; --replace-criu-lock turns it off")
	}
	return notes, nil
}

// experimental tells whether Docker's daemon is configured to be.
func experimental(path string) bool {
	b, err := os.ReadFile(path)
	var conf struct {
		Experimental bool `json:"experimental"`
	}
	return err == nil && json.Unmarshal(b, &conf) == nil && conf.Experimental
}

func (c *cli) undoSetup(e setup.Engine, files []setup.File) error {
	var changes []change
	links, err := setup.Links(files[0].Text)
	if err != nil {
		return inputError("%s: %v", files[0].Path, err)
	}
	if l := links[e.Name]; l != "" {
		ch, err := c.removeLink(l, e.Name)
		if err != nil {
			return inputError("%v", err)
		}
		changes = append(changes, ch)
	}
	for i := len(files) - 1; i >= 0; i-- { // the folder was made for the first
		file := files[i]
		after, made, err := setup.Remove(file.Text, e.Name)
		if err != nil {
			return inputError("%s: %v", file.Path, err)
		}
		changes = append(changes, fileChange(file, after, func() error {
			if made.File {
				return file.Delete(made)
			}
			return file.Write(after)
		}))
	}
	return c.apply(e, changes, nil)
}

// change is what becomes of one file, or of the link; nothing, if it has no diff.
type change struct {
	path, diff string
	do         func() error
}

func fileChange(f setup.File, after string, do func() error) change {
	return change{f.Path, setup.Diff(f.Path, f.Text, after), do}
}

// apply shows the changes, asks, makes them, and says what follows.
func (c *cli) apply(e setup.Engine, changes []change, notes []string) error {
	f := &c.setupFlags
	var said, diff string
	for _, n := range notes {
		said += "note: " + n + "\n"
	}
	for _, ch := range changes {
		diff += ch.diff
	}
	switch {
	case diff == "" && f.undo:
		return printText(fmt.Sprintf("nothing of criu-netlock setup %s is there\n", e.Name))
	case diff == "":
		return printText("nothing to change\n" + said)
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
	done := "written; criu-netlock check tells whether all is well"
	if f.undo {
		done = "undone"
	}
	for _, ch := range changes {
		if ch.diff == "" {
			continue
		}
		if err := ch.do(); err != nil {
			return setupError(netlock.KindOther, err)
		}
		if err := printText(ch.path + ": " + done + "\n"); err != nil {
			return err
		}
	}
	return nil
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

// setupError gives an error its exit code: kind, unless the kernel has another reason.
func setupError(kind netlock.Kind, err error) error {
	hint := ""
	if errors.Is(err, fs.ErrPermission) {
		kind, hint = netlock.KindPrivilege, "run it as root"
	} else if errors.As(err, new(*fs.PathError)) {
		kind = netlock.KindOther
	}
	return &netlock.Error{Kind: kind, Op: "setup", Err: err, Hint: hint}
}

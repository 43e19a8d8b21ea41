// Package setup writes what makes an engine call criu-netlock into CRIU's configuration
// files, and takes it out again.
//
// What it writes is one block at the end of a file, between two comments. The first
// says for which engines each option stands there and what had to be made for it, so
// that undoing needs no other record and gives the file back byte for byte. This file
// is the pure part: text in, text out.
package setup

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The files of CRIU that an engine has read.
const (
	DefaultConf = "/etc/criu/default.conf"
	RuncConf    = "/etc/criu/runc.conf"
	CrunConf    = "/etc/criu/crun.conf"
)

// Engine is a program that runs CRIU.
type Engine struct {
	Name string
	// Program tells, where it is found, that the engine is there.
	Program string
	// File is where it finds action scripts.
	File string
	// RPC: the file is read by way of an RPC request. Before CRIU 3.19 action scripts do
	// not work there, and until 4.2 network-lock crashes it.
	RPC bool
}

// Engines are those that there is something to set up for.
var Engines = []Engine{
	{"criu", "criu", DefaultConf, false},
	{"runc", "runc", RuncConf, true},
	{"crun", "crun", CrunConf, true},
	{"podman", "podman", RuncConf, true},
	{"docker", "dockerd", RuncConf, true},
	{"lxc", "lxc-checkpoint", DefaultConf, false},
}

// Names are the engines' names.
func Names() (names []string) {
	for _, e := range Engines {
		names = append(names, e.Name)
	}
	return names
}

// Find is the engine of that name.
func Find(name string) (Engine, error) {
	for _, e := range Engines {
		if e.Name == name {
			return e, nil
		}
	}
	return Engine{}, fmt.Errorf("unknown engine %.40q; want one of %s", name, strings.Join(Names(), ", "))
}

// The options that are written.
const (
	actionScript   = "action-script"
	tcpEstablished = "tcp-established"
	networkLock    = "network-lock"
)

// asCRIU is an option that stands in the first line alone: the link that was made.
const asCRIU = "as-criu="

// Want is what is to stand in a file for an engine.
type Want struct {
	Engine  string
	Program string // absolute; without blanks, which are fatal to CRIU
	// Aliases are other names of the program: one that is there need not be added.
	Aliases        []string
	Script         bool
	TCPEstablished bool
	ReplaceLock    bool // network-lock skip
	// Link is a link to the program, by the name of criu, that belongs to the engine.
	Link string
}

// Made is what has to be made before the file can be written.
type Made struct{ File, Dir bool }

const (
	begin = "# BEGIN criu-netlock setup: "
	end   = "# END criu-netlock setup"
)

// Flags of the first line.
const (
	madeFile = "(made-the-file)"
	madeDir  = "(made-the-folder)"
	madeLine = "(ended-the-last-line)"
)

// block is ours in a file.
type block struct {
	engines []string // in order
	options map[string][]string
	program string
	flags   []string
	from, n int // bytes of the text
}

// find reads the block of a text; nil if there is none.
func find(text string) (*block, error) {
	var b *block
	for at := 0; at < len(text); {
		line, _, _ := strings.Cut(text[at:], "\n")
		switch rest, ours := strings.CutPrefix(line, begin); {
		case !ours:
			if line == end && (b == nil || b.n != 0) {
				return nil, errors.New("a line \"" + end + "\" ends nothing")
			}
			if line == end {
				b.n = min(at+len(line)+1, len(text)) - b.from
			}
		case b != nil:
			return nil, errors.New("there are two blocks of criu-netlock setup")
		default:
			b = &block{options: map[string][]string{}, from: at}
			for _, w := range strings.Fields(rest) {
				if strings.HasPrefix(w, "(") {
					b.flags = append(b.flags, w)
					continue
				}
				name, opts, _ := strings.Cut(w, "=")
				b.engines = append(b.engines, name)
				b.options[name] = strings.Split(opts, ",")
			}
		}
		at += len(line) + 1
	}
	if b == nil {
		return nil, nil
	}
	if b.n == 0 {
		return nil, errors.New("the line \"" + end + "\" is gone")
	}
	for line := range strings.Lines(text[b.from : b.from+b.n]) {
		if p, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), actionScript+" "); ok {
			b.program = p
		}
	}
	if b.String() != text[b.from:b.from+b.n] {
		return nil, errors.New("what stands between \"# BEGIN criu-netlock setup\" and \"# END criu-netlock setup\" was changed by hand: mend it, or take it out")
	}
	return b, nil
}

// String is the block as it stands in a file.
func (b *block) String() string {
	var out strings.Builder
	out.WriteString(begin)
	words := make([]string, 0, len(b.engines)+len(b.flags))
	for _, e := range b.engines {
		words = append(words, e+"="+strings.Join(b.options[e], ","))
	}
	out.WriteString(strings.Join(append(words, b.flags...), " ") + "\n")
	for _, o := range []string{actionScript, tcpEstablished, networkLock} {
		if !b.has(o) {
			continue
		}
		switch o {
		case actionScript:
			o += " " + b.program
		case networkLock:
			o += " skip"
		}
		out.WriteString(o + "\n")
	}
	out.WriteString(end + "\n")
	return out.String()
}

func (b *block) has(option string) bool {
	for _, opts := range b.options {
		if slices.Contains(opts, option) {
			return true
		}
	}
	return false
}

// Apply returns the text with what is wanted in it. What is there already, by our own
// hand or by another's, is not written twice.
func Apply(text string, w Want, made Made) (string, error) {
	b, err := find(text)
	if err != nil {
		return "", err
	}
	rest := text
	if b != nil {
		rest = text[:b.from] + text[b.from+b.n:]
	}
	if w.ReplaceLock && Has(rest, networkLock) && !Has(rest, networkLock, "skip") {
		return "", errors.New("it has a line network-lock of its own, which two would contradict: change that to skip")
	}
	var opts []string
	for _, o := range []struct {
		name  string
		want  bool
		value []string
	}{{actionScript, w.Script, append(w.Aliases, w.Program)}, {tcpEstablished, w.TCPEstablished, nil}, {networkLock, w.ReplaceLock, nil}} {
		if o.want && !Has(rest, o.name, o.value...) {
			opts = append(opts, o.name)
		}
	}
	if w.Link != "" {
		opts = append(opts, asCRIU+w.Link)
	}
	if b == nil {
		if len(opts) == 0 {
			return text, nil
		}
		b = &block{options: map[string][]string{}, program: w.Program}
		if text != "" && !strings.HasSuffix(text, "\n") {
			text += "\n"
			b.flags = append(b.flags, madeLine)
		}
		if made.File {
			b.flags = append(b.flags, madeFile)
		}
		if made.Dir {
			b.flags = append(b.flags, madeDir)
		}
		b.from = len(text)
	}
	for _, o := range opts {
		if !slices.Contains(b.options[w.Engine], o) {
			b.options[w.Engine] = append(b.options[w.Engine], o)
		}
	}
	if len(b.options[w.Engine]) == 0 {
		return text, nil
	}
	if !slices.Contains(b.engines, w.Engine) {
		b.engines = append(b.engines, w.Engine)
	}
	if w.Script {
		b.program = w.Program
	}
	return text[:b.from] + b.String() + text[b.from+b.n:], nil
}

// Links are the links that a text says were made, by the engines they were made for.
func Links(text string) (map[string]string, error) {
	b, err := find(text)
	if err != nil || b == nil {
		return nil, err
	}
	links := map[string]string{}
	for engine, opts := range b.options {
		for _, o := range opts {
			if l, ok := strings.CutPrefix(o, asCRIU); ok {
				links[engine] = l
			}
		}
	}
	return links, nil
}

// Has tells whether a text has an option, with one of the values if any are given.
func Has(text, option string, values ...string) bool {
	for _, o := range Parse(text) {
		if o.Name == option && (len(values) == 0 || slices.Contains(values, o.Value)) {
			return true
		}
	}
	return false
}

// Remove returns the text without what stands there for the engine alone, and what the
// block had been made with that is to go with it.
func Remove(text, engine string) (out string, made Made, err error) {
	b, err := find(text)
	if err != nil {
		return "", made, err
	}
	if b == nil || !slices.Contains(b.engines, engine) {
		return text, made, nil
	}
	b.engines = slices.DeleteFunc(b.engines, func(e string) bool { return e == engine })
	delete(b.options, engine)
	if len(b.engines) > 0 {
		return text[:b.from] + b.String() + text[b.from+b.n:], made, nil
	}
	before, after := text[:b.from], text[b.from+b.n:]
	if slices.Contains(b.flags, madeLine) && after == "" {
		before = strings.TrimSuffix(before, "\n")
	}
	out = before + after
	if out == "" && slices.Contains(b.flags, madeFile) {
		made = Made{File: true, Dir: slices.Contains(b.flags, madeDir)}
	}
	return out, made, nil
}

// Diff shows a change as diff -u does, in one hunk.
func Diff(path, before, after string) string {
	a, b := strings.SplitAfter(before, "\n"), strings.SplitAfter(after, "\n")
	if a[len(a)-1] == "" {
		a = a[:len(a)-1]
	}
	if b[len(b)-1] == "" {
		b = b[:len(b)-1]
	}
	head := 0
	for head < len(a) && head < len(b) && a[head] == b[head] {
		head++
	}
	tail := 0
	for tail < len(a)-head && tail < len(b)-head && a[len(a)-1-tail] == b[len(b)-1-tail] {
		tail++
	}
	if head == len(a) && head == len(b) {
		return ""
	}
	const context = 3
	from, more := max(0, head-context), min(tail, context)
	var out strings.Builder
	span := func(lines []string) string {
		n := len(lines) - tail + more - from
		if n == 0 {
			return fmt.Sprintf("%d,0", from)
		}
		return fmt.Sprintf("%d,%d", from+1, n)
	}
	fmt.Fprintf(&out, "--- %s\n+++ %s\n@@ -%s +%s @@\n", path, path, span(a), span(b))
	line := func(mark, s string) {
		out.WriteString(mark + s)
		if !strings.HasSuffix(s, "\n") {
			out.WriteString("\n\\ No newline at end of file\n")
		}
	}
	for _, s := range a[from:head] {
		line(" ", s)
	}
	for _, s := range a[head : len(a)-tail] {
		line("-", s)
	}
	for _, s := range b[head : len(b)-tail] {
		line("+", s)
	}
	for _, s := range a[len(a)-tail : len(a)-tail+more] {
		line(" ", s)
	}
	return out.String()
}

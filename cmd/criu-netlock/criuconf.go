package main

// What CRIU's configuration files say about action scripts and its own lock. CRIU
// reads them in this order, and runs the action script given last first.

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
)

// criuFile is a configuration file of CRIU's, or of an engine that runs it.
type criuFile struct {
	path string
	rpc  bool // read by way of an engine's RPC request, after the others
}

func criuFiles(getenv func(string) string) []criuFile {
	files := []criuFile{{"/etc/criu/default.conf", false}}
	if home := getenv("HOME"); home != "" {
		files = append(files, criuFile{filepath.Join(home, ".criu/default.conf"), false})
	}
	if f := getenv("CRIU_CONFIG_FILE"); f != "" {
		files = append(files, criuFile{f, false})
	}
	return append(files, criuFile{"/etc/criu/runc.conf", true}, criuFile{"/etc/criu/crun.conf", true})
}

// criuOption is an option of a configuration file.
type criuOption struct {
	name, value string
	line        int
	words       int // CRIU refuses more than two
}

// parseCRIU reads a file as CRIU does: an option and its value on a line, a value with
// spaces in double quotes, # for a comment.
func parseCRIU(text string) []criuOption {
	var out []criuOption
	for i, line := range strings.Split(text, "\n") {
		w := criuWords(line)
		if len(w) == 0 {
			continue
		}
		o := criuOption{name: strings.TrimPrefix(w[0], "--"), line: i + 1, words: len(w)}
		if len(w) > 1 {
			o.value = w[1]
		}
		out = append(out, o)
	}
	return out
}

func criuWords(line string) []string {
	var (
		out    []string
		word   strings.Builder
		inWord bool
		quoted bool
	)
	end := func() {
		if inWord {
			out = append(out, word.String())
		}
		word.Reset()
		inWord = false
	}
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '\\' && quoted && i+1 < len(line):
			i++
			word.WriteByte(line[i])
		case c == '"':
			quoted, inWord = !quoted, true
		case quoted:
			word.WriteByte(c)
		case c == ' ' || c == '\t' || c == '\r':
			end()
		case c == '#' && !inWord:
			return out
		default:
			word.WriteByte(c)
			inWord = true
		}
	}
	end()
	return out
}

// script is an action script of a configuration file.
type script struct {
	path  string
	where string
	file  criuFile
	ours  bool
	bad   string // why CRIU cannot run it
}

// sameProgram tells whether a path leads to the running program, or to a copy that
// bears its name.
func sameProgram(path string) bool {
	a, err := os.Stat(path)
	if err != nil {
		return false
	}
	b, err := os.Stat("/proc/self/exe")
	return err == nil && os.SameFile(a, b) || filepath.Base(path) == "criu-netlock"
}

// runnable says why a script cannot be run; "" if it can.
func runnable(path string) string {
	st, err := os.Stat(path)
	switch {
	case !filepath.IsAbs(path):
		return "is not an absolute path"
	case errors.Is(err, os.ErrNotExist):
		return "does not exist"
	case err != nil:
		return err.Error()
	case !st.Mode().IsRegular() || st.Mode()&0o111 == 0:
		return "is not executable"
	}
	return ""
}

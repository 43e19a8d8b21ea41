package main

// What CRIU's configuration files say about action scripts and its own lock. CRIU
// reads them in this order, and runs the action script given last first.

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/setup"
)

// criuFile is a configuration file of CRIU's, or of an engine that runs it.
type criuFile struct {
	path string
	rpc  bool // read by way of an engine's RPC request, after the others
}

func criuFiles(getenv func(string) string) []criuFile {
	files := []criuFile{{setup.DefaultConf, false}}
	if home := getenv("HOME"); home != "" {
		files = append(files, criuFile{filepath.Join(home, ".criu/default.conf"), false})
	}
	if f := getenv("CRIU_CONFIG_FILE"); f != "" {
		files = append(files, criuFile{f, false})
	}
	return append(files, criuFile{setup.RuncConf, true}, criuFile{setup.CrunConf, true})
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

package testbed

import (
	"context"
	"errors"
	"os"
	"path/filepath"
)

// Setup makes an engine use criu-netlock, and CRIU no lock of its own, as a user does.
func (s *Session) Setup(ctx context.Context, engine string, flags ...string) error {
	args := append([]string{BinDir + "/criu-netlock", "setup", engine, "--replace-criu-lock", "--yes"}, flags...)
	if engine != "lxc" && engine != "criu" { // these are told on their command lines
		args = append(args, "--tcp-established")
	}
	_, err := s.Run(ctx, args...)
	return err
}

// Undo takes back what Setup wrote.
func (s *Session) Undo(ctx context.Context, engine string) error {
	_, err := s.Run(ctx, BinDir+"/criu-netlock", "setup", "--undo", engine, "--yes")
	return err
}

// ConfigurationFiles are the names in /etc/criu and what stands there.
func (s *Session) ConfigurationFiles() (map[string]string, error) {
	files := map[string]string{}
	dir := filepath.Join(s.Work, "criu")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		files[e.Name()] = string(b)
	}
	return files, nil
}

// Relay adds a script that runs after those that Setup has set.
func (s *Session) Relay(engine, script string) error {
	name := "runc.conf"
	switch engine {
	case "criu", "lxc":
		name = "default.conf"
	case "crun":
		name = "crun.conf"
	}
	name = filepath.Join(s.Work, "criu", name)
	b, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// CRIU runs the one given last first.
	return os.WriteFile(name, []byte("action-script "+script+"\n"+string(b)), 0o644)
}

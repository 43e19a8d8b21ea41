package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Setup makes an engine use criu-netlock, and CRIU no lock of its own, through
// CRIU's configuration files. What LXC takes on its command line alone, the engine
// gives it there.
func (s *Session) Setup(_ context.Context, engine string, _ ...string) error {
	files := map[string]string{"default.conf": "network-lock skip\n"}
	switch engine {
	case "lxc":
	case "podman", "docker":
		files["runc.conf"] = "tcp-established\naction-script " + BinDir + "/criu-netlock\n"
	default:
		return fmt.Errorf("setup: no engine %q", engine)
	}
	return writeFiles(filepath.Join(s.Work, "criu"), files)
}

// Relay adds a script that runs after those that Setup has set.
func (s *Session) Relay(engine, script string) error {
	name := "runc.conf"
	if engine == "lxc" {
		name = "default.conf"
	}
	name = filepath.Join(s.Work, "criu", name)
	b, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// CRIU runs the one given last first.
	return os.WriteFile(name, []byte("action-script "+script+"\n"+string(b)), 0o644)
}

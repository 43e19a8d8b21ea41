package testbed

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
)

// BuildLibrary puts the C library into the session's directory of programs, as a user makes
// it, and there, as name, the C program that drives CRIU by it (e2e/libcriu). The current
// directory has to be in the module.
func (s *Session) BuildLibrary(ctx context.Context, name, guard string) error {
	top, err := moduleRoot(ctx)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "make", "--no-print-directory", "-C", top, "lib", "LIBDIR="+s.programs())
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make lib: %w", errOutput(err, out))
	}
	return s.CompileC(ctx, name, filepath.Join(top, "e2e/libcriu/main.c"), `-DGUARD="`+guard+`"`)
}

// CompileC compiles a C program on this machine, with the library and against libcriu of
// the session, and puts it where the session has its programs.
func (s *Session) CompileC(ctx context.Context, name, source string, flags ...string) error {
	bin := s.programs()
	libs, err := filepath.Glob(s.Path("/usr/lib/*/libcriu.so"))
	if err != nil || len(libs) != 1 {
		return errors.Join(err, errors.New("where is libcriu.so?"))
	}
	args := append(flags, "-Wall", "-Wextra", "-Werror", "-pthread", "-I"+bin, "-isystem", s.Path("/usr/include"), "-o", filepath.Join(bin, name), source,
		"-L"+bin, "-lcriunetlock", "-L"+filepath.Dir(libs[0]), "-lcriu", "-Wl,--allow-shlib-undefined", "-Wl,-rpath,$ORIGIN")
	if out, err := exec.CommandContext(ctx, "gcc", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("gcc %s: %w", strings.Join(args, " "), errOutput(err, out))
	}
	return nil
}

func (s *Session) programs() string { return filepath.Join(s.Work, "bin") }

func moduleRoot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("go list -m: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

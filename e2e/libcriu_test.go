package e2e

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// theLibrary is made when the first test needs it.
var theLibrary struct {
	once sync.Once
	err  error
}

// putLibcriu puts the C library and the C program that uses it where the session has its
// programs.
func putLibcriu(t *testing.T) *lab {
	t.Helper()
	netlocktest.Need(t, "gcc", "make")
	l := openLab(t)
	theLibrary.once.Do(func() {
		bin := filepath.Join(l.Work, "bin")
		// As a user makes it.
		out, err := exec.CommandContext(t.Context(), "make", "--no-print-directory", "-C", "..", "lib", "LIBDIR="+bin).CombinedOutput()
		if err != nil {
			theLibrary.err = errors.New(string(out))
			return
		}
		theLibrary.err = l.compile(t.Context(), "libcriu", "libcriu/main.c", `-DGUARD="`+oursPath+`"`)
	})
	if theLibrary.err != nil {
		t.Fatal(theLibrary.err)
	}
	return l
}

// compile compiles a C program on this machine, against libcriu of the session.
func (l *lab) compile(ctx context.Context, name, source string, flags ...string) error {
	bin := filepath.Join(l.Work, "bin")
	libs, err := filepath.Glob(l.Path("/usr/lib/*/libcriu.so"))
	if err != nil || len(libs) != 1 {
		return errors.Join(err, errors.New("where is libcriu.so?"))
	}
	args := append(flags, "-Wall", "-Wextra", "-Werror", "-pthread", "-I"+bin, "-isystem", l.Path("/usr/include"), "-o", filepath.Join(bin, name), source,
		"-L"+bin, "-lcriunetlock", "-L"+filepath.Dir(libs[0]), "-lcriu", "-Wl,--allow-shlib-undefined", "-Wl,-rpath,$ORIGIN")
	out, err := exec.CommandContext(ctx, "gcc", args...).CombinedOutput()
	if err != nil {
		return errors.New("gcc " + strings.Join(args, " ") + ": " + string(out))
	}
	return nil
}

package e2e

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
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

// A thread that is not the program's first can have a checkpoint too.
func TestLibcriuThread(t *testing.T) {
	r := newRPCRun(t, "libcriu", "skip")
	r.client("libcriu", "-thread")
	r.dump("", false)
	r.dead()
	r.restore("")
	r.finish()
}

// The program in the documentation is one that works.
func TestLibcriuExample(t *testing.T) {
	r := newRPCRun(t, "libcriu", "skip")
	doc, err := os.ReadFile("../docs/libcriu.md")
	if err != nil {
		t.Fatal(err)
	}
	_, program, ok := strings.Cut(string(doc), "```c\n")
	program, _, end := strings.Cut(program, "```\n")
	if !ok || !end {
		t.Fatal("docs/libcriu.md has no program")
	}
	dir := filepath.Join(r.l.Work, "libcriu-example")
	source := filepath.Join(t.TempDir(), "checkpoint.c")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(source, []byte(program), 0o644), r.l.compile(r.ctx, "checkpoint", source)); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(r.l.Work, "criu/default.conf")
	if err := os.WriteFile(conf, []byte("action-script "+relayPath+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(conf)
	r.l.hooks.Handle(r.watch)
	_, err = r.l.RunIn(r.ctx, r.net.Path(), testbed.BinDir+"/checkpoint", "dump", strconv.Itoa(r.e.PID()), testbed.WorkDir+"/libcriu-example")
	if err = errors.Join(append(r.errs, err)...); err != nil {
		t.Fatal(err)
	}
	var hooks []string
	for _, h := range r.l.hooks.Seen() {
		hooks = append(hooks, h.Action)
	}
	want(t, hooks, "pre-dump", "network-lock", "post-dump", "network-unlock")
	r.l.hooks.Handle(nil)
	r.finish()
}

// Mode hold from C: a dump that leaves the tasks running, where the image has no rules in
// it, and a restore.
func TestLibcriuHolds(t *testing.T) {
	putLibcriu(t)
	h := newHoldingOf(t, "libcriu", "skip", "hold", relayPath)
	h.e.(*testbed.CLI).Client = []string{libcriuPath, "-empty-net"}
	h.stream(3)
	h.whole("after 3 dumps")
	if log, err := h.e.Log(); err != nil || !strings.Contains(log, "mode=hold delivered=") {
		t.Errorf("the log of a dump, %v:\n%s", err, ofInterest(log))
	}
	h.e.(*testbed.CLI).Client = []string{libcriuPath}
	if err := h.e.Dump(h.ctx, false); err != nil {
		t.Fatal(err)
	}
	h.sendAt("post-restore")
	if err := h.e.Restore(h.ctx); err != nil {
		t.Fatal(err)
	}
	h.whole("after the restore")
	if log, err := h.e.Log(); err != nil || !strings.Contains(log, "mode=hold delivered=") {
		t.Errorf("the log of the restore, %v:\n%s", err, ofInterest(log))
	}
}

package e2e

import (
	"errors"
	"os"
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
		theLibrary.err = l.BuildLibrary(t.Context(), "libcriu", oursPath)
	})
	if theLibrary.err != nil {
		t.Fatal(theLibrary.err)
	}
	return l
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
	if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(source, []byte(program), 0o644), r.l.CompileC(r.ctx, "checkpoint", source)); err != nil {
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

package netlock

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock/internal/proc"
)

func TestCommentRoundTrip(t *testing.T) {
	now := time.Date(2026, 11, 23, 15, 13, 55, 999, time.UTC)
	for _, name := range []string{"criu", "", "a b", "x\"; accept\n", strings.Repeat("n", 40), "naïve", "$(id)"} {
		text := Comment(now, Caller{PID: 42, Name: name})
		if len(text) > 127 {
			t.Errorf("%q: %d bytes, nft's limit is 127", text, len(text))
		}
		if strings.ContainsAny(text, "\"\n\\") {
			t.Errorf("%q would end nft's string", text)
		}
		since, c, err := ParseComment(text)
		if err != nil || !since.Equal(now.Truncate(time.Second)) || c.PID != 42 || c.Name != cleanName(name) {
			t.Errorf("%q reads back as %v %v %v", text, since, c, err)
		}
	}
	whole := Caller{PID: 1 << 22, Name: strings.Repeat("n", 15), Start: 1<<64 - 1, Task: 1 << 22, TaskStart: 1<<64 - 1, Boot: "0123abceffffffc", Fallback: FallbackKeep}
	if text := Comment(now, whole); len(text) > 127 {
		t.Errorf("%q: %d bytes, nft's limit is 127", text, len(text))
	} else if _, c, err := ParseComment(text); err != nil || c != whole {
		t.Errorf("%q reads back as %+v, %v", text, c, err)
	}
	for _, bad := range []string{"", "criu-netlock", "criu-netlock 2 2026-11-23T15:13:55Z 1 criu", "criu-netlock 1 yesterday 1 criu",
		"criu-netlock 1 2026-11-23T15:13:55Z x criu", "criu-netlock 1 2026-11-23T15:13:55Z 1 a\"b", "criu-netlock 1 2026-11-23T15:13:55Z 1 criu more",
		"criu-netlock 1 2026-11-23T15:13:55Z 1 criu x 1 1 b", "criu-netlock 1 2026-11-23T15:13:55Z 1 criu 1 x 1 b",
		"criu-netlock 1 2026-11-23T15:13:55Z 1 criu 1 1 -1 b", "criu-netlock 1 2026-11-23T15:13:55Z 1 criu 1 1 1 a(b", "criu-netlock 1 2026-11-23T15:13:55Z 1 criu 1 1 1",
		"criu-netlock 1 2026-11-23T15:13:55Z 1 criu 1 1 1 b x", "criu-netlock 1 2026-11-23T15:13:55Z 1 criu 1 1 1 b u u", "criu-netlock 1 2026-11-23T15:13:55Z 1 criu 1 1 1 b "} {
		if _, _, err := ParseComment(bad); err == nil {
			t.Errorf("%q passes for our metadata", bad)
		}
	}
}

func TestCommentNames(t *testing.T) {
	for name, want := range map[string]string{
		"criu": "criu", "": "-", "a b\"c\nCOMMIT": "a_b_c_COMMIT", "much-too-long-a-name": "much-too-long-a", "é": "__",
	} {
		if _, c, err := ParseComment(Comment(time.Now(), Caller{Name: name})); err != nil || c.Name != want {
			t.Errorf("%q became %q, %v", name, c.Name, err)
		}
	}
}

// The caller and its task are known again by their start times, not by their pids alone.
func TestCallerOf(t *testing.T) {
	c := CallerOf(os.Getpid()).For(os.Getppid())
	if c.PID != os.Getpid() || c.Name == "" || c.Start == 0 || len(c.Boot) != bootDigits+8 || c.Task != os.Getppid() || c.TaskStart == 0 {
		t.Errorf("%+v", c)
	}
}

func TestUse(t *testing.T) {
	const boot = "0123abceffffffc"
	tasks := map[int]proc.Stat{
		10: {Start: 100, State: 'S'}, 11: {Start: 100, State: 'Z'}, 20: {Start: 200, State: 'R'}, 23: {Start: 200, State: 'S'}, 21: {Start: 200, State: 'T'}, 22: {Start: 200, State: 'D'},
	}
	stat := func(pid int) (proc.Stat, error) {
		if st, ok := tasks[pid]; ok {
			return st, nil
		}
		return proc.Stat{}, os.ErrNotExist
	}
	caller := func(pid int, start uint64, task int, taskStart uint64) Caller {
		return Caller{PID: pid, Name: "criu", Start: start, Task: task, TaskStart: taskStart, Boot: boot}
	}
	after := func(f Fallback, c Caller) Caller { c.Fallback = f; return c }
	for name, c := range map[string]struct {
		c         Caller
		inhabited bool
		want      Use
	}{
		"CRIU dead, task paused":           {caller(9, 100, 23, 200), true, Stopped},
		"a restore at work":                {after(FallbackUnlock, caller(10, 100, 20, 200)), true, InUse},
		"a restore failed, task dead":      {after(FallbackUnlock, caller(9, 100, 19, 200)), false, Stale},
		"a restore failed, task there":     {after(FallbackUnlock, caller(9, 100, 20, 200)), true, Stale},
		"a restore left its task stopped":  {after(FallbackUnlock, caller(9, 100, 21, 200)), true, Stopped},
		"a restore failed, to be kept":     {after(FallbackKeep, caller(9, 100, 19, 200)), false, Waiting},
		"the same, task there":             {after(FallbackKeep, caller(9, 100, 20, 200)), true, Waiting},
		"CRIU at work":                     {caller(10, 100, 20, 200), true, InUse},
		"its pid is another's":             {caller(10, 99, 20, 200), true, Stale},
		"CRIU a zombie":                    {caller(11, 100, 20, 200), true, Stale},
		"CRIU dead, task runs":             {caller(9, 100, 20, 200), true, Stale},
		"CRIU dead, task in a system call": {caller(9, 100, 22, 200), true, Stale},
		"CRIU dead, task stopped":          {caller(9, 100, 21, 200), true, Stopped},
		"CRIU dead, task dead":             {caller(9, 100, 19, 200), false, Waiting},
		"the task's pid is another's":      {caller(9, 100, 20, 201), false, Waiting},
		"CRIU could not be read":           {caller(9, 0, 20, 200), true, Unknown},
		"the task could not be read":       {caller(9, 100, 20, 0), true, Unknown},
		"by hand":                          {caller(9, 100, 0, 0), true, ByHand},
		"no metadata":                      {Caller{}, true, Unknown},
		"metadata without a boot":          {Caller{PID: 9, Name: "criu"}, true, Unknown},
		"another pid namespace":            {Caller{PID: 9, Task: 20, Boot: "0123abcf0000001"}, true, Unknown},
		"of an image, restored without us": {Caller{PID: 9, Task: 20, Boot: "fffffffeffffffc"}, true, Stale},
		"of an image, not restored":        {Caller{PID: 9, Task: 20, Boot: "fffffffeffffffc"}, false, Waiting},
	} {
		if got := useOf(c.c, boot, stat, func() bool { return c.inhabited }, func(pid int) bool { return pid == 23 }); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
	if got := useOf(caller(10, 100, 20, 200), "", stat, nil, nil); got != Unknown {
		t.Errorf("without a boot id: %s", got)
	}
}

// One that is at work is alive, and works on a task.
func TestCallerWorks(t *testing.T) {
	c := CallerOf(os.Getpid())
	works := c.For(os.Getppid())
	dead := works
	dead.Start++
	elsewhere := works
	elsewhere.Boot = "0000000" + works.Boot[bootDigits:]
	for name, x := range map[string]struct {
		c    Caller
		want bool
	}{"at work": {works, true}, "by hand": {c, false}, "dead": {dead, false}, "of another boot": {elsewhere, false}, "unknown": {Caller{}, false}} {
		if x.c.Works() != x.want {
			t.Errorf("%s: %v", name, !x.want)
		}
	}
}

func TestCallerIs(t *testing.T) {
	c := CallerOf(os.Getpid())
	if !c.Is(c.For(os.Getppid())) {
		t.Error("a process is not itself")
	}
	for name, o := range map[string]Caller{
		"another start": {PID: c.PID, Start: c.Start + 1, Boot: c.Boot}, "another boot": {PID: c.PID, Start: c.Start, Boot: "x"},
		"another pid": {PID: c.PID + 1, Start: c.Start, Boot: c.Boot}, "nobody": {},
	} {
		if c.Is(o) {
			t.Errorf("%s: the same", name)
		}
	}
	if (Caller{}).Is(Caller{}) {
		t.Error("two unknown ones are the same")
	}
}

package netlock

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock/internal/proc"
)

// FormatVersion is the version of a lock's rules and metadata. A lock of another
// version is not an intact one.
const FormatVersion = "1"

// Caller is who asked for a lock, and for which task; it is written into the rule set.
// It tells, later and from there alone, whether the checkpoint is over.
type Caller struct {
	PID  int    `json:"pid"`
	Name string `json:"name"`
	// Start is when the caller started, in clock ticks since the boot: a pid alone is
	// some later task's too. 0 if unknown.
	Start uint64 `json:"-"`
	// Task is the root task of what is checkpointed, TaskStart its Start; 0 for a lock
	// that was asked for by hand.
	Task      int    `json:"-"`
	TaskStart uint64 `json:"-"`
	// Boot tells where the pids mean something: the first digits of the boot's id, and
	// the pid namespace. In an image they are another host's.
	Boot string `json:"-"`
	// Fallback is what becomes of a lock that a restore has made where there was none, should
	// that fail; empty for the others.
	Fallback Fallback `json:"-"`
}

// Fallback is a restore's way back.
type Fallback string

// The fallbacks.
const (
	FallbackUnlock Fallback = "u"
	FallbackKeep   Fallback = "k"
)

// CallerOf is the task of that pid as a Caller.
func CallerOf(pid int) Caller {
	st, _ := proc.StatOf(pid)
	return Caller{PID: pid, Name: st.Comm, Start: st.Start, Boot: bootID()}
}

// For returns the caller as one that acts for a task.
func (c Caller) For(task int) Caller {
	st, _ := proc.StatOf(task)
	c.Task, c.TaskStart = task, st.Start
	return c
}

// Failed tells whether the caller was a restore that has failed, and that was to leave the
// namespace unlocked, as it was before.
func (c Caller) Failed() bool { return c.Fallback == FallbackUnlock && c.gone() }

// Over tells whether the checkpoint is over that the lock was for, so that whoever looks for stale
// ones takes it off: who comes next has to make it their own.
func (c Caller) Over() bool {
	if c.Task == 0 || c.Fallback == FallbackKeep || !c.gone() {
		return false
	}
	st, ok := alive(c.Task, c.TaskStart, proc.StatOf)
	return c.Fallback == FallbackUnlock || ok && st.State != 'T'
}

// Works tells whether the caller is alive, and at work on a task.
func (c Caller) Works() bool {
	if c.Task == 0 || c.Start == 0 || c.Boot == "" || c.Boot != bootID() {
		return false
	}
	_, ok := alive(c.PID, c.Start, proc.StatOf)
	return ok
}

// gone tells whether the caller is dead, as far as is known.
func (c Caller) gone() bool {
	if c.Start == 0 || c.Boot == "" || c.Boot != bootID() {
		return false
	}
	_, ok := alive(c.PID, c.Start, proc.StatOf)
	return !ok
}

func alive(pid int, start uint64, stat func(int) (proc.Stat, error)) (proc.Stat, bool) {
	st, err := stat(pid)
	return st, err == nil && st.Start == start && st.State != 'Z' && st.State != 'X'
}

// Is tells whether both are the same process, and that is known.
func (c Caller) Is(o Caller) bool {
	return c.PID == o.PID && c.Start == o.Start && c.Boot == o.Boot && c.Start != 0
}

// ParentOf is the pid of a task's parent; 0 if it has none that is to be seen.
func ParentOf(pid int) int {
	st, _ := proc.StatOf(pid)
	return st.PPID
}

// bootDigits of a boot's id are enough to tell a host from the next, and leave room for
// the pid namespace's eight.
const bootDigits = 7

func bootID() string {
	var st unix.Stat_t
	s, err := proc.Read("/proc/sys/kernel/random/boot_id")
	if err != nil || len(s) < bootDigits || unix.Stat("/proc/self/ns/pid", &st) != nil {
		return ""
	}
	return s[:bootDigits] + fmt.Sprintf("%08x", uint32(st.Ino))
}

// Use says what a lock is for, as far as its metadata and the tasks of this host tell.
type Use string

// The uses.
const (
	// InUse: the caller is alive.
	InUse Use = "in use"
	// ByHand: no CRIU asked for it, and no CRIU ends it.
	ByHand Use = "by hand"
	// Waiting: the caller is gone and so is the task: it was dumped, and its peers are
	// not to be reset before it is restored. Or a restore has failed, of which the configuration
	// keeps the lock.
	Waiting Use = "waiting for a restore"
	// Stopped: the caller is gone, the task was left stopped, or is paused.
	Stopped Use = "stopped"
	// Stale: the caller is gone and the task runs, or was to be restored where nothing was locked
	// before: the checkpoint is over.
	Stale Use = "stale"
	// Guarded: the same, and its guard is still there: it is about to unlock, or tries again
	// what has failed, or waits for a paused task. UseOf knows nothing of guards.
	Guarded Use = "left to its guard"
	// Unknown: the metadata are missing or not whole, or of another pid namespace.
	Unknown Use = "unknown"
)

// UseOf tells what the lock of a State is for. inhabited tells whether a task is in the
// namespace; it is asked only of a lock that came with an image from another boot. frozen tells
// whether somebody has paused a task.
func UseOf(st State, inhabited func() bool, frozen func(pid int) bool) Use {
	return useOf(st.Caller, bootID(), proc.StatOf, inhabited, frozen)
}

func useOf(c Caller, boot string, stat func(int) (proc.Stat, error), inhabited func() bool, frozen func(int) bool) Use {
	switch {
	case c.Boot == "" || boot == "":
		return Unknown
	case c.Task == 0:
		return ByHand
	case c.Boot != boot && strings.HasPrefix(c.Boot, boot[:bootDigits]):
		return Unknown
	case c.Boot != boot:
		// CRIU has put the rules of an image back, and our hooks, which would have made
		// them their own, were not called.
		if inhabited() {
			return Stale
		}
		return Waiting
	}
	if c.Start == 0 || c.TaskStart == 0 {
		return Unknown // /proc could not be read when the lock was made: that is nobody's death
	}
	if _, ok := alive(c.PID, c.Start, stat); ok {
		return InUse
	}
	switch st, ok := alive(c.Task, c.TaskStart, stat); {
	case c.Fallback == FallbackKeep:
		return Waiting
	case !ok && c.Fallback == FallbackUnlock:
		return Stale
	case !ok:
		return Waiting
	case st.State == 'T', frozen(c.Task):
		return Stopped
	}
	return Stale
}

// Comment is a lock's metadata: format, time and caller. Every backend puts it into
// the rule set as a comment, so that it travels through an image too. It has at most
// 127 bytes, nft's limit.
func Comment(now time.Time, c Caller) string {
	words := []string{"criu-netlock", FormatVersion, now.UTC().Format(time.RFC3339), strconv.Itoa(c.PID), cleanName(c.Name)}
	if c.Boot != "" {
		words = append(words, strconv.FormatUint(c.Start, 10), strconv.Itoa(c.Task), strconv.FormatUint(c.TaskStart, 10), cleanName(c.Boot))
		if c.Fallback != "" {
			words = append(words, string(c.Fallback))
		}
	}
	return strings.Join(words, " ")
}

// ParseComment reads what Comment wrote.
func ParseComment(s string) (since time.Time, c Caller, err error) {
	f := strings.Split(s, " ")
	if (len(f) != 5 && len(f) != 9 && len(f) != 10) || f[0] != "criu-netlock" || f[1] != FormatVersion {
		return since, c, errors.New("no metadata of ours")
	}
	if since, err = time.Parse(time.RFC3339, f[2]); err != nil {
		return since, c, errors.New("metadata with a wrong time")
	}
	bad := func() (time.Time, Caller, error) { return since, Caller{}, errors.New("metadata with a wrong caller") }
	if c.PID, err = strconv.Atoi(f[3]); err != nil || f[4] != cleanName(f[4]) {
		return bad()
	}
	c.Name = f[4]
	if len(f) == 5 {
		return since, c, nil
	}
	if c.Start, err = strconv.ParseUint(f[5], 10, 64); err != nil {
		return bad()
	}
	if c.Task, err = strconv.Atoi(f[6]); err != nil {
		return bad()
	}
	if c.TaskStart, err = strconv.ParseUint(f[7], 10, 64); err != nil || f[8] != cleanName(f[8]) {
		return bad()
	}
	c.Boot = f[8]
	if len(f) == 10 {
		if c.Fallback = Fallback(f[9]); c.Fallback != FallbackUnlock && c.Fallback != FallbackKeep {
			return bad()
		}
	}
	return since, c, nil
}

// cleanName keeps a task's name, which the task chooses, from ending the comment or
// the line when a tool prints it.
func cleanName(s string) string {
	b := []byte(s)
	for i, c := range b {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '_', c == '-':
		default:
			b[i] = '_'
		}
	}
	if len(b) == 0 {
		return "-"
	}
	return string(b[:min(len(b), 15)])
}

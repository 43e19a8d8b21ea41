package netlock

import (
	"errors"
	"strconv"
	"strings"
	"time"

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
	// Boot are the first digits of the boot's id: in an image the pids are another
	// host's.
	Boot string `json:"-"`
}

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

// ParentOf is the pid of a task's parent; 0 if it has none that is to be seen.
func ParentOf(pid int) int {
	st, _ := proc.StatOf(pid)
	return st.PPID
}

// bootDigits of a boot's id are enough to tell a host from the next, and leave room.
const bootDigits = 8

func bootID() string {
	s, err := proc.Read("/proc/sys/kernel/random/boot_id")
	if err != nil || len(s) < bootDigits {
		return ""
	}
	return s[:bootDigits]
}

// Comment is a lock's metadata: format, time and caller. Every backend puts it into
// the rule set as a comment, so that it travels through an image too. It has at most
// 127 bytes, nft's limit.
func Comment(now time.Time, c Caller) string {
	words := []string{"criu-netlock", FormatVersion, now.UTC().Format(time.RFC3339), strconv.Itoa(c.PID), cleanName(c.Name)}
	if c.Boot != "" {
		words = append(words, strconv.FormatUint(c.Start, 10), strconv.Itoa(c.Task), strconv.FormatUint(c.TaskStart, 10), cleanName(c.Boot))
	}
	return strings.Join(words, " ")
}

// ParseComment reads what Comment wrote.
func ParseComment(s string) (since time.Time, c Caller, err error) {
	f := strings.Split(s, " ")
	if (len(f) != 5 && len(f) != 9) || f[0] != "criu-netlock" || f[1] != FormatVersion {
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

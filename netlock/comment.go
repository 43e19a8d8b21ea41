package netlock

import (
	"errors"
	"strconv"
	"strings"
	"time"
)

// FormatVersion is the version of a lock's rules and metadata. A lock of another
// version is not an intact one.
const FormatVersion = "1"

// Comment is a lock's metadata: format, time and caller. Every backend puts it into
// the rule set as a comment, so that it travels through an image too.
func Comment(now time.Time, c Caller) string {
	return strings.Join([]string{
		"criu-netlock", FormatVersion, now.UTC().Format(time.RFC3339), strconv.Itoa(c.PID), cleanName(c.Name)}, " ")
}

// ParseComment reads what Comment wrote.
func ParseComment(s string) (since time.Time, c Caller, err error) {
	f := strings.Split(s, " ")
	if len(f) != 5 || f[0] != "criu-netlock" || f[1] != FormatVersion {
		return since, c, errors.New("no metadata of ours")
	}
	if since, err = time.Parse(time.RFC3339, f[2]); err != nil {
		return since, c, errors.New("metadata with a wrong time")
	}
	if c.PID, err = strconv.Atoi(f[3]); err != nil || f[4] != cleanName(f[4]) {
		return since, Caller{}, errors.New("metadata with a wrong caller")
	}
	c.Name = f[4]
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

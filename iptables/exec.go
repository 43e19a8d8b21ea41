package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// runner runs one command in the calling thread's namespace and returns what it
// prints: the seam below which the tests count processes and make them fail.
type runner func(ctx context.Context, tool, stdin string, args ...string) (stdout string, err error)

// runCommand runs a tool by its absolute path and with a fixed environment: what a
// user exports (XTABLES_LIBDIR, PATH, LANG) must not change what is locked.
func runCommand(ctx context.Context, tool, stdin string, args ...string) (string, error) {
	path := findTool(tool)
	if path == "" {
		return "", fmt.Errorf("there is no %s: install the package iptables", tool)
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	cmd.Stdin = strings.NewReader(stdin)
	cmd.WaitDelay = 100 * time.Millisecond
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err == nil {
		return stdout.String(), nil
	}
	if e := ctx.Err(); e != nil {
		return "", e
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return "", &toolError{tool: tool, code: exit.ExitCode(), text: oneLine(stderr.String())}
	}
	return "", err
}

// toolError is the failure of a tool that ran.
type toolError struct {
	tool string
	code int
	text string
}

func (e *toolError) Error() string { return fmt.Sprintf("%s: exit %d: %s", e.tool, e.code, e.text) }

// busy: legacy gave up waiting for /run/xtables.lock.
func (e *toolError) busy() bool {
	return e.code == 4 && strings.Contains(e.text, "xtables lock")
}

// unsupported: the kernel lacks the table, a match or the whole of iptables.
func (e *toolError) unsupported() bool {
	for _, s := range []string{"Table does not exist", "do you need to insmod", "Protocol not supported", "Protocol not available",
		"No chain/target/match by that name", "Extension", "Couldn't load match", "is incompatible", "Could not fetch rule set generation id: Invalid argument"} {
		if strings.Contains(e.text, s) {
			return true
		}
	}
	return false
}

package iptables

// Running iptables' programs: which, how, and what their words on stderr mean.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
)

// runner runs one program in the calling thread's namespace and returns what it
// prints: the seam below which the tests count processes and make them fail. A
// program that ends with another code than 0 is a *toolError.
type runner func(ctx context.Context, path, stdin string, args ...string) (stdout string, err error)

// runCommand runs a program with a fixed environment: what a user exports must not
// change what is locked. XTABLES_LIBDIR breaks the programs, and XTABLES_LOCKFILE
// has them lock another file than everybody else.
func runCommand(ctx context.Context, path, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	cmd.Dir = "/"
	cmd.Stdin = strings.NewReader(stdin)
	// For what it has written, once it has ended: on a busy machine we may be long in reading
	// that, and then it has failed for us.
	cmd.WaitDelay = time.Second
	// A restore that waits for the xtables lock must not lock the namespace after the
	// one who wanted it is dead. The thread that starts the program waits for it too.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err == nil {
		return stdout.String(), nil
	}
	if e := ctx.Err(); e != nil {
		return "", fmt.Errorf("%s was ended: %w", path, e)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return "", &toolError{tool: filepath.Base(path), code: exit.ExitCode(), text: stderr.String()}
	}
	return "", fmt.Errorf("run %s: %w", path, err)
}

// toolDirs is where the programs are looked for: never in the caller's PATH.
var toolDirs = [...]string{"/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin"}

// findTool returns the path of a variant's program: the one with the variant's name,
// or the plain one where that is the variant's.
func findTool(v Variant, f family, verb string) (string, error) {
	name := f.prefix + "-" + string(v) + "-" + verb
	for _, dir := range toolDirs {
		if p := dir + "/" + name; unix.Access(p, unix.X_OK) == nil {
			return p, nil
		}
	}
	// Before iptables 1.8 there was no other variant than legacy, and no name for it.
	real := map[Variant][]string{Legacy: {"xtables-legacy-multi", "xtables-multi"}, NFT: {"xtables-nft-multi"}}
	for _, dir := range toolDirs {
		p := dir + "/" + f.prefix + "-" + verb
		if to, err := filepath.EvalSymlinks(p); err == nil && slices.Contains(real[v], filepath.Base(to)) {
			return p, nil
		}
	}
	return "", fmt.Errorf("%w: there is no %s in %s", netlock.ErrUnsupported, name, strings.Join(toolDirs[:], ", "))
}

// waitSeconds is the argument of -w: how long a legacy program may wait for the
// xtables lock. Without it, or with a bare -w, it waits for ever.
func waitSeconds(ctx context.Context) string {
	n := 5
	if d, ok := ctx.Deadline(); ok {
		n = int(time.Until(d) / time.Second)
	}
	return strconv.Itoa(max(1, n))
}

// toolError is the failure of a program that ran.
type toolError struct {
	tool string
	code int
	text string // stderr
}

// Error is what the program said, in one line.
func (e *toolError) Error() string {
	var out []string
	for _, l := range strings.Split(e.text, "\n") {
		l = strings.TrimSpace(l)
		if l != "" && !strings.HasPrefix(l, "Try `") && !strings.HasPrefix(l, "Error occurred at line") && !strings.HasPrefix(l, "# Warning") {
			out = append(out, l)
		}
	}
	s := strings.ToValidUTF8(strings.Join(out, "; "), "?")
	if len(s) > 300 {
		s = s[:300] + "…"
	}
	return fmt.Sprintf("%s: exit %d: %s", e.tool, e.code, s)
}

// What a failure comes down to, where it is neither of netlock's kinds nor final.
var (
	// errNoTable: this table cannot take a lock; another one may.
	errNoTable = errors.New("the table cannot be used")
	// errChanged: the rules are no longer what they were when they were read.
	errChanged = errors.New("the rules have changed")
)

// verdict is the sense of a toolError.
type verdict struct {
	kind netlock.Kind
	is   error // errNoTable, errChanged, netlock.ErrUnsupported or nil
	hint string
}

// machine is what diagnose wants to know besides the program's words.
type machine struct {
	table func() error   // what the kernel says of the legacy table itself
	has   func(int) bool // a capability
	match string         // a match that the kernel lacks
}

// diagnose makes sense of a program's failure.
func (e *toolError) diagnose(v Variant, m machine) verdict {
	says := func(subs ...string) bool {
		return slices.ContainsFunc(subs, func(s string) bool { return strings.Contains(e.text, s) })
	}
	unsupported := func(hint string) verdict { return verdict{netlock.KindNoBackend, netlock.ErrUnsupported, hint} }
	privilege := func() verdict {
		caps := []int{unix.CAP_NET_ADMIN}
		if v == Legacy {
			caps = append(caps, unix.CAP_NET_RAW)
		}
		return verdict{netlock.KindPrivilege, nil, netlock.MissingCapability(caps...)}
	}
	switch {
	case says("xtables lock"):
		return verdict{netlock.KindDeadline, nil, "another iptables holds /run/xtables.lock; raise the timeout"}

	case v == Legacy && says("unable to initialize table", "nitialize iptables table", "nitialize ip6tables table", "Cannot initialize"):
		// Legacy restore says the same of a missing table, privilege or kernel.
		switch err := m.table(); {
		case err == unix.EPERM, err == unix.EACCES, err == nil && !m.has(unix.CAP_NET_RAW):
			return privilege()
		case err == unix.ENOENT:
			return verdict{netlock.KindNoBackend, errNoTable, ""}
		case err == nil:
			return verdict{netlock.KindOther, nil, ""}
		}
		return unsupported("the kernel lacks legacy iptables") // ENOPROTOOPT, EAFNOSUPPORT

	case says("generation id: Invalid argument", "Protocol not supported", "Failed to initialize nft"):
		return unsupported("the kernel lacks nf_tables")
	case says("Permission denied", "Operation not permitted"):
		if v == NFT && m.has(unix.CAP_NET_ADMIN) && !says("generation id") {
			// A table with the owner flag refuses everyone but its owner.
			return verdict{netlock.KindHeld, errNoTable, "a live process owns the table: see nft list tables in the namespace"}
		}
		return privilege()
	case says("invalid option", "unrecognized option"):
		return unsupported("iptables 1.6.2 or newer is needed")
	case says("`"+chainIn, "`"+chainOut, "'"+chainIn, "'"+chainOut): // a jump to a chain that is gone
		return verdict{netlock.KindOther, errChanged, ""}
	case says("Couldn't load match", "Couldn't load target", "missing kernel module", "TABLE_ADD failed"):
		return unsupported("a part of iptables is missing in the kernel or on the host")
	case m.match != "":
		return unsupported("the kernel lacks the match " + m.match)
	case says("is incompatible", "table name", "do you need to insmod", "CHAIN_ADD failed"):
		// CHAIN_ADD: a base chain's name is taken by a chain that is none, or hooked elsewhere.
		return verdict{netlock.KindNoBackend, errNoTable, ""}
	case e.code == 1, e.code == 4: // a line, or the commit, met other rules than it was made for
		return verdict{netlock.KindOther, errChanged, ""}
	}
	return verdict{netlock.KindOther, nil, ""}
}

package main

// The command check: can a lock be taken here, and how; what to do if not.

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/setup"
	"github.com/criu-netlock/criu-netlock/cmd/internal/wire"
	"github.com/criu-netlock/criu-netlock/iptables"
	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/config"
)

// finding is one line of check.
type finding struct {
	Level   string `json:"level"` // ok, warning, failed
	What    string `json:"what"`
	Finding string `json:"finding"`
	Advice  string `json:"advice,omitempty"`
}

// checker collects findings, and the first failure's kind for the exit code.
type checker struct {
	Possible bool      `json:"possible"`
	Findings []finding `json:"checks"`

	err error
}

func (k *checker) ok(what, format string, args ...any) {
	k.Findings = append(k.Findings, finding{"ok", what, wire.OneLine(fmt.Sprintf(format, args...)), ""})
}

func (k *checker) warn(what, advice, format string, args ...any) {
	k.Findings = append(k.Findings, finding{"warning", what, wire.OneLine(fmt.Sprintf(format, args...)), advice})
}

func (k *checker) fail(kind netlock.Kind, what, advice, format string, args ...any) {
	f := finding{"failed", what, wire.OneLine(fmt.Sprintf(format, args...)), advice}
	k.Findings = append(k.Findings, f)
	if k.err == nil {
		k.err = &netlock.Error{Kind: kind, Op: "check", Err: errors.New(what + ": " + f.Finding), Hint: advice}
	}
}

func (k *checker) text() string {
	var b strings.Builder
	for _, f := range k.Findings {
		fmt.Fprintf(&b, "%-8s %s: %s", f.Level, f.What, f.Finding)
		if f.Advice != "" {
			b.WriteString("; " + f.Advice)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// advised splits an error into what happened and what to do; otherwise is what to do
// where the error does not say.
func advised(err error, otherwise string) (text, advice string) {
	text = told(err)
	var e *netlock.Error
	if errors.As(err, &e) && e.Hint != "" {
		if rest, ok := strings.CutSuffix(text, "; "+wire.OneLine(e.Hint)); ok {
			return rest, e.Hint
		}
	}
	return text, otherwise
}

// versionTime bounds a program that is asked for its version.
const versionTime = 3 * time.Second

func (c *cli) check() error {
	k := &checker{}
	cfg, fileErr, flagErr := c.config()
	if flagErr != nil {
		return flagErr
	}
	ts, err := c.open()
	if err != nil {
		return err
	}
	defer closeAll(ts)

	k.configuration(fileErr, cfg)
	k.privileges()
	k.kernel()
	k.backends(cfg)
	k.iptables()
	v := k.criu()
	k.engines(k.criuFiles(criuFiles(os.Getenv), v), v)
	k.targets(cfg, ts)

	k.Possible = k.err == nil
	if c.json {
		err = printJSON(k)
	} else {
		err = printText(k.text())
	}
	if k.err != nil {
		return k.err
	}
	return err
}

func (k *checker) configuration(err error, cfg config.Config) {
	path := config.Path(os.LookupEnv)
	switch {
	case err != nil:
		text, advice := advised(err, "correct it: until then every lock is refused")
		var e *netlock.Error
		if errors.As(err, &e) && e.Err != nil && e.Hint == "" {
			text = e.Err.Error() // what is being done is the line's beginning already
		}
		k.fail(netlock.KindOf(err), "configuration", advice, "%s", text)
	case !isThere(path):
		k.ok("configuration", "%s does not exist: the defaults hold", path)
	default:
		k.ok("configuration", "%s: backend %s, timeout %v, log-level %s, %d allow rules", path, cfg.Backend, cfg.Timeout, cfg.LogLevel, len(cfg.Allow))
	}
}

// isThere tells whether a configuration that was read came from a file.
func isThere(path string) bool {
	_, err := config.Read(path, false)
	return !errors.Is(err, os.ErrNotExist)
}

func (k *checker) privileges() {
	for _, p := range []struct {
		capability int
		use        string
	}{
		{unix.CAP_SYS_ADMIN, "to enter a namespace"},
		{unix.CAP_NET_ADMIN, "to change its rules"},
		{unix.CAP_SYS_PTRACE, "to open other tasks' namespaces"},
	} {
		name := netlock.CapabilityName(p.capability)
		if netlock.HasCapability(p.capability) {
			k.ok("privilege", "%s is there, which it takes %s", name, p.use)
		} else {
			k.fail(netlock.KindPrivilege, "privilege", "run as root, or with "+name, "%s is missing, which it takes %s", name, p.use)
		}
	}
	if netlock.HasCapability(unix.CAP_NET_RAW) {
		k.ok("privilege", "CAP_NET_RAW is there, which legacy iptables takes")
	} else {
		k.warn("privilege", "run as root, or with CAP_NET_RAW, if legacy iptables is to be a way to lock; nft does without it", "CAP_NET_RAW is missing, which legacy iptables takes")
	}
}

func (k *checker) kernel() {
	var u unix.Utsname
	release := "unknown"
	if unix.Uname(&u) == nil {
		release = unix.ByteSliceToString(u.Release[:])
	}
	// A child in its own right is not needed: we are a task too.
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		k.fail(netlock.KindNoBackend, "kernel", "Linux 5.8 or newer is needed, and a seccomp filter must not forbid it", "Linux %s: pidfd_open: %v", release, err)
		return
	}
	defer unix.Close(fd)
	const pidfdGetNetNamespace = 0xFF04 // linux/pidfd.h, 6.11
	if ns, err := unix.IoctlRetInt(fd, pidfdGetNetNamespace); err == nil {
		unix.Close(ns)
		k.ok("kernel", "Linux %s: a task's namespace by PIDFD_GET_NET_NAMESPACE", release)
		return
	}
	major, minor := parseVersion(release)
	if major < 5 || major == 5 && minor < 8 {
		k.fail(netlock.KindNoBackend, "kernel", "Linux 5.8 or newer is needed", "Linux %s: no setns on a pidfd", release)
		return
	}
	k.ok("kernel", "Linux %s: a task's namespace by setns on a pidfd", release)
}

// parseVersion reads the first two numbers of a version.
func parseVersion(s string) (major, minor int) {
	_, _ = fmt.Sscanf(strings.TrimPrefix(s, "v"), "%d.%d", &major, &minor) // what cannot be read stays 0
	return major, minor
}

// backends takes and removes a real lock in a throwaway namespace with each backend,
// and with what the configuration chooses.
func (k *checker) backends(cfg config.Config) {
	chosen, err := timed(cfg.Timeout, func(ctx context.Context) (netlock.Result, error) { return netlock.Trial(ctx, newLocker(cfg, parent())) })
	for _, v := range variants() {
		what := "backend " + v.name
		took := time.Duration(0)
		_, err := timed(cfg.Timeout, func(ctx context.Context) (netlock.Result, error) {
			start := time.Now()
			res, err := netlock.Trial(ctx, v)
			took = time.Since(start)
			return res, err
		})
		switch {
		case err == nil && v.name == config.NFT:
			k.ok(what, "nf_tables and its family inet work: locked and unlocked in a new namespace in %v", took.Round(10*time.Microsecond))
		case err == nil:
			k.ok(what, "locked and unlocked in a new namespace in %v", took.Round(10*time.Microsecond))
		default:
			text, advice := advised(err, "nothing, if the backend that is chosen works")
			k.warn(what, advice, "%s", text)
		}
	}
	if err != nil {
		text, advice := advised(err, "see the lines above, one for each backend")
		k.fail(netlock.KindOf(err), "backend = "+cfg.Backend, advice, "%s", text)
		return
	}
	k.ok("backend = "+cfg.Backend, "locks by %s", chosen.Backend)
}

// timed gives up on f after as long as a hook may take.
func timed[T any](limit time.Duration, f func(context.Context) (T, error)) (T, error) {
	return within(time.Now(), limit, f)
}

// sbin is where Debian and others put what a shell's PATH may lack.
var sbin = [...]string{"/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin", "/usr/local/bin"}

// lookPath looks in PATH and in sbin.
func lookPath(name string) string {
	if p, err := exec.LookPath(name); err == nil && filepath.IsAbs(p) {
		return p
	}
	for _, dir := range sbin {
		if p := filepath.Join(dir, name); runnable(p) == "" {
			return p
		}
	}
	return ""
}

// output runs a program that prints its version.
func output(path string, args ...string) (string, error) {
	return timed(versionTime, func(ctx context.Context) (string, error) {
		cmd := exec.CommandContext(ctx, path, args...)
		cmd.WaitDelay = time.Second
		b, err := cmd.CombinedOutput()
		if ctx.Err() != nil {
			err = fmt.Errorf("no answer within %v", versionTime)
		}
		return string(b), err
	})
}

// iptables looks for the programs where the backend does, and nowhere else.
func (k *checker) iptables() {
	for _, v := range []iptables.Variant{iptables.Legacy, iptables.NFT} {
		what := "iptables-" + string(v)
		paths, err := iptables.Tools(v)
		if err != nil {
			k.warn(what, "install iptables, if nft is not to be the only way to lock", "%v", err)
			continue
		}
		version, err := output(paths[0], "--version")
		if err != nil {
			k.warn(what, "reinstall iptables, if nft is not to be the only way to lock", "%s --version: %v", paths[0], err)
			continue
		}
		k.ok(what, "%s, %s", strings.Join(paths, ", "), strings.TrimSpace(firstLine(version)))
	}
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

// criuVersion is a CRIU's version; zero if unknown.
type criuVersion struct{ major, minor int }

func (v criuVersion) known() bool { return v != criuVersion{} }
func (v criuVersion) below(major, minor int) bool {
	return v.known() && (v.major < major || v.major == major && v.minor < minor)
}

func (k *checker) criu() criuVersion {
	p := lookPath("criu")
	if p == "" {
		k.warn("CRIU", "install it, unless an engine brings its own", "no criu in PATH, /usr/sbin or /usr/local/sbin")
		return criuVersion{}
	}
	out, err := output(p, "--version")
	if err != nil {
		k.warn("CRIU", "make it run: without CRIU there is no checkpoint to lock for", "%s --version: %v", p, err)
		return criuVersion{}
	}
	var v criuVersion
	for _, line := range strings.Split(out, "\n") {
		if s, ok := strings.CutPrefix(line, "Version: "); ok {
			v.major, v.minor = parseVersion(s)
			out = line
		}
	}
	switch {
	case !v.known():
		k.warn("CRIU", "see for yourself that it is 3.19 or newer", "%s prints no version: %q", p, firstLine(out))
	case v.below(2, 10):
		k.fail(netlock.KindInput, "CRIU", "install 3.19 or newer", "%s, %s: too old for action scripts as they are run today", p, out)
	case v.below(3, 19):
		k.warn("CRIU", "use 3.19 or newer with runc, crun, podman, Docker and for network-lock skip; with LXC and by hand this one will do", "%s, %s: action scripts from a file do not work with RPC clients", p, out)
	case inPlace() == p:
		k.ok("CRIU", "%s, which is criu-netlock in CRIU's place: %s", p, out)
	default:
		k.ok("CRIU", "%s, %s", p, out)
	}
	return v
}

// criuFiles judges what the configuration files say.
func (k *checker) criuFiles(files []criuFile, v criuVersion) (scripts []script) {
	ownLock := "" // what network-lock is set to where it may be
	for _, f := range files {
		b, err := os.ReadFile(f.path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			k.warn(f.path, "make it a file that can be read, or remove it: CRIU reads it too", "%v", err)
			continue
		}
		lines := 0
		for _, o := range setup.Parse(string(b)) {
			where := f.path + ":" + strconv.Itoa(o.Line)
			switch o.Name {
			case "action-script":
				lines++
				s := script{path: o.Value, where: where, file: f, ours: sameProgram(o.Value), bad: runnable(o.Value)}
				if o.Words != 2 {
					s.bad = `needs one word after action-script, in "double quotes" if it has spaces`
				}
				scripts = append(scripts, s)
			case "network-lock":
				lines++
				if !f.rpc {
					ownLock = o.Value
				}
				k.networkLock(where, f, o.Value, v)
			}
		}
		if lines == 0 {
			k.ok(f.path, "says nothing about action-script or network-lock")
		}
	}
	k.scripts(scripts, v)
	if anyOurs(scripts) {
		k.ok("images", "of a container with a network namespace of its own (LXC, plain CRIU) contain the lock: a host that restores them needs criu-netlock too, or nft delete table inet criu-netlock in the namespace")
	}
	if anyOurs(scripts) && ownLock != "skip" {
		k.warn("CRIU's own lock", "put network-lock skip in /etc/criu/default.conf (CRIU 3.19 or newer), never in runc.conf or crun.conf", "is in use beside ours, which is sound but slower")
	}
	return scripts
}

func (k *checker) networkLock(where string, f criuFile, value string, v criuVersion) {
	switch {
	case f.rpc && v.known() && (v.below(3, 16) || !v.below(4, 3)):
		k.warn(where, "move it to /etc/criu/default.conf", "network-lock %s crashes CRIU 3.16 to 4.2 here", value)
	case f.rpc:
		k.fail(netlock.KindInput, where, "move it to /etc/criu/default.conf", "network-lock %s crashes CRIU 3.16 to 4.2 here", value)
	case value != "skip" && value != "iptables" && value != "nftables":
		k.fail(netlock.KindInput, where, "write skip, iptables or nftables", "network-lock %q is unknown to CRIU", value)
	case value == "skip" && v.below(3, 19):
		k.fail(netlock.KindInput, where, "use CRIU 3.19 or newer, or remove the line", "network-lock skip is unknown to this CRIU")
	default:
		k.ok(where, "network-lock %s", value)
	}
}

func anyOurs(scripts []script) bool {
	for _, s := range scripts {
		if s.ours {
			return true
		}
	}
	return false
}

// scripts judges the action scripts, in the order in which CRIU was given them.
func (k *checker) scripts(scripts []script, v criuVersion) {
	if !anyOurs(scripts) && inPlace() == "" {
		k.warn("action-script", "add a line action-script /usr/local/sbin/criu-netlock, unless the engine is given it another way (criu --action-script, lxc-checkpoint -A)", "no configuration file of CRIU's names criu-netlock")
	}
	for i, s := range scripts {
		// An engine's own file comes after CRIU's, but runc.conf and crun.conf never meet.
		meets := func(o script) bool { return !o.file.rpc || !s.file.rpc || o.file == s.file }
		twice, before := "", ""
		for j, o := range scripts {
			switch {
			case j < i && o.path == s.path && meets(o):
				twice = o.where
			case j > i && s.ours && !o.ours && meets(o):
				before = o.path + " (" + o.where + ")"
			}
		}
		switch {
		case s.bad != "":
			k.fail(netlock.KindInput, s.where, "correct the line: every dump and restore fails with it", "action-script %q %s", s.path, s.bad)
		case !s.ours:
			k.ok(s.where, "action-script %s, not ours", s.path)
		case s.file.rpc && v.below(3, 19):
			k.fail(netlock.KindInput, s.where, "use CRIU 3.19 or newer", "action-script %s: this CRIU does not run scripts of a file for an RPC client", s.path)
		case twice != "":
			k.warn(s.where, "remove one of the lines", "action-script %s is named in %s too: it runs twice at each hook, which is sound but slower", s.path, twice)
		case before != "":
			k.warn(s.where, "give criu-netlock last: CRIU runs the script given last first", "action-script %s runs after %s", s.path, before)
		default:
			k.ok(s.where, "action-script %s", s.path)
		}
	}
}

func (k *checker) targets(cfg config.Config, ts []target) {
	l := newLocker(cfg, parent())
	for _, t := range ts {
		st, err := timed(cfg.Timeout, func(ctx context.Context) (netlock.State, error) { return l.State(ctx, t.ns) })
		what := wire.OneLine(t.String())
		switch {
		case err != nil:
			text, advice := advised(err, "criu-netlock status tells more about it")
			k.fail(netlock.KindOf(err), what, advice, "%s", text)
		case st.Held:
			k.fail(netlock.KindHeld, what, "find them with nft list ruleset in the namespace, and end them", "live processes own tables under both of our names")
		case st.Locked && st.Intact:
			k.ok(what, "can be locked; is locked now, by %s since %s", st.Backend, st.Since.UTC().Format(time.RFC3339))
		case st.Found:
			k.warn(what, "criu-netlock unlock removes it", "can be locked; something of ours is there: %s", st.Why)
		default:
			k.ok(what, "can be locked; is not locked now")
		}
	}
}

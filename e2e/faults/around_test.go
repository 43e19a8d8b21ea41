package faults

// Faults that come from around the program: what others do in the namespace, the machine's
// locks, pids and disks, and capabilities that are missing.

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// tried counts one point of a class and fails the test if the program did not keep its word.
func (c *class) tried(t *testing.T, what string, err error) {
	t.Helper()
	c.points++
	if err != nil {
		c.wrong++
		t.Errorf("%s, %s: %v", c.name, what, err)
	}
}

// hookOK runs a hook that is to end with one of some codes; 0 if none is given.
func (l *lab) hookOK(c *criu, action string, codes ...int) error {
	if codes == nil {
		codes = []int{0}
	}
	r, err := l.hook(c, action, nil)
	if err != nil || !slices.Contains(codes, r.code) || r.took > hang {
		return unexpected(action, r, err)
	}
	return nil
}

// A process in the namespace takes the lock apart. Whatever it does, status tells, the next
// hook of a restore has a whole lock again, and an unlock leaves nothing.
func TestTampered(t *testing.T) {
	scripts := map[string][]string{
		"nft": {
			"delete table inet criu-netlock", "flush ruleset", "flush table inet criu-netlock", "flush chain inet criu-netlock ingress",
			"add table inet criu-netlock { flags dormant; }", "delete chain inet criu-netlock egress", "delete chain inet criu-netlock ingress",
			"add chain inet criu-netlock ingress { policy accept; }", "add chain inet criu-netlock egress { policy accept; }",
			"insert rule inet criu-netlock ingress accept", "insert rule inet criu-netlock egress accept", "add chain inet criu-netlock more",
			"add rule inet criu-netlock ingress accept", "insert rule inet criu-netlock ingress ip saddr 10.0.0.0/8 accept",
			"add table inet criu-netlock-2", "add table ip criu-netlock", "flush chain inet criu-netlock ingress; add rule inet criu-netlock ingress accept",
		},
		"iptables-legacy": {"-F CRIU-NETLOCK-IN", "-F CRIU-NETLOCK-OUT", "-F", "-I CRIU-NETLOCK-IN -j ACCEPT", "-I CRIU-NETLOCK-OUT -j RETURN",
			"-D PREROUTING -j CRIU-NETLOCK-IN", "-D OUTPUT -j CRIU-NETLOCK-OUT", "-I PREROUTING -j ACCEPT", "-A PREROUTING -j CRIU-NETLOCK-IN", "-F PREROUTING"},
	}
	scripts["iptables-nft"] = scripts["iptables-legacy"]
	eachBackend(t, func(t *testing.T, l *lab) {
		for _, script := range scripts[l.backend] {
			for _, tool := range []string{"ip", "ip6"} {
				tamper := func() error {
					var err error
					if l.backend == "nft" {
						_, err = l.Inside.TryRun("", "nft", script)
					} else {
						_, err = l.Inside.TryRun("", tool+"tables"+strings.TrimPrefix(l.backend, "iptables"), append([]string{"-w", "-t", "raw"}, strings.Fields(script)...)...)
					}
					return err
				}
				for _, follow := range []string{"post-setup-namespaces", "post-restore", "network-unlock", "gc"} {
					// Without the rules that bear them, the metadata are gone.
					err := l.tampered(tamper, follow, strings.Contains(script, "flush") || strings.Contains(script, "-F"))
					theTable.class("lock tampered with, "+l.backend).tried(t, tool+" "+script+", then "+follow, err)
				}
				if l.backend == "nft" {
					break // one table is for both
				}
			}
		}
	})
}

func (l *lab) tampered(tamper func() error, follow string, blank bool) error {
	c := l.newCRIU()
	defer c.die()
	defer l.Inside.TryRun("", "iptables-legacy", "-t", "raw", "-F")
	defer l.Inside.TryRun("", "ip6tables-legacy", "-t", "raw", "-F")
	defer l.Inside.TryRun("", "nft", "flush ruleset")
	l.unlocked()
	if err := errors.Join(l.hookOK(c, "network-lock"), l.is(true), tamper()); err != nil {
		return err
	}
	st, err := l.state()
	if err != nil || st.Intact {
		return wrong(err, "nothing is told of it: %+v", st)
	}
	switch follow {
	case "gc":
		c.die()
		if out, err := l.command("gc"); err != nil && !tampered(err) {
			return err
		} else if st, e := l.state(); e != nil || st.Found && !(blank && strings.Contains(out, "unknown, left alone")) {
			return wrong(e, "after gc, %s: %+v", out, st)
		}
		return nil
	case "network-unlock":
		if err := l.hookOK(c, follow, 0, 9); err != nil {
			return err
		}
		if st, err := l.state(); err != nil || st.Found {
			return wrong(err, "after %s: %+v", follow, st)
		}
		return nil
	}
	if err := l.hookOK(c, follow); err != nil {
		return err
	}
	// Other rules of theirs may stop packets too; none may let them through.
	if st, err := l.state(); err != nil || !st.Intact || !st.Locked {
		return wrong(err, "after %s: %+v", follow, st)
	}
	return l.closed()
}

// closed checks that nothing passes.
func (l *lab) closed() error {
	for _, w := range l.wires {
		if open, err := w.open(); open || err != nil {
			return wrong(err, "passes: %t", open)
		}
	}
	return nil
}

// The machine's lock of xtables is held for ever: what needs it ends in time, says so, and
// leaves everything as it was.
func TestXtablesLockHeld(t *testing.T) {
	onItsHost(t, func(t *testing.T) {
		l := newLab(t, "iptables-legacy", backends[1].config)
		l.configure(l.config + "guard = false\ntimeout = \"2s\"\n")
		c := l.newCRIU()
		defer c.die()
		fd, err := unix.Open("/run/xtables.lock", unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		hold := func(how int) {
			t.Helper()
			if err := unix.Flock(fd, how); err != nil {
				t.Fatal(err)
			}
		}
		count := theTable.class("xtables' lock held for ever")
		for _, h := range append(slices.Clone(hookCases), hookCase{"pre-dump", false, false}, hookCase{"network-unlock", false, false}, hookCase{"network-lock", true, true}) {
			hold(unix.LOCK_UN)
			l.unlocked()
			if h.before {
				err = l.hookOK(c, "network-lock")
			}
			hold(unix.LOCK_EX)
			code := 8
			if h.before == h.after && h.action != "pre-dump" {
				code = 0 // nothing to change
			}
			err = errors.Join(err, l.hookOK(c, h.action, code), l.is(h.before))
			count.tried(t, h.action, err)
		}
		hold(unix.LOCK_UN)
		count.tried(t, "given back", errors.Join(l.hookOK(c, "network-lock"), l.is(true), l.hookOK(c, "network-unlock"), l.is(false)))
	})
}

// No disk space and no inode is left for a guard's files, or for the log: hooks do their
// work without.
func TestDiskFull(t *testing.T) {
	eachBackend(t, func(t *testing.T, l *lab) {
		l.configure(l.config)
		count := theTable.class("disk full")
		for name, c := range map[string]struct{ dir, options string }{
			"no inode for a socket": {"/run/criu-netlock", "mode=700,nr_inodes=1"},
			"no space for a log":    {l.dir + "/disk", "size=4k"},
		} {
			if err := os.MkdirAll(c.dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("tmpfs", c.dir, "tmpfs", 0, c.options); err != nil {
				t.Fatal(err)
			}
			if strings.Contains(c.options, "size") {
				l.log = c.dir + "/log"
				if err := os.WriteFile(c.dir+"/full", make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
					t.Fatalf("it is not full: %v", err)
				}
			}
			l.unlocked()
			cr := l.newCRIU()
			for _, s := range []struct {
				action string
				locked bool
			}{{"pre-dump", false}, {"network-lock", true}, {"post-dump", true}, {"network-unlock", false}, {"pre-restore", false},
				{"setup-namespaces", true}, {"post-setup-namespaces", true}, {"post-restore", true}, {"network-unlock", false}, {"post-resume", false}} {
				count.tried(t, name+", "+s.action, errors.Join(l.hookOK(cr, s.action), l.is(s.locked)))
			}
			if r, err := l.hook(cr, "pre-dump", nil); err != nil || strings.Contains(r.log, "guard_err=") != (l.log == "") || (r.log == "") != (l.log != "") {
				t.Errorf("%s: it is not told, or the disk is not full: %v, %v", name, r, err)
			}
			cr.die()
			l.log = ""
			if err := errors.Join(quiet(guards), unix.Unmount(c.dir, unix.MNT_DETACH)); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// needed are the capabilities that docs/security.md names.
var needed = []int{unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN, unix.CAP_SYS_PTRACE}

// Capabilities are taken away one by one. One that is needed is named, with exit code 5,
// and nothing is changed; the others are not missed; and those that are documented are all
// that is needed, for every hook.
func TestCapabilities(t *testing.T) {
	eachBackend(t, func(t *testing.T, l *lab) {
		l.configure(l.config)
		for _, h := range []hookCase{{"pre-dump", false, false}, {"network-lock", false, true}, {"network-unlock", true, false}, {"pre-restore", false, false},
			{"setup-namespaces", false, true}, {"post-restore", true, true}, {"post-resume", true, false}} {
			l.takeCapabilities(t, h)
		}
	})
}

func (l *lab) takeCapabilities(t *testing.T, h hookCase) {
	count := theTable.class("a capability missing, " + l.backend)
	var there []int
	for c := 0; c <= unix.CAP_LAST_CAP; c++ {
		if have, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0); err == nil && have == 1 {
			there = append(there, c)
		}
	}
	need := slices.Clone(needed)
	if l.backend == "iptables-legacy" {
		need = append(need, unix.CAP_NET_RAW)
	}
	try := func(what string, without []int, missing int) {
		l.unlocked()
		free := l.newCRIU()
		defer free.die()
		if h.before {
			if err := l.hookOK(free, "network-lock"); err != nil {
				t.Fatal(err)
			}
		}
		was, err := l.rules()
		if err != nil {
			t.Fatal(err)
		}
		l.without = without
		c := l.newCRIU()
		l.without = nil
		r, err := l.hook(c, h.action, nil)
		c.die()
		err = errors.Join(err, quiet(guards))
		now, e := l.rules()
		switch {
		case errors.Join(err, e) != nil:
			err = errors.Join(err, e)
		case missing < 0 && r.code != 0:
			err = unexpected("it is not needed", r, nil)
		case missing < 0 && h.action != "setup-namespaces": // its guard has unlocked by now
			err = l.is(h.after)
		case missing < 0:
		case r.code != 5 || !strings.Contains(r.log, "run with "+strings.ToUpper(capName(missing))):
			err = unexpected("it is not named", r, nil)
		case now != was:
			err = fmt.Errorf("the rules were changed from\n%s\nto\n%s", was, now)
		}
		count.tried(t, h.action+" "+what, err)
	}
	var others []int
	for _, c := range there {
		missing := -1
		if slices.Contains(need, c) {
			missing = c
		} else if others = append(others, c); !*all && len(others)%10 != 0 {
			continue
		}
		try("without "+capName(c), []int{c}, missing)
	}
	try("with those that are needed alone", others, -1)
}

// capName is the name that capsh has for a capability.
func capName(c int) string {
	out, err := exec.Command("capsh", "--explain="+strconv.Itoa(c)).Output()
	name, _, _ := strings.Cut(string(out), " ")
	if err != nil || !strings.HasPrefix(name, "cap_") {
		return fmt.Sprint("capability ", c)
	}
	return name
}

// rules are all rules of the namespace.
func (l *lab) rules() (string, error) {
	var all strings.Builder
	for _, argv := range [][]string{{"nft", "-s", "list", "ruleset"}, {"iptables-legacy-save"}, {"ip6tables-legacy-save"}} {
		out, err := l.Inside.TryRun("", argv[0], argv[1:]...)
		if err != nil && l.backend != "iptables-nft" { // there the legacy tools are hidden
			return "", err
		}
		for line := range strings.Lines(out) {
			if !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, ":") {
				all.WriteString(line)
			}
		}
	}
	return all.String(), nil
}

package main

// Bad input: for each exactly one line on stderr, its exit code, and no rule changed
// anywhere.

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// needsPID are the hooks that are about a task.
var needsPID = []action.Name{
	action.PreDump, action.NetworkLock, action.NetworkUnlock, action.SetupNamespaces,
	action.PostSetupNamespaces, action.PostRestore, action.PostResume,
}

func TestBadPID(t *testing.T) {
	netlocktest.Need(t, "setpriv")
	free, locked := newSpace(t), newSpace(t)
	run(t, "lock", "--pid", locked.pid).want(t, 0)
	self := strconv.Itoa(os.Getpid())
	for _, c := range []struct {
		name, pid string
		code      int
	}{
		{"empty", "", 2}, {"zero", "0", 2}, {"negative", "-1", 2}, {"a word", "x", 2}, {"a sign", "+5", 2}, {"a leading zero", "05", 2},
		{"a leading space", " 5", 2}, {"a letter behind", "5x", 2}, {"a newline behind", "5\n", 2}, {"above pid_max", "4194305", 2}, {"above everything", strings.Repeat("9", 40), 2},
		{"hexadecimal", "0x5", 2}, {"not ASCII", "５", 2},
		{"dead", dead(t), 3}, {"a zombie", zombie(t), 3}, {"a thread", thread(t), 3},
		{"a kernel thread", "2", 4}, {"pid 1", "1", 4},
	} {
		t.Run(c.name, func(t *testing.T) {
			untouched(t, func() {
				for _, a := range needsPID {
					hook(t, string(a), c.pid).oneError(t, c.code, "level=ERROR", "action="+string(a))
				}
				for _, cmd := range []string{"lock", "unlock", "status", "check"} {
					run(t, cmd, "--pid", c.pid).oneError(t, c.code, "criu-netlock: ")
				}
				// One bad target, and the good one is not touched either.
				run(t, "lock", "--pid", free.pid, "--pid", c.pid).oneError(t, c.code)
				run(t, "unlock", "--pid", locked.pid, "--pid", c.pid).oneError(t, c.code)
			}, free, locked)
		})
	}
	t.Run("unset", func(t *testing.T) {
		for _, a := range needsPID {
			execute(t, []string{"CRTOOLS_SCRIPT_ACTION=" + string(a)}, program).oneError(t, 2, "CRTOOLS_INIT_PID")
		}
	})
	t.Run("our own namespace", func(t *testing.T) {
		for _, a := range needsPID {
			if op := action.OpOf(a); op == action.Lock || op == action.Unlock {
				hook(t, string(a), self).oneError(t, 4, "our own namespace")
			} else {
				hook(t, string(a), self).want(t, 0, "own namespace, nothing to lock")
			}
		}
		for _, cmd := range []string{"lock", "unlock", "status", "check"} {
			run(t, cmd, "--pid", self).oneError(t, 4, "our own namespace")
			run(t, cmd, "--netns", "/proc/self/ns/net").oneError(t, 4, "our own namespace")
		}
	})
	t.Run("the host's namespace, by a path", func(t *testing.T) {
		untouched(t, func() {
			for _, cmd := range []string{"lock", "unlock", "status", "check"} {
				run(t, cmd, "--netns", "/proc/1/ns/net").oneError(t, 4, "namespace")
				run(t, cmd, "--pid", free.pid, "--netns", "/proc/1/ns/net").oneError(t, 4)
				execute(t, nil, "setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace", program, cmd, "--netns", "/proc/1/ns/net").oneError(t, 4, "the host's namespace")
			}
		}, free)
	})
	t.Run("the host's namespace, seen from another", func(t *testing.T) {
		untouched(t, func() {
			for _, cmd := range []string{"lock", "unlock", "status"} {
				execute(t, nil, "nsenter", "-t", free.pid, "-n", program, cmd, "--pid", self).oneError(t, 4, "the host's namespace")
			}
			execute(t, hookEnv("network-lock", self), "nsenter", "-t", free.pid, "-n", program).oneError(t, 4, "the host's namespace")
		}, free)
	})
}

func TestBadNetns(t *testing.T) {
	s := newSpace(t)
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	untouched(t, func() {
		for _, path := range []string{
			"", ".", "..", "a/b", "../x", "./x", "no such name\n", "cn-test-no-such-name", strings.Repeat("x", 300),
			"/", dir, fifo, "/dev/null", "/no/such/path", file(t, "regular", "x"),
			"/proc/" + s.pid + "/ns/mnt", "/proc/" + s.pid + "/ns/user", "/proc/" + s.pid + "/ns/pid",
			"/proc/" + s.pid + "/ns/net/x", "/proc/" + s.pid + "/ns",
		} {
			for _, cmd := range []string{"lock", "unlock", "status", "check"} {
				run(t, cmd, "--netns", path).oneError(t, 2, "criu-netlock: ")
			}
			run(t, "lock", "--pid", s.pid, "--netns", path).oneError(t, 2)
		}
	}, s)
}

func TestBadArguments(t *testing.T) {
	s := newSpace(t)
	untouched(t, func() {
		for _, args := range [][]string{
			{}, {"bogus"}, {"--bogus"}, {"-x"}, {""}, {"help", "bogus"},
			{"lock"}, {"unlock"}, {"status"},
			{"lock", "--bogus"}, {"lock", "--pid"}, {"lock", s.pid}, {"lock", "--pid", s.pid, "extra"},
			{"lock", "--pid", s.pid, "--backend", "ebpf"}, {"lock", "--pid", s.pid, "--backend", "NFT"},
			{"lock", "--pid", s.pid, "--timeout", "5"}, {"lock", "--pid", s.pid, "--timeout", "1ms"}, {"lock", "--pid", s.pid, "--timeout", "1h"},
			{"lock", "--pid", s.pid, "--timeout", "-5s"}, {"lock", "--all"},
			{"unlock", "--all", "--pid", s.pid}, {"unlock", "--all", "extra"}, {"unlock", "--all=x"},
			{"list", "extra"}, {"list", "--pid", s.pid}, {"version", "extra"}, {"version", "--pid", "1"}, {"check", "extra"},
			{"completion"}, {"completion", "bogus"}, {"completion", "bash", "extra"},
			{"status", "--pid", s.pid, "--netns", "/proc/1/ns/net\nx"}, {"lock\nstatus"},
		} {
			run(t, args...).oneError(t, 2, "criu-netlock: ")
		}
		execute(t, []string{"CRTOOLS_SCRIPT_ACTION="}, program).oneError(t, 2, "usage: ")
		run(t).oneError(t, 2, "usage: criu-netlock lock|unlock|status|list|gc|check|setup|version|completion")
	}, s)
	two := newSpace(t)
	run(t, "status", "--pid", s.pid, "--pid", two.pid).oneError(t, 2, "one network namespace")
	for _, args := range [][]string{{"-h"}, {"--help"}, {"help"}, {"help", "lock"}, {"lock", "--help"}} {
		if r := run(t, args...).want(t, 0, "Usage:"); r.stderr != "" {
			t.Error(r)
		}
	}
}

// A broken configuration keeps every lock from being taken, and none from being
// taken off.
func TestBadConfiguration(t *testing.T) {
	s := newSpace(t)
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, path, at string }{
		{"broken TOML", file(t, "c", "timeout = \"5s\"\nbackend = nft\n"), ":2:11: "},
		{"wrong type", file(t, "c", "backend = 5\n"), ":1:11: "},
		{"unknown key", file(t, "c", "\nbacked = \"nft\"\n"), ":2:1: "},
		{"wrong value", file(t, "c", "log-level = \"loud\"\n"), ":1:13: "},
		{"key twice", file(t, "c", "timeout = \"5s\"\ntimeout = \"5s\"\n"), ":2:1: "},
		{"wrong rule", file(t, "c", "allow = [\"tcp dport 22\", \"tcp dport x\"]\n"), ":1:26: "},
		{"too large", file(t, "c", strings.Repeat("#\n", 40000)), ": larger than"},
		{"a directory", t.TempDir(), ": not a regular file"},
		{"a fifo", fifo, ": not a regular file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			env := "CRIU_NETLOCK_CONFIG=" + c.path
			untouched(t, func() {
				for _, a := range append(needsPID, action.PreRestore) {
					switch action.OpOf(a) {
					case action.Unlock, action.Sweep:
					default:
						hook(t, string(a), s.pid, env).oneError(t, 2, c.path+c.at)
					}
				}
				for _, a := range []string{"post-dump", "pre-resume", "pre-stream", "of-the-future"} {
					if r := hook(t, a, "x", env).want(t, 0); r.stderr+r.stdout != "" {
						t.Error(r)
					}
				}
				for _, args := range [][]string{{"lock", "--pid", s.pid}, {"status", "--pid", s.pid}, {"list"}} {
					execute(t, []string{env}, append([]string{program}, args...)...).oneError(t, 2, c.path+c.at)
				}
				execute(t, []string{env}, program, "check").want(t, 2, "failed   configuration: "+c.path+c.at)
			}, s)
			// With an allow list, so that the defaults do not know the lock as intact.
			good := "CRIU_NETLOCK_CONFIG=" + file(t, "good", `allow = ["tcp dport 22"]`)
			for _, unlock := range []func(){
				func() { hook(t, "network-unlock", s.pid, env).oneError(t, 2, c.path+c.at, "result=unlocked") },
				func() { hook(t, "post-resume", s.pid, env).oneError(t, 2, c.path+c.at) },
				func() { execute(t, []string{env}, program, "unlock", "--pid", s.pid).want(t, 2, c.path+c.at) },
			} {
				before := s.rules(t)
				hook(t, "network-lock", s.pid, good).want(t, 0)
				s.wantLocked(t, true)
				unlock()
				if after := s.rules(t); after != before {
					t.Errorf("unlocked, this is left:\n%s", after)
				}
			}
		})
	}
}

// A missing capability is named, whichever way the program was started.
func TestMissingCapability(t *testing.T) {
	netlocktest.Need(t, "setpriv")
	s := newSpace(t)
	for _, c := range []string{"sys_admin", "net_admin", "sys_ptrace"} {
		t.Run(c, func(t *testing.T) {
			name := "CAP_" + strings.ToUpper(c)
			without := func(env []string, args ...string) result {
				return execute(t, env, append([]string{"setpriv", "--bounding-set=-" + c, "--inh-caps=-" + c, program}, args...)...)
			}
			untouched(t, func() {
				without(nil, "lock", "--pid", s.pid).oneError(t, 5, name)
				without(nil, "unlock", "--pid", s.pid).oneError(t, 5, name)
				without(nil, "list").oneError(t, 5, name)
				without(nil, "unlock", "--all").oneError(t, 5, name)
				without(hookEnv("network-lock", s.pid)).oneError(t, 5, name)
				without(hookEnv("network-unlock", s.pid)).oneError(t, 5, name)
				without(hookEnv("pre-dump", s.pid)).oneError(t, 5, name)
				// One missing capability is one story, though two backends missed it.
				for _, r := range []result{
					without(nil, "unlock", "--pid", s.pid), without(nil, "status", "--pid", s.pid), without(hookEnv("network-unlock", s.pid)),
					without(nil, "unlock", "--json", "--pid", s.pid),
				} {
					if strings.Count(r.stderr, name) != 1 || strings.Count(r.stdout, name) > 1 {
						t.Errorf("the same story twice: %v", r)
					}
				}
				r := without(nil, "check").want(t, 5, "failed   privilege: "+name+" is missing")
				if !strings.Contains(r.stderr, name) || !isOneLine(r.stderr) {
					t.Error(r)
				}
			}, s)
		})
	}
	t.Run("all", func(t *testing.T) {
		r := execute(t, nil, "setpriv", "--bounding-set=-all", "--inh-caps=-all", program, "check").want(t, 5)
		for _, name := range []string{"CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SYS_PTRACE", "CAP_NET_RAW"} {
			if !strings.Contains(r.stdout, name+" is missing") {
				t.Errorf("%s is wanted: %v", name, r)
			}
		}
	})
}

// withoutTools runs argv where the directories of iptables' tools are empty.
func withoutTools(argv ...string) []string {
	script := `for d in /usr/sbin /sbin /usr/local/sbin; do
		[ ! -d $d ] || mount -t tmpfs none $d || exit 99
	done; exec "$@"`
	return append([]string{"unshare", "-m", "sh", "-c", script, "sh"}, argv...)
}

// A host without iptables' tools, where iptables is asked for by name.
func TestNoBackend(t *testing.T) {
	netlocktest.Need(t, "unshare", "mount")
	s := newSpace(t)
	hide := func(args ...string) []string { return withoutTools(append([]string{program}, args...)...) }
	env := "CRIU_NETLOCK_CONFIG=" + file(t, "c", `backend = "iptables"`)
	untouched(t, func() {
		execute(t, nil, hide("lock", "--backend", "iptables", "--pid", s.pid)...).oneError(t, 6)
		execute(t, append(hookEnv("network-lock", s.pid), env), hide()...).oneError(t, 6)
		execute(t, append(hookEnv("pre-dump", s.pid), env), hide()...).oneError(t, 6)
		execute(t, append(hookEnv("pre-restore", ""), env), hide()...).oneError(t, 6)
		execute(t, nil, hide("check", "--backend", "iptables")...).want(t, 6, "failed   backend = iptables")
		execute(t, nil, hide("check")...).want(t, 0, "warning  backend iptables-legacy", "ok       backend = auto: locks by nft")
	}, s)
	execute(t, nil, hide("lock", "--pid", s.pid)...).want(t, 0, "locked (nft)")
	execute(t, hookEnv("network-unlock", s.pid), hide()...).want(t, 0)
	s.wantLocked(t, false)
}

func TestHeld(t *testing.T) {
	held, free := newSpace(t), newSpace(t)
	held.own(t)
	untouched(t, func() {
		hook(t, "network-lock", held.pid).oneError(t, 7)
		run(t, "lock", "--pid", held.pid).oneError(t, 7)
		// pre-dump says so before the freeze, and check before there is a dump.
		hook(t, "pre-dump", held.pid).oneError(t, 7, "live processes own tables")
		r := run(t, "check", "--pid", free.pid, "--pid", held.pid).want(t, 7, "failed   net:[", "live processes own tables under both of our names", "can be locked; is not locked now")
		if !isOneLine(r.stderr) {
			t.Error(r)
		}
		// All or none: the free one is unlocked again.
		r = run(t, "lock", "--pid", free.pid, "--pid", held.pid).want(t, 7)
		if !isOneLine(r.stderr) {
			t.Error(r)
		}
	}, held)
	if free.isLocked(t) {
		t.Error("a namespace is left locked by a call that failed")
	}
}

// The deadline holds even when the kernel does not answer.
func TestDeadline(t *testing.T) {
	netlocktest.Need(t, "strace")
	s := newSpace(t)
	env := "CRIU_NETLOCK_CONFIG=" + file(t, "c", "timeout = \"1s\"")
	took := regexp.MustCompile(` duration_us=(\d{5,6}|1[0-3]\d{5}) err="timeout 1s: `)
	untouched(t, func() {
		for _, c := range []struct {
			name string
			env  []string
			args []string
		}{
			{"hook lock", append(hookEnv("network-lock", s.pid), env), nil},
			{"hook unlock", append(hookEnv("network-unlock", s.pid), env), nil},
			{"hook check", append(hookEnv("pre-restore", ""), env), nil},
			{"lock", nil, []string{"lock", "--timeout", "1s", "--pid", s.pid}},
			{"list", nil, []string{"list", "--timeout", "1s"}},
		} {
			// strace itself stays until its delay is over, and says so.
			argv := append([]string{"strace", "-f", "-o", "/dev/null", "-e", "trace=sendto", "-e", "inject=sendto:delay_enter=1500000", program}, c.args...)
			r := execute(t, c.env, argv...)
			r.stderr = regexp.MustCompile(`(?m)^strace: .*\n`).ReplaceAllString(r.stderr, "")
			r.oneError(t, 8, "timeout 1s: ")
			if c.args == nil && !took.MatchString(r.stderr) {
				t.Errorf("%s: too late: %v", c.name, r)
			}
		}
	}, s)
}

func TestTampered(t *testing.T) {
	s := newSpace(t)
	before := s.rules(t)
	for _, unlock := range []func() result{
		func() result { return hook(t, "network-unlock", s.pid) },
		func() result { return run(t, "unlock", "--pid", s.pid) },
	} {
		hook(t, "network-lock", s.pid).want(t, 0)
		s.nft(t, "insert rule inet criu-netlock ingress accept")
		run(t, "status", "--pid", s.pid).want(t, 0, "no: ")
		r := unlock().want(t, 9, "tampered")
		if !isOneLine(r.stderr) {
			t.Error(r)
		}
		if after := s.rules(t); after != before {
			t.Errorf("this is left:\n%s", after)
		}
	}
}

package main

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

func TestCheck(t *testing.T) {
	locked, free := newSpace(t), newSpace(t)
	hook(t, "network-lock", locked.pid).want(t, 0)
	untouched(t, func() {
		r := run(t, "check", "--pid", locked.pid, "--pid", free.pid).want(t, 0,
			"ok       configuration: /dev/null: backend auto",
			"ok       privilege: CAP_SYS_ADMIN", "ok       privilege: CAP_NET_ADMIN", "ok       privilege: CAP_SYS_PTRACE",
			"ok       kernel: Linux ", "ok       backend nft: nf_tables and its family inet work", "ok       backend = auto: locks by nft",
			" (pid "+locked.pid+"): can be locked; is locked now, by nft since 2", " (pid "+free.pid+"): can be locked; is not locked now")
		for _, line := range strings.Split(strings.TrimSuffix(r.stdout, "\n"), "\n") {
			if level := strings.TrimSpace(line[:8]); level != "ok" && level != "warning" || !strings.Contains(line[9:], ": ") {
				t.Errorf("not a line of check: %q", line)
			}
		}
		if r.stderr != "" {
			t.Error(r)
		}
	}, locked, free)
	type report struct {
		Possible bool
		Checks   []finding
	}
	got := decoded[report](t, run(t, "check", "--json").want(t, 0))
	if !got.Possible || len(got.Checks) < 8 {
		t.Errorf("%+v", got)
	}
	bad := decoded[report](t, execute(t, []string{"CRIU_NETLOCK_CONFIG=/"}, program, "check", "--json").want(t, 2))
	if bad.Possible || bad.Checks[0].Level != "failed" || bad.Checks[0].Advice == "" {
		t.Errorf("%+v", bad)
	}
}

// wantAdvice checks that what is not well comes with what to do about it.
func wantAdvice(t *testing.T, findings []finding) {
	t.Helper()
	for _, f := range findings {
		if (f.Level == "ok") != (f.Advice == "") || f.What == "" || f.Finding == "" {
			t.Errorf("%+v", f)
		}
	}
}

// Whatever is wrong, every line that is not ok says what to do.
func TestCheckAdvises(t *testing.T) {
	netlocktest.Need(t, "setpriv", "unshare", "mount")
	held := newSpace(t)
	held.own(t)
	type report struct{ Checks []finding }
	criu := t.TempDir()
	writeScript(t, criu+"/criu", "exit 1")
	odd := t.TempDir()
	writeScript(t, odd+"/criu", "echo what")
	old := t.TempDir()
	writeScript(t, old+"/criu", "echo Version: 2.9")
	for _, c := range []struct {
		name string
		code int
		bad  []string // what must not be ok
		r    result
	}{
		{"no capability", 5, []string{"privilege", "backend nft", "backend = auto"}, execute(t, nil, "setpriv", "--bounding-set=-all", "--inh-caps=-all", program, "check", "--json")},
		{"no nf_tables", 0, []string{"backend nft"}, refused(t, "netfilter-unsupported", nil, program, "check", "--json")},
		{"nf_tables forbidden", 5, []string{"backend nft", "backend = auto"}, refused(t, "netfilter-forbidden", nil, program, "check", "--json")},
		{"old kernel", 6, []string{"kernel"}, refused(t, "pidfd-missing", nil, program, "check", "--json")},
		{"no tools", 0, []string{"iptables-legacy", "iptables-nft", "backend iptables-legacy"}, execute(t, nil, withoutTools(program, "check", "--json")...)},
		{"no tools, and they are wanted", 6, []string{"iptables-legacy", "iptables-nft", "backend = iptables"}, execute(t, nil, withoutTools(program, "check", "--backend", "iptables", "--json")...)},
		{"bad configuration", 2, []string{"configuration"}, execute(t, []string{"CRIU_NETLOCK_CONFIG=/"}, program, "check", "--json")},
		{"held", 7, nil, run(t, "check", "--json", "--pid", held.pid)},
		{"no answer from criu", 0, []string{"CRIU"}, execute(t, []string{"PATH=" + criu}, program, "check", "--json")},
		{"no version of criu", 0, []string{"CRIU"}, execute(t, []string{"PATH=" + odd}, program, "check", "--json")},
		{"old criu", 2, []string{"CRIU"}, execute(t, []string{"PATH=" + old}, program, "check", "--json")},
		{"unreadable configuration of CRIU", 0, []string{"/etc"}, execute(t, []string{"CRIU_CONFIG_FILE=/etc"}, program, "check", "--json")},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.r.want(t, c.code)
			checks := decoded[report](t, c.r).Checks
			wantAdvice(t, checks)
			for _, what := range c.bad {
				if !slices.ContainsFunc(checks, func(f finding) bool { return f.What == what && f.Level != "ok" }) {
					t.Errorf("nothing is said of %s: %v", what, c.r)
				}
			}
		})
	}
}

// The tools are looked for where the backend looks, wherever PATH leads.
func TestCheckTools(t *testing.T) {
	netlocktest.Need(t, "iptables-legacy-restore")
	dir := t.TempDir()
	for _, n := range []string{"iptables-legacy-restore", "ip6tables-legacy-restore", "iptables-nft-restore", "ip6tables-nft-restore"} {
		writeScript(t, dir+"/"+n, "exit 0")
	}
	env := []string{"PATH=" + dir + ":/usr/bin:/bin"}
	r := execute(t, env, program, "check").want(t, 0, "ok       iptables-legacy: /usr/sbin/iptables-legacy-restore, ")
	hidden := execute(t, env, withoutTools(program, "check")...).want(t, 0, "warning  iptables-legacy: not supported here: there is no ", "warning  iptables-nft: ")
	if strings.Contains(r.stdout+hidden.stdout, dir) {
		t.Errorf("%v\n%v", r, hidden)
	}
}

func TestCheckCRIUVersion(t *testing.T) {
	for _, c := range []struct{ script, says string }{
		{"echo Version: 4.2.1; echo GitID: v4.2.1", "ok       CRIU: "},
		{"echo Version: 3.17.1", "warning  CRIU: "},
		{"echo Version: 3.19", "ok       CRIU: "},
		{"echo what", "warning  CRIU: "},
		{"exit 1", "--version: exit status 1"},
		{"exec sleep 600", "--version: no answer within"},
	} {
		dir := t.TempDir()
		writeScript(t, dir+"/criu", c.script)
		r := execute(t, []string{"PATH=" + dir + ":/usr/bin:/bin"}, program, "check").want(t, 0, c.says)
		if !strings.Contains(r.stdout, dir+"/criu") {
			t.Error(r)
		}
	}
}

func TestCheckCRIUFiles(t *testing.T) {
	dir := t.TempDir()
	ours, other, plain := dir+"/criu-netlock", dir+"/other", dir+"/plain"
	writeScript(t, ours, "exit 0")
	writeScript(t, other, "exit 0")
	writePlain(t, plain)
	if got := criuFiles(func(k string) string { return map[string]string{"HOME": "/h", "CRIU_CONFIG_FILE": "/f"}[k] }); !reflect.DeepEqual(got,
		[]criuFile{{"/etc/criu/default.conf", false}, {"/h/.criu/default.conf", false}, {"/f", false}, {"/etc/criu/runc.conf", true}, {"/etc/criu/crun.conf", true}}) {
		t.Errorf("%v", got)
	}
	for _, c := range []struct {
		name           string
		defaults, runc string
		crun           string
		major, minor   int
		kind           netlock.Kind
		says           string
	}{
		{name: "nothing", says: "warning  action-script: no configuration file of CRIU's names criu-netlock"},
		{name: "ours", defaults: "action-script " + ours + "\nnetwork-lock skip", says: "ok       D:1: action-script " + ours + "\n"},
		{name: "ours beside CRIU's lock", defaults: "action-script " + ours, says: "warning  CRIU's own lock: is in use"},
		{name: "ours for runc", runc: "tcp-established\naction-script " + ours, says: "ok       R:2: action-script"},
		{name: "other alone", defaults: "action-script " + other, says: "ok       D:1: action-script " + other + ", not ours"},
		{name: "ours runs first", defaults: "action-script " + other + "\naction-script " + ours, says: "ok       D:2: action-script " + ours},
		{name: "ours runs last", defaults: "action-script " + ours + "\naction-script " + other, says: "warning  D:1: action-script " + ours + " runs after " + other + " (D:2)"},
		{name: "ours runs last, by way of runc", defaults: "action-script " + ours, runc: "action-script " + other, says: "warning  D:1: action-script " + ours + " runs after " + other + " (R:1)"},
		{name: "twice", defaults: "action-script " + ours, runc: "action-script " + ours, says: "warning  R:1: action-script " + ours + " is named in D:1 too"},
		{name: "runc's and crun's never meet", runc: "action-script " + ours, crun: "action-script " + ours, says: "ok       N:1: action-script " + ours},
		{name: "absent", defaults: "action-script " + dir + "/none", kind: 2, says: "failed   D:1: action-script \"" + dir + "/none\" does not exist"},
		{name: "not executable", defaults: "action-script " + plain, kind: 2, says: "is not executable"},
		{name: "relative", defaults: "action-script criu-netlock", kind: 2, says: "is not an absolute path"},
		{name: "spaces", defaults: "action-script " + ours + " --flag", kind: 2, says: "needs one word"},
		{name: "old CRIU, RPC", runc: "action-script " + ours, major: 3, minor: 18, kind: 2, says: "failed   R:1: action-script " + ours + ": this CRIU does not run"},
		{name: "old CRIU, no RPC", defaults: "action-script " + ours, major: 3, minor: 18, says: "ok       D:1"},
		{name: "network-lock in runc.conf", runc: "network-lock skip", kind: 2, says: "failed   R:1: network-lock skip crashes CRIU 3.16 to 4.2"},
		{name: "network-lock in crun.conf", crun: "network-lock skip", major: 4, minor: 2, kind: 2, says: "failed   N:1: network-lock skip crashes"},
		{name: "network-lock in runc.conf, new CRIU", runc: "network-lock skip", major: 4, minor: 3, says: "warning  R:1: network-lock skip crashes CRIU 3.16 to 4.2"},
		{name: "network-lock nftables", defaults: "network-lock nftables", says: "ok       D:1: network-lock nftables"},
		{name: "network-lock unknown", defaults: "network-lock none", kind: 2, says: "failed   D:1: network-lock \"none\" is unknown"},
		{name: "network-lock skip, old CRIU", defaults: "network-lock skip", major: 3, minor: 18, kind: 2, says: "failed   D:1: network-lock skip is unknown to this CRIU"},
		{name: "nothing of interest", defaults: "tcp-established", says: "ok       D: says nothing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var files []criuFile
			var pairs []string
			for _, f := range []struct {
				letter, text string
				rpc          bool
			}{{"D", c.defaults, false}, {"R", c.runc, true}, {"N", c.crun, true}} {
				p := "/nonexistent/" + f.letter
				if f.text != "" {
					p = file(t, f.letter, f.text)
				}
				pairs = append(pairs, p, f.letter)
				files = append(files, criuFile{p, f.rpc})
			}
			names := strings.NewReplacer(pairs...)
			k := &checker{}
			k.criuFiles(files, criuVersion{c.major, c.minor})
			wantAdvice(t, k.Findings)
			text := names.Replace(k.text())
			if !strings.Contains(text, c.says) {
				t.Errorf("%q is wanted:\n%s", c.says, text)
			}
			if got := netlock.ExitCode(k.err); got != int(c.kind) {
				t.Errorf("exit %d: %v\n%s", got, k.err, text)
			}
		})
	}
}

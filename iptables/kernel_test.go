package iptables

// What the real programs and the real kernel make of it, in throwaway namespaces.

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

var update = flag.Bool("update", false, "rewrite testdata")

// The test binary also does one operation as a process of its own: helperOp says
// which, in the namespace of helperPID.
const (
	helperOp      = "IPTABLES_TEST_OP"
	helperPID     = "IPTABLES_TEST_PID"
	helperVariant = "IPTABLES_TEST_VARIANT"
	helperTimeout = "IPTABLES_TEST_TIMEOUT"
)

func TestMain(m *testing.M) {
	if op := os.Getenv(helperOp); op != "" {
		os.Exit(helper(op))
	}
	os.Exit(netlocktest.HostUntouched(m))
}

func helper(op string) int {
	pid, _ := strconv.Atoi(os.Getenv(helperPID))
	limit, _ := time.ParseDuration(os.Getenv(helperTimeout))
	ns, err := netlock.FromPID(pid)
	if err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		b := New(Variant(os.Getenv(helperVariant)))
		if op == "lock" {
			_, err = b.Lock(ctx, ns, options)
		} else {
			_, err = b.Unlock(ctx, ns, options)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	return netlock.ExitCode(err)
}

var options = netlock.Options{Caller: netlock.Caller{PID: 4711, Name: "criu"}}

var variants = []Variant{Legacy, NFT}

func other(v Variant) Variant {
	if v == Legacy {
		return NFT
	}
	return Legacy
}

// each runs a test with both variants, each in a namespace of its own.
func each(t *testing.T, f func(t *testing.T, n *netlocktest.NS, v Variant)) {
	for _, v := range variants {
		t.Run(string(v), func(t *testing.T) {
			netlocktest.Need(t, "iptables-legacy-restore", "iptables-nft-restore", "nft")
			f(t, netlocktest.NewNS(t), v)
		})
	}
}

// save is what iptables-save prints in all families, without what changes by itself.
func save(n *netlocktest.NS, v Variant, args ...string) string {
	var out []string
	for _, f := range families() {
		text := n.Run("", f.prefix+"-"+string(v)+"-save", args...)
		for _, l := range strings.Split(text, "\n") {
			if v == Legacy && strings.HasPrefix(l, ":") {
				// Legacy programs begin a table's policy counters anew with any change.
				l, _, _ = strings.Cut(l, " [")
			}
			if !strings.HasPrefix(l, "#") && l != "" {
				out = append(out, f.name+" "+l)
			}
		}
	}
	return strings.Join(out, "\n")
}

// restore loads rules in one family, or both if it is "".
func restore(n *netlocktest.NS, v Variant, fam, input string) {
	for _, f := range families() {
		if fam == "" || fam == f.name {
			n.Run(input, f.prefix+"-"+string(v)+"-restore", "-w", "5", "--noflush", "-c")
		}
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func lock(t *testing.T, b *Backend, n *netlocktest.NS) netlock.Result {
	t.Helper()
	res, err := b.Lock(within(t, 20*time.Second), n.Netns(), options)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func unlock(t *testing.T, b *Backend, n *netlocktest.NS) netlock.State {
	t.Helper()
	st, err := b.Unlock(within(t, 20*time.Second), n.Netns(), options)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func state(t *testing.T, b *Backend, n *netlocktest.NS) netlock.State {
	t.Helper()
	st, err := b.State(within(t, 20*time.Second), n.Netns(), options)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// wantIntact fails unless there is exactly one lock, of v.
func wantIntact(t *testing.T, n *netlocktest.NS, v Variant) {
	t.Helper()
	if st := state(t, New(v), n); !st.Locked || !st.Intact || !st.Found || st.Backend != full(v) || st.Why != "" {
		t.Errorf("the lock is not intact: %+v\n%s\n%s", st, save(n, Legacy), save(n, NFT))
	}
}

// wantNothing fails if anything of ours is there.
func wantNothing(t *testing.T, n *netlocktest.NS) {
	t.Helper()
	if st := state(t, New(Auto), n); st != (netlock.State{}) {
		t.Errorf("something is left: %+v", st)
	}
	for _, v := range variants {
		if s := save(n, v); strings.Contains(s, ":"+chainIn+" ") || strings.Contains(s, ":"+chainOut+" ") {
			t.Errorf("something is left in %s:\n%s", v, s)
		}
	}
}

// noRaw makes a backend find that there is no table raw, in the words of the real
// programs.
func noRaw(b *Backend) *Backend {
	run := b.run
	b.run = func(ctx context.Context, path, stdin string, args ...string) (string, error) {
		if strings.Contains(stdin, "*raw") && strings.Contains(stdin, "-I ") {
			text := "iptables-restore v1.8.9 (legacy): iptables-restore: unable to initialize table 'raw'\n"
			if strings.Contains(path, "nft") {
				text = "iptables-nft-restore v1.8.9 (nf_tables): table `raw' is incompatible, use 'nft' tool.\n"
			}
			return "", &toolError{tool: filepath.Base(path), code: 2, text: text}
		}
		return run(ctx, path, stdin, args...)
	}
	b.table = func(f family, name string) error {
		if name == "raw" {
			return unix.ENOENT
		}
		return f.legacyTable(name)
	}
	return b
}

// counted counts the processes that a backend starts, by verb.
func counted(b *Backend) (*Backend, *[]string) {
	var mu sync.Mutex
	var calls []string
	run := b.run
	b.run = func(ctx context.Context, path, stdin string, args ...string) (string, error) {
		mu.Lock()
		calls = append(calls, filepath.Base(path))
		mu.Unlock()
		return run(ctx, path, stdin, args...)
	}
	return b, &calls
}

// Each rule set as iptables-save prints it, the same in both variants; and what it
// prints, restored, is an intact lock: so a dump and a restore carry the lock along.
func TestGolden(t *testing.T) {
	allow := []string{"tcp dport 22", "ip daddr 10.0.0.5 tcp dport 2049", "ip saddr 192.168.0.0/16 daddr 172.16.0.0/12 udp sport 53 dport 1024",
		"ip6 daddr fd00::1 sctp dport 7", "ip6 saddr 2001:db8::/33", "icmp", "ip6 icmpv6"}
	each(t, func(t *testing.T, _ *netlocktest.NS, v Variant) {
		for _, name := range tableNames {
			for _, suffix := range []string{"", "-allow", "-hold"} {
				n := netlocktest.NewNS(t)
				o := options
				o.Mode = netlock.Drop
				switch suffix {
				case "-allow":
					for _, s := range allow {
						r, err := netlock.ParseRule(s)
						if err != nil {
							t.Fatal(err)
						}
						o.Allow = append(o.Allow, r)
					}
				case "-hold":
					o.Mode, o.Holder = netlock.Hold, &fakeHolder{}
				}
				b := New(v)
				b.now = func() time.Time { return moment }
				if name == "filter" {
					noRaw(b)
				}
				ctx := within(t, 20*time.Second)
				if res, err := b.Lock(ctx, n.Netns(), o); err != nil || res != (netlock.Result{Backend: full(v), New: true, Mode: o.Mode}) {
					t.Fatalf("%+v, %v", res, err)
				}
				again := netlocktest.NewNS(t)
				for _, f := range families() {
					text := n.Run("", f.prefix+"-"+string(v)+"-save", "-t", name)
					var lines []string
					for _, l := range strings.Split(text, "\n") {
						if !strings.HasPrefix(l, "#") {
							lines = append(lines, l)
						}
					}
					got := strings.Join(lines, "\n")
					file := filepath.Join("testdata", f.name+"-"+name+suffix+".golden")
					if *update && v == Legacy {
						if err := os.MkdirAll("testdata", 0o777); err != nil {
							t.Fatal(err)
						}
						if err := os.WriteFile(file, []byte(got), 0o666); err != nil {
							t.Fatal(err)
						}
					}
					want, err := os.ReadFile(file)
					if err != nil {
						t.Fatal(err)
					}
					if got != string(want) {
						t.Errorf("%s: got\n%s\nwant\n%s", file, got, want)
					}
					again.Run(text, f.prefix+"-"+string(v)+"-restore", "-w", "5")
				}
				st, err := New(v).State(ctx, again.Netns(), o)
				if err != nil || !st.Intact || !st.Locked || !st.Since.Equal(moment) || st.Caller != options.Caller || st.Mode != o.Mode {
					t.Errorf("restored: %+v, %v", st, err)
				}
			}
		}
	})
}

// foreign are somebody's rules, made to be mistaken for ours.
const foreign = `*raw
:PREROUTING ACCEPT [11:1100]
:OUTPUT ACCEPT [12:1200]
:CRIU-NETLOCK-INNER - [0:0]
:FOO - [0:0]
[1:60] -A PREROUTING -p udp -m comment --comment "not -j CRIU-NETLOCK-IN" -j FOO
[2:120] -A PREROUTING -p tcp -m tcp --dport 80 -m comment --comment "criu-netlock 1 2026-11-23T15:13:55Z 1 criu" -j DROP
[3:180] -A PREROUTING -j CRIU-NETLOCK-INNER
[4:240] -A OUTPUT -m comment --comment "a \"quoted\" \\ word" -j FOO
[5:300] -A CRIU-NETLOCK-INNER -m mark --mark 0xc114 -j ACCEPT
[6:360] -A FOO -p tcp -m tcp ! --sport 1:7 -j RETURN
COMMIT
*filter
:INPUT DROP [21:2100]
:FORWARD ACCEPT [22:2200]
:OUTPUT ACCEPT [23:2300]
[7:420] -A INPUT -m comment --comment CRIU-NETLOCK-OUT -j ACCEPT
[8:480] -A FORWARD -p tcp -j DROP
[8:480] -A FORWARD -p tcp -j DROP
COMMIT
`

// Nothing but our chains and the jumps to them is touched, counters included.
func TestForeignRules(t *testing.T) {
	each(t, func(t *testing.T, n *netlocktest.NS, v Variant) {
		for _, w := range variants {
			restore(n, w, "", foreign)
		}
		before := [2]string{save(n, Legacy, "-c"), save(n, NFT, "-c")}
		for name, b := range map[string]*Backend{"raw": New(v), "filter": noRaw(New(v))} {
			for range 2 {
				if res := lock(t, b, n); res.Already {
					t.Errorf("%s: found a lock among foreign rules", name)
				}
				wantIntact(t, n, v)
				if res := lock(t, b, n); !res.Already || res.Backend != full(v) {
					t.Errorf("%s: second lock: %+v", name, res)
				}
				// Without ours, the rules are the same while the lock is on, too.
				var lines []string
				for _, l := range strings.Split(save(n, v, "-c"), "\n") {
					if !strings.Contains(l, ":"+chainIn+" ") && !strings.Contains(l, ":"+chainOut+" ") && !strings.Contains(l, "-A "+chainIn+" ") && !strings.Contains(l, "-A "+chainOut+" ") &&
						!strings.HasSuffix(l, "-j "+chainIn) && !strings.HasSuffix(l, "-j "+chainOut) {
						lines = append(lines, l)
					}
				}
				if got, want := strings.Join(lines, "\n"), before[slices.Index(variants, v)]; got != want {
					t.Errorf("%s: under the lock:\n%s\nbefore:\n%s", name, got, want)
				}
				if st := unlock(t, b, n); !st.Intact || !st.Locked {
					t.Errorf("%s: unlock found %+v", name, st)
				}
				wantNothing(t, n)
				for i, w := range variants {
					if after := save(n, w, "-c"); after != before[i] {
						t.Errorf("%s: rules of %s changed:\n%s\nbefore:\n%s", name, w, after, before[i])
					}
				}
			}
		}
	})
}

// Whatever is under our names ends as exactly one lock, and after Unlock as none.
func TestLeftovers(t *testing.T) {
	const (
		in, out = chainIn, chainOut
		empty   = "*raw\n:" + in + " - [0:0]\n:" + out + " - [0:0]\nCOMMIT\n"
	)
	for name, c := range map[string]struct {
		fam    string // "" for both
		rules  string
		lock   bool // put on a lock first
		locked bool // it is still one
	}{
		"jumps doubled":           {lock: true, rules: "*raw\n-A PREROUTING -j " + in + "\n-A PREROUTING -j " + in + "\n-I OUTPUT -j " + out + "\nCOMMIT\n", locked: true},
		"jumps doubled in v6":     {lock: true, fam: "ip6", rules: "*raw\n-A PREROUTING -j " + in + "\nCOMMIT\n", locked: true},
		"accept in our chain":     {lock: true, rules: "*raw\n-I " + in + " -j ACCEPT\nCOMMIT\n"},
		"accept in v4":            {lock: true, fam: "ip", rules: "*raw\n-I " + out + " -p udp -j ACCEPT\nCOMMIT\n"},
		"accept behind":           {lock: true, rules: "*raw\n-A " + in + " -j ACCEPT\nCOMMIT\n", locked: true},
		"jump not first":          {lock: true, rules: "*raw\n-I PREROUTING -p udp -j ACCEPT\nCOMMIT\n"},
		"jump with matches":       {lock: true, rules: "*raw\n-A OUTPUT -p udp -m comment --comment \"x -j y\" -j " + in + "\nCOMMIT\n", locked: true},
		"goto":                    {lock: true, rules: "*raw\n-A OUTPUT -p tcp -g " + out + "\nCOMMIT\n", locked: true},
		"from a foreign chain":    {lock: true, rules: "*raw\n:FOO - [0:0]\n-A FOO -s 127.0.0.1/32 -j " + in + "\nCOMMIT\n", fam: "ip", locked: true},
		"to each other":           {lock: true, rules: "*raw\n-A " + in + " -j " + out + "\nCOMMIT\n", locked: true},
		"jumps gone":              {lock: true, rules: "*raw\n-D OUTPUT -j " + out + "\nCOMMIT\n"},
		"drop gone":               {lock: true, fam: "ip6", rules: "*raw\n-F " + out + "\nCOMMIT\n"},
		"also in filter":          {lock: true, rules: "*filter\n:" + in + " - [0:0]\n-A FORWARD -j " + in + "\n-A INPUT -j " + in + "\nCOMMIT\n", locked: true},
		"half made":               {rules: empty},
		"one chain":               {rules: "*raw\n:" + in + " - [0:0]\nCOMMIT\n"},
		"one family":              {rules: empty, fam: "ip6"},
		"accepts only":            {rules: "*raw\n:" + in + " - [0:0]\n-A " + in + " -j ACCEPT\n-A PREROUTING -j " + in + "\nCOMMIT\n"},
		"in filter only, v4 only": {fam: "ip", rules: "*filter\n:" + out + " - [0:0]\n-A " + out + " -j DROP\n-I OUTPUT -j " + out + "\nCOMMIT\n"},
		"a thousand rules":        {rules: "*raw\n:" + in + " - [0:0]\n" + strings.Repeat("-A "+in+" -p udp -j ACCEPT\n", 1000) + "COMMIT\n"},
	} {
		t.Run(name, func(t *testing.T) {
			each(t, func(t *testing.T, n *netlocktest.NS, v Variant) {
				restore(n, v, "", foreign)
				foreignRules := save(n, v, "-c")
				for _, end := range []string{"lock", "unlock", "lock by the other variant"} {
					b := New(v)
					if c.lock {
						lock(t, b, n)
					}
					restore(n, v, c.fam, c.rules)
					if st := state(t, b, n); st.Intact || st.Locked != c.locked || !st.Found || st.Why == "" || st.Backend != full(v) {
						t.Errorf("%+v; want locked %v", st, c.locked)
					}
					switch end {
					case "lock":
						// What is besides an intact lock is removed, and the lock left alone.
						if res := lock(t, b, n); res != (netlock.Result{Backend: full(v), Mode: netlock.Drop, Already: name == "also in filter"}) {
							t.Errorf("%+v", res)
						}
						wantIntact(t, n, v)
					case "lock by the other variant":
						b = New(other(v))
						lock(t, b, n)
						wantIntact(t, n, other(v))
					}
					if st := unlock(t, b, n); !st.Found || st.Intact == (end == "unlock") {
						t.Errorf("%s: unlock found %+v", end, st)
					}
					wantNothing(t, n)
					// What a case put in besides is foreign and stays; take it out by hand.
					for _, f := range families() {
						n.TryRun("*raw\n-D PREROUTING -p udp -j ACCEPT\nCOMMIT\n", f.prefix+"-"+string(v)+"-restore", "-w", "5", "--noflush")
						n.TryRun("*raw\n-X FOO2\nCOMMIT\n", f.prefix+"-"+string(v)+"-restore", "-w", "5", "--noflush")
					}
					if name == "from a foreign chain" {
						restore(n, v, "ip", "*raw\n:FOO - [0:0]\n[6:360] -A FOO -p tcp -m tcp ! --sport 1:7 -j RETURN\nCOMMIT\n")
					}
					if after := save(n, v, "-c"); after != foreignRules {
						t.Fatalf("%s: foreign rules changed:\n%s\nbefore:\n%s", end, after, foreignRules)
					}
				}
			})
		})
	}
}

// A process killed between the two commits leaves IPv4 locked alone.
func TestKilledBetweenFamilies(t *testing.T) {
	each(t, func(t *testing.T, n *netlocktest.NS, v Variant) {
		killed := func() {
			b := New(v)
			b.ipv6 = func() (bool, error) { return false, nil } // so it ends after IPv4
			lock(t, b, n)
			if st := state(t, New(v), n); st.Locked || st.Intact || !st.Found || st.Why != "ip6tables has no lock" {
				t.Fatalf("%+v", st)
			}
		}
		killed()
		b, calls := counted(New(v))
		if res := lock(t, b, n); res.Already || res.Backend != full(v) {
			t.Errorf("%+v", res)
		}
		want := []string{"ip6tables-" + string(v) + "-restore"}
		if v == Legacy {
			want = []string{"iptables-legacy-save", "ip6tables-legacy-restore"}
		}
		if !slices.Equal(*calls, want) {
			t.Errorf("the lock was completed by %v, want %v", *calls, want)
		}
		wantIntact(t, n, v)
		unlock(t, b, n)
		wantNothing(t, n)

		killed()
		if st := unlock(t, New(other(v)), n); !st.Found || st.Intact {
			t.Errorf("%+v", st)
		}
		wantNothing(t, n)
	})
}

// If the second family refuses, the first is undone.
func TestSecondFamilyRefuses(t *testing.T) {
	each(t, func(t *testing.T, n *netlocktest.NS, v Variant) {
		for name, c := range map[string]struct {
			text string
			code int
			kind netlock.Kind
		}{
			"no plug-in":  {"Couldn't load match `icmp6':No such file or directory", 2, netlock.KindNoBackend},
			"lock held":   {"Another app is currently holding the xtables lock. Stopped waiting after 1s.", 4, netlock.KindDeadline},
			"line failed": {"ip6tables-restore: line 4 failed", 1, netlock.KindOther},
		} {
			b := New(v)
			run := b.run
			b.run = func(ctx context.Context, path, stdin string, args ...string) (string, error) {
				if strings.Contains(path, "ip6") {
					return "", &toolError{tool: "ip6tables-restore", code: c.code, text: c.text}
				}
				return run(ctx, path, stdin, args...)
			}
			_, err := b.Lock(within(t, 20*time.Second), n.Netns(), options)
			if netlock.KindOf(err) != c.kind || errors.Is(err, netlock.ErrUnsupported) != (c.kind == netlock.KindNoBackend) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s: %v", name, err)
			}
			wantNothing(t, n)
		}
	})
}

// Where the kernel has no IPv6, IPv4 alone is a whole lock.
func TestNoIPv6(t *testing.T) {
	each(t, func(t *testing.T, n *netlocktest.NS, v Variant) {
		b, calls := counted(New(v))
		b.ipv6 = func() (bool, error) { return false, nil }
		lock(t, b, n)
		if st := state(t, b, n); !st.Locked || !st.Intact {
			t.Errorf("%+v", st)
		}
		if res := lock(t, b, n); !res.Already {
			t.Errorf("%+v", res)
		}
		if st := unlock(t, b, n); !st.Intact {
			t.Errorf("%+v", st)
		}
		for _, c := range *calls {
			if strings.HasPrefix(c, "ip6") {
				t.Errorf("ran %s", c)
			}
		}
		wantNothing(t, n)
	})
}

// Auto takes legacy, and nft where legacy is missing; explicit variants do not fall back.
func TestVariants(t *testing.T) {
	netlocktest.Need(t, "iptables-legacy-restore", "iptables-nft-restore")
	missing := func(b *Backend, v Variant) *Backend {
		b.find = func(w Variant, f family, verb string) (string, error) {
			if w == v {
				return "", fmt.Errorf("%w: there is no %s-%s-%s", netlock.ErrUnsupported, f.prefix, w, verb)
			}
			return findTool(w, f, verb)
		}
		return b
	}
	n := netlocktest.NewNS(t)
	if res := lock(t, New(Auto), n); res.Backend != "iptables-legacy" {
		t.Errorf("%+v", res)
	}
	unlock(t, New(Auto), n)
	if res := lock(t, missing(New(Auto), Legacy), n); res.Backend != "iptables-nft" {
		t.Errorf("%+v", res)
	}
	// An intact lock is left alone by Auto, and replaced by an explicit other variant.
	if res := lock(t, New(Auto), n); res != (netlock.Result{Backend: "iptables-nft", Mode: netlock.Drop, Already: true}) {
		t.Errorf("%+v", res)
	}
	if res := lock(t, New(Legacy), n); res != (netlock.Result{Backend: "iptables-legacy", Mode: netlock.Drop}) {
		t.Errorf("%+v", res)
	}
	wantIntact(t, n, Legacy)
	if _, err := missing(New(Auto), Legacy).Unlock(within(t, 20*time.Second), n.Netns(), options); netlock.KindOf(err) != netlock.KindNoBackend || errors.Is(err, netlock.ErrUnsupported) {
		t.Errorf("a lock that cannot be taken off passed for none: %v", err)
	}
	unlock(t, New(NFT), n)
	wantNothing(t, n)
	for _, b := range []*Backend{missing(New(Legacy), Legacy), missing(New(NFT), NFT), missing(missing(New(Auto), Legacy), NFT)} {
		if b.variant == Auto {
			b.find = func(v Variant, _ family, _ string) (string, error) { return "", netlock.ErrUnsupported }
		}
		_, err := b.Lock(within(t, 20*time.Second), n.Netns(), options)
		if !errors.Is(err, netlock.ErrUnsupported) || netlock.KindOf(err) != netlock.KindNoBackend || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", b.variant, err)
		}
	}
	wantNothing(t, n)
}

// Both variants' locks together are not one lock, and one Unlock removes both.
func TestBothVariants(t *testing.T) {
	each(t, func(t *testing.T, n *netlocktest.NS, v Variant) {
		lock(t, New(v), n)
		text := [2]string{n.Run("", "iptables-"+string(v)+"-save"), n.Run("", "ip6tables-"+string(v)+"-save")}
		lock(t, New(other(v)), n)
		for i, f := range families() {
			n.Run(text[i], f.prefix+"-"+string(v)+"-restore", "-w", "5")
		}
		if st := state(t, New(v), n); !st.Locked || st.Intact || st.Why == "" {
			t.Errorf("%+v", st)
		}
		if res := lock(t, New(v), n); res != (netlock.Result{Backend: full(v), Mode: netlock.Drop, Already: true}) {
			t.Errorf("%+v", res)
		}
		wantIntact(t, n, v)
		for i, f := range families() {
			n.Run(text[i], f.prefix+"-"+string(other(v))+"-restore", "-w", "5")
		}
		if st := unlock(t, New(v), n); !st.Locked || st.Intact {
			t.Errorf("%+v", st)
		}
		wantNothing(t, n)
	})
}

// Where nothing of ours is, no process is started and no table is made.
func TestNoProcess(t *testing.T) {
	netlocktest.Need(t, "iptables-legacy-restore", "iptables-nft-restore", "nft")
	n := netlocktest.NewNS(t)
	b, calls := counted(New(Auto))
	look := func(when string) {
		t.Helper()
		*calls = nil
		if st := state(t, b, n); st != (netlock.State{}) {
			t.Errorf("%s: %+v", when, st)
		}
		if st := unlock(t, b, n); st != (netlock.State{}) {
			t.Errorf("%s: %+v", when, st)
		}
		if len(*calls) > 0 {
			t.Errorf("%s: ran %v", when, *calls)
		}
	}
	look("fresh")
	for _, f := range families() {
		if names := n.Run("", "cat", procNet+"/"+f.proc+"names"); names != "" {
			t.Errorf("looking made the tables %q", names)
		}
	}
	if s := n.Run("", "nft", "list", "ruleset"); s != "" {
		t.Errorf("looking made\n%s", s)
	}
	for _, v := range variants {
		restore(n, v, "", foreign)
	}
	look("foreign rules")
	for _, v := range variants {
		lock(t, New(v), n)
		unlock(t, New(v), n)
	}
	look("after a lock")
	// And a lock where nothing is costs one process for each family.
	for _, v := range variants {
		b, calls := counted(New(v))
		lock(t, b, n)
		if want := []string{"iptables-" + string(v) + "-restore", "ip6tables-" + string(v) + "-restore"}; !slices.Equal(*calls, want) {
			t.Errorf("locked by %v, want %v", *calls, want)
		}
		unlock(t, b, n)
	}
}

// The caller's environment does not reach the programs.
func TestEnvironment(t *testing.T) {
	each(t, func(t *testing.T, n *netlocktest.NS, v Variant) {
		dir := t.TempDir()
		for _, f := range families() {
			if err := os.WriteFile(dir+"/"+f.prefix+"-"+string(v)+"-restore", []byte("#!/bin/sh\nexit 1\n"), 0o777); err != nil {
				t.Fatal(err)
			}
		}
		t.Setenv("XTABLES_LIBDIR", "/nonexistent")
		t.Setenv("XTABLES_LOCKFILE", "/nonexistent/lock")
		t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
		lock(t, New(v), n)
		unlock(t, New(v), n)
	})
}

// process is the test binary doing one operation, by way of other programs.
func process(t *testing.T, n *netlocktest.NS, op string, v Variant, limit time.Duration, by ...string) *exec.Cmd {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	by = append(by, self)
	c := exec.CommandContext(t.Context(), by[0], by[1:]...)
	c.Env = append(os.Environ(), helperOp+"="+op, helperPID+"="+strconv.Itoa(n.PID()),
		helperVariant+"="+string(v), helperTimeout+"="+limit.String())
	return c
}

// inPrivateRun are the words before a program that give it a /run of its own, with an
// xtables lock that a file outside can be: the machine's stays as it is.
func inPrivateRun(t *testing.T) (by []string, file *os.File) {
	netlocktest.Need(t, "unshare", "mount")
	dir := t.TempDir()
	file, err := os.Create(dir + "/xtables.lock")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return []string{"unshare", "--mount", "--propagation", "private", "sh", "-c", `mount --bind "$0" /run && exec "$1"`, dir}, file
}

func flock(t *testing.T, f *os.File, how int) {
	t.Helper()
	if err := unix.Flock(int(f.Fd()), how); err != nil {
		t.Fatal(err)
	}
}

// While somebody holds the xtables lock, legacy ends at its deadline and leaves
// nothing; nft does not care. Unlock ends at its deadline too, and says so.
func TestXtablesLockHeld(t *testing.T) {
	each(t, func(t *testing.T, n *netlocktest.NS, v Variant) {
		by, file := inPrivateRun(t)
		flock(t, file, unix.LOCK_EX)
		for _, limit := range []time.Duration{400 * time.Millisecond, 1500 * time.Millisecond} {
			if v == NFT {
				limit *= 20 // it is to succeed
			}
			start := time.Now()
			out, err := process(t, n, "lock", v, limit, by...).CombinedOutput()
			took := time.Since(start)
			var exit *exec.ExitError
			switch {
			case v == NFT && err != nil:
				t.Errorf("%v: %s", err, out)
			case v == NFT:
				wantIntact(t, n, v)
				unlock(t, New(v), n)
			case !errors.As(err, &exit) || exit.ExitCode() != int(netlock.KindDeadline) || strings.Count(string(out), "\n") != 1:
				t.Errorf("%v: %s", err, out)
			case took > limit+netlock.UndoTime+time.Second:
				t.Errorf("took %v of %v", took, limit)
			}
			wantNothing(t, n)
		}
		if v == NFT {
			return
		}
		lock(t, New(v), n)
		out, err := process(t, n, "unlock", v, time.Second, by...).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != int(netlock.KindDeadline) {
			t.Errorf("%v: %s", err, out)
		}
		wantIntact(t, n, v)
		flock(t, file, unix.LOCK_UN)
		if out, err := process(t, n, "unlock", v, 5*time.Second, by...).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		wantNothing(t, n)
	})
}

// When the one who wants a lock is killed while iptables waits for its turn, iptables
// dies too, and no lock appears afterwards.
func TestKilledWhileWaiting(t *testing.T) {
	netlocktest.Need(t, "iptables-legacy-restore")
	n := netlocktest.NewNS(t)
	by, file := inPrivateRun(t)
	flock(t, file, unix.LOCK_EX)
	c := process(t, n, "lock", Legacy, 30*time.Second, by...)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Process.Kill()
		c.Wait()
		if t.Failed() {
			t.Logf("%v: %s", c.ProcessState, &out)
		}
	})
	poll(t, "iptables to wait", func() bool { return len(inside(t, n)) == 1 })
	c.Process.Kill()
	c.Wait()
	poll(t, "iptables to end", func() bool { return len(inside(t, n)) == 0 })
	flock(t, file, unix.LOCK_UN)
	wantNothing(t, n)
}

func poll(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited 10 s for %s", what)
		}
	}
}

// inside lists the programs of legacy iptables that run in the namespace. The test's
// own process can seem to be there, when its main thread is.
func inside(t *testing.T, n *netlocktest.NS) (pids []string) {
	t.Helper()
	want := fmt.Sprintf("net:[%d]", n.Netns().Inode())
	all, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		pid := strings.Split(p, "/")[2]
		comm, _ := os.ReadFile("/proc/" + pid + "/comm")
		if to, err := os.Readlink(p); err == nil && to == want && strings.HasPrefix(string(comm), "iptables-legacy") {
			pids = append(pids, pid)
		}
	}
	return pids
}

// If the xtables lock is taken between the two families, the first is undone once
// it is free.
func TestXtablesLockTakenBetween(t *testing.T) {
	netlocktest.Need(t, "iptables-legacy-restore")
	n := netlocktest.NewNS(t)
	b := New(Legacy)
	run := b.run
	b.run = func(ctx context.Context, path, stdin string, args ...string) (string, error) {
		if strings.Contains(path, "ip6tables-legacy-restore") {
			<-ctx.Done() // as iptables would, until it is killed
			return "", fmt.Errorf("%s was ended: %w", path, ctx.Err())
		}
		return run(ctx, path, stdin, args...)
	}
	_, err := b.Lock(within(t, 500*time.Millisecond), n.Netns(), options)
	if netlock.KindOf(err) != netlock.KindDeadline {
		t.Error(err)
	}
	wantNothing(t, n)
}

// A deadline that passes just as iptables commits takes the lock back.
func TestDeadlineAfterCommit(t *testing.T) {
	each(t, func(t *testing.T, n *netlocktest.NS, v Variant) {
		for _, last := range []string{"iptables", "ip6tables"} {
			ctx, cancel := context.WithCancel(t.Context())
			b := New(v)
			run := b.run
			b.run = func(ctx context.Context, path, stdin string, args ...string) (string, error) {
				out, err := run(ctx, path, stdin, args...)
				if filepath.Base(path) == last+"-"+string(v)+"-restore" {
					cancel()
				}
				return out, err
			}
			if _, err := b.Lock(ctx, n.Netns(), options); netlock.KindOf(err) != netlock.KindDeadline {
				t.Errorf("%s: %v", last, err)
			}
			wantNothing(t, n)
		}
		// And what was there before a Lock that failed stays there.
		lock(t, New(v), n)
		b := New(other(v))
		b.run = func(ctx context.Context, path, stdin string, args ...string) (string, error) {
			if strings.Contains(path, "restore") {
				return "", &toolError{tool: "x", code: 4, text: "xtables lock"}
			}
			return runCommand(ctx, path, stdin, args...)
		}
		if _, err := b.Lock(within(t, 5*time.Second), n.Netns(), options); netlock.KindOf(err) != netlock.KindDeadline {
			t.Error(err)
		}
		wantIntact(t, n, v)
		unlock(t, New(v), n)
	})
}

// A program of which nobody knows how it ended may have locked: that is taken back.
func TestUnknownEnd(t *testing.T) {
	each(t, func(t *testing.T, n *netlocktest.NS, v Variant) {
		for _, last := range []string{"iptables", "ip6tables"} {
			b := New(v)
			run := b.run
			b.run = func(ctx context.Context, path, stdin string, args ...string) (string, error) {
				out, err := run(ctx, path, stdin, args...)
				if filepath.Base(path) == last+"-"+string(v)+"-restore" && strings.Contains(stdin, "-A "+chainIn) {
					err = fmt.Errorf("run %s: %w", path, exec.ErrWaitDelay)
				}
				return out, err
			}
			if _, err := b.Lock(within(t, 20*time.Second), n.Netns(), options); !errors.Is(err, exec.ErrWaitDelay) {
				t.Errorf("%s: %v", last, err)
			}
			wantNothing(t, n)
		}
	})
}

// What is missing is named.
func TestPrivileges(t *testing.T) {
	each(t, func(t *testing.T, n *netlocktest.NS, v Variant) {
		netlocktest.Need(t, "capsh")
		for _, c := range []struct {
			drop string
			op   string
			kind netlock.Kind
		}{
			{"cap_net_admin", "lock", netlock.KindPrivilege},
			{"cap_net_admin", "unlock", netlock.KindPrivilege},
			{"cap_net_raw", "lock", map[Variant]netlock.Kind{Legacy: netlock.KindPrivilege}[v]}, // nft does without
		} {
			cmd := process(t, n, c.op, v, 5*time.Second, "capsh", "--drop="+c.drop, "--", "-c", `exec "$0"`)
			out, err := cmd.CombinedOutput()
			if code := cmd.ProcessState.ExitCode(); code != int(c.kind) {
				t.Errorf("%s without %s: %v: %s", c.op, c.drop, err, out)
			}
			if c.kind != 0 && (!strings.Contains(string(out), strings.ToUpper(c.drop)) || strings.Count(string(out), "\n") != 1) {
				t.Errorf("%s without %s says %s", c.op, c.drop, out)
			}
			unlock(t, New(v), n)
			wantNothing(t, n)
		}
	})
}

// Many at once end with one lock, then with none.
func TestConcurrent(t *testing.T) {
	each(t, func(t *testing.T, n *netlocktest.NS, v Variant) {
		restore(n, v, "", foreign)
		before := save(n, v)
		all := func(op func() error) {
			var wg sync.WaitGroup
			for range 6 {
				wg.Go(func() {
					if err := op(); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
		}
		ctx := within(t, 60*time.Second)
		for range 3 {
			all(func() error { _, err := New(v).Lock(ctx, n.Netns(), options); return err })
			wantIntact(t, n, v)
			all(func() error { _, err := New(v).Unlock(ctx, n.Netns(), options); return err })
			wantNothing(t, n)
		}
		if after := save(n, v); after != before {
			t.Errorf("foreign rules changed:\n%s\nbefore:\n%s", after, before)
		}
	})
}

// A table of nf_tables that is dormant, hooked elsewhere or somebody's own stops
// nothing, however much it looks like a lock to iptables-nft.
func TestDeadTable(t *testing.T) {
	netlocktest.Need(t, "iptables-nft-restore", "nft")
	for name, prepare := range map[string]func(n *netlocktest.NS){
		"dormant":       func(n *netlocktest.NS) { n.Run("", "nft", "add table ip raw { flags dormant; }") },
		"no base chain": func(n *netlocktest.NS) { n.Run("", "nft", "add table ip raw; add chain ip raw PREROUTING") },
		"wrong priority": func(n *netlocktest.NS) {
			n.Run("", "nft", "add table ip raw; add chain ip raw PREROUTING { type filter hook prerouting priority 0; }")
		},
		"wrong hook": func(n *netlocktest.NS) {
			n.Run("", "nft", "add table ip raw; add chain ip raw OUTPUT { type filter hook input priority -300; }")
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := netlocktest.NewPair(t)
			n := p.Inside
			prepare(n)
			before := n.Run("", "nft", "list", "table", "ip", "raw")
			if lock(t, New(NFT), n); !silent(t, p, "10.77.0.1:9", noAnswer) {
				t.Errorf("packets pass under\n%s", n.Run("", "nft", "list", "ruleset"))
			}
			wantIntact(t, n, NFT)
			unlock(t, New(NFT), n)
			wantNothing(t, n)
			if silent(t, p, "10.77.0.1:9", answer) {
				t.Error("nothing passes after unlock")
			}
			if after := n.Run("", "nft", "list", "table", "ip", "raw"); !strings.Contains(after, strings.TrimSuffix(strings.TrimSpace(before), "}")) && name == "dormant" {
				t.Errorf("the table changed:\n%s\nbefore:\n%s", after, before)
			}
		})
	}
	t.Run("falls asleep", func(t *testing.T) {
		n := netlocktest.NewNS(t)
		lock(t, New(NFT), n)
		n.Run("", "nft", "add table ip6 raw { flags dormant; }")
		if st := state(t, New(NFT), n); st.Locked || st.Intact || !strings.Contains(st.Why, "dormant") {
			t.Errorf("%+v", st)
		}
		lock(t, New(NFT), n)
		wantIntact(t, n, NFT)
		unlock(t, New(NFT), n)
		wantNothing(t, n)
	})
}

// How long a connection waits for an answer that must not come, and for one that must.
const (
	noAnswer = 300 * time.Millisecond
	answer   = 10 * time.Second
)

// silent tells whether a connection from the peer to a port without a listener gets
// no answer; without a lock it is refused at once.
func silent(t *testing.T, p *netlocktest.Pair, addr string, wait time.Duration) bool {
	t.Helper()
	err := p.Peer.Do(func() error {
		c, err := net.DialTimeout("tcp", addr, wait)
		if err == nil {
			c.Close()
		}
		return err
	})
	var ne net.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return false
	case errors.As(err, &ne) && ne.Timeout():
		return true
	}
	t.Fatalf("connect %s: %v", addr, err)
	return false
}

// A lock stops packets in both families and both directions, in either table, and
// counts what it dropped.
func TestPackets(t *testing.T) {
	for _, v := range variants {
		for name, b := range map[string]*Backend{"raw": New(v), "filter": noRaw(New(v))} {
			t.Run(string(v)+"/"+name, func(t *testing.T) {
				netlocktest.Need(t, "iptables-legacy-restore", "iptables-nft-restore")
				p := netlocktest.NewPair(t)
				out := &netlocktest.Pair{Inside: p.Peer, Peer: p.Inside}
				lo := &netlocktest.Pair{Inside: p.Inside, Peer: p.Inside}
				check := func(want bool) {
					t.Helper()
					wait := answer
					if want {
						wait = noAnswer
					}
					for addr, from := range map[string]*netlocktest.Pair{
						"10.77.0.1:9": p, "[fd77::1]:9": p, "10.77.0.2:9": out, "[fd77::2]:9": out, "127.0.0.1:9": lo, "[::1]:9": lo,
					} {
						if got := silent(t, from, addr, wait); got != want {
							t.Errorf("%s silent: %v, want %v", addr, got, want)
						}
					}
				}
				check(false)
				lock(t, b, p.Inside)
				check(true)
				if st := state(t, b, p.Inside); st.DroppedIn < 2 || st.DroppedOut < 4 || !st.Intact {
					t.Errorf("%+v", st)
				}
				unlock(t, b, p.Inside)
				check(false)
			})
		}
	}
}

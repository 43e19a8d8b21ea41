package nft_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
	"github.com/criu-netlock/criu-netlock/nft"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

var update = flag.Bool("update", false, "rewrite testdata")

const (
	helperOp  = "NFT_TEST_OP"
	helperPID = "NFT_TEST_PID"
	// helperTime is how long it may take, a second without it.
	helperTime = "NFT_TEST_TIME"
)

// TestMain makes the test binary do one operation as a process of its own, for the
// tests that inject faults into its system calls.
func TestMain(m *testing.M) {
	if op := os.Getenv(helperOp); op != "" {
		os.Exit(helper(op))
	}
	os.Exit(netlocktest.HostUntouched(m))
}

func helper(op string) int {
	runtime.LockOSThread() // strace counts each thread's system calls by themselves
	pid, err := strconv.Atoi(os.Getenv(helperPID))
	if err != nil {
		return 99
	}
	ns, err := netlock.FromPID(pid)
	limit := time.Second
	if text := os.Getenv(helperTime); text != "" && err == nil {
		limit, err = time.ParseDuration(text)
	}
	if err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		b := nft.New(nft.WithRelease(nfnl.Park))
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

type space struct {
	t  *testing.T
	ns *netlock.Namespace
	// pid of a process in it
	pid int
}

func newSpace(t *testing.T) *space {
	netlocktest.Need(t, "nft")
	n := netlocktest.NewNS(t)
	return &space{t, n.Netns(), n.PID()}
}

func (s *space) nft(stdin string, args ...string) string {
	s.t.Helper()
	var out []byte
	err := s.ns.Do(func() (err error) {
		c := exec.Command("nft", args...)
		c.Stdin = strings.NewReader(stdin)
		var stderr bytes.Buffer
		c.Stderr = &stderr
		if out, err = c.Output(); err != nil {
			err = fmt.Errorf("nft %v: %w: %s", args, err, &stderr)
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return string(out)
}

func (s *space) lock(b *nft.Backend, o netlock.Options) netlock.Result {
	s.t.Helper()
	res, err := b.Lock(s.t.Context(), s.ns, o)
	if err != nil {
		s.t.Fatal(err)
	}
	return res
}

func (s *space) state(b *nft.Backend, o netlock.Options) netlock.State {
	s.t.Helper()
	st, err := b.State(s.t.Context(), s.ns, o)
	if err != nil {
		s.t.Fatal(err)
	}
	return st
}

func allow(t *testing.T, rules ...string) (o netlock.Options) {
	o = options
	for _, s := range rules {
		r, err := netlock.ParseRule(s)
		if err != nil {
			t.Fatal(err)
		}
		o.Allow = append(o.Allow, r)
	}
	return o
}

// Every rule set as nft prints it; and what it prints, read in again by nft, is an
// intact lock and prints the same: so a dump and a restore carry the lock along.
func TestGolden(t *testing.T) {
	for name, rules := range map[string][]string{
		"plain": nil,
		"allow": {"tcp dport 22", "ip daddr 10.0.0.5 tcp dport 2049", "ip saddr 192.168.0.0/16 daddr 172.16.0.0/12 udp sport 53 dport 1024",
			"ip6 saddr fd00::/61", "ip6 daddr fe80::1 icmpv6", "ip6 saddr 2001:db8::/32 sctp", "icmp", "ip tcp dport 80"},
	} {
		t.Run(name, func(t *testing.T) {
			s, b, o := newSpace(t), nft.New(), allow(t, rules...)
			defer b.Wait()
			s.lock(b, o)
			list := s.nft("", "list", "ruleset")
			golden(t, name, list)

			if st := s.state(b, o); !st.Intact || !st.Locked {
				t.Fatalf("a fresh lock is not intact: %+v", st)
			}
			if _, err := b.Unlock(t.Context(), s.ns, o); err != nil {
				t.Fatal(err)
			}
			if left := s.nft("", "list", "ruleset"); left != "" {
				t.Fatalf("left after unlock:\n%s", left)
			}
			s.nft(list, "-f", "-")
			if again := s.nft("", "list", "ruleset"); again != list {
				t.Fatalf("a replayed lock prints otherwise:\n%s\nwas\n%s", again, list)
			}
			if st := s.state(b, o); !st.Intact || st.Caller != options.Caller || st.Since.IsZero() {
				t.Fatalf("a replayed lock is not intact: %+v", st)
			}
			if res := s.lock(b, o); !res.Already {
				t.Fatal("a replayed lock was put on again")
			}

			// Once more on top: now every rule is there twice.
			s.nft(list, "-f", "-")
			if st := s.state(b, o); !st.Locked || st.Intact {
				t.Fatalf("a doubled lock: %+v", st)
			}
			s.lock(b, o)
			if got := s.nft("", "list", "tables"); got != "table inet criu-netlock-2\n" {
				t.Fatalf("after a doubled lock was replaced there is:\n%s", got)
			}
			if st := s.state(b, o); !st.Intact {
				t.Fatalf("the replacement is not intact: %+v", st)
			}
			if st, err := b.Unlock(t.Context(), s.ns, o); err != nil || !st.Intact {
				t.Fatalf("unlock: %+v, %v", st, err)
			}
			if left := s.nft("", "list", "ruleset"); left != "" {
				t.Fatalf("left after unlock:\n%s", left)
			}
		})
	}
}

var varies = regexp.MustCompile(`packets \d+ bytes \d+|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`)

func golden(t *testing.T, name, got string) {
	t.Helper()
	got = varies.ReplaceAllStringFunc(got, func(s string) string {
		if strings.HasPrefix(s, "packets") {
			return "packets 0 bytes 0"
		}
		return "2026-01-02T03:04:05Z"
	})
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s:\n%s\nwant\n%s", file, got, want)
	}
}

// fault is what strace makes of a system call.
type fault struct{ call, inject string }

// inject runs the helper with a fault in those calls that when selects, and tells
// whether there were any. Meanwhile it runs during, with the file that strace writes.
func (s *space) inject(op string, f fault, when string, during ...func(trace string)) (code int, hit bool, stderr string) {
	trace := filepath.Join(s.t.TempDir(), "trace")
	c := exec.Command("strace", "-f", "-qq", "-o", trace, "-e", "trace="+f.call,
		"-e", fmt.Sprintf("inject=%s:%s:when=%s", f.call, f.inject, when), os.Args[0])
	c.Env = append(os.Environ(), helperOp+"="+op, helperPID+"="+strconv.Itoa(s.pid))
	var out bytes.Buffer
	c.Stderr = &out
	start := time.Now()
	var wg sync.WaitGroup
	for _, d := range during {
		wg.Go(func() { d(trace) })
	}
	err := c.Run()
	wg.Wait()
	if took := time.Since(start); took > 5*time.Second {
		s.t.Errorf("%s, %s of %s %s: took %v", op, f.inject, f.call, when, took)
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &exit):
		code = exit.ExitCode() // -1 if strace followed the process into its death
	default:
		s.t.Fatal(err)
	}
	log, err := os.ReadFile(trace)
	if err != nil {
		s.t.Fatal(err)
	}
	return code, bytes.Contains(log, []byte("INJECTED")) || bytes.Contains(log, []byte("DELAYED")) || bytes.Contains(log, []byte("killed by")), out.String()
}

// Real faults in the real system calls of a process that locks or unlocks. Whatever
// happens: it ends, a lock is there whole or not at all, and the exit code is true.
func TestFaults(t *testing.T) {
	netlocktest.Need(t, "strace", "nft")
	s, b := newSpace(t), nft.New()
	defer b.Wait()
	var faults []fault
	for _, e := range []string{"ENOBUFS", "EINTR", "EAGAIN", "ENOMEM", "ETIMEDOUT"} {
		faults = append(faults, fault{"recvmsg", "error=" + e}, fault{"sendto", "error=" + e})
	}
	faults = append(faults, fault{"recvmsg", "signal=KILL"}, fault{"sendto", "signal=KILL"}, fault{"sendto", "delay_exit=1500000"},
		fault{"setns", "error=EPERM"}, fault{"socket", "error=EMFILE"}, fault{"pidfd_open", "error=ENFILE"})
	reset := func(locked bool) {
		if _, err := b.Unlock(t.Context(), s.ns, options); err != nil {
			t.Fatal(err)
		}
		b.Wait()
		if locked {
			s.lock(b, options)
		}
	}
	points := 0
	for _, op := range []string{"lock", "unlock"} {
		for _, f := range faults {
			for k := 1; k < 40; k++ {
				reset(op == "unlock")
				code, hit, stderr := s.inject(op, f, strconv.Itoa(k))
				if !hit {
					if k == 1 {
						t.Errorf("%s: no %s to inject %s into", op, f.call, f.inject)
					}
					break
				}
				points++
				at := fmt.Sprintf("%s, %s of %s %d: exit %d, %s", op, f.inject, f.call, k, code, strings.TrimSpace(stderr))
				st := s.state(b, options)
				rules := s.nft("", "list", "ruleset")
				switch {
				case st.Found != (rules != ""):
					t.Errorf("%s: state %+v, but the rules are\n%s", at, st, rules)
				case st.Found && !st.Intact:
					t.Errorf("%s: a lock that is not whole: %s", at, st.Why)
				case op == "lock" && code == 0 && !st.Locked:
					t.Errorf("%s: success, and no lock", at)
				case op == "lock" && code > 0 && code < 128 && st.Found:
					t.Errorf("%s: failure, and a lock is left", at)
				case op == "unlock" && code == 0 && st.Found:
					t.Errorf("%s: success, and a lock is left", at)
				case code > 0 && code < 128 && strings.Count(stderr, "\n") != 1:
					t.Errorf("%s: not exactly one line", at)
				}
			}
		}
	}
	t.Logf("%d points", points)
}

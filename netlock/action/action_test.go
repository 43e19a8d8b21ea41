package action

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// The one table that says what each hook does, and that all others do nothing.
func TestTable(t *testing.T) {
	want := map[Name]Op{
		PreStream: Nothing, PreDump: CheckTask, NetworkLock: Lock, PostDump: Nothing, NetworkUnlock: Unlock,
		PreRestore: CheckHost, SetupNamespaces: Ensure, PostSetupNamespaces: Ensure, PostRestore: EnsureRemovable,
		PreResume: Nothing, PostResume: Sweep,
		OrphanPtsMaster: Nothing, StatusReady: Nothing, QueryExtFiles: Nothing,
		"": Nothing, "network-lock ": Nothing, "Network-Lock": Nothing, "of-the-future": Nothing,
	}
	for n, op := range want {
		if got := OpOf(n); got != op {
			t.Errorf("%q: %d; %d is wanted", n, got, op)
		}
	}
	for n := range table {
		if _, ok := want[n]; !ok {
			t.Errorf("%q is in the table and not in this test", n)
		}
	}
	for op, needs := range map[Op]bool{Nothing: false, CheckHost: false, CheckTask: true, Lock: true, Ensure: true, EnsureRemovable: true, Unlock: true, Sweep: true} {
		if op.NeedsPID() != needs {
			t.Errorf("operation %d needs a pid: %v", op, !needs)
		}
	}
}

func env(m map[string]string) func(string) (string, bool) {
	return func(k string) (string, bool) { v, ok := m[k]; return v, ok }
}

func TestFromEnv(t *testing.T) {
	for _, c := range []struct {
		env  map[string]string
		want Event
		err  string
	}{
		{map[string]string{}, Event{}, "read CRTOOLS_SCRIPT_ACTION: unset or empty"},
		{map[string]string{EnvAction: ""}, Event{}, "unset or empty"},
		{map[string]string{EnvAction: "network-lock", EnvInitPID: "12", EnvImageDir: "/proc/9/fd/3"}, Event{Action: NetworkLock, PID: 12, ImageDir: "/proc/9/fd/3"}, ""},
		{map[string]string{EnvAction: "network-lock"}, Event{Action: NetworkLock}, "read CRTOOLS_INIT_PID: unset, but network-lock needs it"},
		{map[string]string{EnvAction: "network-unlock", EnvInitPID: ""}, Event{Action: NetworkUnlock}, `"" is not a pid: empty`},
		{map[string]string{EnvAction: "post-resume", EnvInitPID: "+5"}, Event{Action: PostResume}, `"+5" is not a pid`},
		// Where no pid is needed, none is read.
		{map[string]string{EnvAction: "pre-restore"}, Event{Action: PreRestore}, ""},
		{map[string]string{EnvAction: "pre-restore", EnvInitPID: "x"}, Event{Action: PreRestore}, ""},
		{map[string]string{EnvAction: "post-dump", EnvInitPID: "x"}, Event{Action: PostDump}, ""},
		{map[string]string{EnvAction: "of-the-future", EnvInitPID: "-1"}, Event{Action: "of-the-future"}, ""},
	} {
		got, err := FromEnv(env(c.env))
		switch {
		case got != c.want:
			t.Errorf("%v: %+v; %+v is wanted", c.env, got, c.want)
		case (err == nil) != (c.err == ""), err != nil && !strings.Contains(err.Error(), c.err):
			t.Errorf("%v: %v; %q is wanted", c.env, err, c.err)
		case err != nil && netlock.KindOf(err) != netlock.KindInput:
			t.Errorf("%v: kind %d", c.env, netlock.KindOf(err))
		}
	}
}

func TestParsePID(t *testing.T) {
	limit := pidMax()
	for s, want := range map[string]int{
		"1": 1, "5": 5, "10": 10, strconv.Itoa(limit): limit,
		"": 0, "0": 0, "00": 0, "05": 0, "-1": 0, "+5": 0, " 5": 0, "5 ": 0, "5x": 0, "x": 0, "5\n": 0, "5.0": 0, "1e3": 0, "0x5": 0, "1_0": 0, "５": 0, "\x00": 0,
		strconv.Itoa(limit + 1): 0, "18446744073709551617": 0, strings.Repeat("9", 10000): 0,
	} {
		got, err := ParsePID(s)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%.40q: %d, %v", s, got, err)
		}
		if err != nil && len(err.Error()) > 200 {
			t.Errorf("%.40q: an error of %d bytes", s, len(err.Error()))
		}
	}
}

func FuzzFromEnv(f *testing.F) {
	for _, a := range []Name{NetworkLock, PreRestore, PostDump, "x", ""} {
		for _, p := range []string{"1", "0", "05", "", "x", "4194304", "99999999999999999999"} {
			f.Add(string(a), p, "/proc/1/fd/3")
		}
	}
	f.Fuzz(func(t *testing.T, a, p, dir string) {
		ev, err := FromEnv(env(map[string]string{EnvAction: a, EnvInitPID: p, EnvImageDir: dir}))
		if err != nil {
			var e *netlock.Error
			if !errors.As(err, &e) || e.Kind != netlock.KindInput || strings.ContainsAny(err.Error(), "\r\n") {
				t.Errorf("%q, %q: %q", a, p, err)
			}
			if ev.PID != 0 {
				t.Errorf("a pid with an error: %+v", ev)
			}
			return
		}
		needs := OpOf(Name(a)).NeedsPID()
		switch {
		case a == "" || ev.Action != Name(a) || ev.ImageDir != dir:
			t.Errorf("%q: %+v", a, ev)
		case needs && strconv.Itoa(ev.PID) != p: // the kernel would have written it so
			t.Errorf("%q taken as pid %d", p, ev.PID)
		case needs && (ev.PID < 1 || ev.PID > 4<<20), !needs && ev.PID != 0:
			t.Errorf("pid %d", ev.PID)
		}
	})
}

// fake is a Locker that remembers what it was asked, and answers what it is told to.
type fake struct {
	calls []string
	res   netlock.Result
	state netlock.State
	err   map[string]error
}

func (f *fake) Lock(context.Context, *netlock.Namespace) (netlock.Result, error) {
	f.calls = append(f.calls, "lock")
	return f.res, f.err["lock"]
}

func (f *fake) Unlock(context.Context, *netlock.Namespace) (netlock.State, error) {
	f.calls = append(f.calls, "unlock")
	return f.state, f.err["unlock"]
}

func (f *fake) State(context.Context, *netlock.Namespace) (netlock.State, error) {
	f.calls = append(f.calls, "state")
	return f.state, f.err["state"]
}

func (f *fake) trial(context.Context) (netlock.Result, error) {
	f.calls = append(f.calls, "trial")
	return f.res, f.err["trial"]
}

func TestHandle(t *testing.T) {
	pid, _ := netlocktest.NewTask(t)
	locked := netlock.State{Locked: true, Found: true, Intact: true, Backend: "nft"}
	broken := errors.New("broken")
	criu := netlock.Caller{PID: 7, Name: "criu", Start: 70, Boot: "b"}
	byIt := locked
	byIt.Caller = criu
	for _, c := range []struct {
		action Name
		fake   fake
		calls  string
		want   Report
		err    error
	}{
		{PostDump, fake{}, "", Report{Result: "nothing to do"}, nil},
		{"of-the-future", fake{}, "", Report{Result: "nothing to do"}, nil},
		{PreRestore, fake{res: netlock.Result{Backend: "nft"}}, "trial", Report{Backend: "nft", Result: "possible"}, nil},
		{PreRestore, fake{err: map[string]error{"trial": broken}}, "trial", Report{}, broken},
		{PreDump, fake{res: netlock.Result{Backend: "nft"}}, "trial state", Report{Backend: "nft", Result: "possible"}, nil},
		{PreDump, fake{err: map[string]error{"trial": broken}}, "trial", Report{}, broken},
		{PreDump, fake{err: map[string]error{"state": broken}}, "trial state", Report{}, broken},
		{NetworkLock, fake{res: netlock.Result{Backend: "nft"}}, "lock", Report{Backend: "nft", Result: "locked"}, nil},
		{NetworkLock, fake{res: netlock.Result{Backend: "nft", Already: true}}, "lock", Report{Backend: "nft", Result: "already locked"}, nil},
		{NetworkLock, fake{err: map[string]error{"lock": broken}}, "lock", Report{}, broken},
		{SetupNamespaces, fake{res: netlock.Result{Backend: "nft"}}, "state lock", Report{Backend: "nft", Result: "locked"}, nil},
		{SetupNamespaces, fake{state: locked, res: netlock.Result{Backend: "nft", Already: true}}, "state lock", Report{Backend: "nft", Result: "already locked", WasLocked: true}, nil},
		{SetupNamespaces, fake{state: byIt, res: netlock.Result{Backend: "nft", Already: true}}, "state lock", Report{Backend: "nft", Result: "already locked"}, nil},
		{PostSetupNamespaces, fake{res: netlock.Result{Backend: "nft", Already: true}}, "lock", Report{Backend: "nft", Result: "already locked"}, nil},
		{PostRestore, fake{state: locked, res: netlock.Result{Backend: "nft", Already: true}}, "state lock", Report{Backend: "nft", Result: "already locked"}, nil},
		{PostRestore, fake{res: netlock.Result{Backend: "nft"}}, "state lock", Report{Backend: "nft", Result: "the lock had been removed; locked again", Loud: true}, nil},
		{PostRestore, fake{err: map[string]error{"state": broken}}, "state", Report{}, broken},
		{PostRestore, fake{state: locked, err: map[string]error{"lock": broken}}, "state lock", Report{}, broken},
		{NetworkUnlock, fake{state: locked}, "unlock", Report{Backend: "nft", Result: "unlocked"}, nil},
		{NetworkUnlock, fake{}, "unlock", Report{Result: "not locked"}, nil},
		{NetworkUnlock, fake{err: map[string]error{"unlock": broken}}, "unlock", Report{}, broken},
		{PostResume, fake{}, "unlock", Report{Result: "not locked"}, nil},
		{PostResume, fake{state: locked}, "unlock", Report{Backend: "nft", Result: "a lock was left after network-unlock; removed", Loud: true}, nil},
		{PostResume, fake{err: map[string]error{"unlock": broken}}, "unlock", Report{}, broken},
	} {
		f := c.fake
		h := Handler{Locker: &f, Trial: f.trial}
		rep, err := h.Handle(context.Background(), Event{Action: c.action, PID: pid, Caller: criu})
		if !errors.Is(err, c.err) || strings.Join(f.calls, " ") != c.calls {
			t.Errorf("%s: %v, calls %q; %v and %q are wanted", c.action, err, f.calls, c.err, c.calls)
		}
		if (rep.Netns != 0) != OpOf(c.action).NeedsPID() {
			t.Errorf("%s: namespace %d", c.action, rep.Netns)
		}
		rep.Netns = 0
		if c.err == nil && rep != c.want {
			t.Errorf("%s: %+v; %+v is wanted", c.action, rep, c.want)
		}
	}
}

// A task in CRIU's own namespace: CRIU does not call the two network hooks there, the
// others have nothing to do.
func TestHandleOwnNamespace(t *testing.T) {
	netlocktest.Need(t)
	for a, op := range table {
		if !op.NeedsPID() {
			continue
		}
		f := &fake{}
		rep, err := (&Handler{Locker: f, Trial: f.trial}).Handle(context.Background(), Event{Action: a, PID: os.Getpid()})
		refuses := a == NetworkLock || a == NetworkUnlock
		if (err != nil) != refuses || err != nil && netlock.KindOf(err) != netlock.KindRefused || len(f.calls) != 0 {
			t.Errorf("%s: %+v, %v, %q", a, rep, err, f.calls)
		}
	}
}

// Whatever changes a lock waits for its turn, and what does not comes at once.
func TestHandleTurn(t *testing.T) {
	pid, _ := netlocktest.NewTask(t)
	broken := errors.New("not your turn")
	for a, op := range table {
		f := &fake{}
		h := Handler{Locker: f, Trial: f.trial, Turn: func(*netlock.Namespace, func() error) error { return broken }}
		_, err := h.Handle(context.Background(), Event{Action: a, PID: pid})
		waits := op != CheckHost && op != CheckTask
		if errors.Is(err, broken) != waits || waits && len(f.calls) != 0 {
			t.Errorf("%s: %v, %q", a, err, f.calls)
		}
	}
}

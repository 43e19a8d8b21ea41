package netlock

import (
	"context"
	"errors"
	"slices"
	"testing"
)

// fake is a Backend that remembers what it was asked, in a log that it shares.
type fake struct {
	name      string
	log       *[]string
	lockErr   error
	unlockErr error
	state     State
}

func (f *fake) Name() string { return f.name }
func (f *fake) Lock(context.Context, *Namespace, Options) (Result, error) {
	*f.log = append(*f.log, "lock "+f.name)
	return Result{Backend: f.name}, f.lockErr
}
func (f *fake) Unlock(context.Context, *Namespace, Options) (State, error) {
	*f.log = append(*f.log, "unlock "+f.name)
	return f.state, f.unlockErr
}
func (f *fake) State(context.Context, *Namespace, Options) (State, error) { return f.state, nil }

// The choice of a backend: "unsupported" alone lets the next one try.
func TestLockerChoice(t *testing.T) {
	unsupported := &Error{Kind: KindNoBackend, Err: ErrUnsupported}
	for name, c := range map[string]struct {
		first, second, unlock error
		cleaner               bool // the second one is a cleaner only
		want                  []string
		kind                  Kind // 0: success
	}{
		"the first works":               {want: []string{"lock a", "unlock b"}},
		"the first is unsupported":      {first: unsupported, want: []string{"lock a", "lock b", "unlock a"}},
		"never after a missing right":   {first: &Error{Kind: KindPrivilege}, want: []string{"lock a"}, kind: KindPrivilege},
		"never after a deadline":        {first: &Error{Kind: KindDeadline}, want: []string{"lock a"}, kind: KindDeadline},
		"none is supported":             {first: unsupported, second: unsupported, want: []string{"lock a", "lock b"}, kind: KindNoBackend},
		"a cleaner never locks":         {first: unsupported, cleaner: true, want: []string{"lock a"}, kind: KindNoBackend},
		"a cleaner cleans":              {cleaner: true, want: []string{"lock a", "unlock b"}},
		"leftovers that stay: undone":   {unlock: &Error{Kind: KindOther}, want: []string{"lock a", "unlock b", "unlock a"}, kind: KindOther},
		"an unsupported one is no harm": {unlock: unsupported, want: []string{"lock a", "unlock b"}},
	} {
		t.Run(name, func(t *testing.T) {
			var log []string
			a, b := &fake{name: "a", log: &log, lockErr: c.first}, &fake{name: "b", log: &log, lockErr: c.second, unlockErr: c.unlock}
			l := New(a, b)
			if c.cleaner {
				l = &Locker{Backends: []Backend{a}, Cleaners: []Backend{b}}
			}
			_, err := l.Lock(t.Context(), &Namespace{})
			if !slices.Equal(log, c.want) {
				t.Errorf("did %q, want %q", log, c.want)
			}
			if (err == nil) != (c.kind == 0) || err != nil && KindOf(err) != c.kind {
				t.Errorf("error %v, want kind %d", err, c.kind)
			}
		})
	}
}

// Unlock goes through all, the preferred backend last, and leaves the order alone.
func TestLockerUnlock(t *testing.T) {
	var log []string
	whole := State{Found: true, Locked: true, Intact: true, DroppedIn: 1}
	a, b := &fake{name: "a", log: &log, state: whole}, &fake{name: "b", log: &log}
	l := New(a, b)
	for range 2 {
		log = nil
		if st, err := l.Unlock(t.Context(), &Namespace{}); err != nil || !st.Intact {
			t.Fatalf("%+v, %v", st, err)
		}
		if want := []string{"unlock b", "unlock a"}; !slices.Equal(log, want) {
			t.Fatalf("did %q, want %q", log, want)
		}
	}
	b.state = whole
	st, err := l.Unlock(t.Context(), &Namespace{})
	if KindOf(err) != KindTampered || st.Intact || st.DroppedIn != 2 {
		t.Errorf("two locks: %+v, %v; want one that was tampered with", st, err)
	}
	b.state, b.unlockErr = State{}, errors.New("b failed")
	log = nil
	if _, err := l.Unlock(t.Context(), &Namespace{}); err == nil || !slices.Contains(log, "unlock a") {
		t.Errorf("a failure of one keeps the other from unlocking: %q, %v", log, err)
	}
}

// Passing is called for the first intact lock that is off: not where it was tampered with, or something
// could not be removed.
func TestLockerPassing(t *testing.T) {
	whole := State{Found: true, Locked: true, Intact: true}
	for name, c := range map[string]struct {
		a, b fake
		want []string
	}{
		"locked":              {fake{}, fake{state: whole}, []string{"unlock a", "unlock b", "passing"}},
		"by the first":        {fake{state: whole}, fake{}, []string{"unlock a", "passing", "unlock b"}},
		"by both":             {fake{state: whole}, fake{state: whole}, []string{"unlock a", "passing", "unlock b"}},
		"not locked":          {fake{}, fake{}, []string{"unlock a", "unlock b"}},
		"broken":              {fake{}, fake{state: State{Found: true, Locked: true}}, []string{"unlock a", "unlock b"}},
		"failed":              {fake{}, fake{state: whole, unlockErr: errors.New("no")}, []string{"unlock a", "unlock b"}},
		"the first failed":    {fake{unlockErr: errors.New("no")}, fake{state: whole}, []string{"unlock a", "unlock b"}},
		"the first is not it": {fake{unlockErr: ErrUnsupported}, fake{state: whole}, []string{"unlock a", "unlock b", "passing"}},
	} {
		var log []string
		a, b := c.a, c.b
		a.name, b.name, a.log, b.log = "a", "b", &log, &log
		l := New(&b, &a) // a goes first, the sockets not being kept
		l.Options.Passing = func() { log = append(log, "passing") }
		_, _ = l.Unlock(t.Context(), &Namespace{})
		if !slices.Equal(log, c.want) {
			t.Errorf("%s: did %q, want %q", name, log, c.want)
		}
	}
}

func TestErrorIsOneLine(t *testing.T) {
	err := &Error{Kind: KindOther, Op: "op", Namespace: "ns\nx", Err: errors.Join(errors.New("a"), errors.New("b")), Hint: "do"}
	if got, want := err.Error(), "ns; x: op: a; b; do"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

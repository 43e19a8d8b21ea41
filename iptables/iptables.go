// Package iptables locks a network namespace through iptables-restore and
// ip6tables-restore, for kernels without nf_tables: two chains in table raw, or in
// filter where there is no raw, jumped to first of all. See testdata/*.golden.
//
// Be aware:
//   - IPv4 and IPv6 are two commits. A process killed in between leaves a mixture,
//     which the next Lock completes and the next Unlock removes.
//   - There are two kinds of iptables with rules of their own, legacy and nft. Lock
//     uses one, Unlock and State look in both.
//   - The first use makes a table that the kernel keeps, empty, after Unlock.
//   - In table filter a dropped packet has already moved its conntrack entry.
package iptables

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
)

// Name is the backend's name.
const Name = "iptables"

// Variant is one of the two kinds of iptables.
type Variant string

// The variants.
const (
	Legacy Variant = "legacy"
	NFT    Variant = "nft"
	// Auto is Legacy where the host and the kernel have it, since it unlocks ten times
	// faster, and NFT otherwise.
	Auto Variant = "auto"
)

// Backend is a netlock.Backend on iptables.
type Backend struct {
	variant Variant
	run     runner
	now     func() time.Time
}

// New returns a backend that locks with one variant. It touches nothing.
func New(v Variant) *Backend { return &Backend{variant: v, run: runCommand, now: time.Now} }

var _ netlock.Backend = (*Backend)(nil)

// Name is "iptables".
func (b *Backend) Name() string { return Name }

// session is one operation on one namespace, on a thread inside of it.
type session struct {
	ctx context.Context
	b   *Backend
	ns  *netlock.Namespace
	o   netlock.Options
}

func (b *Backend) in(ctx context.Context, ns *netlock.Namespace, o netlock.Options, f func(*session) error) error {
	return ns.Do(func() error {
		s := &session{ctx, b, ns, o}
		if err := ctx.Err(); err != nil {
			return s.fail(Name, "start", err)
		}
		return f(s)
	})
}

func full(v Variant) string { return Name + "-" + string(v) }

func (s *session) fail(backend, op string, err error) error {
	if errors.As(err, new(*netlock.Error)) {
		return err
	}
	e := &netlock.Error{Kind: netlock.KindOther, Op: op, Namespace: s.ns.String(), Backend: backend, Err: err}
	var tool *toolError
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		e.Kind, e.Hint = netlock.KindDeadline, "nothing is left of it; raise the timeout"
	case errors.As(err, &tool) && tool.busy():
		e.Kind, e.Hint = netlock.KindDeadline, "another program holds /run/xtables.lock"
	case !netlock.HasCapability(unix.CAP_NET_ADMIN):
		e.Kind, e.Hint = netlock.KindPrivilege, netlock.MissingCapability(unix.CAP_NET_ADMIN)
	case backend == full(Legacy) && !netlock.HasCapability(unix.CAP_NET_RAW):
		e.Kind, e.Hint = netlock.KindPrivilege, netlock.MissingCapability(unix.CAP_NET_RAW)
	case errors.As(err, &tool) && tool.unsupported():
		e.Kind, e.Hint = netlock.KindNoBackend, "the kernel lacks a table or a match of iptables"
		e.Err = fmt.Errorf("%w: %w", netlock.ErrUnsupported, err)
	}
	return e
}

// place is one table of one family in one variant that has something of ours.
type place struct {
	v   Variant
	fam int // index of families()
	table
}

// look finds everything of ours, in both variants. Where there is nothing it starts
// no process.
func (s *session) look() ([]place, error) {
	var out []place
	var hits [2][2][]string // by variant, by family
	fams := families()
	for i, f := range fams {
		names, err := inLegacy(f)
		if err != nil {
			return nil, s.fail(full(Legacy), "look", err)
		}
		hits[0][i] = names
	}
	names, err := inNFT(s.ctx)
	if err != nil {
		return nil, s.fail(full(NFT), "look", err)
	}
	hits[1] = names
	for vi, v := range []Variant{Legacy, NFT} {
		for i, f := range fams {
			for _, name := range hits[vi][i] {
				t, err := s.read(v, f, name)
				if err != nil {
					return nil, err
				}
				if t.found() {
					out = append(out, place{v, i, t})
				}
			}
		}
	}
	return out, nil
}

// read runs iptables-save on one table that is there.
func (s *session) read(v Variant, f family, name string) (table, error) {
	tool := f.prefix + "-" + string(v) + "-save"
	text, err := s.b.run(s.ctx, tool, "", "-c", "-t", name)
	if err != nil {
		return table{}, s.fail(full(v), tool, err)
	}
	for _, t := range parseSave(text) {
		if t.name == name {
			return t, nil
		}
	}
	return table{name: name}, nil
}

// restore feeds one commit to iptables-restore.
func (s *session) restore(ctx context.Context, v Variant, f family, input string) error {
	tool := f.prefix + "-" + string(v) + "-restore"
	// -w bounded: without it, or without a number, legacy waits for ever.
	seconds := 1
	if d, ok := ctx.Deadline(); ok {
		seconds = max(1, int(time.Until(d).Seconds()))
	}
	_, err := s.b.run(ctx, tool, input, "-w", fmt.Sprint(seconds), "--noflush")
	return err
}

// summary is what the places add up to, for the lock that variant v would make; any
// variant if v is Auto.
func (s *session) summary(ps []place) (st netlock.State) {
	if len(ps) == 0 {
		return st
	}
	st = netlock.State{Found: true, Backend: full(ps[0].v), Locked: true, Intact: true}
	blame := func(why string) {
		st.Intact = false
		if st.Why == "" {
			st.Why = why
		}
	}
	// A packet is stopped if any variant stops it.
	var drops [2]bool
	var perFamily [2]int
	fams := families()
	for _, p := range ps {
		v := p.judge(fams[p.fam].v6, s.o.Allow)
		drops[p.fam] = drops[p.fam] || v.locks
		perFamily[p.fam]++
		if v.why != "" {
			blame(fams[p.fam].prefix + " " + v.why)
		}
		if p.v != ps[0].v {
			blame("both variants have a lock")
		}
		st.DroppedIn += v.in
		st.DroppedOut += v.out
		if st.Since.IsZero() {
			st.Since, st.Caller = v.since, v.caller
		}
	}
	for i, f := range fams {
		switch {
		case f.required() && !drops[i]:
			st.Locked = false
			blame(f.prefix + " has no lock")
		case perFamily[i] > 1:
			blame(f.prefix + " has two locks")
		}
	}
	return st
}

// Lock makes sure that exactly one lock is in force, in both families.
func (b *Backend) Lock(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (res netlock.Result, err error) {
	err = b.in(ctx, ns, o, func(s *session) error {
		ps, err := s.look()
		if err != nil {
			return err
		}
		if st := s.summary(ps); st.Intact && (b.variant == Auto || st.Backend == full(b.variant)) {
			res = netlock.Result{Backend: st.Backend, Already: true}
			return nil
		}
		v := b.variant
		if v == Auto {
			v = Legacy
		}
		err = s.lock(v, ps)
		if b.variant == Auto && errors.Is(err, netlock.ErrUnsupported) {
			v = NFT
			err = s.lock(v, ps)
		}
		if err == nil {
			res = netlock.Result{Backend: full(v)}
		}
		return err
	})
	if err != nil {
		return netlock.Result{}, err
	}
	return res, nil
}

// lock puts a lock of variant v in, and then removes everything else of ours.
func (s *session) lock(v Variant, before []place) error {
	for _, tool := range []string{"iptables", "ip6tables"} {
		for _, what := range []string{"restore", "save"} {
			if name := tool + "-" + string(v) + "-" + what; findTool(name) == "" {
				return &netlock.Error{Kind: netlock.KindNoBackend, Op: "lock", Namespace: s.ns.String(), Backend: full(v),
					Err: fmt.Errorf("%w: there is no %s", netlock.ErrUnsupported, name), Hint: "install the package iptables"}
			}
		}
	}
	var made [2]string // the table of each family
	for i, f := range families() {
		if !f.required() {
			continue
		}
		var err error
		if made[i], err = s.lockFamily(v, i, f, before); err != nil {
			return s.undo(before, s.fail(full(v), f.prefix+"-restore", err))
		}
	}
	after, err := s.look()
	if err == nil {
		rest := slices.DeleteFunc(after, func(p place) bool { return p.v == v && p.name == made[p.fam] })
		err = s.remove(s.ctx, rest)
	}
	if err == nil {
		err = s.ctx.Err()
	}
	if err != nil {
		return s.undo(before, s.fail(full(v), "lock", err))
	}
	return nil
}

// lockFamily tries table raw, and filter where there is no raw.
func (s *session) lockFamily(v Variant, fam int, f family, before []place) (name string, err error) {
	for _, name = range tableNames {
		t := table{name: name}
		for _, p := range before {
			if p.v == v && p.fam == fam && p.name == name {
				t = p.table
			}
		}
		err = s.restore(s.ctx, v, f, t.lockInput(f.v6, s.o, s.b.now()))
		var tool *toolError
		if err == nil || !errors.As(err, &tool) || !tool.unsupported() {
			return name, err
		}
	}
	return name, err
}

// undo removes what a failed lock left. A lock that was there before and was whole
// for a family is not put back: the caller hears that there is none.
func (s *session) undo(before []place, cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), netlock.UndoTime)
	defer cancel()
	late := &session{ctx, s.b, s.ns, s.o}
	ps, err := late.look()
	if err == nil {
		err = late.remove(ctx, ps)
	}
	if err == nil {
		return cause
	}
	return fmt.Errorf("%w; and the lock could not be taken back: %w", cause, err)
}

// remove takes everything of ours out of the places.
func (s *session) remove(ctx context.Context, ps []place) error {
	fams := families()
	var errs []error
	for _, p := range ps {
		if err := s.restore(ctx, p.v, fams[p.fam], p.unlockInput()); err != nil {
			// Somebody else may have been faster: what counts is what is left.
			errs = append(errs, s.fail(full(p.v), fams[p.fam].prefix+"-restore", err))
		}
	}
	return errors.Join(errs...)
}

// Unlock removes every lock of either variant, from both families and tables.
func (b *Backend) Unlock(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (st netlock.State, err error) {
	err = b.in(ctx, ns, o, func(s *session) error {
		var last error
		for try := 0; ; try++ {
			ps, err := s.look()
			if err != nil {
				return errors.Join(err, last)
			}
			if try == 0 {
				st = s.summary(ps)
			}
			switch {
			case len(ps) == 0:
				return nil
			case try == 8 && last == nil:
				last = s.fail(st.Backend, "unlock", errors.New("somebody keeps putting it back"))
				fallthrough
			case try == 8:
				return last
			}
			if err := ctx.Err(); err != nil {
				return s.fail(st.Backend, "unlock", err)
			}
			last = s.remove(ctx, ps)
			if last != nil && netlock.KindOf(last) != netlock.KindOther {
				return last
			}
		}
	})
	return st, err
}

// State reads what is there and changes nothing.
func (b *Backend) State(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (st netlock.State, err error) {
	err = b.in(ctx, ns, o, func(s *session) error {
		ps, err := s.look()
		st = s.summary(ps)
		return err
	})
	return st, err
}

// toolDirs is where the commands are looked for: never in the caller's PATH.
var toolDirs = [...]string{"/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin"}

// findTool returns the absolute path of a command, "" if there is none.
func findTool(name string) string {
	for _, d := range toolDirs {
		if st, err := os.Stat(d + "/" + name); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return d + "/" + name
		}
	}
	return ""
}

// oneLine makes an error message of a tool's output.
func oneLine(s string) string {
	var out []string
	for _, l := range strings.Split(s, "\n") {
		if l = strings.TrimSpace(l); l != "" && !strings.HasPrefix(l, "Try `") && !strings.HasPrefix(l, "Error occurred at line") {
			out = append(out, l)
		}
	}
	return strings.Join(out, "; ")
}

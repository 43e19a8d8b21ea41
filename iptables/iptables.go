// Package iptables locks a network namespace through iptables-restore and
// ip6tables-restore, for kernels without nf_tables: two chains in table raw, or in
// filter where there is no raw, jumped to first of all. See testdata/*.golden.
//
// Be aware:
//   - IPv4 and IPv6 are two commits. A process killed in between leaves a mixture,
//     which the next Lock completes and the next Unlock removes.
//   - There are two kinds of iptables with rules of their own, legacy and nft. Lock
//     uses one, Unlock and State look in both.
//   - iptables-nft-save hides what it does not know, so the nft variant's rules are read,
//     and removed, by netlink. A lock that an iptables wrote in a form not known here
//     locks, but is never found intact: the next Lock puts it in anew.
//   - Rules name the loopback: iptables knows no index. Whoever lives in the namespace
//     can give its name to another link after a Lock, and TCP with CRIU's mark passes
//     there until the next Lock; State says that such a lock is not intact.
//   - The first use makes a table that the kernel keeps, empty, after Unlock.
//   - Whatever the legacy programs change in a table, they begin the counters of its
//     policies anew. Rules keep theirs.
//   - In mode hold the container's packets are delivered through the rules behind ours, after two
//     more commits for each family: 5 to 8 ms of an unlock with legacy, 15 to 21 with nft.
//   - In table filter a dropped packet has already moved its conntrack entry.
//   - Legacy programs take turns by /run/xtables.lock, which is a different file in
//     another mount namespace. What was changed under our hands is done again.
package iptables

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
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
	now     func() time.Time
	// What reaches the machine; tests put something else in.
	run  runner
	find func(v Variant, f family, verb string) (string, error)
	ipv6 func() (bool, error)
	// table is what the kernel says of a legacy table.
	table func(f family, name string) error
}

// New returns a backend that locks with one variant. It touches nothing.
func New(v Variant) *Backend {
	return &Backend{variant: v, now: time.Now, run: runCommand, find: findTool, ipv6: hasIPv6, table: family.legacyTable}
}

var _ netlock.Backend = (*Backend)(nil)

// Name is "iptables".
func (b *Backend) Name() string { return Name }

// session is one operation on one namespace, on a thread inside of it.
type session struct {
	ctx context.Context
	b   *Backend
	ns  *netlock.Namespace
	o   netlock.Options
	// fams is how many of families() the namespace has: IPv4, or both.
	fams    int
	comment string
	// conn asks nf_tables; nil where the kernel has none. gen is the generation of its
	// rules at the last look.
	conn *nfnl.Conn
	gen  uint32
	// lo is the name of the loopback, which whoever lives there can change.
	lo string
	// put are the spots where this call put a lock, or may have.
	put []spot
	// kept are the spots where an intact lock of this variant was.
	kept []spot
	// useless are the tables that refuse a lock, or in which it has no effect.
	useless map[spot]bool
	// queue is what our lock of mode hold sends to; notHeld is why it has none.
	queue   queue
	fresh   bool // the Holder has it from this call
	notHeld error
	// done ends our turn.
	done func()
}

// turnTime is how long an operation waits for its turn at most.
const turnTime = 2 * time.Second

// takeTurn keeps our own operations on one namespace from undoing each other's work
// between a look and a commit, which they would notice and begin anew. The turn is a
// flock on the namespace itself, and no more than a courtesy: whoever lives there can
// hold it, so it is waited for a quarter of the time we have and then done without.
func (s *session) takeTurn() {
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	s.done = func() { unix.Close(fd) }
	wait := turnTime
	if d, ok := s.ctx.Deadline(); ok {
		wait = min(wait, time.Until(d)/4)
	}
	for end := time.Now().Add(wait); unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) != nil && time.Now().Before(end); {
		time.Sleep(300 * time.Microsecond)
	}
}

// in runs f in the namespace; unless emptyToo, only if something of ours is there.
func (b *Backend) in(ctx context.Context, ns *netlock.Namespace, o netlock.Options, emptyToo bool, f func(*session) error) error {
	var left *nfnl.Conn
	if !emptyToo {
		var quiet bool
		if quiet, left = stillQuiet(ctx, ns); quiet {
			return nil
		}
	}
	defer func() {
		if left != nil {
			nfnl.Park(left.Take())
		}
	}()
	return ns.Do(func() (err error) {
		s := &session{ctx: ctx, b: b, ns: ns, o: o, fams: 1, done: func() {}}
		if err := s.ended("start"); err != nil {
			return err
		}
		conn := left
		if left = nil; conn == nil {
			conn, err = nfnl.DialIn(ns.Do)
		}
		switch {
		case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT):
		case err != nil:
			return s.fail(b.variant, "look for locks", fmt.Errorf("ask nf_tables: %w", err))
		default:
			s.conn = conn
			defer func() {
				if s.conn == nil {
					return // a watch has it
				}
				// Where sockets are kept, another backend may just have deleted.
				if conn.Slow || ns.KeepsSockets() {
					nfnl.Park(conn.Take())
				} else {
					conn.Close()
				}
			}()
		}
		if !emptyToo {
			// This is what another backend's lock and unlock wait for.
			sights, err := s.detect()
			if err == nil && len(sights) == 0 && ns.KeepsSockets() {
				if q := watch(s.conn, s.gen); q != nil && ns.Leave(quietKey{}, q) {
					s.conn = nil
				} else if q != nil {
					q.closeNames()
				}
			}
			if err != nil || len(sights) == 0 {
				return err
			}
		}
		s.comment, s.useless = netlock.Comment(b.now(), o.Caller), map[spot]bool{}
		has, err := b.ipv6()
		if err != nil {
			return s.fail(b.variant, "look for IPv6", err)
		}
		if has {
			s.fams = 2
		}
		if s.lo, err = loopback(); err != nil {
			return s.fail(b.variant, "look for the loopback", err)
		}
		defer func() { s.done() }()
		return f(s)
	})
}

// full is a variant's name in a Result or a State.
func full(v Variant) string {
	if v == Auto {
		return Name
	}
	return Name + "-" + string(v)
}

func (s *session) fail(v Variant, op string, err error) error {
	if errors.As(err, new(*netlock.Error)) {
		return err
	}
	e := &netlock.Error{Kind: netlock.KindOther, Op: op, Namespace: s.ns.String(), Backend: full(v), Err: err}
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		e.Kind, e.Hint = netlock.KindDeadline, "raise the timeout"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		e.Kind, e.Hint = netlock.KindPrivilege, netlock.MissingCapability(unix.CAP_NET_ADMIN)
	case errors.Is(err, netlock.ErrUnsupported):
		e.Kind, e.Hint = netlock.KindNoBackend, "install the package iptables"
	}
	return e
}

// ended is the error of a context that is over.
func (s *session) ended(op string) error {
	if err := s.ctx.Err(); err != nil {
		return s.fail(s.b.variant, op, err)
	}
	return nil
}

// join makes one error, of the first one's kind, of several.
func (s *session) join(op string, errs ...error) error {
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) < 2 {
		return errors.Join(errs...)
	}
	sum := &netlock.Error{Kind: netlock.KindOf(errs[0]), Op: op, Namespace: s.ns.String(), Backend: full(s.b.variant)}
	for _, err := range errs {
		var e *netlock.Error
		if errors.As(err, &e) {
			sum.Hint = cmp.Or(sum.Hint, e.Hint)
			err = fmt.Errorf("%s: %w", e.Op, e.Err)
		}
		if sum.Err == nil {
			sum.Err = err
		} else if !strings.Contains(sum.Err.Error(), err.Error()) {
			sum.Err = fmt.Errorf("%w, %w", sum.Err, err)
		}
	}
	return sum
}

// tool runs one of iptables' programs on a table.
func (s *session) tool(at spot, op, verb, stdin string, args ...string) (string, error) {
	f := families()[at.fam]
	path, err := s.b.find(at.v, f, verb)
	if err != nil {
		return "", s.fail(at.v, op, err)
	}
	out, err := s.b.run(s.ctx, path, stdin, args...)
	var tool *toolError
	if !errors.As(err, &tool) {
		if err != nil {
			err = s.fail(at.v, op, err)
		}
		return out, err
	}
	v := tool.diagnose(at.v, machine{
		table: func() error { return s.b.table(f, at.name) },
		has:   netlock.HasCapability,
		match: f.missingMatch(),
	})
	if v.is != nil {
		err = fmt.Errorf("%w: %w", v.is, err)
	}
	return "", &netlock.Error{Kind: v.kind, Op: op, Namespace: s.ns.String(), Backend: full(at.v), Err: err, Hint: v.hint}
}

// restore feeds commits to iptables-restore.
func (s *session) restore(at spot, op, input string) error {
	_, err := s.tool(at, op, "restore", input, "-w", waitSeconds(s.ctx), "--noflush")
	return err
}

// place is a sight and what iptables-save says of it.
type place struct {
	sight
	table
	view
	err error // it could not be read
}

func (s *session) detect() ([]sight, error) {
	out, gen, err := detect(s.ctx, s.conn)
	if err != nil {
		return nil, s.fail(s.b.variant, "look for locks", err)
	}
	s.gen = gen
	return out, nil
}

// readTable reads the table of a sight: of the nft variant as nf_tables has it, of the
// other one as iptables-save prints it.
func (s *session) readTable(at sight) (t table, err error) {
	op := "read " + families()[at.fam].name + " table " + at.spot.name
	if at.v == NFT {
		if t, err = readNFT(s.ctx, s.conn, at); err != nil {
			err = s.fail(NFT, op, err)
		}
		return t, err
	}
	text, err := s.tool(at.spot, op, "save", "", "-c", "-t", at.spot.name)
	if err != nil {
		return t, err
	}
	for _, saved := range parseSave(text) {
		if saved.name == at.spot.name {
			t = saved
		}
	}
	if !t.found() {
		err = s.fail(at.v, op, fmt.Errorf("%w: iptables-save does not show what is there", errChanged))
	}
	return t, err
}

// look finds everything of ours, in both variants. Where there is nothing it starts
// no process. A place that cannot be read is among the places and in the error.
func (s *session) look() (out []place, err error) {
	sights, err := s.detect()
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, at := range sights {
		p := place{sight: at}
		if p.table, err = s.readTable(at); err != nil {
			p.view.why, p.err = "table "+at.spot.name+" cannot be read", err
			errs = append(errs, present(err))
		} else {
			p.view = p.judge(families()[at.fam].v6, s.lo, s.o.Allow, at.dead)
		}
		out = append(out, p)
	}
	return out, s.join("read", errs...)
}

// present takes ErrUnsupported out of an error: what is there and cannot be dealt
// with is no backend that has nothing to do.
func present(err error) error {
	var e *netlock.Error
	if errors.Is(err, netlock.ErrUnsupported) && errors.As(err, &e) {
		plain := *e
		plain.Err = errors.New(e.Err.Error())
		return &plain
	}
	return err
}

// summary is what the places add up to.
func (s *session) summary(ps []place) (st netlock.State) {
	if len(ps) == 0 {
		return st
	}
	st = netlock.State{Found: true, Locked: true, Intact: true}
	blame := func(why string) {
		st.Intact = false
		st.Why = cmp.Or(st.Why, why)
	}
	var drops [2]bool // a packet is stopped if either variant stops it
	var seen [2]int
	named := false // by a variant that locks
	q := queueIn(ps)
	for _, p := range ps {
		drops[p.fam] = drops[p.fam] || p.locks
		seen[p.fam]++
		if st.Backend == "" || p.locks && !named {
			st.Backend, named = full(p.v), p.locks
		}
		if p.v != ps[0].v {
			blame("both variants have a lock")
		}
		if p.why != "" {
			blame(families()[p.fam].prefix + " " + p.why)
		}
		if p.queue != q {
			blame("not all of it holds in one queue")
		}
		if p.locks && st.Mode != netlock.Drop {
			st.Mode = p.queue.mode()
		}
		st.DroppedIn += p.in
		st.DroppedOut += p.out
		if st.Since.IsZero() {
			st.Since, st.Caller = p.since, p.caller
		}
	}
	for i, f := range families() {
		if i >= s.fams {
			break
		}
		st.Locked = st.Locked && drops[i]
		switch {
		case seen[i] == 0:
			blame(f.prefix + " has no lock")
		case seen[i] > 1:
			blame(f.prefix + " has two locks")
		}
	}
	if q != "" {
		s.count(&st, q)
	}
	return st
}

// tries bounds how often an operation begins anew because the rules changed
// between the look and the commit.
const tries = 32

func again(err error, try int) bool { return errors.Is(err, errChanged) && try < tries }

// Lock makes sure that exactly one lock is in force, in both families.
func (b *Backend) Lock(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (res netlock.Result, err error) {
	err = b.in(ctx, ns, o, true, func(s *session) error {
		s.takeTurn()
		by := []Variant{b.variant}
		if b.variant == Auto {
			by = []Variant{Legacy, NFT}
		}
		var unsupported []error
		for _, v := range by {
			s.notHeld = nil
			res, err = s.lock(v)
			if res.NotHeld = s.notHeld; err == nil {
				return nil
			}
			s.unbind()
			if err = s.undo(err); !errors.Is(err, netlock.ErrUnsupported) {
				return err
			}
			unsupported = append(unsupported, err)
			s.put = nil
		}
		return s.join("lock", unsupported...)
	})
	if err != nil {
		return netlock.Result{}, err
	}
	return res, nil
}

// lock puts a lock of variant v in, unless an intact one is there, and then removes
// everything else of ours.
func (s *session) lock(v Variant) (res netlock.Result, err error) {
	nothing := false // was there, the first time
	for try := 1; ; try++ {
		if err := s.ended("lock"); err != nil {
			return res, err
		}
		if !sayable(s.lo) {
			return res, s.fail(v, "lock", fmt.Errorf("iptables cannot name the loopback, %q: rename it to lo, or use the backend nft", s.lo))
		}
		ps, err := s.look()
		if again(err, try) {
			continue
		}
		if err != nil {
			return res, err
		}
		nothing = nothing || try == 1 && len(ps) == 0
		for i := range ps {
			if ps[i].why == "" && ps[i].caller.Over() {
				ps[i].why = "it is of a checkpoint that is over"
			}
		}
		by, q, rest, ok := s.intact(v, ps)
		if ok && s.asWanted(q) {
			if err := s.remove(rest); again(err, try) {
				continue
			} else if err != nil {
				return res, err
			}
			if q != s.queue {
				s.unbind()
			}
			return netlock.Result{Backend: full(by), Already: len(s.put) == 0, Mode: q.mode()}, s.ended("lock")
		}
		if s.bind(); s.notHeld != nil && ok {
			continue // it may be as wanted by now
		}
		if err = s.complete(v, ps); err == nil {
			err = s.trim()
		}
		if s.queue != "" && (errors.Is(err, netlock.ErrUnsupported) || errors.Is(err, errChanged) && try >= holdTries) {
			s.dropInstead(err)
			continue
		}
		// Where nothing is there a refusal has another reason than somebody's change.
		if again(err, try) && (try == 1 || len(ps) > 0) {
			continue
		}
		if err != nil {
			return res, err
		}
		switch alone, err := s.alone(); {
		case err != nil:
			return res, err
		case alone:
			return netlock.Result{Backend: full(v), New: nothing, Mode: s.queue.mode()}, s.ended("lock")
		case s.queue != "" && try >= holdTries:
			s.dropInstead(errors.New("it does not read back as it was made"))
		case try == tries:
			return res, s.fail(v, "lock", errors.New("somebody keeps changing the lock"))
		}
	}
}

// intact looks for an intact lock of v, in all families, and returns what is there
// beside it, and its queue. With Auto either variant's will do.
func (s *session) intact(v Variant, ps []place) (by Variant, q queue, rest []place, ok bool) {
	by = v
	candidates := []Variant{v}
	if s.b.variant == Auto {
		candidates = []Variant{Legacy, NFT}
	}
	for _, by = range candidates {
		rest = nil
		var seen [2]bool
		var queues [2]queue
		for _, p := range ps {
			if p.v == by && p.why == "" && !seen[p.fam] {
				seen[p.fam], queues[p.fam] = true, p.queue
			} else {
				rest = append(rest, p)
			}
		}
		if seen[0] && (s.fams == 1 || seen[1] && queues[0] == queues[1]) {
			return by, queues[0], rest, true
		}
	}
	return by, "", nil, false
}

// complete puts a lock into every family that has no intact one of v with our queue, if any.
func (s *session) complete(v Variant, ps []place) error {
	s.kept = nil
	for i := range s.fams {
		if k := slices.IndexFunc(ps, func(p place) bool { return p.v == v && p.fam == i && p.why == "" && p.queue == s.queue }); k >= 0 {
			s.kept = append(s.kept, ps[k].spot)
			continue
		}
		if err := s.lockFamily(v, i, ps); err != nil {
			return err
		}
		if err := s.ended("lock"); err != nil {
			return err
		}
	}
	return nil
}

// lockFamily puts a lock into the best table that takes one.
func (s *session) lockFamily(v Variant, fam int, ps []place) error {
	f := families()[fam]
	var refusals []error
	for _, name := range tableNames {
		at := spot{v, fam, name}
		if s.useless[at] {
			continue
		}
		t := table{name: name}
		for _, p := range ps {
			if p.spot != at {
				continue
			}
			if t = p.table; p.base {
				// Nothing can jump there, so no lock goes with it.
				if err := s.remove([]place{p}); err != nil {
					return err
				}
			}
		}
		err := s.restore(at, "lock "+f.name+" table "+name, t.lockInput(f.v6, s.lo, s.o.Allow, s.queue, s.comment))
		// Of a program that did not end by itself nobody knows what it did.
		if err == nil || !errors.As(err, new(*toolError)) && !errors.Is(err, netlock.ErrUnsupported) || s.ctx.Err() != nil {
			s.put = append(s.put, at)
			return err
		}
		if !errors.Is(err, errNoTable) {
			return err
		}
		s.useless[at] = true
		refusals = append(refusals, err)
	}
	if len(refusals) == 0 {
		return s.fail(v, "lock "+f.name, errors.New("a lock has no effect in table raw or filter"))
	}
	err := s.join("lock "+f.name, refusals...)
	var e *netlock.Error
	if netlock.KindOf(err) == netlock.KindNoBackend && errors.As(err, &e) {
		e.Err, e.Hint = fmt.Errorf("%w: %w", netlock.ErrUnsupported, e.Err), "the kernel has neither table raw nor table filter"
	}
	return err
}

// trim removes what is left of former ways into the chains of the locks that this call
// put into nf_tables. They have no words in which iptables-nft-restore could.
func (s *session) trim() error {
	if !slices.ContainsFunc(s.put, func(at spot) bool { return at.v == NFT }) {
		return nil
	}
	sights, err := s.detect()
	if err != nil {
		return err
	}
	var changes []nfnl.Request
	for _, at := range sights {
		if at.v != NFT || !slices.Contains(s.put, at.spot) {
			continue
		}
		t, err := s.readTable(at)
		if err != nil {
			return err
		}
		changes = append(changes, at.unhookNFT(t.surplus())...)
	}
	return s.commit("lock", changes)
}

// alone looks whether the lock that this call made or completed is all that is
// there: somebody else may have locked at the same time, or the table may stop
// nothing.
func (s *session) alone() (bool, error) {
	sights, err := s.detect()
	if err != nil {
		return false, err
	}
	lo, err := loopback()
	if err != nil {
		return false, s.fail(s.b.variant, "look for the loopback", err)
	}
	ok := len(sights) == s.fams && lo == s.lo
	s.lo = lo
	for _, at := range sights {
		if at.dead != "" {
			s.useless[at.spot] = true
		}
		put := slices.Contains(s.put, at.spot)
		if ok = ok && at.dead == "" && (put || slices.Contains(s.kept, at.spot)); !ok {
			continue
		}
		if at.v == Legacy {
			ok = at.exact(s.o.Allow)
			continue
		}
		t, err := s.readTable(at)
		if err != nil {
			return false, err
		}
		v6 := families()[at.fam].v6
		v := t.judge(v6, s.lo, s.o.Allow, "")
		ok = v.why == "" && v.queue == s.queue || put && t.whole(s.lo, v6, s.o.Allow, s.queue, s.comment)
	}
	return ok, nil
}

// undo takes back what this call put in, after cause, within a time of its own.
// What was there before and was not replaced stays.
func (s *session) undo(cause error) error {
	if len(s.put) == 0 {
		return cause
	}
	was := s.ctx
	var cancel context.CancelFunc
	s.ctx, cancel = context.WithTimeout(context.WithoutCancel(was), netlock.UndoTime)
	defer func() { cancel(); s.ctx = was }()
	_, err := s.sweep(func(p place) bool {
		return slices.Contains(s.put, p.spot) && (p.err != nil || p.view.comment == s.comment)
	}, false)
	if err != nil {
		return fmt.Errorf("%w; and the lock could not be taken back: %w", cause, err)
	}
	return cause
}

// sweep removes what it is to remove, again until no commit met other rules than it
// was made for. It returns what the first look saw, and first delivers what is held if it is to.
func (s *session) sweep(which func(place) bool, deliver bool) (st netlock.State, err error) {
	start := time.Now()
	for try := 1; ; try++ {
		ps, err := s.look()
		if try == 1 {
			if st = s.summary(ps); deliver && s.deliver(ps, &st) && slices.ContainsFunc(ps, func(p place) bool { return p.v == NFT }) {
				continue // with the generation that there is now
			}
		}
		var mine []place
		for _, p := range ps {
			if which(p) {
				mine = append(mine, p)
			}
		}
		err = s.join("unlock", err, s.remove(mine))
		if !again(err, try) {
			if !errors.Is(err, errChanged) || !deliver || time.Since(start) > sweepTime {
				return st, err
			}
			time.Sleep(sweepPause)
		}
		if e := s.ended("unlock"); e != nil {
			return st, e
		}
	}
}

// sweepTime is how long at least an unlock begins anew while others change the rules: given up, it
// leaves the container locked. What it takes for such a change may be a fault that stays, so it makes a pause.
const (
	sweepTime  = time.Second
	sweepPause = 2 * time.Millisecond
)

// remove takes everything of ours out of the places: of legacy by one process for each
// family, of nf_tables by one batch.
func (s *session) remove(ps []place) error {
	var errs []error
	var native []place
	for i, f := range families() {
		var input strings.Builder
		var at spot
		for _, p := range ps {
			switch {
			case p.err != nil || p.fam != i:
			case p.v == NFT:
				native = append(native, p)
			default:
				at = p.spot
				input.WriteString(p.unlockInput())
			}
		}
		if input.Len() > 0 {
			errs = append(errs, present(s.restore(at, "unlock "+f.name, input.String())))
		}
	}
	return s.join("unlock", append(errs, s.clear(clearNFT(native)))...)
}

// clear makes the changes of an unlock, but for the removal of chains to which something
// leads that is not ours to remove: somebody's map, or a rule too large for the kernel to
// tell of. They stay, and empty they stop nothing.
func (s *session) clear(changes []nfnl.Request) error {
	for {
		err := s.commit("unlock", changes)
		var batch *nfnl.BatchError
		if !errors.Is(err, unix.EBUSY) || !errors.As(err, &batch) || batch.Index == 0 || changes[batch.Index-1].Cmd != unix.NFT_MSG_DELCHAIN {
			return err
		}
		changes = slices.Delete(changes, batch.Index-1, batch.Index)
	}
}

// commit changes nf_tables as it was at the last look.
func (s *session) commit(op string, changes []nfnl.Request) error {
	if len(changes) == 0 {
		return nil
	}
	err := s.conn.Commit(s.ctx, s.gen, changes...)
	var batch *nfnl.BatchError
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ERESTART), errors.Is(err, unix.ENOENT),
		errors.Is(err, nfnl.ErrUnsure) && s.ctx.Err() == nil,
		// A process that took the table as its own; the next look passes it over.
		errors.Is(err, unix.EPERM) && errors.As(err, &batch) && batch.Index > 0:
		err = fmt.Errorf("%w: %w", errChanged, err)
	}
	return s.fail(NFT, op, err)
}

// Unlock removes every lock of either variant, from both families and tables.
func (b *Backend) Unlock(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (st netlock.State, err error) {
	err = b.in(ctx, ns, o, false, func(s *session) error {
		s.takeTurn()
		st, err = s.sweep(func(place) bool { return true }, true)
		return err
	})
	return st, err
}

// State reads what is there and changes nothing.
func (b *Backend) State(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (st netlock.State, err error) {
	err = b.in(ctx, ns, o, false, func(s *session) error {
		ps, err := s.look()
		st = s.summary(ps)
		return err
	})
	return st, err
}

// Package nft locks a network namespace with one nf_tables table: two base chains
// with policy drop at prerouting and output, priority raw, and the few accepts of
// netlock's contract. See testdata/*.golden for what it looks like.
//
// Be aware:
//   - google/nftables builds every batch, package nfnl sends it.
//   - A lock is created, never changed: replacing a table in place lets packets
//     through, so a successor goes in under the second name before the other goes.
//   - Closing a socket that deleted a table waits 7 to 23 ms for an RCU grace period
//     after the traffic flows again. WithRelease says who does that.
package nft

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// Name is the backend's name.
const Name = "nft"

// Backend is a netlock.Backend on nf_tables.
type Backend struct {
	release func(fd int)
	now     func() time.Time
	closer  closer
	rules   cache
}

// Option changes a Backend.
type Option func(*Backend)

// WithRelease names what disposes of a netlink socket whose close would wait for
// the kernel's clean-up. The default closes it in the background, which suits a
// process that lives on; one that is about to exit gives Park.
func WithRelease(f func(fd int)) Option { return func(b *Backend) { b.release = f } }

// New returns the backend. It touches nothing.
func New(opts ...Option) *Backend {
	b := &Backend{now: time.Now}
	b.release = b.closer.add
	for _, o := range opts {
		o(b)
	}
	return b
}

var _ netlock.Backend = (*Backend)(nil)

// Name is "nft".
func (b *Backend) Name() string { return Name }

// Wait returns when every socket left to the background is closed.
func (b *Backend) Wait() { b.closer.wait() }

// closer closes descriptors one after the other off the caller's path: the first
// close of many waits for the grace period, and the others find it over.
type closer struct {
	mu    sync.Mutex
	queue []int
	busy  bool
	idle  sync.WaitGroup
}

func (c *closer) add(fd int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queue = append(c.queue, fd)
	if !c.busy {
		c.busy = true
		c.idle.Add(1)
		go c.drain()
	}
}

func (c *closer) drain() {
	defer c.idle.Done()
	for {
		c.mu.Lock()
		if len(c.queue) == 0 {
			c.busy = false
			c.mu.Unlock()
			return
		}
		fd := c.queue[0]
		c.queue = c.queue[1:]
		c.mu.Unlock()
		unix.Close(fd)
	}
}

func (c *closer) wait() { c.idle.Wait() }

// cache keeps what the rules read back as: a Backend mostly meets one allow list.
type cache struct {
	mu    sync.Mutex
	allow []netlock.Rule
	want  texts
}

func (c *cache) get(allow []netlock.Rule) (texts, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.want[0] == nil || !slices.Equal(c.allow, allow) {
		want, err := wantBoth(allow)
		if err != nil {
			return want, err
		}
		c.allow, c.want = slices.Clone(allow), want
	}
	return c.want, nil
}

// session is one operation on one namespace.
type session struct {
	ctx  context.Context
	conn *nfnl.Conn
	ns   *netlock.Namespace
	o    netlock.Options
	b    *Backend
	// held are the tables that answered EPERM though their owner did not show.
	held map[table]bool
	// noDestroy: the kernel is older than 6.3 and does not know "destroy".
	noDestroy bool
}

// in runs f with a socket of the namespace.
func (b *Backend) in(ctx context.Context, ns *netlock.Namespace, o netlock.Options, f func(*session) error) error {
	return ns.Do(func() error {
		s := &session{ctx: ctx, ns: ns, o: o, b: b, held: map[table]bool{}}
		if err := ctx.Err(); err != nil {
			return s.fail("start", err)
		}
		conn, err := nfnl.Dial()
		if err != nil {
			return s.fail("open netlink socket", err)
		}
		s.conn = conn
		defer func() {
			if conn.Slow {
				b.release(conn.Take())
			} else {
				conn.Close()
			}
		}()
		return f(s)
	})
}

// fail wraps what the kernel said.
func (s *session) fail(op string, err error) error {
	e := &netlock.Error{Kind: netlock.KindOther, Op: op, Namespace: s.ns.String(), Backend: Name, Err: err}
	var batch *nfnl.BatchError
	switch {
	case errors.As(err, new(*netlock.Error)):
		return err
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		e.Kind, e.Hint = netlock.KindDeadline, "raise the timeout"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		e.Kind, e.Hint = netlock.KindPrivilege, netlock.MissingCapability(unix.CAP_NET_ADMIN)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT),
		errors.As(err, &batch) && batch.IsNewChain() && batch.Errno == unix.ENOENT:
		e.Kind, e.Hint = netlock.KindNoBackend, "the kernel lacks nf_tables or its inet family"
		e.Err = fmt.Errorf("%w: %w", netlock.ErrUnsupported, err)
	case errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ENOBUFS):
		e.Hint = "the kernel is out of memory; nothing was changed"
	}
	return e
}

// look reads the rule set's generation and every table under a name of ours.
func (s *session) look() (gen uint32, ours []table, err error) {
	ans, err := s.conn.Ask(s.ctx,
		nfnl.Request{Cmd: unix.NFT_MSG_GETGEN},
		nfnl.Request{Cmd: unix.NFT_MSG_GETTABLE, Dump: true})
	if err != nil {
		return 0, nil, s.fail("list tables", err)
	}
	for _, a := range ans {
		if a.Errno == unix.EINVAL { // what nfnetlink says of a subsystem it has not got
			a.Errno = unix.EOPNOTSUPP
		}
		if a.Errno != 0 {
			return 0, nil, s.fail("list tables", a.Errno)
		}
	}
	for _, o := range ans[0].Objects {
		nfnl.Walk(o.Attrs, func(typ uint16, b []byte) {
			if typ == unix.NFTA_GEN_ID {
				gen = nfnl.U32(b)
			}
		})
	}
	for _, o := range ans[1].Objects {
		if t, ok := parseTable(o); ok {
			ours = append(ours, t)
		}
	}
	return gen, ours, nil
}

// read judges one table. A table that vanished meanwhile locks nothing.
func (s *session) read(t table) (view, error) {
	want, err := s.b.rules.get(s.o.Allow)
	if err != nil {
		return view{}, err
	}
	if !t.inet() {
		return judge(t, [2]*nfnl.Object{}, nil, want), nil
	}
	inTable := nfnl.AttrString(nil, unix.NFTA_CHAIN_TABLE, t.name) // NFTA_RULE_TABLE is the same number
	var reqs []nfnl.Request
	for _, c := range chains() {
		reqs = append(reqs, nfnl.Request{Cmd: unix.NFT_MSG_GETCHAIN, Family: t.family,
			Attrs: nfnl.AttrString(inTable[:len(inTable):len(inTable)], unix.NFTA_CHAIN_NAME, c.name)})
	}
	reqs = append(reqs, nfnl.Request{Cmd: unix.NFT_MSG_GETRULE, Family: t.family, Attrs: inTable, Dump: true})
	ans, err := s.conn.Ask(s.ctx, reqs...)
	if err != nil {
		return view{}, s.fail("read table "+t.name, err)
	}
	for _, a := range ans {
		if a.Errno != 0 && a.Errno != unix.ENOENT { // ENOENT: it is not there, which judge tells
			return view{}, s.fail("read table "+t.name, a.Errno)
		}
	}
	var objs [2]*nfnl.Object
	for i := range objs {
		if len(ans[i].Objects) == 1 {
			objs[i] = &ans[i].Objects[0]
		}
	}
	rules := make([]rule, 0, len(ans[2].Objects))
	for _, o := range ans[2].Objects {
		rules = append(rules, parseRule(o))
	}
	return judge(t, objs, rules, want), nil
}

// views reads all tables and splits off those that a live process owns.
func (s *session) views(ours []table) (mine []view, held []table, err error) {
	for _, t := range ours {
		if t.held() || s.held[t] {
			held = append(held, t)
			continue
		}
		v, err := s.read(t)
		if err != nil {
			return nil, nil, err
		}
		mine = append(mine, v)
	}
	return mine, held, nil
}

// intact: there is one table of ours, and it is exactly the lock.
func intact(mine []view) bool { return len(mine) == 1 && mine[0].why == "" && mine[0].locks }

// capture is a transport for google/nftables that keeps the batch it is given.
type capture struct{ msgs []netlink.Message }

func (c *capture) send(req []netlink.Message) ([]netlink.Message, error) {
	if req != nil {
		c.msgs = append([]netlink.Message(nil), req...)
	}
	return nil, io.EOF
}

// batch has google/nftables build one atomic batch, and sends it. With a
// generation other than 0 the kernel refuses it (ERESTART) if the rule set has
// changed since.
func (s *session) batch(ctx context.Context, gen uint32, build func(*nftables.Conn)) error {
	var c capture
	conn, err := nftables.New(nftables.WithTestDial(c.send))
	if err != nil {
		return err
	}
	build(conn)
	if err := conn.FlushWithGenID(gen); err != nil {
		return fmt.Errorf("build batch: %w", err)
	}
	return s.conn.Batch(ctx, c.msgs)
}

func nftTable(t table) *nftables.Table {
	return &nftables.Table{Name: t.name, Family: nftables.TableFamily(t.family)}
}

// create puts a lock in under name, in one batch; replace says that something is
// there which goes in the same batch.
func (s *session) create(gen uint32, name string, replace bool, text string) error {
	return s.batch(s.ctx, gen, func(c *nftables.Conn) {
		old := nftTable(table{name: name, family: unix.NFPROTO_INET})
		switch {
		case replace && s.noDestroy:
			c.AddTable(old)
			c.DelTable(old)
		case replace:
			c.DestroyTable(old)
		}
		addLock(c, name, s.o.Allow, text)
	})
}

// drop deletes tables in one batch.
func (s *session) drop(ctx context.Context, ts ...table) error {
	return s.batch(ctx, 0, func(c *nftables.Conn) {
		for _, t := range ts {
			c.DelTable(nftTable(t))
		}
	})
}

// place decides under which name a lock goes in, given what is there: a free name
// if there is one; else the name of what does not lock, so that what does stays in
// force until then; else the second.
func place(mine []view, held []table) (name string, replace, ok bool) {
	taken := map[string]bool{}
	for _, t := range held {
		if t.inet() {
			taken[t.name] = true
		}
	}
	locks, there := map[string]bool{}, map[string]bool{}
	for _, v := range mine {
		if v.inet() {
			there[v.name] = true
			locks[v.name] = v.locks
		}
	}
	for _, n := range tableNames {
		if !taken[n] && !there[n] {
			return n, false, true
		}
	}
	for _, n := range tableNames {
		if !taken[n] && !locks[n] {
			return n, true, true
		}
	}
	for _, n := range []string{tableNames[1], tableNames[0]} {
		if !taken[n] {
			return n, true, true
		}
	}
	return "", false, false
}

// calmTries is how often a lock insists on a rule set that nobody else changed
// between its look and its batch. Where somebody changes it all the time, the
// exclusive create has to do.
const calmTries = 8

// Lock makes sure that exactly one lock, exactly ours, is in force.
func (b *Backend) Lock(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (res netlock.Result, err error) {
	res.Backend = Name
	text := netlock.Comment(b.now(), o.Caller)
	err = b.in(ctx, ns, o, func(s *session) error {
		res.Already, err = s.lock(text)
		return err
	})
	if err != nil {
		return netlock.Result{}, err
	}
	return res, nil
}

func (s *session) lock(text string) (already bool, err error) {
	for try := 0; ; try++ {
		gen, ours, err := s.look()
		if err != nil {
			return false, err
		}
		mine, held, err := s.views(ours)
		if err != nil {
			return false, err
		}
		if intact(mine) {
			return true, nil
		}
		name, replace, ok := place(mine, held)
		if !ok {
			return false, netlock.HeldError(s.ns, Name)
		}
		if try >= calmTries {
			gen = 0
		}
		err = s.create(gen, name, replace, text)
		switch created, e := s.settle(err, name, text); {
		case e != nil:
			return false, e
		case !created:
			continue
		}
		if len(ours) == 0 && try == 0 {
			return false, nil
		}
		// Ours is in force. What else bears our name goes now; held tables cannot.
		if err := s.clear(name); err != nil {
			return false, s.rollback(name, err)
		}
		return false, nil
	}
}

// settle makes an error of a create into one of three things: the lock is there,
// it is to be tried again, or it has failed and left nothing.
func (s *session) settle(err error, name, text string) (created bool, _ error) {
	if err == nil {
		if e := s.ctx.Err(); e != nil { // the send itself can wait long for the kernel's commit lock
			return false, s.rollback(name, s.fail("create table "+name, e))
		}
		return true, nil
	}
	var batch *nfnl.BatchError
	switch {
	case errors.Is(err, nfnl.ErrUnsure):
		// Was it committed? Only a lock with our metadata of this moment is ours.
		late, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), netlock.UndoTime)
		defer cancel()
		was := s.ctx
		s.ctx = late
		defer func() { s.ctx = was }()
		v, e := s.read(table{name: name, family: unix.NFPROTO_INET, use: 2})
		switch {
		case e != nil:
			return false, s.rollback(name, s.fail("create table "+name, err))
		case v.why != "" || v.text != text:
			return false, s.fail("create table "+name, err)
		case was.Err() != nil:
			return false, s.rollback(name, s.fail("create table "+name, was.Err()))
		}
		return true, nil
	case errors.Is(err, unix.EPERM) && netlock.HasCapability(unix.CAP_NET_ADMIN):
		if errors.As(err, &batch) && batch.Index == 0 {
			break // the batch as a whole: no privilege in this namespace
		}
		// Its owner came between the look and the batch.
		return false, s.markHeld(name)
	case errors.Is(err, unix.ERESTART), errors.Is(err, unix.EEXIST), errors.Is(err, unix.EBUSY):
		return false, s.ctxErr("create table " + name)
	case errors.Is(err, unix.EINVAL) && !s.noDestroy && errors.As(err, &batch) && batch.IsDestroy():
		s.noDestroy = true
		return false, nil
	}
	return false, s.fail("create table "+name, err)
}

func (s *session) ctxErr(op string) error {
	if err := s.ctx.Err(); err != nil {
		return s.fail(op, err)
	}
	return nil
}

// markHeld notes every table of that name as somebody else's.
func (s *session) markHeld(name string) error {
	_, ours, err := s.look()
	if err != nil {
		return err
	}
	for _, t := range ours {
		if t.name == name {
			s.held[t] = true
		}
	}
	return s.ctxErr("create table " + name)
}

// clear deletes all of ours but the table named keep.
func (s *session) clear(keep string) error {
	for {
		if err := s.ctxErr("delete table"); err != nil {
			return err
		}
		_, ours, err := s.look()
		if err != nil {
			return err
		}
		var old []table
		for _, t := range ours {
			if (t.name != keep || !t.inet()) && !t.held() && !s.held[t] {
				old = append(old, t)
			}
		}
		if len(old) == 0 {
			return nil
		}
		if _, err := s.remove(old); err != nil {
			return err
		}
	}
}

// remove deletes tables together, and one by one where one of them has an owner
// or is gone. If it is not sure what it did, the caller has to look again.
func (s *session) remove(ts []table) (sure bool, _ error) {
	err := s.drop(s.ctx, ts...)
	if err == nil {
		return true, nil
	}
	for _, t := range ts {
		if len(ts) > 1 {
			err = s.drop(s.ctx, t)
		}
		var batch *nfnl.BatchError
		switch {
		case err == nil, errors.Is(err, unix.ENOENT), errors.Is(err, nfnl.ErrUnsure) && s.ctx.Err() == nil:
		case errors.Is(err, unix.EPERM) && errors.As(err, &batch) && batch.Index > 0:
			s.held[t] = true
		default:
			return false, s.fail("delete table "+t.name, err)
		}
	}
	return false, nil
}

// rollback takes back a table that this call made, after cause, within a time of
// its own.
func (s *session) rollback(name string, cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), netlock.UndoTime)
	defer cancel()
	err := s.drop(ctx, table{name: name, family: unix.NFPROTO_INET})
	if err == nil || errors.Is(err, unix.ENOENT) {
		return cause
	}
	return fmt.Errorf("%w; and the lock could not be taken back: %w", cause, err)
}

// state sums up what was read.
func state(mine []view) netlock.State {
	st := netlock.State{Backend: Name, Found: len(mine) > 0, Intact: intact(mine)}
	for _, v := range mine {
		st.Locked = st.Locked || v.locks
		st.DroppedIn += v.in
		st.DroppedOut += v.out
		if st.Since.IsZero() {
			st.Since, st.Caller = v.since, v.caller
		}
		if st.Why == "" {
			st.Why = v.why
		}
	}
	if len(mine) > 1 && st.Why == "" {
		st.Why = "there are two locks"
	}
	return st
}

// Unlock removes every table of ours, under both names and in all families.
func (b *Backend) Unlock(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (st netlock.State, err error) {
	err = b.in(ctx, ns, o, func(s *session) error {
		for try := 0; ; try++ {
			_, ours, err := s.look()
			if err != nil {
				return err
			}
			var left []table
			for _, t := range ours {
				if !t.held() && !s.held[t] {
					left = append(left, t)
				}
			}
			if try == 0 {
				mine, _, err := s.views(ours)
				if err != nil && netlock.KindOf(err) == netlock.KindDeadline {
					return err
				}
				st = state(mine)
				st.Found = len(left) > 0
				if err != nil { // what cannot be read is removed all the same
					st.Intact, st.Why = false, err.Error()
				}
			}
			if len(left) == 0 {
				return nil
			}
			if err := s.ctxErr("delete table"); err != nil {
				return err
			}
			if sure, err := s.remove(left); sure || err != nil {
				return err
			}
		}
	})
	return st, err
}

// State reads what is there and changes nothing.
func (b *Backend) State(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (st netlock.State, err error) {
	err = b.in(ctx, ns, o, func(s *session) error {
		_, ours, err := s.look()
		if err != nil {
			return err
		}
		mine, held, err := s.views(ours)
		st = state(mine)
		_, _, free := place(mine, held)
		st.Held = !free
		return err
	})
	return st, err
}

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
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/hold"
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
	notes   notes
	creates creates
	kernel  *Kernel
}

// Kernel is what has been learned of the kernel: Backends may share it.
type Kernel struct{ noQueue atomic.Bool }

// NoQueue tells that a lock of mode hold has been tried, and the kernel has no queue expression. The
// NFQUEUE target of xtables that is used then is printed by nft in words that it cannot
// read in again on such a kernel.
func (k *Kernel) NoQueue() bool { return k.noQueue.Load() }

// WithKernel has the Backend use what another one has learned.
func WithKernel(k *Kernel) Option { return func(b *Backend) { b.kernel = k } }

// Option changes a Backend.
type Option func(*Backend)

// WithRelease names what disposes of a netlink socket whose close would wait for
// the kernel's clean-up. The default closes it in the background, which suits a
// process that lives on; one that is about to exit gives Park.
func WithRelease(f func(fd int)) Option { return func(b *Backend) { b.release = f } }

// New returns the backend. It touches nothing.
func New(opts ...Option) *Backend {
	b := &Backend{now: time.Now, kernel: &Kernel{}}
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
		want, err := wantBoth(allow, nil)
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
	// queue is what our lock of mode hold sends to; notHeld is why it has none.
	queue   *queue
	fresh   bool // the Holder has it from this call
	notHeld error
	// made: nothing of ours was there.
	made bool
	// mode of the lock that there is, or was made.
	mode netlock.Mode
}

// left is what a socket stands under that a handle keeps.
type left struct{}

// leftConn is closed where nobody waits for it.
type leftConn struct {
	*nfnl.Conn
	release func(fd int)
}

func (c leftConn) Close() error {
	if c.Slow {
		c.release(c.Take())
		return nil
	}
	return c.Conn.Close()
}

// in runs f with a socket of the namespace.
func (b *Backend) in(ctx context.Context, ns *netlock.Namespace, o netlock.Options, f func(*session) error) error {
	s := &session{ctx: ctx, ns: ns, o: o, b: b, held: map[table]bool{}}
	if err := ctx.Err(); err != nil {
		return s.fail("start", err)
	}
	conn, ok := ns.Take(left{}).(leftConn)
	if !ok {
		dialled, err := nfnl.DialIn(ns.Do)
		if err != nil {
			return s.fail("open netlink socket", err)
		}
		conn = leftConn{dialled, b.release}
	}
	s.conn = conn.Conn
	defer func() {
		if !ns.Leave(left{}, conn) {
			_ = conn.Close() // nothing is lost with it
		}
	}()
	return f(s)
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
func (s *session) look(ctx context.Context) (gen uint32, ours []table, err error) {
	ans, err := s.conn.Ask(ctx,
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
func (s *session) read(ctx context.Context, t table) (view, error) {
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
	ans, err := s.conn.Ask(ctx, reqs...)
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
	v := judge(t, objs, rules, want)
	if v.queue != nil {
		err = s.ns.Do(func() error {
			v.held, v.in = hold.Count(s.ctx, s.ns, v.queue.num, v.in, s.o.Holder)
			return nil
		})
	}
	return v, err
}

// readTime is how long reading may go on: what can be done without comes next, and
// needs the rest of the time.
func (s *session) readTime() (context.Context, context.CancelFunc) {
	left := time.Second
	if d, ok := s.ctx.Deadline(); ok {
		left = time.Until(d) * 3 / 4
	}
	return context.WithTimeout(s.ctx, left)
}

// seen is what is there, read at one generation of the rule set if that was to be had.
type seen struct {
	gen  uint32
	ours []table // all under names of ours
	mine []view
	held []table // those of ours that a live process owns
	// unread is why a table of mine could not be read, its view then being a guess.
	unread error
}

// calmReads is how often what does not look like a lock is read once more because the
// rule set changed in between: the table may have been going or coming.
const calmReads = 16

// see looks and reads, again and again where that fails, until reading's end. Then
// what is known has to do: an error says that not even the tables are.
func (s *session) see(reading context.Context) (was seen, err error) {
	for try := 0; ; try++ {
		was, err = s.seeOnce(reading)
		switch {
		case s.ctx.Err() != nil:
			return was, s.ctxErr("list tables")
		case err == nil && was.unread == nil && (len(was.mine) == 0 || intact(was.mine) || try >= calmReads):
			return was, nil
		case err == nil && was.unread == nil:
			if now, _, e := s.look(reading); e == nil && now == was.gen {
				return was, nil
			}
		case err == nil:
			err = was.unread
		}
		var e *netlock.Error
		if errors.As(err, &e) && (e.Kind == netlock.KindPrivilege || e.Kind == netlock.KindNoBackend) || reading.Err() != nil {
			if was.unread != nil {
				err = nil
			}
			return was, err
		}
		wait(reading, try)
	}
}

// wait lets others work before another try, unless it is the first one.
func wait(ctx context.Context, try int) {
	if try == 0 {
		return
	}
	t := time.NewTimer(time.Millisecond)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func (s *session) seeOnce(reading context.Context) (was seen, err error) {
	ctx := reading
	if ctx.Err() != nil {
		ctx = s.ctx // the tables at least
	}
	if was.gen, was.ours, err = s.look(ctx); err != nil {
		return was, err
	}
	for _, t := range was.ours {
		if t.held() || s.held[t] {
			was.held = append(was.held, t)
			continue
		}
		v, err := s.read(reading, t)
		if err != nil {
			was.unread = err
			// It may be a lock, so it stays until another is in force.
			v = view{table: t, locks: t.inet(), why: "table " + t.name + " could not be read"}
		}
		was.mine = append(was.mine, v)
	}
	return was, nil
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
	msgs, err := built(build)
	if err != nil {
		return err
	}
	return s.conn.CommitMessages(ctx, gen, msgs)
}

// built is what google/nftables makes of a change.
func built(build func(*nftables.Conn)) ([]netlink.Message, error) {
	var c capture
	conn, err := nftables.New(nftables.WithTestDial(c.send))
	if err != nil {
		return nil, err
	}
	build(conn)
	if err := conn.Flush(); err != nil {
		return nil, fmt.Errorf("build batch: %w", err)
	}
	if len(c.msgs) < 2 {
		return nil, errors.New("build batch: it is empty")
	}
	return c.msgs[1 : len(c.msgs)-1], nil
}

// creates keeps the last lock that was built: the next one mostly differs in its comment
// alone, and building takes longer than anything else that is ours in a freeze.
type creates struct {
	mu    sync.Mutex
	name  string
	allow []netlock.Rule
	text  string
	msgs  []netlink.Message
}

func (c *creates) get(name string, allow []netlock.Rule, text string) ([]netlink.Message, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.msgs == nil || c.name != name || len(c.text) != len(text) || !slices.Equal(c.allow, allow) {
		msgs, err := built(func(conn *nftables.Conn) { addLock(conn, name, allow, nil, text) })
		if err != nil {
			return nil, err
		}
		c.name, c.allow, c.text, c.msgs = name, slices.Clone(allow), text, msgs
	}
	msgs := slices.Clone(c.msgs)
	if c.text != text {
		for i := range msgs {
			msgs[i].Data = bytes.ReplaceAll(msgs[i].Data, []byte(c.text), []byte(text))
		}
	}
	return msgs, nil
}

func nftTable(t table) *nftables.Table {
	return &nftables.Table{Name: t.name, Family: nftables.TableFamily(t.family)}
}

// create puts a lock in under name, in one batch; replace says that something is
// there which goes in the same batch.
func (s *session) create(gen uint32, name string, replace bool, text string) error {
	if !replace && s.queue == nil {
		msgs, err := s.b.creates.get(name, s.o.Allow, text)
		if err != nil {
			return err
		}
		return s.conn.CommitMessages(s.ctx, gen, msgs)
	}
	return s.batch(s.ctx, gen, func(c *nftables.Conn) {
		old := nftTable(table{name: name, family: unix.NFPROTO_INET})
		switch {
		case replace && s.noDestroy:
			c.AddTable(old)
			c.DelTable(old)
		case replace:
			c.DestroyTable(old)
		}
		addLock(c, name, s.o.Allow, s.queue, text)
	})
}

// drop deletes tables in one batch.
func (s *session) drop(ctx context.Context, gen uint32, ts ...table) error {
	return s.batch(ctx, gen, func(c *nftables.Conn) {
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

// Lock makes sure that exactly one lock, exactly ours, is in force.
func (b *Backend) Lock(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (res netlock.Result, err error) {
	res.Backend = Name
	text := netlock.Comment(b.now(), o.Caller)
	err = b.in(ctx, ns, o, func(s *session) error {
		res.Already, err = s.lock(text)
		res.New = s.made
		res.Mode, res.NotHeld = s.mode, s.notHeld
		if err != nil {
			s.unbind()
		}
		return err
	})
	if err != nil {
		return netlock.Result{}, err
	}
	return res, nil
}

func (s *session) lock(text string) (already bool, err error) {
	reading, cancel := s.readTime()
	defer cancel()
	was, noted := s.notedNone()
	for ; ; noted = false {
		if !noted {
			if was, err = s.see(reading); err != nil {
				return false, err
			}
		}
		if intact(was.mine) && s.asWanted(was.mine[0]) {
			v := was.mine[0]
			s.mode = v.mode()
			if len(was.held) == 0 {
				s.remember(was.gen, v.name, v.text)
			}
			if s.queue != nil && (v.queue == nil || v.queue.num != s.queue.num) {
				s.unbind()
			}
			return true, nil
		}
		name, replace, ok := place(was.mine, was.held)
		if !ok {
			return false, netlock.HeldError(s.ns, Name)
		}
		if s.bind(); s.notHeld != nil && intact(was.mine) && s.asWanted(was.mine[0]) {
			continue // it may be as wanted by now
		}
		s.mode = netlock.Drop
		if s.queue != nil {
			s.mode = netlock.Hold
		}
		err = s.create(was.gen, name, replace, text)
		switch created, e := s.settle(err, name, text); {
		case e != nil:
			return false, e
		case !created:
			continue
		}
		if len(was.ours) == 0 { // nor did anything come meanwhile
			s.made = true
			if err == nil && was.gen != 0 {
				s.ns.Moved(was.gen, following(was.gen))
				s.remember(following(was.gen), name, text)
			}
			return false, nil
		}
		// Ours is in force. What else bears our name goes now; held tables cannot.
		there, err := s.clear(name)
		if err != nil {
			return false, s.rollback(name, err)
		}
		if there {
			return false, nil
		}
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
		v, e := s.read(late, table{name: name, family: unix.NFPROTO_INET, use: 2})
		switch {
		case e != nil:
			return false, s.rollback(name, s.fail("create table "+name, err))
		case v.why != "" || v.text != text:
			return false, s.fail("create table "+name, err)
		case s.ctx.Err() != nil:
			return false, s.rollback(name, s.fail("create table "+name, s.ctx.Err()))
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
	case errors.Is(err, unix.ENOENT) && s.queue != nil && errors.As(err, &batch) && batch.IsNewRule():
		s.noExpr()
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
	_, ours, err := s.look(s.ctx)
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

// clear deletes all of ours but the table named keep, and tells whether that is
// there: another Lock may have taken it for what has to go, in favour of its own.
// No batch deletes what came after the look, or two of them would leave no lock.
func (s *session) clear(keep string) (there bool, _ error) {
	for {
		if err := s.ctxErr("delete table"); err != nil {
			return false, err
		}
		gen, ours, err := s.look(s.ctx)
		if err != nil {
			return false, err
		}
		there = false
		var old []table
		for _, t := range ours {
			switch {
			case t.held() || s.held[t]:
			case t.name == keep && t.inet():
				there = true
			default:
				old = append(old, t)
			}
		}
		if len(old) == 0 || !there {
			return there, nil
		}
		if _, err := s.remove(gen, old); err != nil {
			return false, err
		}
	}
}

// remove deletes tables together, and one by one where one of them has an owner
// or is gone. If it is not sure what it did, the caller has to look again, as it
// has if the rule set is no longer at gen.
func (s *session) remove(gen uint32, ts []table) (sure bool, _ error) {
	err := s.drop(s.ctx, gen, ts...)
	if err == nil {
		return true, nil
	}
	if errors.Is(err, unix.ERESTART) {
		return false, nil
	}
	for _, t := range ts {
		if len(ts) > 1 {
			err = s.drop(s.ctx, gen, t)
		}
		var batch *nfnl.BatchError
		switch {
		case err == nil, errors.Is(err, nfnl.ErrUnsure) && s.ctx.Err() == nil:
			if gen != 0 {
				return false, nil // it is the next generation now
			}
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EBUSY):
		case errors.Is(err, unix.ERESTART):
			return false, nil
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
	err := s.drop(ctx, 0, table{name: name, family: unix.NFPROTO_INET})
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
		if v.locks && st.Mode != netlock.Drop {
			st.Mode = v.mode()
		}
		if v.queue != nil {
			st.Queue = v.held
		}
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

// Unlock removes every table of ours, under both names and in all families. Tables
// that cannot be read go too, once the time for reading is over; the error then says
// that nobody knows what they were.
func (b *Backend) Unlock(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (st netlock.State, err error) {
	err = b.in(ctx, ns, o, func(s *session) (err error) {
		st, err = s.unlock()
		return err
	})
	return st, err
}

func (s *session) unlock() (st netlock.State, err error) {
	if st, done := s.unlockNoted(); done {
		return st, nil
	}
	reading, cancel := s.readTime()
	defer cancel()
	var unread error
	for try := 0; ; try++ {
		was, err := s.see(reading)
		if err != nil {
			if reading.Err() == nil || s.ctx.Err() != nil {
				return st, err
			}
			return s.unlockUnseen(st, err)
		}
		// What somebody else removed meanwhile was there all the same.
		if now := state(was.mine); now.Found || try == 0 {
			st = now
		}
		if unread == nil {
			unread = was.unread
		}
		if len(was.mine) == 0 {
			return st, s.unsure(unread)
		}
		if err := s.ctxErr("delete table"); err != nil {
			return st, err
		}
		// What is deleted is what was read, but an unlock does not wait for ever for others
		// to leave the rule set alone.
		gen := was.gen
		if reading.Err() != nil {
			gen = 0
		}
		var left []table
		for _, v := range was.mine {
			left = append(left, v.table)
			if v.queue != nil && v.locks && s.o.Holder != nil {
				s.deliver(v, &st)
				gen = 0 // it is no more what was read
			}
		}
		sure, err := s.remove(gen, left)
		if err != nil {
			return st, err
		}
		if sure {
			return st, s.unsure(unread)
		}
	}
}

// unlockUnseen deletes the tables that a lock can be in without knowing whether there
// are any, after cause.
func (s *session) unlockUnseen(st netlock.State, cause error) (netlock.State, error) {
	var errs []error
	for _, name := range tableNames {
		err := s.drop(s.ctx, 0, table{name: name, family: unix.NFPROTO_INET})
		switch {
		case err == nil:
			st.Found, st.Intact, st.Why = true, false, "table "+name+" could not be read"
		case errors.Is(err, unix.ENOENT):
		default:
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	if errs != nil {
		return st, s.fail("delete unread tables", errors.Join(errs...))
	}
	return st, s.unsure(cause)
}

// unsure is the error of an unlock that had to do without reading.
func (s *session) unsure(cause error) error {
	if cause == nil {
		return nil
	}
	if e := new(netlock.Error); errors.As(cause, &e) {
		cause = e.Err
	}
	return &netlock.Error{Kind: netlock.KindOther, Op: "unlock", Namespace: s.ns.String(), Backend: Name,
		Err: fmt.Errorf("unlocked, but nobody knows whether the lock was intact: it could not be read: %w", cause)}
}

// State reads what is there and changes nothing.
func (b *Backend) State(ctx context.Context, ns *netlock.Namespace, o netlock.Options) (st netlock.State, err error) {
	err = b.in(ctx, ns, o, func(s *session) error {
		reading, cancel := s.readTime()
		defer cancel()
		was, err := s.see(reading)
		if err != nil {
			return err
		}
		st = state(was.mine)
		_, _, free := place(was.mine, was.held)
		st.Held = !free
		if len(was.ours) == 0 {
			s.rememberNone(was.gen)
		}
		return was.unread
	})
	return st, err
}

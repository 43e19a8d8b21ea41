package nft

// What a Backend knows of its own locks. The rule set of a namespace has a generation, which
// every change raises: an unlock that finds the one that its lock has left need not read
// what is there, and the kernel itself refuses it (ERESTART) otherwise. It is a hint and
// nothing more: without it an unlock looks.

import (
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// note is a lock that was the only thing under our names at a generation, or that nothing was.
type note struct {
	gen   uint32
	name  string // empty for nothing
	allow []netlock.Rule
	text  string // its comment
}

// maxNotes bounds them: a lock whose namespace dies is never asked for again.
const maxNotes = 4096

// notes are by the namespace's cookie, which no other one ever gets.
type notes struct {
	mu sync.Mutex
	of map[uint64]note
}

func (n *notes) put(cookie uint64, x note) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.of == nil || len(n.of) >= maxNotes {
		n.of = map[uint64]note{}
	}
	n.of[cookie] = x
}

func (n *notes) take(cookie uint64) (note, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	x, ok := n.of[cookie]
	delete(n.of, cookie)
	return x, ok
}

// remember notes the lock that is in force at gen, unless it holds what is to be delivered
// first.
func (s *session) remember(gen uint32, name, text string) {
	if s.mode == netlock.Hold {
		return
	}
	if cookie, ok := s.conn.Cookie(); ok && gen != 0 {
		s.b.notes.put(cookie, note{gen, name, s.o.Allow, text})
	}
}

// rememberNone notes that nothing bears a name of ours at gen.
func (s *session) rememberNone(gen uint32) {
	if cookie, ok := s.conn.Cookie(); ok && gen != 0 {
		s.b.notes.put(cookie, note{gen: gen})
	}
}

// notedNone is what was seen where nothing has borne a name of ours and, as the kernel will
// check, nothing has changed since.
func (s *session) notedNone() (was seen, ok bool) {
	cookie, ok := s.conn.Cookie()
	if !ok {
		return was, false
	}
	n, ok := s.b.notes.take(cookie)
	return seen{gen: n.gen}, ok && n.name == ""
}

// following is the generation that a change leads to.
func following(gen uint32) uint32 {
	if gen++; gen == 0 {
		gen++
	}
	return gen
}

// unlockNoted deletes the lock that this Backend has made and nobody has touched. It is
// not done if there is anything to say about it: then the lock is to be looked at.
func (s *session) unlockNoted() (st netlock.State, done bool) {
	cookie, ok := s.conn.Cookie()
	if !ok {
		return st, false
	}
	n, ok := s.b.notes.take(cookie)
	if !ok || n.name == "" || !slices.Equal(n.allow, s.o.Allow) {
		return st, false
	}
	st = netlock.State{Backend: Name, Found: true, Locked: true, Intact: true, Mode: netlock.Drop}
	var err error
	if !s.o.Terse {
		if st.Since, st.Caller, err = netlock.ParseComment(n.text); err != nil {
			return st, false
		}
		if st.DroppedIn, st.DroppedOut, err = s.dropped(s.ctx, n); err != nil {
			return st, false
		}
	}
	err = s.conn.Commit(s.ctx, n.gen, nfnl.Request{Cmd: unix.NFT_MSG_DELTABLE, Family: unix.NFPROTO_INET, Attrs: nfnl.AttrString(nil, unix.NFTA_TABLE_NAME, n.name)})
	if err == nil {
		s.ns.Moved(n.gen, following(n.gen))
	}
	return st, err == nil
}

// dropped reads the counters of the lock that a note is of, and nothing else: a dump of its
// rules takes three times as long.
func (s *session) dropped(ctx context.Context, n note) (in, out uint64, err error) {
	rules := fixedRules + uint64(len(netlock.Expand(n.allow)))
	var reqs []nfnl.Request
	for i, c := range chains() {
		// The kernel numbers what a batch adds to a new table: a chain, its rules, the other chain, its rules.
		last := uint64(i+1) * (1 + rules)
		reqs = append(reqs, getRule(n.name, c, last))
	}
	ans, err := s.conn.Ask(ctx, reqs...)
	if err != nil {
		return 0, 0, err
	}
	var packets [2]uint64
	for i, a := range ans {
		ok := false
		for _, o := range a.Objects {
			packets[i], ok = onlyCounter(o)
		}
		if !ok {
			return 0, 0, errNoCounter
		}
	}
	return packets[0], packets[1], nil
}

// getRule asks for one rule.
func getRule(table string, c chain, handle uint64) nfnl.Request {
	attrs := nfnl.AttrString(nil, unix.NFTA_RULE_TABLE, table)
	attrs = nfnl.AttrString(attrs, unix.NFTA_RULE_CHAIN, c.name)
	attrs = nfnl.Attr(attrs, unix.NFTA_RULE_HANDLE, binary.BigEndian.AppendUint64(nil, handle))
	return nfnl.Request{Cmd: unix.NFT_MSG_GETRULE, Family: unix.NFPROTO_INET, Attrs: attrs}
}

var errNoCounter = errors.New("a rule of the lock is not where it was put")

// onlyCounter reads a rule that is a counter and nothing more.
func onlyCounter(o nfnl.Object) (packets uint64, ok bool) {
	packets, behind := firstCounter(o)
	return packets, behind == 0
}

// firstCounter reads a rule that begins with a counter, and tells how many expressions stand behind
// it; -1 if it does not.
func firstCounter(o nfnl.Object) (packets uint64, behind int) {
	exprs, first := 0, false
	nfnl.Walk(o.Attrs, func(typ uint16, b []byte) {
		if typ != unix.NFTA_RULE_EXPRESSIONS {
			return
		}
		nfnl.Walk(b, func(_ uint16, e []byte) {
			if name, data, ok := splitExpr(e); exprs == 0 && ok && name == "counter" {
				packets, first = counted(data), true
			}
			exprs++
		})
	})
	if !first {
		return 0, -1
	}
	return packets, exprs - 1
}

// counted is a counter's number of packets.
func counted(data []byte) (packets uint64) {
	nfnl.Walk(data, func(typ uint16, v []byte) {
		if typ == unix.NFTA_COUNTER_PACKETS {
			packets += nfnl.U64(v)
		}
	})
	return packets
}

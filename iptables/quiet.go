package iptables

import (
	"bytes"
	"context"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// quietWatch stays with a handle that keeps sockets once nothing of ours was seen in its
// namespace, to tell without entering it that there is still nothing.
type quietWatch struct {
	conn *nfnl.Conn
	gen  uint32 // of the rules of nf_tables, when there was nothing
	// vouched is when the kernel itself has made sure of gen, for a change of another backend.
	vouched time.Time
	// names are the lists of the legacy tables that there are; -1 where the kernel has none.
	names [2]int
}

// quietKey is what it stands under.
type quietKey struct{}

// namesFile lists a family's legacy tables.
func (f family) namesFile() string { return procNet + "/" + f.proc + "names" }

// watch takes the connection over, on a thread inside the namespace. It returns nil if
// something is not as simple as it mostly is.
func watch(conn *nfnl.Conn, gen uint32) *quietWatch {
	if conn == nil || gen == 0 {
		return nil
	}
	q := &quietWatch{conn: conn, gen: gen, names: [2]int{-1, -1}}
	for i, f := range families() {
		fd, err := unix.Open(f.namesFile(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		switch err {
		case nil:
			q.names[i] = fd
		case unix.ENOENT:
		default:
			q.closeNames()
			return nil
		}
	}
	return q
}

// still tells whether nothing of ours is there for certain.
func (q *quietWatch) still(ctx context.Context) bool {
	for i, f := range families() {
		if q.names[i] < 0 {
			// With the kernel's module it would have come in every namespace.
			if unix.Access(f.namesFile(), unix.F_OK) != unix.ENOENT {
				return false
			}
			continue
		}
		var buf [1024]byte
		n, err := unix.Pread(q.names[i], buf[:], 0)
		if err != nil || n == len(buf) {
			return false
		}
		for _, name := range tableNames {
			if bytes.Contains(append([]byte("\n"), buf[:n]...), []byte("\n"+name+"\n")) {
				return false
			}
		}
	}
	if time.Since(q.vouched) < vouchTime {
		q.vouched = time.Time{}
		return true
	}
	ans, err := q.conn.Ask(ctx, nfnl.Request{Cmd: unix.NFT_MSG_GETGEN})
	return err == nil && generation(ans[0]) == q.gen
}

// vouchTime is how long the kernel's word does: for the backend that comes next in the same
// Lock or Unlock. To ask again takes 20 µs of a freeze.
const vouchTime = time.Millisecond

// Moved keeps up with what another backend has changed.
func (q *quietWatch) Moved(from, to uint32) {
	if q.gen == from {
		q.gen, q.vouched = to, time.Now()
	}
}

func (q *quietWatch) closeNames() {
	for _, fd := range q.names {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// Close ends the watch.
func (q *quietWatch) Close() error {
	q.closeNames()
	return q.conn.Close()
}

// stillQuiet tells whether a watch says so that is with the handle. If it does not, its connection
// is the caller's: to close one after a delete in nf_tables waits for an RCU grace period.
func stillQuiet(ctx context.Context, ns *netlock.Namespace) (quiet bool, conn *nfnl.Conn) {
	q, ok := ns.Take(quietKey{}).(*quietWatch)
	if !ok {
		return false, nil
	}
	if q.still(ctx) && ns.Leave(quietKey{}, q) {
		return true, nil
	}
	q.closeNames()
	return false, q.conn
}

package hold

// CRIU's own lock, beside which a delivered packet needs CRIU's mark.

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// CRIUsMark is SOCCR_MARK, which CRIU's own lock accepts at input.
const CRIUsMark = 0xC114

// CRIULocked tells whether CRIU's own lock is in force in the calling thread's namespace, so
// that what is delivered needs CRIU's mark. What cannot be read counts as no lock.
func CRIULocked(ctx context.Context) bool { return nftLocked(ctx) || legacyLocked() }

// nftLocked looks for the table inet CRIU-…, and for the chain CRIU that iptables-nft makes.
func nftLocked(ctx context.Context) bool {
	conn, err := nfnl.Dial()
	if err != nil {
		return false
	}
	defer conn.Close()
	chain := nfnl.AttrString(nfnl.AttrString(nil, unix.NFTA_CHAIN_TABLE, "filter"), unix.NFTA_CHAIN_NAME, "CRIU")
	ans, err := conn.Ask(ctx,
		nfnl.Request{Cmd: unix.NFT_MSG_GETCHAIN, Family: unix.NFPROTO_IPV4, Attrs: chain},
		nfnl.Request{Cmd: unix.NFT_MSG_GETTABLE, Dump: true})
	if err != nil {
		return false
	}
	if len(ans[0].Objects) > 0 {
		return true
	}
	found := false
	for _, o := range ans[1].Objects {
		nfnl.Walk(o.Attrs, func(typ uint16, b []byte) {
			found = found || typ == unix.NFTA_TABLE_NAME && strings.HasPrefix(nfnl.Str(b), "CRIU-")
		})
	}
	return found
}

// From linux/netfilter_ipv4/ip_tables.h.
const (
	iptSoGetInfo    = 64
	iptSoGetEntries = 65
	xtTableName     = 32
	iptGetInfo      = 84 // struct ipt_getinfo; its last member is the size of the entries
	maxEntries      = 64 << 20
)

// legacyLocked looks for the chain CRIU in the legacy table filter, if the namespace has one.
func legacyLocked() bool {
	f := legacyFamilies[0]
	// A chain begins with the target ERROR, whose data are its name.
	return slices.Contains(f.tables(), "filter") && bytes.Contains(f.entries("filter", maxEntries), []byte("\x00CRIU\x00"))
}

// entries are those of a table that is there; none if it cannot be read, or is larger than most.
func (f legacyFamily) entries(table string, most uint32) []byte {
	fd, err := unix.Socket(f.domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	info := make([]byte, iptGetInfo)
	copy(info[:xtTableName-1], table)
	if f.getsockopt(fd, iptSoGetInfo, info) != nil {
		return nil
	}
	size := *(*uint32)(unsafe.Pointer(&info[iptGetInfo-4]))
	if size > most {
		return nil
	}
	// struct ipt_get_entries: the name, the size, and the entries, which are aligned.
	b := make([]byte, xtTableName+8+int(size))
	copy(b[:xtTableName-1], table)
	*(*uint32)(unsafe.Pointer(&b[xtTableName])) = size
	if f.getsockopt(fd, iptSoGetEntries, b) != nil {
		return nil
	}
	return b[xtTableName+8:]
}

func (f legacyFamily) getsockopt(fd, name int, b []byte) error {
	size := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(f.level), uintptr(name),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

package iptables

// Is anything of ours there? Asked after every lock and unlock by the other
// backend, in the freeze window: so without a process, and without making a table
// by looking at it.

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// family is ip or ip6.
type family struct {
	v6       bool
	prefix   string // of the commands' names
	names    string // the legacy tables that the namespace has
	sockFam  int
	sockOpt  int // the level of the legacy get-options
	nfproto  uint8
	ourTwo   [2]string
	required func() bool
}

func families() [2]family {
	two := [2]string{chainIn, chainOut}
	return [2]family{
		{false, "iptables", "/proc/thread-self/net/ip_tables_names", unix.AF_INET, unix.SOL_IP, unix.NFPROTO_IPV4, two, func() bool { return true }},
		{true, "ip6tables", "/proc/thread-self/net/ip6_tables_names", unix.AF_INET6, unix.SOL_IPV6, unix.NFPROTO_IPV6, two, func() bool {
			_, err := os.Stat("/proc/thread-self/net/if_inet6") // missing where the kernel has no IPv6
			return err == nil
		}},
	}
}

var tableNames = [2]string{"raw", "filter"}

// inLegacy returns the legacy tables of a family that have a chain of ours.
func inLegacy(f family) ([]string, error) {
	b, err := os.ReadFile(f.names)
	if err != nil {
		if os.IsNotExist(err) {
			return nil, nil // the kernel has no legacy iptables
		}
		return nil, err
	}
	var out []string
	for _, name := range strings.Fields(string(b)) {
		if !slices.Contains(tableNames[:], name) {
			continue
		}
		entries, err := legacyEntries(f, name)
		if err != nil {
			return nil, fmt.Errorf("read legacy table %s: %w", name, err)
		}
		if bytes.Contains(entries, []byte(chainIn)) || bytes.Contains(entries, []byte(chainOut)) {
			out = append(out, name)
		}
	}
	return out, nil
}

// Options of getsockopt, the same in linux/netfilter_ipv4/ip_tables.h and ip6_tables.h.
const (
	soGetInfo    = 64
	soGetEntries = 65
)

// legacyEntries reads a table as the kernel has it: a chain's name stands in its
// first entry, as the name of an error target.
func legacyEntries(f family, name string) ([]byte, error) {
	fd, err := unix.Socket(f.sockFam, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	get := func(opt int, b []byte) error {
		n := uint32(len(b))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(f.sockOpt), uintptr(opt),
			uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
		if errno != 0 {
			return errno
		}
		return nil
	}
	for range 16 {
		// struct ipt_getinfo: name[32], valid_hooks, hook_entry[5], underflow[5], num_entries, size.
		info := make([]byte, 84)
		copy(info, name)
		if err := get(soGetInfo, info); err != nil {
			return nil, err
		}
		// struct ipt_get_entries: name[32], size, and at the next multiple of 8 the entries.
		size := binary.NativeEndian.Uint32(info[80:])
		b := make([]byte, 40+int(size))
		copy(b, name)
		binary.NativeEndian.PutUint32(b[32:], size)
		switch err := get(soGetEntries, b); err {
		case nil:
			return b[40:], nil
		case unix.EAGAIN: // the table changed its size in between
		default:
			return nil, err
		}
	}
	return nil, unix.EAGAIN
}

// inNFT returns, for ip and ip6, the tables of iptables-nft that have a chain of ours.
func inNFT(ctx context.Context) (out [2][]string, err error) {
	conn, err := nfnl.Dial()
	if err != nil {
		return out, nil // the kernel has no nfnetlink
	}
	defer conn.Close()
	tables, err := conn.Ask(ctx, nfnl.Request{Cmd: unix.NFT_MSG_GETTABLE, Dump: true})
	if err != nil {
		return out, err
	}
	switch tables[0].Errno {
	case 0:
	case unix.EINVAL, unix.EOPNOTSUPP: // the kernel has no nf_tables
		return out, nil
	default:
		return out, tables[0].Errno
	}
	for i, f := range families() {
		for _, o := range tables[0].Objects {
			name := ""
			nfnl.Walk(o.Attrs, func(typ uint16, b []byte) {
				if typ == unix.NFTA_TABLE_NAME {
					name = nfnl.Str(b)
				}
			})
			if o.Family != f.nfproto || !slices.Contains(tableNames[:], name) {
				continue
			}
			var reqs []nfnl.Request
			for _, c := range f.ourTwo {
				reqs = append(reqs, nfnl.Request{Cmd: unix.NFT_MSG_GETCHAIN, Family: f.nfproto,
					Attrs: nfnl.AttrString(nfnl.AttrString(nil, unix.NFTA_CHAIN_TABLE, name), unix.NFTA_CHAIN_NAME, c)})
			}
			chains, err := conn.Ask(ctx, reqs...)
			if err != nil {
				return out, err
			}
			if len(chains[0].Objects)+len(chains[1].Objects) > 0 {
				out[i] = append(out[i], name)
			}
		}
	}
	return out, nil
}

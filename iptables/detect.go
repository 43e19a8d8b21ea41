package iptables

// Is anything of ours there? Asked after every lock and unlock by the other
// backend, in the freeze window: so without a process, and without making a table
// by looking at it.

import (
	"context"
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/nft/nfnl"
)

// family is ip or ip6: xtables knows no rule for both.
type family struct {
	v6      bool
	name    string // as nft calls it
	prefix  string // of the programs' names
	proc    string // of the files in /proc/net
	sockFam int
	sockOpt int // the level of the legacy get-options
	nfproto uint8
	// where struct ipt_entry or ip6t_entry has target_offset; next_offset follows
	targetAt int
}

// procNet is /proc/net of the calling thread's namespace.
const procNet = "/proc/thread-self/net"

func families() [2]family {
	return [2]family{
		{false, "ip", "iptables", "ip_tables_", unix.AF_INET, unix.SOL_IP, unix.NFPROTO_IPV4, 88},
		{true, "ip6", "ip6tables", "ip6_tables_", unix.AF_INET6, unix.SOL_IPV6, unix.NFPROTO_IPV6, 140},
	}
}

// hasIPv6 tells whether the calling thread's namespace knows IPv6 at all.
func hasIPv6() (bool, error) {
	err := unix.Access(procNet+"/if_inet6", unix.F_OK)
	if err == unix.ENOENT {
		return false, nil
	}
	return err == nil, err
}

// tableNames are where a lock can be, best first: raw comes before conntrack, which
// a dropped packet must not move.
var tableNames = [2]string{"raw", "filter"}

// spot is one table of one family in one variant.
type spot struct {
	v    Variant
	fam  int // index of families()
	name string
}

// sight is what the kernel shows of us in a spot.
type sight struct {
	spot
	// uses counts the rules in each of our chains and the jumps to it; -1 for a
	// chain that is not there.
	uses [2]int
	// dead says why nothing in the table takes effect, though iptables prints it as
	// it prints any other.
	dead string
	// base: one of our names is a base chain's, to which nothing can jump.
	base bool
}

// exact tells whether there are as many rules and jumps as a lock has.
func (s sight) exact(allow []netlock.Rule) bool {
	for i, chain := range [2]string{chainIn, chainOut} {
		want := len(specs(chain, "lo", families()[s.fam].v6, allow)) + 1
		for _, h := range hooks(s.name) {
			if h[1] == chain {
				want++
			}
		}
		if s.uses[i] != want {
			return false
		}
	}
	return s.dead == ""
}

// detect finds every spot where something of ours is, and the generation of the rules
// of nf_tables. conn is nil where the kernel has no nf_tables.
func detect(ctx context.Context, conn *nfnl.Conn) (out []sight, gen uint32, err error) {
	out, err = detectLegacy()
	if err != nil {
		return nil, 0, fmt.Errorf("read legacy tables: %w", err)
	}
	more, gen, err := detectNFT(ctx, conn)
	if err != nil {
		return nil, 0, fmt.Errorf("read chains of nf_tables: %w", err)
	}
	return append(out, more...), gen, nil
}

func detectLegacy() (out []sight, err error) {
	// Walking down /proc to the thread costs more than all the rest: once will do.
	dir, err := unix.Open(procNet, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", procNet, err)
	}
	defer unix.Close(dir)
	for i, f := range families() {
		names, err := f.lines(dir, "names")
		if err != nil {
			return nil, err
		}
		for _, name := range tableNames {
			if !strings.Contains(names, "\n"+name+"\n") {
				continue
			}
			entries, err := f.legacyEntries(name)
			if err != nil {
				return nil, fmt.Errorf("%s table %s: %w", f.name, name, err)
			}
			s := sight{spot: spot{Legacy, i, name}}
			if s.uses = f.countUses(entries); s.uses != [2]int{-1, -1} {
				out = append(out, s)
			}
		}
	}
	return out, nil
}

// lines reads one of a family's files in /proc/net, with a newline before and after
// each line; it is empty where the kernel has no such file. dir is procNet, open.
func (f family) lines(dir int, file string) (string, error) {
	fd, err := unix.Openat(dir, f.proc+file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w", f.proc+file, err)
	}
	defer unix.Close(fd)
	out := []byte("\n")
	var buf [1024]byte
	for {
		n, err := unix.Read(fd, buf[:])
		if err != nil {
			return "", fmt.Errorf("%s: %w", f.proc+file, err)
		}
		if n <= 0 {
			return string(out), nil
		}
		out = append(out, buf[:n]...)
	}
}

// Options of getsockopt, the same in linux/netfilter_ipv4/ip_tables.h and ip6_tables.h.
const (
	soGetInfo    = 64
	soGetEntries = 65
	nameLen      = 32
)

func (f family) socket() (int, error) {
	return unix.Socket(f.sockFam, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
}

func (f family) get(fd, opt int, b []byte) error {
	n := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(f.sockOpt), uintptr(opt),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// legacySize asks for the size of a table's entries. It makes the table if the
// kernel knows it and it is not there yet.
func (f family) legacySize(fd int, name string) (uint32, error) {
	// struct ipt_getinfo: name[32], valid_hooks, hook_entry[5], underflow[5], num_entries, size.
	info := make([]byte, nameLen+13*4)
	copy(info[:nameLen-1], name)
	if err := f.get(fd, soGetInfo, info); err != nil {
		return 0, err
	}
	return binary.NativeEndian.Uint32(info[len(info)-4:]), nil
}

// legacyTable is the kernel's own word on whether it has a table.
func (f family) legacyTable(name string) error {
	fd, err := f.socket()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = f.legacySize(fd, name)
	return err
}

// legacyEntries reads a table as the kernel has it.
func (f family) legacyEntries(name string) ([]byte, error) {
	fd, err := f.socket()
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	// struct ipt_get_entries: name[32], size, and the entries, aligned as C aligns a
	// 64-bit number.
	at := nameLen + 8
	if runtime.GOARCH == "386" {
		at = nameLen + 4
	}
	for range 16 {
		size, err := f.legacySize(fd, name)
		if err != nil {
			return nil, err
		}
		b := make([]byte, at+int(size))
		copy(b[:nameLen-1], name)
		binary.NativeEndian.PutUint32(b[nameLen:], size)
		switch err := f.get(fd, soGetEntries, b); err {
		case nil:
			return b[at:], nil
		case unix.EAGAIN: // the table changed its size in between
		default:
			return nil, err
		}
	}
	return nil, unix.EAGAIN
}

// countUses walks the entries of a table. A user's chain begins with an entry whose
// target is ERROR and bears the chain's name, and ends with one that returns; a jump
// is a standard target whose verdict is the offset of the chain's first rule.
func (f family) countUses(blob []byte) (uses [2]int) {
	const (
		nameAt  = 2  // in struct xt_entry_target
		valueAt = 32 // behind it: a verdict, or a chain's name
	)
	verdicts := map[int]int{}
	first := [2]int{-1, -1}
	uses = first
	current := -1
	for off := 0; off+f.targetAt+4 <= len(blob); {
		target := off + int(binary.NativeEndian.Uint16(blob[off+f.targetAt:]))
		next := off + int(binary.NativeEndian.Uint16(blob[off+f.targetAt+2:]))
		if next <= off || next > len(blob) || target+valueAt+4 > next {
			break
		}
		if current >= 0 {
			uses[current]++
		}
		switch nfnl.Str(blob[target+nameAt : target+valueAt]) {
		case "ERROR":
			if current >= 0 {
				uses[current] -= 2 // this entry, and the one that ends the chain
			}
			current = -1
			for i, c := range [2]string{chainIn, chainOut} {
				if nfnl.Str(blob[target+valueAt:next]) == c {
					current, first[i], uses[i] = i, next, 0
				}
			}
		case "":
			if v := int32(binary.NativeEndian.Uint32(blob[target+valueAt:])); v > 0 {
				verdicts[int(v)]++
			}
		}
		off = next
	}
	for i := range uses {
		if first[i] >= 0 {
			uses[i] += verdicts[first[i]]
		}
	}
	return uses
}

// generation is that of the rules of nf_tables, by the kernel's answer; 0 if it says none.
func generation(a nfnl.Answer) (gen uint32) {
	if a.Errno != 0 {
		return 0
	}
	for _, o := range a.Objects {
		nfnl.Walk(o.Attrs, func(typ uint16, b []byte) {
			if typ == unix.NFTA_GEN_ID {
				gen = nfnl.U32(b)
			}
		})
	}
	return gen
}

// detectNFT asks nf_tables for each of our chains by name, which costs the same
// however many rules there are.
func detectNFT(ctx context.Context, conn *nfnl.Conn) (out []sight, gen uint32, err error) {
	if conn == nil {
		return nil, 0, nil
	}
	// The tables first: mostly there is none, and every request costs an answer.
	var spots []sight
	reqs := []nfnl.Request{{Cmd: unix.NFT_MSG_GETGEN}}
	for i := range 2 * len(tableNames) {
		p := sight{spot: spot{NFT, i / 2, tableNames[i%2]}, uses: [2]int{-1, -1}}
		spots = append(spots, p)
		reqs = append(reqs, p.ask(unix.NFT_MSG_GETTABLE, unix.NFTA_TABLE_NAME, 0, ""))
	}
	ans, err := conn.Ask(ctx, reqs...)
	if err != nil {
		return nil, 0, err
	}
	gen = generation(ans[0])
	ans, reqs = ans[1:], nil
	for i := len(spots) - 1; i >= 0; i-- {
		switch e := ans[i].Errno; e {
		case 0:
			if owned(ans[i]) {
				spots = slices.Delete(spots, i, i+1)
			}
		case unix.ENOENT:
			spots = slices.Delete(spots, i, i+1)
		case unix.EINVAL, unix.EOPNOTSUPP: // what a kernel without nf_tables says
			return nil, 0, nil
		default:
			return nil, 0, e
		}
	}
	for _, p := range spots {
		for _, c := range [2]string{chainIn, chainOut} {
			reqs = append(reqs, p.ask(unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, c))
		}
	}
	if len(reqs) == 0 {
		return nil, gen, nil
	}
	if ans, err = conn.Ask(ctx, reqs...); err != nil {
		return nil, 0, err
	}
	for i, p := range spots {
		found := false
		for j, a := range ans[2*i : 2*i+2] {
			switch a.Errno {
			case 0:
			case unix.ENOENT:
				continue
			default:
				return nil, 0, a.Errno
			}
			for _, o := range a.Objects {
				found = true
				nfnl.Walk(o.Attrs, func(typ uint16, b []byte) {
					switch typ {
					case unix.NFTA_CHAIN_USE:
						p.uses[j] = int(nfnl.U32(b))
					case unix.NFTA_CHAIN_HOOK:
						p.base = true
					}
				})
			}
		}
		if !found {
			continue
		}
		if p.dead, err = deadTable(ctx, conn, p.spot); err != nil {
			return nil, 0, err
		}
		out = append(out, p)
	}
	return out, gen, nil
}

const nftaTableOwner = 7 // NFTA_TABLE_OWNER, Linux 5.12

// owned: a live process owns the table. What is in it is that process's own, goes when
// the process goes, and can be changed by nobody else.
func owned(a nfnl.Answer) (yes bool) {
	for _, o := range a.Objects {
		nfnl.Walk(o.Attrs, func(typ uint16, b []byte) { yes = yes || typ == nftaTableOwner && nfnl.U32(b) != 0 })
	}
	return yes
}

// ask makes a request about a thing in the spot's table.
func (p spot) ask(cmd uint8, tableAttr, nameAttr uint16, name string) nfnl.Request {
	r := nfnl.Request{Cmd: cmd, Family: families()[p.fam].nfproto, Attrs: nfnl.AttrString(nil, tableAttr, p.name)}
	if nameAttr != 0 {
		r.Attrs = nfnl.AttrString(r.Attrs, nameAttr, name)
	}
	return r
}

// builtins are the base chains from which ours are called, with their hooks.
func builtins(table string) (names []string, hook map[string]uint32, priority int32) {
	hook = map[string]uint32{
		"PREROUTING": unix.NF_INET_PRE_ROUTING, "INPUT": unix.NF_INET_LOCAL_IN,
		"FORWARD": unix.NF_INET_FORWARD, "OUTPUT": unix.NF_INET_LOCAL_OUT,
	}
	for _, h := range hooks(table) {
		names = append(names, h[0])
	}
	if table == "raw" {
		priority = -300 // NF_IP_PRI_RAW
	}
	return names, hook, priority
}

// deadTable says why a table of nf_tables stops nothing, though iptables-nft prints
// it as it prints any other.
func deadTable(ctx context.Context, conn *nfnl.Conn, p spot) (string, error) {
	names, hook, priority := builtins(p.name)
	reqs := []nfnl.Request{p.ask(unix.NFT_MSG_GETTABLE, unix.NFTA_TABLE_NAME, 0, "")}
	for _, n := range names {
		reqs = append(reqs, p.ask(unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, n))
	}
	ans, err := conn.Ask(ctx, reqs...)
	if err != nil {
		return "", err
	}
	why := ""
	for _, o := range ans[0].Objects {
		nfnl.Walk(o.Attrs, func(typ uint16, b []byte) {
			if typ == unix.NFTA_TABLE_FLAGS && nfnl.U32(b)&1 != 0 { // NFT_TABLE_F_DORMANT
				why = "is dormant"
			}
		})
	}
	for i, a := range ans[1:] {
		num, prio := ^uint32(0), int32(0)
		kind := ""
		for _, o := range a.Objects {
			nfnl.Walk(o.Attrs, func(typ uint16, b []byte) {
				switch typ {
				case unix.NFTA_CHAIN_TYPE:
					kind = nfnl.Str(b)
				case unix.NFTA_CHAIN_HOOK:
					nfnl.Walk(b, func(typ uint16, b []byte) {
						switch typ {
						case unix.NFTA_HOOK_HOOKNUM:
							num = nfnl.U32(b)
						case unix.NFTA_HOOK_PRIORITY:
							prio = int32(nfnl.U32(b))
						}
					})
				}
			})
		}
		if why == "" && (num != hook[names[i]] || prio != priority) {
			why = "has a chain " + names[i] + " that is not hooked where it belongs"
		}
		if why == "" && kind != "filter" { // one of type nat sees a connection's first packet only
			why = "has a chain " + names[i] + " of type " + kind
		}
	}
	return why, nil
}

// loopback is the name of the calling thread's namespace's loopback, which always has
// the index 1. Another link can be called lo.
func loopback() (string, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo") // the kernel writes the name, and needs none
	if err != nil {
		return "", err
	}
	ifr.SetUint32(1) // ifr_ifindex
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFNAME, ifr); err != nil {
		return "", fmt.Errorf("name of link 1: %w", err)
	}
	return ifr.Name(), nil
}

// missingMatch names a match that every lock needs and the kernel has not got; "" if
// it has them all, or does not say. To be asked after a refusal: it is iptables'
// asking that loads a match's module.
func (f family) missingMatch() string {
	dir, err := unix.Open(procNet, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(dir)
	have, err := f.lines(dir, "matches")
	if err != nil || have == "" {
		return ""
	}
	for _, name := range []string{"mark", "comment"} {
		if !strings.Contains(have, "\n"+name+"\n") {
			return name
		}
	}
	return ""
}

package guard

// Who keeps a namespace alive beside the holder of a lock in it.

import (
	"bytes"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
)

// keepers looks for who else keeps a namespace alive: a task in it, a mount of it, a descriptor
// of it or of a socket in it. What it cannot see, a namespace mounted where no task is, a
// descriptor on its way from one process to another, keeps the namespace alive too, but not
// its holder.
type keepers struct {
	ns *netlock.Namespace
	// last tells whether the one that was found last is still there, which is all that there is to
	// look at as a rule.
	last func() bool
}

// any tells whether there is somebody.
func (k *keepers) any() bool {
	if k.last == nil || !k.last() {
		k.last = k.find()
	}
	return k.last != nil
}

// pidNSInit is the inode number of the first pid namespace (PROC_PID_INIT_INO).
const pidNSInit = 0xEFFFFFFC

// seesAll tells whether /proc shows all processes of this machine.
func seesAll() bool {
	var st unix.Stat_t
	own, err := os.Readlink("/proc/self")
	return err == nil && own == strconv.Itoa(os.Getpid()) && unix.Stat("/proc/self/ns/pid", &st) == nil && st.Ino == pidNSInit
}

// find returns nil if it has looked everywhere, and nobody is there.
func (k *keepers) find() func() bool {
	all := names("/proc")
	if !seesAll() || all == nil {
		return func() bool { return true }
	}
	look := func(look func(proc string) func() bool) func() bool {
		for _, name := range all {
			if pid, err := strconv.Atoi(name); err != nil || pid == os.Getpid() {
				continue
			}
			if last := look("/proc/" + name); last != nil {
				return last
			}
		}
		return nil
	}
	if last := look(k.task); last != nil {
		return last
	}
	views := map[string]bool{}
	if last := look(func(proc string) func() bool { return k.mount(proc, views) }); last != nil {
		return last
	}
	sockets := k.sockets()
	return look(func(proc string) func() bool { return k.descriptor(proc, sockets) })
}

// names are those in a directory; none where it cannot be read.
func names(dir string) []string {
	d, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1) // what it has read until an error
	return names
}

// task looks for a thread in the namespace.
func (k *keepers) task(proc string) func() bool {
	for _, tid := range names(proc + "/task") {
		path := proc + "/task/" + tid + "/ns/net"
		inside := func() bool {
			var st unix.Stat_t
			err := unix.Stat(path, &st)
			if err == unix.EACCES || err == unix.EPERM {
				// It may be in it, or is just ending. That of pid 1, which may have a capability
				// more than we, is the host's.
				return proc != "/proc/1"
			}
			return err == nil && st.Ino == k.ns.Inode()
		}
		if inside() {
			return inside
		}
	}
	return nil
}

// mount looks for a mount of the namespace, once for all processes that see the same. Mounts that
// this process alone sees are none.
func (k *keepers) mount(proc string, views map[string]bool) func() bool {
	ns, err := os.Readlink(proc + "/ns/mnt")
	root, errRoot := os.Readlink(proc + "/root")
	view := ns + " " + root
	if err != nil || errRoot != nil || views[view] {
		return nil
	}
	views[view] = true
	mounted := func() bool {
		b, err := os.ReadFile(proc + "/mountinfo")
		return err == nil && bytes.Contains(b, []byte(" "+k.text()+" "))
	}
	if mounted() {
		return mounted
	}
	return nil
}

// text is the namespace as the kernel writes it.
func (k *keepers) text() string { return "net:[" + strconv.FormatUint(k.ns.Inode(), 10) + "]" }

// descriptor looks for an open file of the namespace, or a socket in it.
func (k *keepers) descriptor(proc string, sockets map[string]bool) func() bool {
	for _, fd := range names(proc + "/fd") {
		path := proc + "/fd/" + fd
		link, err := os.Readlink(path)
		open := func() bool {
			now, err := os.Readlink(path)
			return err == nil && now == link
		}
		switch {
		case err != nil:
		case link == k.text(), sockets[link]:
			return open
		case strings.HasPrefix(link, "/"): // opened where it was mounted, perhaps
			if k.is(proc, fd) {
				return func() bool { return k.is(proc, fd) }
			}
		}
	}
	return nil
}

// is tells whether a descriptor is of the namespace. It asks no file system, which may never
// answer, where the kernel tells inodes by itself, since Linux 5.14.
func (k *keepers) is(proc, fd string) bool {
	b, err := os.ReadFile(proc + "/fdinfo/" + fd)
	if err != nil {
		return false
	}
	if _, rest, there := bytes.Cut(b, []byte("\nino:\t")); there {
		ino, _, _ := bytes.Cut(rest, []byte("\n"))
		return string(ino) == strconv.FormatUint(k.ns.Inode(), 10)
	}
	var st unix.Statx_t
	err = unix.Statx(unix.AT_FDCWD, proc+"/fd/"+fd, unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st)
	return err == nil && st.Ino == k.ns.Inode()
}

// sockets are the links of those in the namespace.
func (k *keepers) sockets() map[string]bool {
	all := map[string]bool{}
	_ = k.ns.Do(func() error { // what cannot be read does not keep it
		for name, field := range map[string]int{
			"tcp": 9, "tcp6": 9, "udp": 9, "udp6": 9, "udplite": 9, "udplite6": 9, "raw": 9, "raw6": 9,
			"icmp": 9, "icmp6": 9, "netlink": 9, "packet": 8, "unix": 6,
		} {
			b, _ := os.ReadFile("/proc/thread-self/net/" + name)
			for line := range strings.Lines(string(b)) {
				if f := strings.Fields(line); len(f) > field && f[field] != "0" {
					all["socket:["+f[field]+"]"] = true
				}
			}
		}
		return nil
	})
	return all
}

package main

// What does not answer does not hold up a command.

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// confined runs a script in a mount and a pid namespace of its own, where $1 is the
// program and $2 the FUSE server; everything in it dies with it. $dir is a directory.
func confined(t *testing.T, script string) result {
	t.Helper()
	netlocktest.Need(t, "unshare", "mount", "umount")
	if _, err := os.Stat("/dev/fuse"); err != nil {
		netlocktest.CannotRun(t, err.Error())
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return execute(t, []string{"dir=" + t.TempDir()}, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
		"sh", "-c", "set -e\numount -a -t nsfs\n[ ! -d /run/netns ] || mount -t tmpfs none /run/netns\n"+script, "sh", program, self)
}

// A namespace that is mounted in a file system that does not answer, in somebody's mount
// namespace, is passed over with a word; the others are listed and unlocked.
func TestListPassesOverSilentMounts(t *testing.T) {
	r := confined(t, `
		mkdir $dir/fuse
		unshare -n sleep 600 & there=$!
		unshare -n sleep 600 & free=$!
		until "$1" lock --pid $there --pid $free >/dev/null 2>&1; do :; done
		`+envFUSE+`=$dir/fuse:/proc/$there/ns/net:all:0:$dir/ready unshare -m "$2" &
		until [ -e $dir/ready ]; do :; done
		echo net:$(stat -L -c %i /proc/$there/ns/net); echo free:$free
		kill $there
		while kill -0 $there 2>/dev/null && ! grep -q ') Z ' /proc/$there/stat 2>/dev/null; do :; done
		code=0; "$1" list --timeout 3s || code=$?; echo -- list $code
		code=0; "$1" unlock --all --timeout 3s || code=$?; echo -- unlock $code
		code=0; "$1" status --pid $free || code=$?; echo -- status $code`)
	r.want(t, 0, "-- list 1\n", "-- unlock 1\n", ": unlocked (nft)\n", "-- status 0\n", ": not locked\n", "/fuse/d/f: passed over: ")
	ino, _, _ := strings.Cut(strings.TrimPrefix(r.stdout, "net:"), "\n")
	if _, err := strconv.Atoi(ino); err != nil || strings.Count(r.stderr, "net:["+ino+"]") != 2 || strings.Count(r.stderr, "\n") != 2 {
		t.Errorf("net:[%s] is to be told once by each: %v", ino, r)
	}
}

// A configuration in a file system that does not answer, at whichever request: hooks and
// commands end in time, and an unlock goes on without it.
func TestSilentConfiguration(t *testing.T) {
	for _, c := range []struct {
		name, silent string
		keep         string // for how long the kernel may keep names, in seconds
		code         int    // of a lock
	}{
		{"answers", "", "0", 0}, {"silent at a lookup", "1", "0", 8}, {"silent at a read", "15", "0", 8},
		{"silent at a read, its name in the cache", "15", "3600", 8},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel() // they wait, most of the time
			silent := c.silent
			if silent == "" {
				silent = "99999" // no request of FUSE's
			}
			r := confined(t, `
				mkdir $dir/fuse
				unshare -n sleep 600 & task=$!
				until "$1" status --pid $task >/dev/null 2>&1; do :; done
				`+envFUSE+`=$dir/fuse::`+silent+`:`+c.keep+`:$dir/ready "$2" &
				until [ -e $dir/ready ]; do :; done
				hook() { CRIU_NETLOCK_CONFIG=$dir/fuse/d/f CRTOOLS_SCRIPT_ACTION=$1 CRTOOLS_INIT_PID=$task "$program"; }
				program=$1
				begin=$(cut -d' ' -f1 /proc/uptime)
				code=0; hook network-lock || code=$?; echo -- lock $code
				code=0; CRIU_NETLOCK_CONFIG=$dir/fuse/d/f "$1" status --pid $task || code=$?; echo -- status $code
				"$1" lock --pid $task
				code=0; hook network-unlock || code=$?; echo -- unlock $code
				"$1" status --pid $task
				echo "took $begin $(cut -d' ' -f1 /proc/uptime)"`)
			code := strconv.Itoa(c.code)
			r.want(t, 0, "-- lock "+code+"\n", "-- status "+code+"\n", "-- unlock "+code+"\n", "result=unlocked", ": not locked\n")
			if c.code != 0 {
				r.want(t, 0, "read configuration: ", "no answer within 2s", "result=failed")
			}
			if r.took.Seconds() > 12 { // three times the two seconds
				t.Errorf("too late: %v", r)
			}
		})
	}
}

// A file on this machine is read without another process, known to the kernel's cache or
// not: that would be a frozen container's time.
func TestConfigurationNeedsNoProcess(t *testing.T) {
	netlocktest.Need(t, "strace", "unshare", "mount")
	dir := t.TempDir()
	for _, path := range []string{dir + "/absent", dir + "/no/such/directory", file(t, "c", "backend = \"nft\""), "/dev/null", "/dev/shm/no such file"} {
		trace := dir + "/trace"
		execute(t, []string{"CRTOOLS_SCRIPT_ACTION=pre-restore", "CRIU_NETLOCK_CONFIG=" + path}, "strace", "-f", "-o", trace, "-e", "trace=execve,openat2,open", program).want(t, 0)
		b, err := os.ReadFile(trace)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(b), "execve("); n != 1 {
			t.Errorf("%s: %d programs were run:\n%s", path, n, b)
		}
	}
}

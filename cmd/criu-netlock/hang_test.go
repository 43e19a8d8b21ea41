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
		if os.Getenv("CI") == "true" {
			t.Fatal("cannot run here: ", err)
		}
		t.Skip(err)
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
		`+envFUSE+`=$dir/fuse:/proc/$there/ns/net:all:$dir/ready unshare -m "$2" &
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

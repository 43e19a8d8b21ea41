package guard

import (
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
)

// letGo tells whether CRIU, which is gone, has let a task go that it restored, and the task
// lives. One that it has not waits for ever in the restorer, code that CRIU has put into it and
// which is unmapped at the very end: in a futex, called from memory that is anonymous,
// writable and executable. Where that cannot be told the answer is no.
func letGo(pid, pidfd int) bool {
	const looks, pause = 20, 5 * time.Millisecond // it may be on its way there
	for range looks {
		if in, err := inRestorer(pid); in || err != nil {
			return false
		}
		time.Sleep(pause)
	}
	return !netlock.Dead(pidfd) // it may have been about to die
}

func inRestorer(pid int) (bool, error) {
	dir := "/proc/" + strconv.Itoa(pid)
	s, err := os.ReadFile(dir + "/syscall")
	if err != nil {
		return false, err
	}
	f := strings.Fields(string(s))
	if len(f) < 3 || f[0] != strconv.Itoa(unix.SYS_FUTEX) { // "running" is one word
		return false, nil
	}
	pc, err := strconv.ParseUint(f[len(f)-1], 0, 64)
	if err != nil {
		return false, err
	}
	maps, err := os.ReadFile(dir + "/maps")
	return err == nil && restorerAt(string(maps), pc), err
}

// restorerAt tells whether the restorer can be what the maps have at an address.
func restorerAt(maps string, pc uint64) bool {
	for line := range strings.Lines(maps) {
		f := strings.Fields(line) // 7f00-7f10 rwxp 00000000 00:00 0 [path]
		if len(f) < 5 {
			continue
		}
		from, to, _ := strings.Cut(f[0], "-")
		a, err := strconv.ParseUint(from, 16, 64)
		b, err2 := strconv.ParseUint(to, 16, 64)
		if err == nil && err2 == nil && a <= pc && pc < b {
			return f[4] == "0" && strings.HasPrefix(f[1], "rwx")
		}
	}
	return false
}

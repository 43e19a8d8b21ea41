package main

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock/config"
)

// systemLog takes the place of the system log for the guards of a CRIU, whose /run is its own.
type systemLog struct {
	conn *net.UnixConn
	said []string
}

func newSystemLog(t *testing.T) (*systemLog, []string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "log")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	// Where there is a /dev/log that is not in /run, it is looked for first.
	return &systemLog{conn: conn}, []string{"PREPARE=mount -t tmpfs none /run && ln -s " + path + " /run/syslog && : >/run/xtables.lock && { [ ! -e /dev/log ] || mount --bind " + path + " /dev/log; }"}
}

// wait waits for a line that has all of these words.
func (l *systemLog) wait(t *testing.T, words ...string) {
	t.Helper()
	if err := l.conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 8192)
	for {
		n, err := l.conn.Read(b)
		if err != nil {
			t.Fatalf("the system log has no line with %q: %v\n%s", words, err, strings.Join(l.said, "\n"))
		}
		line := string(b[:n])
		l.said = append(l.said, line)
		all := strings.Contains(line, "criu-netlock[")
		for _, w := range words {
			all = all && strings.Contains(line, w)
		}
		if all {
			return
		}
	}
}

// What the guard does alone is said in the system log: that CRIU was gone and it has
// unlocked; that it could not, tries again, and gives up.
func TestSystemLog(t *testing.T) {
	log, prepare := newSystemLog(t)
	s := newSpace(t)
	c := newCRIU(t, prepare...)
	c.ok(t, s.pid, "pre-dump", "network-lock")
	c.kill()
	log.wait(t, "was gone without unlocking net:[", "unlocked")

	conf := file(t, "netlock.toml", "backend = \"iptables\"\ntimeout = \"1s\"\nguard-timeout = \"1s\"\n")
	log, prepare = newSystemLog(t)
	c = newCRIU(t, append(prepare, config.EnvPath+"="+conf)...)
	c.ok(t, s.pid, "pre-dump", "network-lock")
	// xtables' own lock, held by somebody who does not give it back.
	f, err := os.OpenFile("/proc/"+strconv.Itoa(c.Process.Pid)+"/root/run/xtables.lock", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	c.kill()
	log.wait(t, "unlock", "trying again for 1s")
	log.wait(t, "unlock", "gave up after 1s: run criu-netlock unlock")
	run(t, "unlock", "--pid", s.pid).want(t, 0)
}

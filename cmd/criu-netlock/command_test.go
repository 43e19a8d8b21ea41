package main

// The program as a command line.

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// decoded reads JSON that a run printed.
func decoded[T any](t *testing.T, r result) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(r.stdout), &v); err != nil {
		t.Fatalf("%v: %v", err, r)
	}
	return v
}

func TestStatus(t *testing.T) {
	netlocktest.Need(t, "ip")
	s := newSpace(t)
	name := s.name(t)
	inode := float64(s.inode(t))
	keys := []string{"backend", "dropped_in", "dropped_out", "intact", "locked", "locked_by", "mode", "netns", "since"}

	run(t, "status", "--netns", name).want(t, 0, fmt.Sprintf("net:[%.0f] (%s): not locked\n", inode, name))
	got := decoded[map[string]any](t, run(t, "status", "--json", "--pid", s.pid).want(t, 0))
	if ks := slices.Sorted(maps.Keys(got)); !slices.Equal(ks, keys) {
		t.Errorf("keys %v", ks)
	}
	want := map[string]any{"locked": false, "backend": nil, "mode": nil, "since": nil, "dropped_in": 0.0, "dropped_out": 0.0, "locked_by": nil, "intact": false, "netns": inode}
	if !maps.Equal(got, want) {
		t.Errorf("%v; %v is wanted", got, want)
	}

	start := time.Now().Truncate(time.Second)
	run(t, "lock", "--netns", name).want(t, 0, "): locked (nft)\n")
	execute(t, nil, "nsenter", "-t", s.pid, "-n", "ip", "link", "set", "lo", "up").want(t, 0)
	execute(t, nil, "nsenter", "-t", s.pid, "-n", program, "version").want(t, 0)
	// UDP to ourselves over lo: dropped on its way out.
	execute(t, nil, "nsenter", "-t", s.pid, "-n", "bash", "-c", "echo x >/dev/udp/127.0.0.1/9")
	for _, path := range []string{"/run/netns/" + name, "/proc/" + s.pid + "/ns/net"} {
		got = decoded[map[string]any](t, run(t, "status", "--json", "--netns", path).want(t, 0))
		if ks := slices.Sorted(maps.Keys(got)); !slices.Equal(ks, keys) {
			t.Errorf("keys %v", ks)
		}
		since, err := time.Parse(time.RFC3339, fmt.Sprint(got["since"]))
		if err != nil || since.Before(start) || since.After(time.Now()) {
			t.Errorf("since %v, %v", got["since"], err)
		}
		by, _ := got["locked_by"].(map[string]any)
		if by["pid"] != float64(os.Getpid()) || by["name"] == "" {
			t.Errorf("locked by %v", by)
		}
		if got["locked"] != true || got["backend"] != "nft" || got["mode"] != "drop" || got["intact"] != true || got["netns"] != inode || got["dropped_out"] == 0.0 {
			t.Errorf("%v", got)
		}
	}
	run(t, "status", "--pid", s.pid).want(t, 0, ": locked\n", "backend    nft\n", "mode       drop\n", "since      ", " ago)\n", " in, ", "locked by  ", "intact     yes\n")

	s.nft(t, "add rule inet criu-netlock ingress accept")
	got = decoded[map[string]any](t, run(t, "status", "--json", "--pid", s.pid).want(t, 0))
	if got["intact"] != false {
		t.Errorf("%v", got)
	}
	run(t, "status", "--pid", s.pid).want(t, 0, "intact     no: ")
	run(t, "unlock", "--pid", s.pid).want(t, 9)
}

// Every backend locks, is told by status, and is unlocked by any other choice.
func TestBackends(t *testing.T) {
	netlocktest.Need(t, "iptables-legacy-restore")
	for _, c := range []struct{ lock, name, unlock string }{
		{"nft", "nft", "iptables"}, {"iptables", "iptables-", "nft"}, {"auto", "nft", "auto"}, {"iptables", "iptables-", "auto"},
	} {
		s := newSpace(t)
		run(t, "lock", "--backend", c.lock, "--pid", s.pid).want(t, 0, "locked ("+c.name)
		run(t, "status", "--pid", s.pid).want(t, 0, "backend    "+c.name, "intact     yes")
		run(t, "lock", "--backend", c.lock, "--pid", s.pid).want(t, 0, "already locked ("+c.name)
		run(t, "unlock", "--backend", c.unlock, "--pid", s.pid).want(t, 0, "unlocked ("+c.name)
		run(t, "status", "--pid", s.pid).want(t, 0, "not locked")
	}
}

func TestLockMany(t *testing.T) {
	var spaces []*space
	var pids []string
	for range 12 {
		s := newSpace(t)
		spaces = append(spaces, s)
		pids = append(pids, "--pid", s.pid)
	}
	args := append(pids, "--pid", spaces[0].pid, "--netns", "/proc/"+spaces[1].pid+"/ns/net") // twice: once is done
	run(t, "lock", "--pid", spaces[3].pid).want(t, 0)
	r := run(t, append([]string{"lock"}, args...)...).want(t, 0)
	if strings.Count(r.stdout, "\n") != 12 || strings.Count(r.stdout, ": locked (nft)") != 11 || strings.Count(r.stdout, "already locked") != 1 {
		t.Error(r)
	}
	out := decoded[[]map[string]any](t, run(t, append([]string{"unlock", "--json"}, args...)...).want(t, 0))
	for _, o := range out {
		if o["result"] != "unlocked" || o["backend"] != "nft" || o["error"] != nil {
			t.Errorf("%v", o)
		}
	}
	if len(out) != 12 {
		t.Errorf("%d targets", len(out))
	}
	run(t, append([]string{"unlock"}, args...)...).want(t, 0, "not locked")

	// One fails: what this call locked is unlocked, what was locked before stays.
	hook(t, "network-lock", spaces[3].pid).want(t, 0)
	spaces[7].own(t)
	untouched(t, func() {
		r := run(t, append([]string{"lock"}, pids...)...).want(t, 7)
		if !isOneLine(r.stderr) || strings.Contains(r.stdout, ": locked") {
			t.Error(r)
		}
	}, spaces[3], spaces[7])
	for i, s := range spaces {
		if i != 7 {
			s.wantLocked(t, i == 3)
		}
	}
	// Unlocking does what it can.
	for i, s := range spaces {
		if i != 7 {
			hook(t, "network-lock", s.pid).want(t, 0)
		}
	}
	run(t, append([]string{"unlock"}, pids...)...)
	for i, s := range spaces {
		if i != 7 {
			s.wantLocked(t, false)
		}
	}
}

// A signal in the middle of locking many: all or none holds then, too, and the program
// ends by the signal.
func TestLockInterrupted(t *testing.T) {
	netlocktest.Need(t, "strace")
	var spaces []*space
	args := []string{"lock", "--timeout", "15s"}
	for range 16 {
		s := newSpace(t)
		spaces = append(spaces, s)
		args = append(args, "--pid", s.pid)
	}
	run(t, "lock", "--pid", spaces[5].pid).want(t, 0) // it was locked before, and stays so
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		var out, stderr bytes.Buffer
		pidFile := filepath.Join(t.TempDir(), "pid")
		// Slow enough that there is a middle: every message to the kernel takes a while.
		cmd := command(ctx, nil, append([]string{"strace", "-f", "-o", "/dev/null", "-e", "trace=sendto", "-e", "inject=sendto:delay_enter=150000",
			"sh", "-c", `echo $$ >"$0"; exec "$@"`, pidFile, program}, args...)...)
		cmd.Stdout, cmd.Stderr = &out, &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Four are locked side by side: with a fifth, one of the first is done.
		eventually(t, "a fifth lock", func() bool {
			return slices.ContainsFunc(slices.Concat(spaces[4:5], spaces[6:]), func(s *space) bool { return s.isLocked(t) })
		})
		b, err := os.ReadFile(pidFile)
		if err != nil {
			t.Fatal(err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // the status tells; strace ends as its child does
		ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if !ok || !ws.Signaled() || ws.Signal() != sig || !isOneLine(stderr.String()) || !strings.Contains(stderr.String(), "ended by "+unix.SignalName(sig)) {
			t.Errorf("%v: %v\n%s%s", sig, cmd.ProcessState, &out, &stderr)
		}
		if !strings.Contains(out.String(), ": unlocked again\n") || !strings.Contains(out.String(), ": not tried\n") || strings.Contains(out.String(), ": locked") {
			t.Errorf("%v: not in the middle, or not honest:\n%s", sig, &out)
		}
		for i, s := range spaces {
			s.wantLocked(t, i == 5)
		}
	}
}

// list finds a namespace by its task, by its name, and by a bind mount that is to be
// seen in another mount namespace alone. What others lock meanwhile is theirs.
func TestList(t *testing.T) {
	netlocktest.Need(t, "ip", "unshare", "mount", "nsenter")
	task, named, mounted, free := newSpace(t), newSpace(t), newSpace(t), newSpace(t)
	name := named.name(t)
	kill := func(s *space) { _ = s.task.Process.Kill(); _ = s.task.Wait() }

	dir := filepath.Join(t.TempDir(), "a dir\twith\\040")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	mountPoint := filepath.Join(dir, "net")
	if err := os.WriteFile(mountPoint, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	keeper := command(ctx, nil, "unshare", "-m", "sh", "-c", `mount --bind "$1" "$2" && echo done && exec sleep 600`, "sh", "/proc/"+mounted.pid+"/ns/net", mountPoint)
	pipe, err := keeper.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := keeper.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); _ = keeper.Wait() })
	if n, err := pipe.Read(make([]byte, 5)); n != 5 {
		t.Fatal("no bind mount: ", err)
	}

	inodes := map[*space]uint64{}
	for _, s := range []*space{task, named, mounted, free} {
		inodes[s] = s.inode(t)
		if s != free {
			hook(t, "network-lock", s.pid).want(t, 0)
		}
	}
	kill(named)
	kill(mounted)

	found := map[uint64]map[string]any{}
	r := run(t, "list", "--json")
	for _, ino := range inodes {
		if strings.Contains(r.stderr, fmt.Sprint(ino)) {
			t.Error(r)
		}
	}
	for _, f := range decoded[[]map[string]any](t, r) {
		ino := uint64(f["netns"].(float64))
		if found[ino] != nil {
			t.Errorf("net:[%d] twice", ino)
		}
		found[ino] = f
		mine := slices.Contains(slices.Collect(maps.Values(inodes)), ino) // others' may be there
		if len(f) != 11 || mine && f["use"] != "in use" {
			t.Errorf("%v", f)
		}
	}
	b, _ := os.ReadFile("/proc/" + task.pid + "/comm")
	for s, at := range map[*space]string{
		task:    "pid " + task.pid + " " + strings.TrimSpace(string(b)),
		named:   "/run/netns/" + name,
		mounted: "/proc/" + strconv.Itoa(keeper.Process.Pid) + "/root" + mountPoint,
	} {
		if f := found[inodes[s]]; f == nil || f["found_at"] != at || f["locked"] != true {
			t.Errorf("net:[%d]: %v; %q is wanted: %v", inodes[s], f, at, r)
		}
	}
	if found[inodes[free]] != nil {
		t.Error("a namespace without a lock is listed")
	}
	if r := run(t, "list"); !strings.Contains(r.stdout, "/run/netns/"+name+"): locked\n") {
		t.Error(r)
	}

	run(t, "unlock", "--netns", "/run/netns/"+name, "--pid", task.pid, "--netns", "/proc/"+strconv.Itoa(keeper.Process.Pid)+"/root"+mountPoint).want(t, 0)
	if r := run(t, "list"); strings.Contains(r.stdout, name) || strings.Contains(r.stdout, mountPoint) || strings.Contains(r.stdout, "pid "+task.pid+" ") {
		t.Error(r)
	}
}

// unlock --all unlocks what list finds: here only this test's own namespaces, since a
// pid and a mount namespace of its own show no others.
func TestUnlockAll(t *testing.T) {
	netlocktest.Need(t, "unshare", "mount", "umount")
	script := `set -e
		umount -a -t nsfs
		[ ! -d /run/netns ] || mount -t tmpfs none /run/netns
		for i in 1 2 3; do unshare -n sleep 600 & pids="$pids --pid $!"; done
		until "$0" lock $pids 2>/dev/null; do :; done
		echo -- list; "$0" list
		echo -- unlock; "$0" unlock --all
		echo -- again; "$0" unlock --all
		echo -- list; "$0" list --json; "$0" list`
	r := execute(t, nil, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script, program).want(t, 0)
	parts := strings.Split(r.stdout, "-- ")
	if len(parts) != 5 || strings.Count(parts[1], ": locked\n") != 3 || strings.Count(parts[2], ": unlocked (nft)\n") != 3 ||
		strings.TrimSpace(parts[3]) != "again" || !strings.HasPrefix(parts[4], "list\n[]\nno network namespace of this host is locked\n") || r.stderr != "" {
		t.Error(r)
	}
}

func TestVersion(t *testing.T) {
	run(t, "version").want(t, 0, "criu-netlock v0-test\nrule set format 1\n"+runtime.Version()+" ")
	got := decoded[map[string]string](t, run(t, "version", "--json").want(t, 0))
	if got["version"] != "v0-test" || got["rule_set_format"] != "1" || got["go"] == "" || len(got) != 3 {
		t.Errorf("%v", got)
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		run(t, "completion", shell).want(t, 0, "criu-netlock")
	}
	run(t, "__complete", "lock", "--backend", "").want(t, 0, "auto\nnft\niptables\n")
}

// What cannot be printed is an error, but what was locked is locked.
func TestUnwritableStdout(t *testing.T) {
	s := newSpace(t)
	sh := func(args string) result { return execute(t, nil, "sh", "-c", program+" "+args) }
	sh("status --pid "+s.pid+" >/dev/full").oneError(t, 1, "write to stdout")
	for _, args := range []string{"completion bash", "completion zsh", "completion fish", "completion powershell", "help", "help lock", "--help", "unlock -h", "version", "list --json"} {
		sh(args+" >/dev/full").oneError(t, 1, "write to stdout: no space left on device")
	}
	sh("lock --pid "+s.pid+" >/dev/full").want(t, 0)
	s.wantLocked(t, true)
	sh("unlock --pid "+s.pid+" <&- >&- 2>&-").want(t, 0)
	s.wantLocked(t, false)
}

// A reader that has gone, as head goes, gets no line on stderr and kills nobody.
func TestBrokenStdout(t *testing.T) {
	netlocktest.Need(t, "env")
	s := newSpace(t)
	for _, sigpipe := range []string{"--default-signal=PIPE", "--ignore-signal=PIPE"} {
		for _, c := range []struct {
			code int
			args []string
		}{
			{1, []string{"help"}}, {1, []string{"--help"}}, {1, []string{"lock", "--help"}}, {1, []string{"version"}}, {1, []string{"version", "--json"}},
			{1, []string{"list", "--json"}}, {1, []string{"status", "--pid", s.pid}}, {1, []string{"check"}},
			{1, []string{"completion", "bash"}}, {1, []string{"__complete", "lo"}},
			{0, []string{"lock", "--pid", s.pid}}, {0, []string{"unlock", "--pid", s.pid}},
		} {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			var stderr bytes.Buffer
			cmd := command(ctx, nil, append([]string{"env", sigpipe, program}, c.args...)...)
			cmd.Stdout, cmd.Stderr = brokenPipe(t), &stderr
			_ = cmd.Run() // the exit code tells
			said := stderr.String()
			if c.args[0] == "__complete" {
				said = "" // cobra tells the shell's script there what it did
			}
			if code := cmd.ProcessState.ExitCode(); code != c.code || said != "" {
				t.Errorf("%v: %v, stderr %q; exit %d and no word are wanted", c.args, cmd.ProcessState, stderr.String(), c.code)
			}
		}
	}
}

func TestMountinfo(t *testing.T) {
	for _, c := range []struct {
		line string
		ino  uint64
		at   string
	}{
		{"36 35 0:4 net:[4026532567] /run/netns/a rw shared:1 - nsfs nsfs rw", 4026532567, "/run/netns/a"},
		{`36 35 0:4 net:[7] /a\040b\011\134x rw - nsfs nsfs rw`, 7, "/a b\t\\x"},
		{"36 35 0:4 mnt:[4026532567] /m rw - nsfs nsfs rw", 0, ""},
		{"36 35 0:4 net:[x] /m rw - nsfs nsfs rw", 0, ""},
		{"36 35 8:1 / / rw - ext4 /dev/sda1 rw", 0, ""},
		{" - nsfs ", 0, ""},
		{"", 0, ""},
	} {
		ino, at, ok := netnsMount(c.line)
		if ok != (c.ino != 0) || ok && (ino != c.ino || at != c.at) {
			t.Errorf("%q: %d %q %v", c.line, ino, at, ok)
		}
	}
	for in, want := range map[string]string{`\`: `\`, `\04`: `\04`, `a\999`: `a\999`, `\101`: "A"} {
		if got := unescape(in); got != want {
			t.Errorf("%q: %q", in, got)
		}
	}
}

package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// machine is a folder to set up in, with a criu of a version in its PATH.
type machine struct {
	root, path string
}

func newMachine(t *testing.T, version string) *machine {
	t.Helper()
	m := &machine{root: t.TempDir(), path: t.TempDir()}
	if err := os.Mkdir(m.root+"/etc", 0o755); err != nil {
		t.Fatal(err)
	}
	if version != "" {
		m.write(t, m.path+"/criu", "#!/bin/sh\necho Version: "+version+"\n", 0o755)
	}
	return m
}

func (m *machine) write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), mode), os.Chmod(path, mode)); err != nil {
		t.Fatal(err)
	}
}

func (m *machine) conf(name string) string { return filepath.Join(m.root, "etc/criu", name) }

func (m *machine) read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(m.conf(name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func (m *machine) setup(t *testing.T, args ...string) result {
	t.Helper()
	return execute(t, []string{"PATH=" + m.path + ":/usr/sbin:/usr/bin:/sbin:/bin"}, append([]string{program, "setup", "--root", m.root}, args...)...)
}

var fileOf = map[string]string{"criu": "default.conf", "lxc": "default.conf", "runc": "runc.conf", "podman": "runc.conf", "docker": "runc.conf", "crun": "crun.conf"}

// Setting up, twice, and undoing leaves every engine's files as they were.
func TestSetup(t *testing.T) {
	for engine, name := range fileOf {
		t.Run(engine, func(t *testing.T) {
			m := newMachine(t, "4.2")
			m.setup(t, engine, "--yes").want(t, 0, "+action-script "+program, "written")
			once := m.read(t, name)
			if !strings.Contains(once, "\naction-script "+program+"\n") {
				t.Errorf("written:\n%s", once)
			}
			m.setup(t, engine, "--yes").want(t, 0, "nothing to change")
			if m.read(t, name) != once {
				t.Error("twice is not the same as once")
			}
			m.setup(t, "--undo", engine, "--yes").want(t, 0, "-action-script", "undone")
			if left, _ := os.ReadDir(m.root + "/etc"); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
			m.setup(t, "--undo", engine, "--yes").want(t, 0, "nothing of criu-netlock setup")

			const before = "# mine\nlog-file /x"
			m.write(t, m.conf(name), before, 0o640)
			if err := os.Chown(m.conf(name), 65534, 65534); err != nil {
				t.Fatal(err)
			}
			m.setup(t, engine, "--yes").want(t, 0)
			var st syscall.Stat_t
			if err := syscall.Stat(m.conf(name), &st); err != nil || st.Mode&0o777 != 0o640 || st.Uid != 65534 || st.Gid != 65534 {
				t.Errorf("mode %o, owner %d:%d, %v", st.Mode, st.Uid, st.Gid, err)
			}
			m.setup(t, "--undo", engine, "--yes").want(t, 0)
			if got := m.read(t, name); got != before {
				t.Errorf("undone: %q", got)
			}
			if left, _ := os.ReadDir(m.root + "/etc/criu"); len(left) != 1 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func TestSetupShowsAndWritesNothing(t *testing.T) {
	m := newMachine(t, "4.2")
	m.setup(t, "runc", "--dry-run").want(t, 0, "+++ ", "+action-script "+program)
	m.setup(t, "runc").oneError(t, 2, "not a terminal", "--yes")
	if left, _ := os.ReadDir(m.root + "/etc"); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestSetupKnowsTheEngines(t *testing.T) {
	m := newMachine(t, "4.2")
	m.setup(t, "docker", "--yes", "--tcp-established").want(t, 0, "experimental")
	m.write(t, m.root+"/etc/docker/daemon.json", `{"experimental": true}`, 0o644)
	if r := m.setup(t, "docker", "--dry-run").want(t, 0); strings.Contains(r.stdout, "experimental") {
		t.Errorf("%v", r)
	}
	if got := m.read(t, "runc.conf"); !strings.Contains(got, "\ntcp-established\n") {
		t.Errorf("runc.conf:\n%s", got)
	}
	m.setup(t, "lxc", "--yes", "--replace-criu-lock").want(t, 0, "lxc-checkpoint -A "+program, "names the program too", "contains the lock")
	if got := m.read(t, "default.conf"); !strings.Contains(got, "\nnetwork-lock skip\n") {
		t.Errorf("default.conf:\n%s", got)
	}
	// What default.conf names already would run twice.
	m.setup(t, "crun", "--yes").want(t, 0, "names the program already", "nothing to change")
	if _, err := os.Stat(m.conf("crun.conf")); err == nil {
		t.Error("crun.conf was written")
	}
}

// CRIU's own lock is turned off in default.conf alone, for whichever engine.
func TestSetupReplacesTheLock(t *testing.T) {
	for engine, name := range fileOf {
		m := newMachine(t, "4.2")
		m.setup(t, engine, "--yes", "--replace-criu-lock").want(t, 0)
		if got := m.read(t, "default.conf"); !strings.Contains(got, "\nnetwork-lock skip\n") {
			t.Errorf("%s: default.conf:\n%s", engine, got)
		}
		if got := m.read(t, name); !strings.Contains(got, "\naction-script ") || name != "default.conf" && strings.Contains(got, "network-lock") {
			t.Errorf("%s: %s:\n%s", engine, name, got)
		}
		m.setup(t, "--undo", engine, "--yes").want(t, 0)
		if left, _ := os.ReadDir(m.root + "/etc"); len(left) != 0 {
			t.Errorf("%s: left: %v", engine, left)
		}
	}
}

// A line of the user's that contradicts is told, and nothing is written.
func TestSetupContradiction(t *testing.T) {
	for _, engine := range []string{"criu", "docker"} {
		m := newMachine(t, "4.2")
		m.write(t, m.conf("default.conf"), "network-lock nftables\n", 0o644)
		m.setup(t, engine, "--yes", "--replace-criu-lock").oneError(t, 2, "default.conf", "network-lock of its own")
		if left, _ := os.ReadDir(m.root + "/etc/criu"); len(left) != 1 || m.read(t, "default.conf") != "network-lock nftables\n" {
			t.Errorf("%s: written: %v", engine, left)
		}
		m.setup(t, engine, "--yes").want(t, 0)
	}
}

// A link to the program is the program: it is not named a second time.
func TestSetupKnowsItsLinks(t *testing.T) {
	m := newMachine(t, "4.2")
	link := filepath.Join(m.root, "netlock-link")
	if err := os.Symlink(program, link); err != nil {
		t.Fatal(err)
	}
	m.write(t, m.conf("runc.conf"), "action-script "+link+"\n", 0o644)
	m.setup(t, "runc", "--yes").want(t, 0, "nothing to change")
	m.write(t, m.conf("default.conf"), "action-script "+link+"\n", 0o644)
	m.setup(t, "crun", "--yes").want(t, 0, "names the program already")
}

// Without a CRIU whose version can be asked, setup goes on and says so.
func TestSetupUnknownCRIU(t *testing.T) {
	m := newMachine(t, "")
	m.write(t, m.path+"/criu", "#!/bin/sh\nexit 1\n", 0o755) // before any CRIU of this machine
	m.setup(t, "runc", "--yes").want(t, 0, "no CRIU was found whose version", "written")
}

// check says of each engine that is there whether it would call us.
func TestCheckEngines(t *testing.T) {
	m := newMachine(t, "4.2")
	for _, p := range []string{"runc", "dockerd", "lxc-checkpoint"} {
		m.write(t, m.path+"/"+p, "#!/bin/sh\n", 0o755)
	}
	const script = `mount -t tmpfs tmpfs /etc/criu 2>/dev/null || { mkdir -p "$T/criu" && mount -t tmpfs tmpfs /etc && mkdir /etc/criu; }
"$P" check --json; "$P" setup runc --yes >/dev/null || exit 99; exec "$P" check --json`
	r := execute(t, []string{"PATH=" + m.path + ":/usr/sbin:/usr/bin:/sbin:/bin", "P=" + program, "T=" + m.root}, "unshare", "-m", "sh", "-c", script)
	for _, want := range []string{
		`"what": "runc",\n`, "run criu-netlock setup runc", "run criu-netlock setup docker", "lxc-checkpoint -A",
		"calls criu-netlock, by /etc/criu/runc.conf:2",
		"docker checkpoint needs an experimental daemon", "contain the lock",
	} {
		if !strings.Contains(r.stdout, strings.ReplaceAll(want, "\\n", "\n")) {
			t.Errorf("%q is wanted: %v", want, r)
		}
	}
	if strings.Contains(r.stdout, `"podman"`) {
		t.Errorf("podman is not there: %v", r)
	}
}

// In CRIU's place: one link, for as many engines as want it.
func TestSetupAsCRIU(t *testing.T) {
	m := newMachine(t, "3.11") // any will do
	link := filepath.Join(m.root, defaultLink)
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		t.Fatal(err)
	}
	is := func(want string) {
		t.Helper()
		if got, _ := os.Readlink(link); got != want {
			t.Fatalf("the link leads to %q, want %q", got, want)
		}
	}
	m.setup(t, "runc", "--as-criu", "--dry-run").want(t, 0, "+link "+link+" -> "+program, "+# BEGIN criu-netlock setup: runc=as-criu="+defaultLink)
	is("")
	m.setup(t, "runc", "--as-criu", "--yes").want(t, 0, "+link ", "written", m.path+"/criu comes before")
	is(program)
	if got := m.read(t, "runc.conf"); strings.Contains(got, "\naction-script") {
		t.Errorf("runc.conf:\n%s", got)
	}
	once := m.read(t, "runc.conf")
	m.setup(t, "runc", "--as-criu", "--yes").want(t, 0, "nothing to change")
	if m.read(t, "runc.conf") != once {
		t.Error("twice is not the same as once")
	}
	m.setup(t, "docker", "--as-criu", "--tcp-established", "--yes").want(t, 0)
	m.setup(t, "crun", "--as-criu", "--yes").want(t, 0)
	m.setup(t, "runc", "--as-criu=/opt/criu", "--yes").oneError(t, 2, "setup --undo runc")
	for _, engine := range []string{"crun", "runc"} {
		if r := m.setup(t, "--undo", engine, "--yes").want(t, 0, "undone"); strings.Contains(r.stdout, "-link") {
			t.Errorf("%v", r)
		}
		is(program) // docker's
	}
	m.setup(t, "--undo", "docker", "--yes").want(t, 0, "-link "+link, "undone")
	is("")
	if left, _ := os.ReadDir(m.root + "/etc"); len(left) != 0 {
		t.Errorf("left: %v", left)
	}

	// The program has moved.
	m.setup(t, "runc", "--as-criu", "--yes").want(t, 0)
	if err := errors.Join(os.Remove(link), os.Symlink("/gone/criu-netlock", link)); err != nil {
		t.Fatal(err)
	}
	m.setup(t, "runc", "--as-criu", "--yes").want(t, 0, "-link "+link+" -> /gone/criu-netlock", "+link ")
	is(program)
	// Somebody else's by now.
	if err := errors.Join(os.Remove(link), os.WriteFile(link, nil, 0o755)); err != nil {
		t.Fatal(err)
	}
	m.setup(t, "--undo", "runc", "--yes").oneError(t, 2, link, "no longer the link")
	if m.read(t, "runc.conf") != once {
		t.Error("half undone")
	}
	if err := os.Remove(link); err != nil {
		t.Fatal(err)
	}
	m.setup(t, "--undo", "runc", "--yes").want(t, 0, "undone")
}

// What is not setup's is neither replaced nor removed.
func TestSetupAsCRIURefuses(t *testing.T) {
	for name, make := range map[string]func(string) error{
		"a program":    func(p string) error { return os.WriteFile(p, nil, 0o755) },
		"a folder":     func(p string) error { return os.Mkdir(p, 0o755) },
		"another link": func(p string) error { return os.Symlink("/usr/sbin/criu", p) },
		"a lost link":  func(p string) error { return os.Symlink("/nowhere/criu-netlock", p) },
	} {
		m := newMachine(t, "4.2")
		link := filepath.Join(m.root, defaultLink)
		if err := errors.Join(os.MkdirAll(filepath.Dir(link), 0o755), make(link)); err != nil {
			t.Fatal(err)
		}
		before, err := os.Lstat(link)
		if err != nil {
			t.Fatal(err)
		}
		if m.setup(t, "runc", "--as-criu", "--yes").oneError(t, 2, link); t.Failed() {
			t.Fatal(name)
		}
		if after, err := os.Lstat(link); err != nil || !os.SameFile(before, after) {
			t.Errorf("%s: replaced", name)
		}
		if left, _ := os.ReadDir(m.root + "/etc"); len(left) != 0 {
			t.Errorf("%s: left: %v", name, left)
		}
	}
	m := newMachine(t, "4.2")
	link := filepath.Join(m.root, defaultLink)
	if err := errors.Join(os.MkdirAll(filepath.Dir(link), 0o755), os.Symlink(program, link)); err != nil {
		t.Fatal(err)
	}
	m.setup(t, "runc", "--as-criu", "--yes").want(t, 0, "nothing to change") // made by hand
	m.setup(t, "--undo", "runc", "--yes").want(t, 0, "nothing of")
	if _, err := os.Lstat(link); err != nil {
		t.Error(err)
	}
	for _, args := range [][]string{{"lxc", "--as-criu"}, {"criu", "--as-criu"}, {"runc", "--as-criu=criu"}, {"runc", "--as-criu=/opt/other"}, {"runc", "--as-criu=/a b/criu"}, {"runc", "--as-criu", "--undo"}} {
		m.setup(t, append(args, "--yes")...).oneError(t, 2)
	}
}

// check says who is found under the name of criu.
func TestCheckAsCRIU(t *testing.T) {
	m := newMachine(t, "4.2")
	m.write(t, m.path+"/runc", "#!/bin/sh\n", 0o755)
	first := filepath.Join(m.root, "first")
	if err := os.Mkdir(first, 0o755); err != nil {
		t.Fatal(err)
	}
	const script = `mount -t tmpfs tmpfs /etc/criu 2>/dev/null || { mount -t tmpfs tmpfs /etc && mkdir /etc/criu; }
"$P" setup runc --as-criu="$F/criu" --yes >/dev/null || exit 99; "$P" check; rm "$F/criu"; exec "$P" check`
	r := execute(t, []string{"PATH=" + first + ":" + m.path + ":/usr/sbin:/usr/bin:/sbin:/bin", "P=" + program, "F=" + first}, "unshare", "-m", "sh", "-c", script)
	for _, want := range []string{"CRIU: " + first + "/criu, which is criu-netlock in CRIU's place: Version: 4.2", "runc: calls criu-netlock, by " + first + "/criu, in CRIU's place", "runc: was set up with criu-netlock as " + first + "/criu, which is not the criu in PATH"} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("%q is wanted: %v", want, r)
		}
	}
}

// Other scripts stay, and ours is given last, so that it runs first.
func TestSetupRunsFirst(t *testing.T) {
	m := newMachine(t, "4.2")
	m.write(t, m.conf("runc.conf"), "action-script /usr/bin/criu-coordinator\n", 0o644)
	m.setup(t, "runc", "--yes").want(t, 0)
	got := m.read(t, "runc.conf")
	if strings.Index(got, program) < strings.Index(got, "criu-coordinator") || !strings.HasPrefix(got, "action-script /usr/bin/criu-coordinator\n") {
		t.Errorf("%s", got)
	}
}

func TestSetupOldCRIU(t *testing.T) {
	m := newMachine(t, "3.18")
	for _, engine := range []string{"runc", "crun", "podman", "docker"} {
		m.setup(t, engine, "--yes").oneError(t, 2, "CRIU 3.18", "3.19")
	}
	m.setup(t, "criu", "--yes", "--replace-criu-lock").oneError(t, 2, "network-lock skip")
	if left, _ := os.ReadDir(m.root + "/etc"); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	m.setup(t, "criu", "--yes").want(t, 0)
}

func TestSetupRefuses(t *testing.T) {
	m := newMachine(t, "4.2")
	for _, c := range [][]string{
		{}, {"--yes"}, {"kubernetes"}, {"runc", "docker"}, {"runc", "--undo", "--tcp-established"}, {"criu", "--tcp-established"},
		{"runc", "--program", "relative"}, {"runc", "--program", "/a b"}, {"runc", "--program", "/nowhere"},
		{"runc", "--program", "/etc/passwd"}, {"runc", "--pid", "1"}, {"runc", "--json"},
	} {
		m.setup(t, append(c, "--yes")...).oneError(t, 2)
	}
	loose := filepath.Join(t.TempDir(), "criu-netlock")
	m.write(t, loose, "x", 0o777)
	m.setup(t, "runc", "--yes", "--program", loose).oneError(t, 2, "can be changed by others")
	for name, make := range map[string]func(string) error{
		"a folder":      func(p string) error { return os.Mkdir(p, 0o755) },
		"a lost link":   func(p string) error { return os.Symlink("/nowhere/x", p) },
		"a fifo":        func(p string) error { return syscall.Mkfifo(p, 0o600) },
		"a second name": func(p string) error { return errors.Join(os.WriteFile(p+"2", nil, 0o600), os.Link(p+"2", p)) },
		"changed since": func(p string) error {
			return os.WriteFile(p, []byte("# BEGIN criu-netlock setup: runc=action-script\naction-script /x\nmore\n# END criu-netlock setup\n"), 0o600)
		},
	} {
		m := newMachine(t, "4.2")
		if err := errors.Join(os.MkdirAll(m.root+"/etc/criu", 0o755), make(m.conf("runc.conf"))); err != nil {
			t.Fatal(err)
		}
		r := m.setup(t, "runc", "--yes")
		if r.oneError(t, 2); t.Failed() {
			t.Fatalf("%s: %v", name, r)
		}
	}
	// A link is followed, and stays one.
	m.write(t, m.root+"/real.conf", "a\n", 0o600)
	if err := errors.Join(os.MkdirAll(m.root+"/etc/criu", 0o755), os.Symlink("../../real.conf", m.conf("runc.conf"))); err != nil {
		t.Fatal(err)
	}
	m.setup(t, "runc", "--yes").want(t, 0)
	if st, err := os.Lstat(m.conf("runc.conf")); err != nil || st.Mode()&os.ModeSymlink == 0 || !strings.Contains(m.read(t, "runc.conf"), program) {
		t.Errorf("the link: %v, %v", st, err)
	}
}

// A full disk leaves the file as it was.
func TestSetupFullDisk(t *testing.T) {
	m := newMachine(t, "4.2")
	dir := m.root + "/etc/criu"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	const script = `mount -t tmpfs -o size=4k tmpfs "$1" && printf 'mine\n' >"$1/runc.conf" && shift && "$@"; echo "exit $?"; cat "$D/runc.conf"; ls -A "$D" | wc -l`
	r := execute(t, []string{"D=" + dir, "PATH=" + m.path + ":/usr/sbin:/usr/bin:/sbin:/bin"}, "unshare", "-m", "sh", "-c", script, "sh", dir, program, "setup", "--root", m.root, "runc", "--yes")
	if !strings.Contains(r.stdout, "exit 1\nmine\n1\n") || !isOneLine(r.stderr) {
		t.Errorf("%v", r)
	}
}

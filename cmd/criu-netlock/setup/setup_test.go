package setup

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

const program = "/usr/local/sbin/criu-netlock"

func want(engine string, more ...string) Want {
	w := Want{Engine: engine, Program: program, Script: true}
	for _, m := range more {
		switch m {
		case tcpEstablished:
			w.TCPEstablished = true
		case networkLock:
			w.ReplaceLock = true
		case asCRIU:
			w.Link, w.Script = "/usr/local/sbin/criu", false
		}
	}
	return w
}

func apply(t *testing.T, text string, w Want, made Made) string {
	t.Helper()
	out, err := Apply(text, w, made)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestParse(t *testing.T) {
	got := Parse("# comment\n\naction-script /usr/local/sbin/criu-netlock # ours\r\n  tcp-established\n--network-lock skip\naction-script \"/a b/\\\"c\"\naction-script /a b\n")
	want := []Option{
		{"action-script", "/usr/local/sbin/criu-netlock", 3, 2},
		{"tcp-established", "", 4, 1},
		{"network-lock", "skip", 5, 2},
		{"action-script", `/a b/"c`, 6, 2},
		{"action-script", "/a", 7, 3},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
}

// texts are files as they are met.
var texts = []string{
	"", "\n", "# nothing\n", "log-file /var/log/criu.log\n", "no newline at the end", "tcp-established\r\nfile-locks\r\n",
	"action-script /usr/bin/criu-coordinator\n", "  action-script \"/x y\" # quoted\n\n\n", "tcp-established\n", "\x00\xff\n", "network-lock skip\n",
}

func TestApplyAndRemove(t *testing.T) {
	for _, text := range texts {
		for _, w := range []Want{want("runc"), want("docker", tcpEstablished), want("criu", networkLock)} {
			for _, made := range []Made{{}, {File: true}, {File: true, Dir: true}} {
				if made.File && text != "" {
					continue
				}
				once := apply(t, text, w, made)
				if !strings.HasPrefix(once, text) || !Has(once, actionScript, program) {
					t.Errorf("%q became %q", text, once)
				}
				if twice := apply(t, once, w, made); twice != once {
					t.Errorf("twice:\n%s\nonce:\n%s", twice, once)
				}
				for _, o := range []string{tcpEstablished, networkLock} {
					n := 0
					for _, got := range Parse(once) {
						if got.Name == o {
							n++
						}
					}
					if n > 1 {
						t.Errorf("%s stands there %d times:\n%s", o, n, once)
					}
				}
				back, gone, err := Remove(once, w.Engine)
				if err != nil || back != text || gone != made {
					t.Errorf("undone: %q, %+v, %v; want %q, %+v", back, gone, err, text, made)
				}
			}
		}
	}
}

func TestGolden(t *testing.T) {
	got := apply(t, apply(t, "log-file x", want("runc"), Made{}), want("docker", tcpEstablished), Made{})
	const want = `log-file x
# BEGIN criu-netlock setup: runc=action-script docker=action-script,tcp-established (ended-the-last-line)
action-script /usr/local/sbin/criu-netlock
tcp-established
# END criu-netlock setup
`
	if got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}

// A link stands in the first line alone.
func TestLinks(t *testing.T) {
	const text = "file-locks\n"
	one := apply(t, text, want("runc", asCRIU), Made{})
	const golden = text + "# BEGIN criu-netlock setup: runc=as-criu=/usr/local/sbin/criu\n# END criu-netlock setup\n"
	if one != golden || apply(t, one, want("runc", asCRIU), Made{}) != one {
		t.Errorf("%s", one)
	}
	two := apply(t, one, want("docker", asCRIU, tcpEstablished), Made{})
	got, err := Links(two)
	if want := map[string]string{"runc": "/usr/local/sbin/criu", "docker": "/usr/local/sbin/criu"}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	if back, _, err := Remove(two, "docker"); err != nil || back != one {
		t.Errorf("without docker:\n%s%v", back, err)
	}
	if got, err := Links(text); err != nil || len(got) != 0 {
		t.Errorf("%v, %v", got, err)
	}
}

// Engines share a file: what one needs stays when another goes.
func TestShared(t *testing.T) {
	const text = "file-locks\n"
	both := apply(t, apply(t, text, want("runc"), Made{}), want("podman", tcpEstablished), Made{})
	if strings.Count(both, "\n"+actionScript) != 1 {
		t.Errorf("the script stands there twice:\n%s", both)
	}
	left, _, err := Remove(both, "podman")
	if err != nil || left != apply(t, text, want("runc"), Made{}) {
		t.Errorf("without podman:\n%s%v", left, err)
	}
	if left, _, err = Remove(left, "runc"); err != nil || left != text {
		t.Errorf("without both:\n%s%v", left, err)
	}
	if same, _, err := Remove(both, "docker"); err != nil || same != both {
		t.Errorf("docker, which is not there:\n%s%v", same, err)
	}
}

// What others write around the block stays theirs; what they write into it is refused.
func TestChangedSince(t *testing.T) {
	once := apply(t, "a 1", want("runc"), Made{})
	back, _, err := Remove("first\n"+once+"last\n", "runc")
	if err != nil || back != "first\na 1\nlast\n" {
		t.Errorf("%q, %v", back, err)
	}
	for name, text := range map[string]string{
		"a line more": strings.Replace(once, end, "evil\n"+end, 1),
		"no end":      strings.Replace(once, end+"\n", "", 1),
		"two blocks":  once + once,
		"an option":   strings.Replace(once, "runc=action-script", "runc=action-script,tcp-established", 1),
		"two ends":    once + end + "\n",
	} {
		if out, _, err := Remove(text, "runc"); err == nil {
			t.Errorf("%s: undone to %q", name, out)
		}
		if out, err := Apply(text, want("runc"), Made{}); err == nil {
			t.Errorf("%s: set up to %q", name, out)
		}
	}
}

// A line that somebody wrote by hand is as good as ours.
func TestByHand(t *testing.T) {
	for _, text := range []string{"action-script " + program + "\n", "--action-script \"" + program + "\"\n", "\taction-script\t" + program + " # ours"} {
		if got := apply(t, text, want("runc"), Made{}); got != text {
			t.Errorf("%q became %q", text, got)
		}
	}
	alias := want("runc")
	alias.Aliases = []string{"/opt/criu-netlock"}
	if got := apply(t, "action-script /opt/criu-netlock\n", alias, Made{}); strings.Contains(got, program) {
		t.Errorf("the program stands there by two names: %q", got)
	}
	if got := apply(t, "action-script /opt/criu-netlock\n", want("runc"), Made{}); !strings.Contains(got, program) {
		t.Errorf("another program of the name passes for ours: %q", got)
	}
}

// Two lines of network-lock would contradict each other, and ours would not be obeyed in
// silence.
func TestContradiction(t *testing.T) {
	for _, text := range []string{"network-lock nftables\n", "network-lock iptables", "network-lock\n"} {
		if got, err := Apply(text, want("criu", networkLock), Made{}); err == nil {
			t.Errorf("%q became %q", text, got)
		}
		if _, err := Apply(text, want("criu"), Made{}); err != nil {
			t.Errorf("%q, which is not asked about: %v", text, err)
		}
	}
}

// A program that has moved is named anew.
func TestMoved(t *testing.T) {
	w := want("runc")
	w.Program = "/opt/criu-netlock"
	got := apply(t, apply(t, "", want("runc"), Made{File: true}), w, Made{})
	if got != apply(t, "", w, Made{File: true}) {
		t.Errorf("%s", got)
	}
}

// The diff is one that patch takes.
func TestDiff(t *testing.T) {
	netlocktest.Need(t, "patch")
	const before = "1\n2\n3\n4\n5"
	after := apply(t, before, want("runc"), Made{})
	d := Diff("f", before, after)
	for _, s := range []string{"--- f\n+++ f\n@@ -2,4 +2,7 @@\n 2\n 3\n 4\n-5\n\\ No newline at end of file\n+5\n+# BEGIN", "+# END criu-netlock setup\n"} {
		if !strings.Contains(d, s) {
			t.Errorf("%q is wanted:\n%s", s, d)
		}
	}
	if Diff("f", before, before) != "" {
		t.Error("a diff of nothing")
	}
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte(before), 0o600); err != nil {
		t.Fatal(err)
	}
	c := exec.Command("patch", file)
	c.Stdin = strings.NewReader(d)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if got, _ := os.ReadFile(file); string(got) != after {
		t.Errorf("patched:\n%s", got)
	}
}

// Undoing gives back every text byte for byte, and setting up twice changes nothing.
func FuzzSetupUndo(f *testing.F) {
	for _, t := range texts {
		f.Add(t, true, false)
	}
	f.Add(begin+"runc=action-script\n"+end+"\n", false, true)
	f.Fuzz(func(t *testing.T, text string, tcp, skip bool) {
		w := Want{Engine: "podman", Program: program, Script: true, TCPEstablished: tcp, ReplaceLock: skip}
		once, err := Apply(text, w, Made{})
		if err != nil {
			return
		}
		if twice, err := Apply(once, w, Made{}); err != nil || twice != once {
			t.Fatalf("twice: %q, %v; once: %q", twice, err, once)
		}
		if b, _ := find(text); b != nil {
			return // it was set up before
		}
		if back, _, err := Remove(once, "podman"); err != nil || back != text {
			t.Fatalf("undone: %q, %v; want %q", back, err, text)
		}
	})
}

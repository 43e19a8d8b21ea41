package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
)

func rule(t *testing.T, s string) netlock.Rule {
	t.Helper()
	r, err := netlock.ParseRule(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestParse(t *testing.T) {
	for _, c := range []struct {
		text string
		want func(*Config)
	}{
		{"", func(*Config) {}},
		{"# nothing\n\n", func(*Config) {}},
		{`backend = "nft"`, func(c *Config) { c.Backend = NFT }},
		{"backend = 'iptables'\r\n", func(c *Config) { c.Backend = IPTables }},
		{`timeout = "1s"`, func(c *Config) { c.Timeout = time.Second }},
		{`timeout = "1m"`, func(c *Config) { c.Timeout = time.Minute }},
		{`timeout = "1500ms"`, func(c *Config) { c.Timeout = 1500 * time.Millisecond }},
		{`log-level = "error"`, func(c *Config) { c.LogLevel = "error" }},
		{`allow = []`, func(*Config) {}},
		{"guard = false", func(c *Config) { c.Guard = false }},
		{"guard = true", func(*Config) {}},
		{`guard-timeout = "1h"`, func(c *Config) { c.GuardTimeout = time.Hour }},
		{`on-failed-restore = "keep"`, func(c *Config) { c.OnFailedRestore = "keep" }},
		{`mode = "hold"`, func(c *Config) { c.Mode = Hold }},
		{`mode = "auto"`, func(c *Config) { c.Mode = Auto }},
		{"hold-packets = 1_000\nhold-bytes = +65536", func(c *Config) { c.HoldPackets, c.HoldBytes = 1000, 65536 }},
		{`cpu-latency = "off"`, func(c *Config) { c.CPULatency = guard.NoLatency }},
		{`cpu-latency = "auto"`, func(*Config) {}},
		{`cpu-latency = "0s"`, func(c *Config) { c.CPULatency = 0 }},
		{`cpu-latency = "20us"`, func(c *Config) { c.CPULatency = 20 * time.Microsecond }},
		{`criu = "/opt/criu"`, func(c *Config) { c.CRIU = "/opt/criu" }},
		{"allow = [\n  \"tcp dport 22\", # ssh\n  \"ip daddr 10.0.0.5 tcp dport 2049\",\n]", func(c *Config) {
			c.Allow = []netlock.Rule{rule(t, "tcp dport 22"), rule(t, "ip daddr 10.0.0.5 tcp dport 2049")}
		}},
	} {
		want := Default()
		c.want(&want)
		got, err := Parse("f", []byte(c.text))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, %v; want %+v", c.text, got, err, want)
		}
	}
}

// Every mistake is found where it stands.
func TestParseErrors(t *testing.T) {
	for _, c := range []struct{ text, at, says string }{
		// Broken TOML.
		{"backend", "1:7", "expected '='"},
		{"backend = ", "1:10", ""},
		{"backend = nft", "1:11", ""},
		{"\n\n  backend = \"nft", "3:16", "unterminated"},
		{"timeout = \"5s\"\nallow = [\"tcp dport 22\"", "2:23", ""},
		{"= 1", "1:1", ""},
		{"backend = \"nft\" timeout = \"5s\"", "1:17", ""},
		{"\x00", "1:1", ""},
		{"backend = \"\xff\"", "1:12", ""},
		// Wrong types.
		{"backend = 5", "1:11", "integer"},
		{"\nbackend = true", "2:11", "bool"},
		{"backend = [\"nft\"]", "1:11", "array"},
		{"backend = {}", "1:11", ""},
		{"[backend]", "1:2", ""},
		{"timeout = 5", "1:11", "integer"},
		{"guard = \"yes\"", "1:9", "string"},
		{"guard = 1", "1:9", "integer"},
		{"guard-timeout = \"2h\"", "1:17", "out of range"},
		{"\non-failed-restore = \"never\"", "2:21", "previous, keep and unlock"},
		{"mode = \"queue\"", "1:8", "drop, hold and auto"},
		{"mode = 1", "1:8", "integer"},
		{"hold-packets = 0", "1:16", "out of range"},
		{"\nhold-packets = \"1\"", "2:16", "string"},
		{"hold-bytes = 65535", "1:14", "want 65536 to"},
		{"hold-bytes = 99999999999", "1:14", "out of range"},
		{"\ncpu-latency = \"-1us\"", "2:15", "out of range"},
		{"cpu-latency = \"1.1s\"", "1:15", "out of range"},
		{"cpu-latency = \"on\"", "1:15", "auto, off and a duration"},
		{"cpu-latency = \"orange\"", "1:15", "auto, off and a duration"},
		{"cpu-latency = \"500ns\"", "1:15", "no whole number of microseconds"},
		{"cpu-latency = 20", "1:15", "integer"},
		{"criu = \"sbin/criu\"", "1:8", "no absolute path"},
		{"timeout = 0", "1:11", "integer"},
		{"timeout = 5.5", "1:11", "float"},
		{"timeout = 2020-01-01", "1:11", "date"},
		{"log-level = 1", "1:13", "integer"},
		{"allow = \"tcp dport 22\"", "1:9", "string"},
		{"allow = [22]", "1:10", "integer"},
		{"allow = [\"tcp dport 22\",\n 22]", "2:2", "integer"},
		{"allow = [{}]", "1:10", ""},
		{"allow = [{Proto = \"tcp\"}]", "1:10", ""},
		{"allow = [[]]", "1:10", "wrong type: array,"},
		{"\n\t allow  =  [ [\"tcp dport 22\"] ]", "2:15", "wrong type: array,"},
		{"allow = [\n  \"tcp dport 22\", # a [comment]\n\n  [[\"x\"]],\n]", "4:3", "wrong type: array,"},
		{"allow = [\"tcp dport 22\", 5, []]", "1:26", ""},
		{"[[allow]]\n", "1:3", ""},
		// Unknown keys.
		{"backed = \"nft\"", "1:1", `unknown key "backed"`},
		{"timeout = \"5s\"\n  log_level = \"info\"", "2:3", `unknown key "log_level"`},
		{"[netlock]\nbackend = \"nft\"", "", `unknown key "netlock`},
		{"Backend = \"nft\"", "1:1", `unknown key "Backend"`},
		{"backend = \"nft\"\n BACKEND = \"iptables\"", "2:2", `unknown key "BACKEND"`},
		{"allow = []\n\"Allow\" = []", "2:1", `unknown key "Allow"`},
		{"Log-Level = \"loud\"", "1:1", `unknown key "Log-Level"`},
		{"[Backend]", "1:2", `unknown key "Backend"`},
		{"[[ALLOW]]", "1:3", `unknown key "ALLOW"`},
		{"backend.x = 1", "1:9", "wrong type: table,"},
		// Wrong values.
		{"backend = \"ebpf\"", "1:11", `"ebpf" is none of auto, nft and iptables`},
		{"backend = \"\"", "1:11", `none of`},
		{"backend = \"NFT\"", "1:11", `none of`},
		{"timeout = \"5\"", "1:11", "not a duration"},
		{"timeout = \"-5s\"", "1:11", "out of range"},
		{"timeout = \"999ms\"", "1:11", "out of range"},
		{"timeout = \"61s\"", "1:11", "out of range"},
		{"\tlog-level = \"loud\"", "1:14", "none of debug"},
		{"allow = [\"tcp dport 22\", \"tcp dport x\"]", "1:26", "column 11"},
		{"allow = [\n\t\"\",\n]", "2:2", "empty rule"},
		// Twice.
		{"backend = \"nft\"\nbackend = \"nft\"", "2:1", ""},
		{"allow = []\nallow = []", "2:1", ""},
	} {
		got, err := Parse("/etc/x.toml", []byte(c.text))
		if err == nil {
			t.Errorf("%q: taken, as %+v", c.text, got)
			continue
		}
		if !reflect.DeepEqual(got, Default()) {
			t.Errorf("%q: not the defaults with the error: %+v", c.text, got)
		}
		checkError(t, c.text, err)
		if !strings.Contains(err.Error(), " /etc/x.toml:"+c.at) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q: %v; want it at %s and to say %q", c.text, err, c.at, c.says)
		}
	}
}

var placed = regexp.MustCompile(`^read configuration: /etc/x\.toml:[1-9][0-9]*:[1-9][0-9]*: .`)

func checkError(t *testing.T, text string, err error) {
	t.Helper()
	var e *netlock.Error
	if !errors.As(err, &e) || e.Kind != netlock.KindInput || strings.ContainsAny(err.Error(), "\n\r") || !placed.MatchString(err.Error()) {
		t.Errorf("%q: %q is not one line with a position, of kind input", text, err)
	}
}

func TestPath(t *testing.T) {
	for _, c := range []struct {
		val  string
		ok   bool
		want string
	}{{"", false, DefaultPath}, {"", true, DefaultPath}, {"/x", true, "/x"}} {
		got := Path(func(k string) (string, bool) { return c.val, c.ok && k == EnvPath })
		if got != c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file("good", "backend = \"nft\""), link); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path    string
		backend string
		err     string
	}{
		{filepath.Join(dir, "absent"), Auto, ""},
		{"/dev/null", Auto, ""},
		{link, NFT, ""},
		{file("large", strings.Repeat("#", MaxSize)), Auto, ""},
		{file("larger", strings.Repeat("#", MaxSize+1)), Auto, "larger than"},
		{file("bad", "backend = 1"), Auto, "/bad:1:11: "},
		{dir, Auto, "not a regular file"},
		{fifo, Auto, "not a regular file"},
		{"/dev/zero", Auto, "not a regular file"},
		{link + "/x", Auto, "not a directory"},
		{"a\x00b", Auto, "NUL"},
	} {
		cfg, err := Load(c.path)
		// Here nothing may wait, and being careful makes no difference, but where a link
		// leads nowhere.
		text, readErr := Read(c.path, false)
		if c.path == link+"/x" && errors.Is(readErr, ErrMayWait) {
			// A process of its own finds out.
		} else if careful, carefulErr := FromRead(c.path, text, readErr); !reflect.DeepEqual(careful, cfg) || fmt.Sprint(carefulErr) != fmt.Sprint(err) {
			t.Errorf("%q: read with care: %+v, %v; %+v, %v is wanted", c.path, careful, carefulErr, cfg, err)
		}
		if cfg.Backend != c.backend || (err == nil) != (c.err == "") || (err != nil && !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%q: %+v, %v; want %s, %q", c.path, cfg, err, c.backend, c.err)
		}
		if err != nil && netlock.KindOf(err) != netlock.KindInput {
			t.Errorf("%q: kind %d", c.path, netlock.KindOf(err))
		}
	}
}

// The documented file is the defaults, and names every key.
func TestExampleFile(t *testing.T) {
	text, err := os.ReadFile("netlock.toml")
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := Parse("netlock.toml", text)
	if len(cfg.Allow) == 0 {
		cfg.Allow = nil
	}
	if err != nil || !reflect.DeepEqual(cfg, Default()) {
		t.Errorf("%+v, %v; want the defaults", cfg, err)
	}
	for _, key := range keys {
		if !regexp.MustCompile(`(?m)^` + key + ` = `).Match(text) {
			t.Errorf("key %s is not set in it", key)
		}
	}
}

func FuzzParse(f *testing.F) {
	text, err := os.ReadFile("netlock.toml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	for _, s := range []string{"backend = 5", "[backend]", "allow = [\"tcp dport 22\", {}]", "[[allow]]", "timeout = '1h'", "a.b.c = {x = [1, 2]}", "log-level = \"\"\"\ninfo\"\"\""} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		cfg, err := Parse("/etc/x.toml", text)
		if err != nil {
			checkError(t, string(text), err)
			return
		}
		if _, err := ParseBackend(cfg.Backend); err != nil {
			t.Error(err)
		}
		if _, err := ParseLogLevel(cfg.LogLevel); err != nil {
			t.Error(err)
		}
		if cfg.Timeout < MinTimeout || cfg.Timeout > MaxTimeout {
			t.Errorf("timeout %v", cfg.Timeout)
		}
		for _, r := range cfg.Allow {
			if r == (netlock.Rule{}) {
				t.Error("a rule that matches everything")
			}
		}
	})
}

package testbed

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// debianSuites are the suites that only a mirror of the whole archive carries;
// security and third-party repositories name theirs otherwise.
var debianSuites = []string{"bullseye", "bookworm", "trixie", "forky", "sid", "oldoldstable", "oldstable", "stable", "testing", "unstable"}

// Mirror is the Debian mirror that this machine itself installs from.
func Mirror() (string, error) { return mirrorIn("/etc/apt") }

func mirrorIn(etc string) (string, error) {
	files, _ := filepath.Glob(filepath.Join(etc, "sources.list.d", "*"))
	slices.Sort(files)
	for _, f := range append([]string{filepath.Join(etc, "sources.list")}, files...) {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		parse := oneLine
		switch filepath.Ext(f) {
		case ".list":
		case ".sources":
			parse = deb822
		default:
			continue
		}
		for _, s := range parse(string(b)) {
			if uri, ok := s.mirror(); ok {
				return uri, nil
			}
		}
	}
	return "", fmt.Errorf("no Debian mirror in %s: want a \"deb\" entry with component main and one of the suites %s",
		etc, strings.Join(debianSuites, ", "))
}

// source is one entry of apt's sources.
type source struct{ types, uris, suites, components []string }

func (s source) mirror() (string, bool) {
	if !slices.Contains(s.types, "deb") || !slices.Contains(s.components, "main") {
		return "", false
	}
	if !slices.ContainsFunc(s.suites, func(x string) bool { return slices.Contains(debianSuites, x) }) {
		return "", false
	}
	for _, u := range s.uris {
		scheme, _, _ := strings.Cut(u, ":")
		if slices.Contains([]string{"http", "https", "file"}, scheme) { // what debootstrap can fetch from
			return strings.TrimSuffix(u, "/"), true
		}
	}
	return "", false
}

// oneLine reads the format of sources.list(5): deb [options] uri suite component...
func oneLine(text string) []source {
	var out []source
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) > 1 && strings.HasPrefix(f[1], "[") {
			end := slices.IndexFunc(f, func(w string) bool { return strings.HasSuffix(w, "]") })
			if end < 0 {
				continue
			}
			f = append(f[:1], f[end+1:]...)
		}
		if len(f) >= 4 {
			out = append(out, source{f[:1], f[1:2], f[2:3], f[3:]})
		}
	}
	return out
}

// deb822 reads the stanzas of a .sources file.
func deb822(text string) []source {
	var out []source
	var cur map[string]string
	last := ""
	flush := func() {
		if cur != nil && !strings.EqualFold(cur["enabled"], "no") {
			out = append(out, source{strings.Fields(cur["types"]), strings.Fields(cur["uris"]), strings.Fields(cur["suites"]), strings.Fields(cur["components"])})
		}
		cur, last = nil, ""
	}
	sc := bufio.NewScanner(strings.NewReader(text))
	for sc.Scan() {
		line := sc.Text()
		switch {
		case strings.HasPrefix(line, "#"):
		case strings.TrimSpace(line) == "":
			flush()
		case line[0] == ' ' || line[0] == '\t':
			if last != "" {
				cur[last] += " " + strings.TrimSpace(line)
			}
		default:
			key, val, _ := strings.Cut(line, ":")
			if cur == nil {
				cur = map[string]string{}
			}
			last = strings.ToLower(strings.TrimSpace(key))
			cur[last] = strings.TrimSpace(val)
		}
	}
	flush()
	return out
}

// errOutput is what a command said, shortened to its end.
func errOutput(err error, out []byte) error {
	if err == nil {
		return nil
	}
	const keep = 2000
	if len(out) > keep {
		out = append([]byte("…"), out[len(out)-keep:]...)
	}
	if s := strings.TrimSpace(string(out)); s != "" {
		return fmt.Errorf("%w:\n%s", err, s)
	}
	return errors.Join(err)
}

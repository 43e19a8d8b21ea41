package netlocktest

// The guard that keeps the tests away from the machine's own network.

import (
	"bufio"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
)

// HostUntouched runs the tests of a package, for its TestMain, and makes them fail if
// the machine's own rules, links or named namespaces are not what they were before.
// What the tests start dies of a hangup, even if they themselves were told to ignore it (nohup).
func HostUntouched(m *testing.M) int {
	if signal.Ignored(unix.SIGHUP) {
		signal.Notify(make(chan os.Signal, 1), unix.SIGHUP) // what is caught is not ignored by what is started
	}
	before, err := hostNetwork()
	if err != nil {
		fmt.Fprintln(os.Stderr, "cannot read the host's network:", err)
		return 1
	}
	code := m.Run()
	after, err := hostNetwork()
	if err != nil {
		fmt.Fprintln(os.Stderr, "cannot read the host's network:", err)
		return 1
	}
	for _, what := range changed(before, after) {
		fmt.Fprintf(os.Stderr, "FAIL: the host's %s changed; before:\n%s\nafter:\n%s\n", what, before[what], after[what])
		code = 1
	}
	return code
}

// changed are the names of what is not as it was.
func changed(before, after map[string]string) (out []string) {
	all := maps.Clone(before)
	maps.Copy(all, after)
	for _, what := range slices.Sorted(maps.Keys(all)) {
		if before[what] != after[what] {
			out = append(out, what)
		}
	}
	return out
}

// hostNetwork is what of our own network namespace the tests could spoil, by name.
// Counters are left out: the host goes on working.
func hostNetwork() (map[string]string, error) {
	out := map[string]string{}
	run := func(what, name string, args ...string) error {
		if _, err := exec.LookPath(name); err != nil || os.Geteuid() != 0 {
			return nil // then no test can spoil it either
		}
		b, err := exec.Command(name, args...).Output()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		out[what] = rulesOnly(string(b))
		return nil
	}
	errs := []error{run("nft rules", "nft", "-s", "list", "ruleset")}
	for _, ip := range []string{"ip", "ip6"} {
		// Asking for a table would make it: only those that are there already.
		b, err := os.ReadFile("/proc/thread-self/net/" + ip + "_tables_names")
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrPermission) {
			errs = append(errs, err)
		}
		for table := range strings.FieldsSeq(string(b)) {
			errs = append(errs, run(ip+"tables "+table, ip+"tables-legacy-save", "-t", table))
		}
	}
	links, err := netlink.LinkList()
	errs = append(errs, err)
	for _, l := range links {
		a := l.Attrs()
		out["links"] += fmt.Sprintln(a.Index, a.Name, l.Type(), a.HardwareAddr)
	}
	names, err := os.ReadDir(netlock.NamedDir)
	if !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, e := range names {
		out["named namespaces"] += e.Name() + "\n"
	}
	return out, errors.Join(errs...)
}

// rulesOnly strips what changes by itself from the output of iptables-save: comment
// lines and the chains' counters.
func rulesOnly(s string) string {
	var b strings.Builder
	sc := bufio.NewScanner(strings.NewReader(s))
	sc.Buffer(nil, 1<<24)
	for sc.Scan() {
		line := sc.Text()
		if strings.HasPrefix(line, "#") {
			continue
		}
		if i := strings.LastIndex(line, " ["); i > 0 && strings.HasPrefix(line, ":") {
			line = line[:i]
		}
		b.WriteString(line + "\n")
	}
	return b.String()
}

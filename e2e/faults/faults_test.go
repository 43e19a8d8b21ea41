// Package faults holds the program to its word under every fault that can be counted:
// killed at each of its system calls, refused each of them, its guard killed, its rules
// changed under it, its files and descriptors used up. make faults runs them all and
// prints how many there were; make test runs a short set.
package faults

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early/link"
	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

// all: the whole set, for make faults.
var all = flag.Bool("faults.all", false, "try every point, not the short set alone")

const (
	// envInside is set, to the test's name, in a process that has the test's own host.
	envInside = "CRIU_NETLOCK_FAULTS_INSIDE"
	// envProgram is the built program there.
	envProgram = "CRIU_NETLOCK_FAULTS_PROGRAM"
)

// patience bounds every wait for something that is to happen soon.
const patience = 30 * time.Second

// program is the built program.
var program = os.Getenv(envProgram)

func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv(envInside) != "" {
		code := m.Run()
		theTable.send()
		os.Exit(code)
	}
	dir, err := os.MkdirTemp("", "criu-netlock-faults")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	program = filepath.Join(dir, "criu-netlock")
	code := 1
	if err := build(program); err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		code = netlocktest.HostUntouched(m)
	}
	_ = os.RemoveAll(dir)
	theTable.print()
	os.Exit(code)
}

// build builds the program as make build does.
func build(path string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X main.version=v0-test "+link.Flag, "-o", path, "../../cmd/criu-netlock")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w\n%s", err, out)
	}
	return nil
}

// hostScript makes a host for one test, with processes, mounts and a /run of its own: gc
// finds no namespaces but the test's, no guard of anybody else's is there, the lock of
// xtables is another file, and pids can be chosen.
const hostScript = `umount -a -t nsfs 2>/dev/null
mount -t tmpfs tmpfs /run && mkdir -p /run/netns || exit 1
[ -z "$HIDE" ] || mount --bind /dev/null "$HIDE" || exit 1
"$@"`

// onItsHost runs a test in a process of its own on such a host. Several run side by side.
func onItsHost(t *testing.T, body func(*testing.T), env ...string) {
	t.Helper()
	if os.Getenv(envInside) == t.Name() {
		body(t)
		return
	}
	netlocktest.Need(t, "unshare", "mount", "umount", "nft", "iptables-legacy-restore", "iptables-nft-restore")
	if !traceable {
		netlocktest.CannotRun(t, "the tracer knows amd64 alone")
	}
	t.Parallel()
	var pattern []string
	for _, part := range strings.Split(t.Name(), "/") {
		pattern = append(pattern, "^"+part+"$")
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", hostScript, "host",
		os.Args[0], "-test.v", "-test.count=1", "-test.timeout=40m", "-test.parallel=10", "-test.run="+strings.Join(pattern, "/"), fmt.Sprintf("-faults.all=%t", *all))
	cmd.Env = append(append(os.Environ(), env...), envInside+"="+t.Name(), envProgram+"="+program)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	said := theTable.receive(out.String())
	var exit *exec.ExitError
	switch {
	case err == nil && strings.Contains(said, "--- PASS: "+t.Name()):
	case err == nil && strings.Contains(said, "--- SKIP: "+t.Name()):
		netlocktest.CannotRun(t, said)
	case err != nil && !errors.As(err, &exit):
		t.Fatal(err)
	default:
		t.Errorf("%v\n%s", err, said)
	}
}

// table counts what was tried, by class.
type table struct {
	mu      sync.Mutex
	classes []*class
}

var theTable table

// class is one class of faults.
type class struct {
	name string
	// points is how many faults were tried, wrong at how many the program did not keep its
	// word.
	points, wrong int
	notes         []note
}

// note is what else was seen, and how often.
type note struct {
	what  string
	times int
}

func (ta *table) class(name string) *class {
	ta.mu.Lock()
	defer ta.mu.Unlock()
	for _, c := range ta.classes {
		if c.name == name {
			return c
		}
	}
	c := &class{name: name}
	ta.classes = append(ta.classes, c)
	return c
}

// at counts a point that was tried. One that the run did not
// come by is none, unless something was wrong all the same.
func (c *class) at(t *testing.T, tr *trace, err error, where string, args ...any) {
	t.Helper()
	if !tr.hit {
		c.note(notComeBy, 1)
		if err == nil {
			return
		}
	}
	c.tried(t, fmt.Sprintf(where, args...), err)
}

// note counts something worth a word that is not wrong.
func (c *class) note(what string, times int) {
	if c == nil {
		return
	}
	for i := range c.notes {
		if c.notes[i].what == what {
			c.notes[i].times += times
			return
		}
	}
	c.notes = append(c.notes, note{what, times})
}

// wantPoints fails a test whose faults mostly did not happen: nothing is shown then.
func (c *class) wantPoints(t *testing.T, before int) {
	t.Helper()
	missed := 0
	for _, n := range c.notes {
		if n.what == notComeBy {
			missed = n.times
		}
	}
	if got := c.points - before; got < 5 || missed > c.points {
		t.Errorf("%s: %d points, and %d were not come by", c.name, got, missed)
	}
}

// notComeBy notes a point of the clean run that the run with the fault did not come by:
// Go's runtime does not make the same calls each time.
const notComeBy = "not come by"

const sent = "faults-table\t"

// send gives the table to the process that started this one, by its stdout.
func (ta *table) send() {
	for _, c := range ta.classes {
		fmt.Printf("%s%s\t%d\t%d", sent, c.name, c.points, c.wrong)
		for _, n := range c.notes {
			fmt.Printf("\t%s=%d", n.what, n.times)
		}
		fmt.Println()
	}
}

// receive takes tables out of a process's output and returns the rest.
func (ta *table) receive(out string) string {
	var rest strings.Builder
	sc := bufio.NewScanner(strings.NewReader(out))
	sc.Buffer(nil, 1<<24)
	for sc.Scan() {
		line, ok := strings.CutPrefix(sc.Text(), sent)
		if !ok {
			fmt.Fprintln(&rest, sc.Text())
			continue
		}
		f := strings.Split(line, "\t")
		c := ta.class(f[0])
		ta.mu.Lock()
		var points, wrong int
		fmt.Sscan(f[1]+" "+f[2], &points, &wrong)
		c.points += points
		c.wrong += wrong
		for _, n := range f[3:] {
			what, times, _ := strings.Cut(n, "=")
			k := 0
			fmt.Sscan(times, &k)
			c.note(what, k)
		}
		ta.mu.Unlock()
	}
	return rest.String()
}

func (ta *table) print() {
	if len(ta.classes) == 0 {
		return
	}
	slices.SortFunc(ta.classes, func(a, b *class) int { return strings.Compare(a.name, b.name) })
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 1, ' ', 0)
	fmt.Fprintln(w, "| fault\t| points\t| wrong\t| seen\t|")
	fmt.Fprintln(w, "|---\t|---\t|---\t|---\t|")
	sum := class{}
	for _, c := range ta.classes {
		var seen []string
		for _, n := range c.notes {
			seen = append(seen, fmt.Sprintf("%s: %d", n.what, n.times))
		}
		fmt.Fprintf(w, "| %s\t| %d\t| %d\t| %s\t|\n", c.name, c.points, c.wrong, strings.Join(seen, ", "))
		sum.points += c.points
		sum.wrong += c.wrong
	}
	fmt.Fprintf(w, "| all\t| %d\t| %d\t|\t|\n", sum.points, sum.wrong)
	w.Flush()
}

package proc

import (
	"os"
	"os/exec"
	"testing"
)

func TestParseStat(t *testing.T) {
	const rest = " S 7 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 0 0"
	for line, want := range map[string]Stat{
		"12 (criu)" + rest:                 {"criu", 'S', 7, 4194560, 4242},
		"12 () S 9 9 9)" + rest:            {") S 9 9 9", 'S', 7, 4194560, 4242},
		"12 (name with blanks ((x)" + rest: {"name with blanks ((x", 'S', 7, 4194560, 4242},
		"":                                 {},
		"12 )criu(" + rest:                 {},
		"12 (criu) S 7 1":                  {},
		"12 (criu) Sx" + rest[2:]:          {},
	} {
		got, err := parseStat(line)
		if (err == nil) != (want != Stat{}) || (err == nil && got != want) {
			t.Errorf("%q: %+v, %v; want %+v", line, got, err, want)
		}
	}
}

func TestStatOf(t *testing.T) {
	c := exec.Command("sleep", "60")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	st, err := StatOf(c.Process.Pid)
	if err != nil || st.PPID != os.Getpid() || st.Start == 0 {
		t.Errorf("%+v, %v", st, err)
	}
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait() // killed
	if st, err := StatOf(c.Process.Pid); err == nil {
		t.Errorf("of a dead task: %+v", st)
	}
}

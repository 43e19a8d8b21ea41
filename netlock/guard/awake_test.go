package guard

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestAutoLatency(t *testing.T) {
	for _, c := range []struct {
		driver string
		states []string
		want   time.Duration
	}{
		{"haltpoll", []string{"0\n", "1\n"}, 0},
		{"intel_idle", []string{"0\n", "2\n", "10\n", "133\n"}, 2 * time.Microsecond},
		{"intel_idle", []string{"133\n", "3\n", "0\n"}, 3 * time.Microsecond},
		{"acpi_idle", []string{"0\n"}, NoLatency},
		{"psci_idle", []string{"x\n", "", "-4\n", "99999999999\n"}, NoLatency},
		{"none", nil, NoLatency}, {"", nil, NoLatency},
	} {
		if got := autoLatency(c.driver, c.states); got != c.want {
			t.Errorf("%s, %q: %v, want %v", c.driver, c.states, got, c.want)
		}
	}
}

// What is asked of the kernel, and until when.
func TestAwake(t *testing.T) {
	device := filepath.Join(t.TempDir(), "latency")
	open := func() (n int) {
		fds, err := filepath.Glob("/proc/self/fd/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			if at, err := os.Readlink(fd); err == nil && at == device {
				n++
			}
		}
		return n
	}
	for _, c := range []struct {
		asked time.Duration
		want  uint32 // in µs
	}{{0, 0}, {20 * time.Microsecond, 20}, {time.Hour, 1_000_000}} {
		if err := os.WriteFile(device, []byte("????"), 0o600); err != nil {
			t.Fatal(err)
		}
		end := awake(device, c.asked, time.Minute)
		b, err := os.ReadFile(device)
		if err != nil || len(b) != 4 || binary.NativeEndian.Uint32(b) != c.want || open() != 1 {
			t.Errorf("%v: wrote %x, %v, open %d times; want %d", c.asked, b, err, open(), c.want)
		}
		end()
		end()
		if open() != 0 {
			t.Errorf("%v: still open", c.asked)
		}
	}
	if end := awake(device, NoLatency, time.Minute); open() != 0 {
		t.Error("opened though nothing is asked for")
	} else {
		end()
	}
	awake(device+"-not-there", 0, time.Minute)()

	end := awake(device, 0, 20*time.Millisecond)
	eventually(t, "over", func() bool { return open() == 0 })
	end()
}

package guard

// A checkpoint is a conversation: CRIU, its client, the hooks and the tasks wake one another some
// hundred times while the container stands still, and each time a processor that has nothing
// to do has to wake first. How deep it may sleep until then the kernel lets us say.

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// latencyDevice is the kernel's PM QoS of processors: who has written to it has a wish, which ends with
// the descriptor, however the process ends.
const latencyDevice = "/dev/cpu_dma_latency"

// Latencies that are none: AutoLatency says that it depends on the machine, NoLatency that
// nothing is asked for.
const (
	AutoLatency time.Duration = -1 - iota
	NoLatency
)

// MaxLatency bounds them. The kernel counts whole microseconds.
const MaxLatency = time.Second

// awakeTime is how long a guard has processors kept awake at most: to wake up is a small part of a longer
// freeze.
const awakeTime = 5 * time.Second

// cpuidle has the driver of the processors' sleep, and sleeps the states of the first processor.
const (
	cpuidle = "/sys/devices/system/cpu/cpuidle/current_driver"
	sleeps  = "/sys/devices/system/cpu/cpu0/cpuidle/state*/latency"
)

// haltPoll is the kernel's driver for virtual machines. It says that its sleep takes 1 µs to wake from, but to
// sleep is to leave the machine, and to come back takes some 50 µs.
const haltPoll = "haltpoll"

// autoLatency is that of the first sleep there is (C1, WFI): without any the processors run in a loop,
// which takes from a neighbour on the same core. In a virtual machine only the loop stays in it. NoLatency
// says that nobody would heed a wish.
func autoLatency(driver string, latencies []string) time.Duration {
	if driver == haltPoll {
		return 0
	}
	first := NoLatency
	for _, s := range latencies {
		us, err := strconv.ParseUint(strings.TrimSpace(s), 10, 31)
		if d := time.Duration(us) * time.Microsecond; err == nil && d > 0 && (first < 0 || d < first) {
			first = d
		}
	}
	return first
}

// StayAwake asks the kernel that no processor of this machine sleeps so deep that waking takes longer
// than d, for five seconds or until end is called. d is AutoLatency, NoLatency or at most MaxLatency, in
// whole microseconds. Where that is not to be had, a checkpoint takes as long as it takes.
func StayAwake(d time.Duration) (end func()) {
	if d == AutoLatency {
		driver, _ := os.ReadFile(cpuidle)
		var latencies []string
		states, _ := filepath.Glob(sleeps)
		for _, path := range states {
			if b, err := os.ReadFile(path); err == nil {
				latencies = append(latencies, string(b))
			}
		}
		d = autoLatency(strings.TrimSpace(string(driver)), latencies)
	}
	return awake(latencyDevice, d, awakeTime)
}

func awake(device string, d, limit time.Duration) (end func()) {
	if d < 0 {
		return func() {}
	}
	fd, err := unix.Open(device, unix.O_WRONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return func() {}
	}
	var once sync.Once
	end = func() { once.Do(func() { unix.Close(fd) }) }
	wish := binary.NativeEndian.AppendUint32(nil, uint32(min(d, MaxLatency).Microseconds()))
	if n, err := unix.Write(fd, wish); err != nil || n != len(wish) {
		end()
		return func() {}
	}
	time.AfterFunc(limit, end)
	return end
}

package guard

// A checkpoint is a conversation: CRIU, its client, the hooks and the tasks wake one another some
// hundred times while the container stands still, and each time a processor that has nothing
// to do has to wake first. How deep it may sleep until then the kernel lets us say.

import (
	"encoding/binary"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// latencyDevice is the kernel's PM QoS of processors: who has it open has a wish, which ends with
// the descriptor, however the process ends.
const latencyDevice = "/dev/cpu_dma_latency"

// Latencies that are none: AutoLatency says that it depends on the machine, NoLatency that
// nothing is asked for.
const (
	AutoLatency time.Duration = -1 - iota
	NoLatency
)

// MaxLatency bounds them.
const MaxLatency = time.Second

// awakeTime is how long processors are kept awake at most: to wake up is a small part of a longer freeze.
const awakeTime = 5 * time.Second

// shallow is the first sleep of the processors that there are (C1, WFI), which costs nobody anything:
// below it they have to run in a loop, which takes from a neighbour on the same core.
const shallow = 2 * time.Microsecond

// haltPoll is the kernel's driver for virtual machines. It calls leaving the machine 1 µs, which takes
// some 50; the only way to stay in it is the loop.
const haltPoll = "haltpoll"

// cpuidleDriver has the name of the driver, or "none": then nobody heeds a wish.
const cpuidleDriver = "/sys/devices/system/cpu/cpuidle/current_driver"

// latencyOf is what a latency means on this machine; NoLatency if nothing is to be asked for.
func latencyOf(d time.Duration, driver string) time.Duration {
	switch {
	case d != AutoLatency:
		return d
	case driver == "" || driver == "none":
		return NoLatency
	case driver == haltPoll:
		return 0
	}
	return shallow
}

// StayAwake asks the kernel that no processor of this machine sleeps so deep that waking takes longer
// than d, AutoLatency, NoLatency or at most MaxLatency, for five seconds or until end is called. Where that
// is not to be had, a checkpoint takes as long as it takes.
func StayAwake(d time.Duration) (end func()) { return awake(latencyDevice, d, awakeTime) }

func awake(device string, d, limit time.Duration) (end func()) {
	b, _ := os.ReadFile(cpuidleDriver)
	if d = latencyOf(d, strings.TrimSpace(string(b))); d < 0 {
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

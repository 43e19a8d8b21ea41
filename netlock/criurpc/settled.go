package criurpc

import (
	"strconv"
	"strings"
)

// settled reads /proc/PID/status: no tracer holds the task and nobody has killed it.
func settled(status string) bool {
	const sigkill = 1 << (9 - 1)
	traced := true // until it says otherwise
	for line := range strings.Lines(status) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		value = strings.TrimSpace(value)
		switch key {
		case "State":
			if value == "" || strings.ContainsRune("ZX", rune(value[0])) {
				return false
			}
		case "TracerPid":
			traced = value != "0"
		case "SigPnd", "ShdPnd":
			if set, err := strconv.ParseUint(value, 16, 64); err != nil || set&sigkill != 0 {
				return false
			}
		}
	}
	return !traced
}

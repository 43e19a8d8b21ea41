package guard

import (
	"strconv"
	"strings"

	"github.com/criu-netlock/criu-netlock/netlock/internal/proc"
)

// cgroupRoot is where the cgroups are mounted.
const cgroupRoot = "/sys/fs/cgroup"

// Frozen tells whether a cgroup freezer holds the task: of version 2, or of version 1,
// or of 1 in a hybrid.
func Frozen(pid int) bool {
	s, err := proc.Read("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return false
	}
	return frozenBy(s, proc.Read)
}

// frozenBy reads the lines of /proc/PID/cgroup, "4:freezer:/a/b" and "0::/a/b".
func frozenBy(lines string, read func(string) (string, error)) bool {
	for _, line := range strings.Split(lines, "\n") {
		f := strings.SplitN(line, ":", 3)
		if len(f) != 3 {
			continue
		}
		switch {
		case f[0] == "0" && f[1] == "":
			for _, root := range []string{cgroupRoot, cgroupRoot + "/unified"} {
				if s, err := read(root + f[2] + "/cgroup.events"); err == nil && strings.Contains("\n"+s, "\nfrozen 1") {
					return true
				}
			}
		case hasWord(f[1], "freezer"):
			if s, err := read(cgroupRoot + "/freezer" + f[2] + "/freezer.state"); err == nil && strings.TrimSpace(s) != "THAWED" {
				return true
			}
		}
	}
	return false
}

func hasWord(list, word string) bool {
	for _, w := range strings.Split(list, ",") {
		if w == word {
			return true
		}
	}
	return false
}

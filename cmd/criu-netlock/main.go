// The program criu-netlock: CRIU's action script when CRIU runs it, a command line
// otherwise.
//
// CRIU starts it once for each of about ten hooks, most of them with nothing to do and
// some while a container is frozen. So the hooks are told from the commands before
// anything is set up.
package main

import (
	"os"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock/action"
)

func main() {
	start := time.Now()
	if len(os.Args) == 1 {
		if name := action.Name(os.Getenv(action.EnvAction)); name != "" {
			if action.OpOf(name) == action.Nothing {
				return
			}
			os.Exit(runHook(start))
		}
	}
	os.Exit(runCommand(start, os.Args[1:]))
}

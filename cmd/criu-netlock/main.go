// The program criu-netlock: CRIU's action script when CRIU runs it, a command line
// otherwise.
//
// CRIU starts it once for each of about ten hooks, most of them with nothing to do and
// some while a container is frozen. Those end in package early, before this package is
// so much as initialised; the others are told from the commands before anything is set up.
package main

import (
	"os"
	"time"

	_ "github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early"
	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
)

func main() {
	start := time.Now()
	if len(os.Args) > 1 && os.Args[1] == guard.Arg {
		os.Exit(runGuard(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == guard.StartArg {
		os.Exit(runGuardStart(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == guard.HoldArg {
		os.Exit(runHolder(os.Args[2:]))
	}
	if len(os.Args) == 1 {
		if os.Getenv(action.EnvAction) != "" {
			os.Exit(runHook(start))
		}
	}
	if args, ok := asCRIU(os.Args); ok {
		os.Exit(runCRIU(args))
	}
	if len(os.Args) > 1 && os.Args[1] == proxyStartArg {
		os.Exit(runProxyStart(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == proxyArg {
		os.Exit(runProxy(os.Args[2:]))
	}
	if len(os.Args) == 3 && os.Args[1] == readConfigArg {
		os.Exit(runReadConfig(os.Args[2]))
	}
	os.Exit(runCommand(start, os.Args[1:]))
}

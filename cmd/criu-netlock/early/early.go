// Package early ends the process where CRIU's hook has nothing for us to do: most
// hooks, and two of them while a container is frozen.
//
// It is a package of its own, and imports nothing but os and what
// os imports (strings and strconv, say, would come too late), because Go initialises
// packages in the order of their import paths as soon as what they import is ready.
// So this comes before all that the other hooks and the commands need (nftables,
// cobra, encoding, net), which is two thirds of what the program takes longer to
// start than an empty one.
package early

import "os"

// Passed is true in every process that goes on. It is here to be initialised.
var Passed = pass()

func pass() bool {
	if name := os.Getenv("CRTOOLS_SCRIPT_ACTION"); name != "" && len(os.Args) == 1 {
		if !Busy(name) {
			os.Exit(0)
		}
		if Asks(name) {
			ask(name)
		}
	}
	return true
}

// Busy tells whether a hook has something to do: action.OpOf says what, and a test
// holds the two together.
func Busy(name string) bool {
	switch name {
	case "pre-dump", "network-lock", "network-unlock", "pre-restore",
		"setup-namespaces", "post-setup-namespaces", "post-restore", "post-resume":
		return true
	}
	return false
}

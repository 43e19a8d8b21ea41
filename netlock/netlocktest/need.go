// Package netlocktest is the conformance suite of netlock's backends: throwaway
// network namespaces, probes that tell what passes between them, and what every
// lock has to do and to withstand.
package netlocktest

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// Need makes sure that the test is run by root and that the tools are installed.
// Without them a test is skipped at home and fails where CI=true: a test that was
// not run must not count as passed there.
func Need(t testing.TB, tools ...string) {
	t.Helper()
	var missing []string
	if os.Geteuid() != 0 {
		missing = append(missing, "root")
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			missing = append(missing, tool)
		}
	}
	if missing != nil {
		CannotRun(t, "needs "+strings.Join(missing, ", "))
	}
}

// CannotRun ends a test that cannot run on this machine: with CI=true it has failed,
// elsewhere it is skipped. Nothing else skips a test.
func CannotRun(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("cannot run here: %s", why)
	} else {
		t.Skipf("%s", why)
	}
}

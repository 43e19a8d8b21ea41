//go:build !amd64 && !arm64

package early

// GuardDir is guard.Dir.
const GuardDir = "/run/criu-netlock"

// ask: here the hook does the work itself, as it does where there is no guard.
func ask(string, func(string) string) {}

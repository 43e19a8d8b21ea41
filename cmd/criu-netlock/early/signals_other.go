//go:build !amd64 && !arm64

package early

// AsStarted can do nothing here, where Go's runtime comes first: of what was ignored, SIGHUP and
// SIGINT alone stay so.
func AsStarted() {}

package early

import (
	"syscall"
	"time"
)

// SayTime is how long Say may take. CRIU's log is a file, but may be a pipe that nobody
// reads.
const SayTime = 100 * time.Millisecond

// Say writes a line to stderr, if that can be done at once. It must neither block nor
// be killed: os.Stderr raises SIGPIPE on a pipe without a reader, even where the
// parent had it ignored, and a full one blocks.
func Say(line string) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for b := []byte(line); len(b) > 0; {
			n, err := syscall.Write(syscall.Stderr, b)
			if err != nil && err != syscall.EINTR {
				return // there is nowhere to tell
			}
			b = b[max(n, 0):]
		}
	}()
	select {
	case <-done:
	case <-time.After(SayTime):
	}
}

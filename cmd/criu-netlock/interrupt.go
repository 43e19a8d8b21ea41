package main

// A signal in the middle of locking many namespaces.

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// interrupted is the signal that ended a command.
type interrupted struct{ sig syscall.Signal }

func (i *interrupted) Error() string {
	return "lock: ended by " + unix.SignalName(i.sig) + "; what it had locked was unlocked again"
}

// interruptible returns a context that a signal to end cancels, with an *interrupted as
// its cause. One that is ignored, as under nohup, stays so.
func interruptible(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	came := make(chan os.Signal, 1)
	for _, s := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP} {
		if !signal.Ignored(s) {
			signal.Notify(came, s)
		}
	}
	go func() {
		select {
		case s := <-came:
			if sig, ok := s.(syscall.Signal); ok {
				cancel(&interrupted{sig})
			}
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		signal.Stop(came)
		cancel(nil)
	}
}

// die ends the process by the signal, which is what a shell's loop looks at.
func (i *interrupted) die() {
	signal.Reset(i.sig)
	if unix.Kill(os.Getpid(), i.sig) == nil {
		select {} // it is on its way to one of our threads
	}
}

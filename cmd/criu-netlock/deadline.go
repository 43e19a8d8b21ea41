package main

// Everything ends by its deadline, and nothing waits for a reader of its output.

import (
	"context"
	"errors"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early"
	"github.com/criu-netlock/criu-netlock/cmd/internal/wire"
	"github.com/criu-netlock/criu-netlock/netlock"
)

// within runs f with a context that ends early enough for undoing what f began, and
// returns before timeout has passed since start whatever f does.
func within[T any](start time.Time, timeout time.Duration, f func(context.Context) (T, error)) (T, error) {
	type answer struct {
		v   T
		err error
	}
	ctx, cancel := context.WithDeadline(context.Background(), start.Add(timeout-netlock.UndoTime))
	defer cancel()
	done := make(chan answer, 1) // f may come back when nobody waits any more
	go func() {
		v, err := f(ctx)
		done <- answer{v, err}
	}()
	last := time.NewTimer(time.Until(start.Add(timeout - early.SayTime)))
	defer last.Stop()
	select {
	case a := <-done:
		if a.err != nil && errors.Is(a.err, context.DeadlineExceeded) && netlock.KindOf(a.err) == netlock.KindOther {
			a.err = &netlock.Error{Kind: netlock.KindDeadline, Op: "timeout " + timeout.String(), Err: a.err}
		}
		return a.v, a.err
	case <-last.C:
		var none T
		return none, &netlock.Error{
			Kind: netlock.KindDeadline, Op: "timeout " + timeout.String(),
			Err:  errors.New("the kernel or a tool has not answered; gave up waiting"),
			Hint: "criu-netlock status tells what is there now",
		}
	}
}

// write is a plain write of everything.
func write(fd int, s string) error {
	for b := []byte(s); len(b) > 0; {
		n, err := unix.Write(fd, b)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return err
		}
		b = b[max(n, 0):]
	}
	return nil
}

// told is an error as it is printed: on one line, and the same story once. Where a
// capability is missing, every backend says so.
func told(err error) string {
	var stories []string
	missing := map[string]int{} // advice to the place among stories of who gave it
	for _, e := range joined(err) {
		text := wire.OneLine(e.Error())
		var n *netlock.Error
		if errors.As(e, &n) && n.Kind == netlock.KindPrivilege {
			key := n.Namespace + n.Hint
			if i, ok := missing[key]; ok {
				if len(text) < len(stories[i]) {
					stories[i] = text
				}
				continue
			}
			missing[key] = len(stories)
		}
		stories = append(stories, text)
	}
	return strings.Join(stories, "; ")
}

// joined takes apart what errors.Join has put together.
func joined(err error) []error {
	list, ok := err.(interface{ Unwrap() []error }) //nolint:errorlint // only one that is nothing but a list
	if !ok || errors.Join(list.Unwrap()...).Error() != err.Error() {
		return []error{err}
	}
	var out []error
	for _, e := range list.Unwrap() {
		out = append(out, joined(e)...)
	}
	return out
}

// parent is who started us: CRIU, or a shell.
func parent() netlock.Caller { return netlock.CallerOf(os.Getppid()) }

package netlock

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
)

// Kind says what sort of failure an Error is. Its number is the exit code of
// the program, so that a script and a Go caller read the same table.
type Kind int

// The kinds of failure.
const (
	// KindOther is a refusal by the kernel that none of the others names.
	KindOther Kind = 1
	// KindInput: the environment, the configuration or the arguments are wrong.
	KindInput Kind = 2
	// KindNoTask: there is no such task, or it is dead, a zombie or a thread.
	KindNoTask Kind = 3
	// KindRefused: the namespace is the host's or our own.
	KindRefused Kind = 4
	// KindPrivilege: a capability is missing.
	KindPrivilege Kind = 5
	// KindNoBackend: the kernel or the host offers no way to lock.
	KindNoBackend Kind = 6
	// KindHeld: tables owned by live processes bear all of our names.
	KindHeld Kind = 7
	// KindDeadline: the deadline passed. A lock that was begun was taken back.
	KindDeadline Kind = 8
	// KindTampered: unlocked, but the lock was no longer what we had put there.
	KindTampered Kind = 9
)

// ErrUnsupported is wrapped by a backend's errors when the kernel or the host
// lacks what the backend needs. Only this lets Locker try the next one.
var ErrUnsupported = errors.New("not supported here")

// Error is the one error type of this module: what was being done, on which
// namespace, by which backend, what the kernel said, what to do about it.
type Error struct {
	Kind      Kind
	Op        string // what was being done: "create table", "open pid"
	Namespace string // which namespace, as a person names it; may be empty
	Backend   string // which backend; empty where none was involved
	Err       error  // what the kernel or the parser said
	Hint      string // what to do; may be empty
}

// Error returns the whole story on one line.
func (e *Error) Error() string {
	var b strings.Builder
	for _, s := range []string{e.Namespace, e.Backend, e.Op} {
		if s != "" {
			b.WriteString(s)
			b.WriteString(": ")
		}
	}
	if e.Err != nil {
		b.WriteString(e.Err.Error())
		var no syscall.Errno
		if errors.As(e.Err, &no) {
			if name := errnoName(no); name != "" && !strings.Contains(b.String(), name) {
				fmt.Fprintf(&b, " (%s)", name)
			}
		}
	}
	if e.Hint != "" {
		b.WriteString("; ")
		b.WriteString(e.Hint)
	}
	return strings.ReplaceAll(strings.TrimSpace(strings.ReplaceAll(b.String(), "\r", "")), "\n", "; ")
}

func (e *Error) Unwrap() error { return e.Err }

// HeldError is a backend's refusal where live processes own tables under all of our
// names.
func HeldError(ns *Namespace, backend string) error {
	return &Error{Kind: KindHeld, Op: "lock", Namespace: ns.String(), Backend: backend,
		Err: errors.New("live processes own tables under both of our names"), Hint: "find them with nft list ruleset in the namespace, and end them"}
}

// KindOf returns the kind of the first *Error in err's tree, and KindOther if
// there is none. It must not be asked about nil.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) && e.Kind != 0 {
		return e.Kind
	}
	return KindOther
}

// ExitCode is 0 for nil and the number of the error's kind otherwise.
func ExitCode(err error) int {
	if err == nil {
		return 0
	}
	return int(KindOf(err))
}

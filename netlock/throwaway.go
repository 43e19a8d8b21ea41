package netlock

// A network namespace that nobody uses.

import (
	"context"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// Trial takes a real lock in a throwaway namespace and takes it off: the one honest
// answer to whether this host can lock.
func Trial(ctx context.Context, l interface {
	Lock(context.Context, *Namespace) (Result, error)
	Unlock(context.Context, *Namespace) (State, error)
}) (Result, error) {
	ns, err := NewThrowaway()
	if err != nil {
		return Result{}, err
	}
	defer ns.Close()
	res, err := l.Lock(ctx, ns)
	if err != nil {
		return Result{}, fmt.Errorf("trial: %w", err)
	}
	if _, err := l.Unlock(ctx, ns); err != nil {
		return Result{}, fmt.Errorf("trial: %w", err)
	}
	return res, nil
}

// NewThrowaway makes a network namespace that ends with its handle.
func NewThrowaway() (*Namespace, error) {
	fd, err := throwawayFD()
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	return FromFD(fd) // from this thread: to the one that made it, it is its own
}

func throwawayFD() (int, error) {
	type answer struct {
		fd  int
		err error
	}
	made := make(chan answer)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread dies with this goroutine
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot die, and /proc/self/ns/net is its namespace. While
			// this goroutine keeps it, another one gets another thread.
			defer runtime.UnlockOSThread()
			fd, err := throwawayFD()
			made <- answer{fd, err}
			return
		}
		fd, err := unshareNet()
		made <- answer{fd, err}
	}()
	a := <-made
	return a.fd, a.err
}

func unshareNet() (int, error) {
	fail := func(op string, err error) (int, error) {
		e := &Error{Kind: KindOther, Op: op, Namespace: "trial", Err: err}
		switch err {
		case unix.EPERM:
			e.Kind, e.Hint = KindPrivilege, MissingCapability(unix.CAP_SYS_ADMIN)
		case unix.ENOSPC:
			e.Hint = "raise user.max_net_namespaces"
		case unix.EINVAL:
			e.Kind, e.Hint = KindNoBackend, "the kernel has no network namespaces"
		}
		return -1, e
	}
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fail("unshare", err)
	}
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail("open /proc/thread-self/ns/net", err)
	}
	return fd, nil
}

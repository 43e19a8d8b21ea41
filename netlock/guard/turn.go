package guard

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// turn is the right to change the lock of one namespace, held while a guard or a hook
// looks and acts. It needs Dir; where no guard ever was there is nobody to take turns with.
type turn struct {
	fd   int
	path string
}

// takeTurn waits for the right until a deadline. The file goes when it is given back,
// so whoever gets the lock of a file that is gone by then takes the next one.
func takeTurn(dir string, netns uint64, until time.Time) (*turn, error) {
	path := filepath.Join(dir, "turn-"+strconv.FormatUint(netns, 10))
	for {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		if err := lockFile(fd, until); err != nil {
			unix.Close(fd)
			return nil, &os.PathError{Op: "flock", Path: path, Err: err}
		}
		var mine, there unix.Stat_t
		if unix.Fstat(fd, &mine) == nil && unix.Stat(path, &there) == nil && mine.Ino == there.Ino && mine.Dev == there.Dev {
			return &turn{fd, path}, nil
		}
		unix.Close(fd)
	}
}

func lockFile(fd int, until time.Time) error {
	for {
		switch err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); {
		case err == nil:
			return nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			return err
		case time.Now().After(until):
			return context.DeadlineExceeded
		}
		time.Sleep(time.Millisecond)
	}
}

func (t *turn) done() {
	_ = unix.Unlink(t.path) // the next one makes another
	unix.Close(t.fd)
}

// InTurn calls f when no guard and no other hook changes the lock of the namespace, and
// tells whether it was f's turn: after the deadline it returns false, and f was not
// called. Where no guard can be, f is called at once.
func InTurn(netns uint64, until time.Time, f func()) bool {
	if trusted(Dir) != nil {
		f()
		return true
	}
	t, err := takeTurn(Dir, netns, until)
	if errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	if err == nil {
		defer t.done()
	}
	f() // without a file to lock, a full disk say, there is no turn to take
	return true
}

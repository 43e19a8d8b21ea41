package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v8/rpc"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
	"github.com/criu-netlock/criu-netlock/netlock/criurpc"
	"github.com/criu-netlock/criu-netlock/nft"
)

// terminal dumps and restores a cat on a terminal whose other end CRIU sends us at
// orphan-pts-master, and talks to the cat over it. dir is a folder for CRIU.
func terminal(dir string) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	master, slave, err := openPTY()
	if err != nil {
		return err
	}
	cat := exec.Command("cat")
	cat.Stdin, cat.Stdout, cat.Stderr = slave, slave, slave
	cat.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Cloneflags: syscall.CLONE_NEWNET}
	if err := cat.Start(); err != nil {
		return err
	}
	pid := cat.Process.Pid
	defer func() { _ = syscall.Kill(pid, syscall.SIGKILL) }() // dumped, it is dead already
	slave.Close()
	if err := talk(ctx, master, "before"); err != nil {
		return err
	}
	images, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer images.Close()
	opts := &rpc.CriuOpts{
		Pid: ptr(int32(pid)), ImagesDirFd: ptr(int32(images.Fd())), LogFile: ptr("dump.log"), LogLevel: ptr(int32(4)),
		ShellJob: ptr(true), OrphanPtsMaster: ptr(true), NetworkLock: ptr(rpc.CriuNetworkLockMethod_SKIP),
	}
	locker := netlock.New(nft.New())
	s, err := criurpc.Swrk(exec.Command("criu"))
	if err != nil {
		return err
	}
	_, err = s.Dump(ctx, opts, nil, criurpc.Options{Locker: locker})
	if err = errors.Join(err, s.Close()); err != nil {
		return errors.Join(err, logOf(dir, "dump.log"))
	}
	_ = cat.Wait() // CRIU has killed it
	master.Close()

	if s, err = criurpc.Swrk(exec.Command("criu")); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	opts.Pid, opts.LogFile = nil, ptr("restore.log")
	master = nil
	callback := func(_ context.Context, n *criurpc.Notification) error {
		if n.Action == action.OrphanPtsMaster {
			master = n.TakeFile()
		}
		return nil
	}
	resp, err := s.Restore(ctx, opts, callback, criurpc.Options{Locker: locker})
	if err != nil {
		return errors.Join(err, logOf(dir, "restore.log"))
	}
	defer func() { _ = syscall.Kill(int(resp.GetRestore().GetPid()), syscall.SIGKILL) }()
	if master == nil {
		return errors.New("orphan-pts-master has brought no descriptor")
	}
	defer master.Close()
	if st, err := isTerminal(master); err != nil || !st {
		return fmt.Errorf("what orphan-pts-master brought is no terminal: %w", err)
	}
	return talk(ctx, master, "after")
}

func logOf(dir, name string) error {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	return errors.New(string(b))
}

func openPTY() (master, slave *os.File, err error) {
	if master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0); err != nil {
		return nil, nil, err
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		return nil, nil, err
	}
	slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|syscall.O_NOCTTY, 0)
	return master, slave, err
}

func isTerminal(f *os.File) (bool, error) {
	_, err := unix.IoctlGetInt(int(f.Fd()), unix.TIOCGPTN)
	return err == nil, err
}

// talk writes a word and waits until it comes back twice: the terminal's echo, and cat.
func talk(ctx context.Context, master *os.File, word string) error {
	if _, err := master.WriteString(word + "\n"); err != nil {
		return err
	}
	got := make(chan error, 1)
	go func() {
		var seen []byte
		b := make([]byte, 256)
		for bytes.Count(seen, []byte(word)) < 2 {
			n, err := master.Read(b)
			if err != nil {
				got <- fmt.Errorf("cat said %q, then %w", seen, err)
				return
			}
			seen = append(seen, b[:n]...)
		}
		got <- nil
	}()
	select {
	case err := <-got:
		return err
	case <-ctx.Done():
		return fmt.Errorf("cat does not answer to %q: %w", strings.TrimSpace(word), ctx.Err())
	}
}

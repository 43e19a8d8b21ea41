package main

// The configuration, within a bounded time wherever it lies.

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/config"
)

// readConfigArg is the program's first argument when it is to read a file for another
// process of ours, which nobody waits for should it never end.
const readConfigArg = "read-config"

// configTime is how long a file system that may never answer has for the configuration:
// half of a hook's usual time, so that an unlock can still go on without it.
const configTime = 2 * time.Second

// What the child's answer begins with.
const (
	answerText   = 't'
	answerAbsent = 'a'
	answerError  = 'e'
)

// loadConfig is config.Load that comes back.
func loadConfig(path string) (config.Config, error) {
	text, err := config.Read(path, false)
	if errors.Is(err, config.ErrMayWait) {
		text, err = readInChild(path)
		var e *netlock.Error
		if errors.As(err, &e) {
			return config.Default(), err
		}
	}
	return config.FromRead(path, text, err)
}

func readInChild(path string) ([]byte, error) {
	cmd := exec.Command("/proc/self/exe", readConfigArg, path)
	cmd.Env = []string{}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start a process that reads it: %w", err)
	}
	type answer struct {
		b   []byte
		err error
	}
	done := make(chan answer, 1)
	go func() {
		b, err := io.ReadAll(io.LimitReader(out, config.MaxSize+4096))
		done <- answer{b, err}
	}()
	late := time.NewTimer(configTime)
	defer late.Stop()
	select {
	case <-late.C:
		// It may be past killing. It holds nothing of ours, and init reaps it one day.
		_ = cmd.Process.Kill()
		return nil, &netlock.Error{
			Kind: netlock.KindDeadline, Op: "read configuration", Err: fmt.Errorf("%q: no answer within %v", path, configTime),
			Hint: "move it to a file system of this machine",
		}
	case a := <-done:
		_ = cmd.Wait() // its answer says it all
		switch {
		case a.err != nil:
			return nil, a.err
		case len(a.b) == 0:
			return nil, errors.New("the process that reads it ended without an answer")
		case a.b[0] == answerAbsent:
			return nil, os.ErrNotExist
		case a.b[0] == answerError:
			return nil, errors.New(string(a.b[1:]))
		}
		return a.b[1:], nil
	}
}

// runReadConfig is the child.
func runReadConfig(path string) int {
	text, err := config.Read(path, true)
	switch {
	case errors.Is(err, os.ErrNotExist):
		err = printText(string(rune(answerAbsent)))
	case err != nil:
		err = printText(string(rune(answerError)) + err.Error())
	default:
		err = printText(string(rune(answerText)) + string(text))
	}
	return netlock.ExitCode(err)
}

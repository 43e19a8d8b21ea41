package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

func capMask(capabilities ...int) (mask uint64) {
	for _, c := range capabilities {
		mask |= 1 << c
	}
	return mask
}

// What docs/security.md says.
var (
	capsOfUs     = capMask(unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN, unix.CAP_SYS_PTRACE, unix.CAP_NET_RAW, unix.CAP_DAC_READ_SEARCH)
	capsInside   = capMask(unix.CAP_NET_ADMIN, unix.CAP_NET_RAW)
	capsIPTables = capMask(unix.CAP_SYS_MODULE)
)

// threadCaps is what a thread's status says of its capabilities: it uses some, and what it executes
// has others too.
func threadCaps(uses, lends uint64) string {
	return fmt.Sprintf("CapInh:\t%016x\nCapPrm:\t%016x\nCapEff:\t%016x\n", 0, uses|lends, uses)
}

// onlyCaps checks that a process has those capabilities alone, in all of its threads, and
// those inside, if there are any, in the one that is in the namespace.
func onlyCaps(pid int, rest string, netns, inside string) error {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil || len(threads) == 0 {
		return errors.Join(err, errGone)
	}
	found := false
	for _, dir := range threads {
		b, err := os.ReadFile(dir + "/status")
		if err != nil {
			return errors.Join(err, errGone)
		}
		want := rest
		if ns, err := os.Readlink(dir + "/ns/net"); err != nil {
			return err
		} else if inside != "" && ns == netns {
			want, found = inside, true
		}
		for _, want := range []string{want, fmt.Sprintf("CapAmb:\t%016x\n", 0), "NoNewPrivs:\t1\n"} {
			if !strings.Contains(string(b), want) {
				return fmt.Errorf("%s lacks %q:\n%s", dir, want, b)
			}
		}
	}
	if inside != "" && !found {
		return fmt.Errorf("no thread of process %d is in %s", pid, netns)
	}
	return nil
}

// soon tries until there is no error.
func soon(t *testing.T, f func() error) {
	t.Helper()
	var said error
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if said == nil || !errors.Is(err, errGone) {
			said = err
		}
	}
	t.Error(said)
}

var errGone = errors.New("there is no such process")

// What stays has the capabilities that it needs and no other, in all of its threads.
func TestGuardHasNoOtherCapabilities(t *testing.T) {
	s, c := newSpace(t), newCRIU(t)
	c.ok(t, s.pid, "pre-dump")
	if err := onlyCaps(c.guard(t), threadCaps(capsOfUs, 0), "", ""); err != nil {
		t.Error(err)
	}
	c.ok(t, s.pid, "network-lock")
	c.ok(t, s.pid, "network-unlock")
}

// So has a hook that does its work itself, from its beginning; and once it is in the namespace, what it
// takes to lock that.
func TestHookHasNoOtherCapabilities(t *testing.T) {
	netlocktest.Need(t, "strace")
	// Linked without the flag it does not begin in package early.
	plain := filepath.Join(t.TempDir(), "criu-netlock")
	build := exec.Command("go", "build", "-o", plain, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const tool = "execve:delay_exit"
	for _, exe := range []string{program, plain} {
		for _, c := range []struct {
			backend, action, call string // that it is seen in
			inside                string
		}{
			{"nft", "network-lock", "sendto:delay_enter", threadCaps(capsInside, 0)},
			{"auto", "network-unlock", "sendto:delay_enter", threadCaps(capsInside, capsIPTables)},
			{"iptables", "network-lock", tool, threadCaps(capsInside, capsIPTables)},
			{"auto", "pre-dump", "unshare:delay_enter", ""},
		} {
			t.Run(filepath.Base(filepath.Dir(exe))+" "+c.action+" "+c.backend, func(t *testing.T) {
				t.Parallel()
				s := newSpace(t)
				if c.action == "network-unlock" {
					hook(t, "network-lock", s.pid).want(t, 0)
				}
				config := filepath.Join(t.TempDir(), "netlock.toml")
				if err := os.WriteFile(config, []byte("guard = false\nbackend = \""+c.backend+"\"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				defer cancel()
				call, _, _ := strings.Cut(c.call, ":")
				cmd := command(ctx, append(hookEnv(c.action, s.pid), "CRIU_NETLOCK_CONFIG="+config),
					"strace", "-f", "-o", "/dev/null", "-e", "trace="+call, "-e", "inject="+c.call+"=400000:when=1", exe)
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				netns, err := os.Readlink("/proc/" + s.pid + "/ns/net")
				if err != nil {
					t.Fatal(err)
				}
				soon(t, func() error {
					pid, err := childOf(cmd.Process.Pid)
					if err != nil {
						return err
					}
					if c.call == tool {
						child, err := childOf(pid)
						// It is root's, and may load a module.
						if err = errors.Join(err, onlyCaps(child, threadCaps(capsInside|capsIPTables, 0), "", "")); err != nil {
							return err
						}
					}
					return onlyCaps(pid, threadCaps(capsOfUs, capsIPTables), netns, c.inside)
				})
				if err := cmd.Wait(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// childOf is the one child of a process that has one.
func childOf(pid int) (int, error) {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return 0, err
	}
	for _, name := range threads {
		b, err := os.ReadFile(name)
		if err != nil {
			return 0, errors.Join(err, errGone)
		}
		if f := strings.Fields(string(b)); len(f) > 0 {
			return strconv.Atoi(f[0])
		}
	}
	return 0, errGone
}

// And the process between CRIU and its client. CRIU keeps what it was started with.
func TestProxyHasNoOtherCapabilities(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "criu"), []byte("#!/bin/sh\nexec sleep 60\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	client, theirs := os.NewFile(uintptr(pair[0]), "client"), os.NewFile(uintptr(pair[1]), "criu")
	defer client.Close()
	cmd := exec.Command(program, "criu", "swrk", "3")
	cmd.Env = []string{"PATH=" + dir + ":/usr/bin:/bin", "CRIU_NETLOCK_CONFIG=/dev/null"}
	cmd.ExtraFiles = []*os.File{theirs}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	defer func() {
		_ = cmd.Process.Kill() // it is alive
		_ = cmd.Wait()         // it was killed
	}()
	args := fmt.Sprintf("criu-netlock\x00swrk-proxy\x00%d\x00%d\x00", os.Getpid(), cmd.Process.Pid)
	soon(t, func() error {
		all, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			return err
		}
		for _, name := range all {
			if b, err := os.ReadFile(name); err == nil && string(b) == args {
				pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
				return errors.Join(err, onlyCaps(pid, threadCaps(capsOfUs, capsIPTables), "", ""))
			}
		}
		return errors.New("there is no process in between")
	})
	own, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	theirStatus, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	caps := func(status []byte) string {
		_, s, _ := strings.Cut(string(status), "CapInh:")
		s, _, _ = strings.Cut(s, "Seccomp:")
		return s
	}
	if caps(own) != caps(theirStatus) {
		t.Errorf("CRIU has%s\nand was started with%s", caps(theirStatus), caps(own))
	}
}

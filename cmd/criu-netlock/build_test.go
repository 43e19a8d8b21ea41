package main

// What make build makes: the same bytes wherever it is made, and no need of any library.

import (
	"bytes"
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/criu-netlock/criu-netlock/netlock/netlocktest"
)

func TestBuildTwice(t *testing.T) {
	netlocktest.Need(t, "make", "cp")
	var made [][]byte
	for _, name := range []string{"one", "another/place"} {
		dir := filepath.Join(t.TempDir(), name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, part := range []string{"Makefile", "go.mod", "go.sum", "cmd", "netlock", "nft", "iptables"} {
			if out, err := exec.Command("cp", "-r", "../../"+part, dir).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
		build := exec.Command("make", "build", "VERSION=v0-test")
		build.Dir = dir
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		b, err := os.ReadFile(dir + "/bin/criu-netlock")
		if err != nil {
			t.Fatal(err)
		}
		made = append(made, b)
	}
	if !bytes.Equal(made[0], made[1]) {
		t.Errorf("made in two places it is not the same: %d and %d bytes", len(made[0]), len(made[1]))
	}
	f, err := elf.NewFile(bytes.NewReader(made[0]))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("it is linked dynamically: %v", p.Type)
		}
	}
}

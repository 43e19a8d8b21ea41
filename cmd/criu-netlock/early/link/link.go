//go:build amd64 || arm64

// Package link says how the program is to be linked. The Makefile has it too, and a test
// holds the two together.
package link

// Flag is the linker's option that makes the program begin in package early.
const Flag = "-E github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early.entry"

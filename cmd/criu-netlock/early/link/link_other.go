//go:build !amd64 && !arm64

// Package link says how the program is to be linked.
package link

// Flag is empty: the program begins where Go's programs do.
const Flag = ""

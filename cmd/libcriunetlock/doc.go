// Libcriunetlock is the C library: the lock for a program that drives CRIU by libcriu.
// criu_netlock.h says what there is; `make lib` builds it.
//
// This file and checkpoints.go are Go, exports.go hands C's calls to them, and library.c
// is what the program calls.
package main

func main() {}

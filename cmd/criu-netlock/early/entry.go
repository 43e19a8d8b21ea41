//go:build amd64 || arm64

package early

import "unsafe"

// entry is where the kernel starts the program: it calls begin, and goes on to Go's own
// entry if that comes back.
func entry()

// What entry and begin have between them. begin is called by its variable, which has its
// address whatever Go's calling convention is.
var (
	stack unsafe.Pointer // as the kernel has left it: argc, argv, nil, environment, nil
	first = begin
	noG   [1024]byte // stands for the goroutine: the end of its stack is at 0
)

var _, _, _ = entry, &first, &noG // the linker and the assembler use them

func begin() {
	entered = true
	if *(*uintptr)(stack) == 1 && hook(environ) {
		shed()
		return
	}
	name, _ := onStack(1)
	verb, _ := onStack(2) // or the nil that ends the arguments
	if IsCRIU(name, verb) {
		keep()
	}
}

// onStack is the string to which a word of the stack points, unless that is nil.
func onStack(word uintptr) (string, bool) {
	v := *(*unsafe.Pointer)(unsafe.Add(stack, word*unsafe.Sizeof(uintptr(0))))
	if v == nil {
		return "", false
	}
	n := uintptr(0)
	for *(*byte)(unsafe.Add(v, n)) != 0 {
		n++
	}
	return unsafe.String((*byte)(v), n), true
}

// environ is a variable of the environment on the stack, behind one argument. The first one
// counts, as in package syscall.
func environ(name string) string {
	const argcArgvNil = 3
	for word := uintptr(argcArgvNil); ; word++ {
		s, more := onStack(word)
		if !more {
			return ""
		}
		if len(s) > len(name) && s[len(name)] == '=' && s[:len(name)] == name {
			return s[len(name)+1:]
		}
	}
}

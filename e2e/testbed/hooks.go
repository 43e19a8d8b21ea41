package testbed

import (
	"bufio"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// HookSocket is the name of the socket, beside the relaying script.
const HookSocket = "hooks.sock"

// Hook is one call of an action script by CRIU.
type Hook struct {
	Action string
	// PID is CRTOOLS_INIT_PID as it stood in the environment, if it did.
	PID    string
	PIDSet bool
	// CRIU is the pid in the session of the process that runs the script.
	CRIU int
	// Dir is CRIU's work folder, where its log is.
	Dir string
}

// Hooks hears of every hook from the relaying script, while CRIU waits.
type Hooks struct {
	s      *Session
	l      *net.UnixListener
	wg     sync.WaitGroup
	mu     sync.Mutex
	handle func(Hook) error
	seen   []Hook
	log    string
}

// ListenHooks begins to listen in the session. Until Handle is called every hook
// succeeds.
func (s *Session) ListenHooks() (*Hooks, error) {
	name := filepath.Join(s.Work, "bin", HookSocket)
	os.Remove(name)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		return nil, err
	}
	h := &Hooks{s: s, l: l}
	h.wg.Go(func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			h.wg.Go(func() { h.serve(c) })
		}
	})
	return h, nil
}

func (h *Hooks) serve(c *net.UnixConn) {
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	var hook Hook
	if err := json.NewDecoder(bufio.NewReader(c)).Decode(&hook); err != nil {
		return // the script fails for want of an answer
	}
	h.mu.Lock()
	handle := h.handle
	h.seen = append(h.seen, hook)
	if log := h.s.criuLog(hook.Dir); log != "" {
		h.log = log
	}
	h.mu.Unlock()
	answer := "ok"
	if handle != nil {
		if err := handle(hook); err != nil {
			answer = strings.ReplaceAll(err.Error(), "\n", " ")
		}
	}
	// In CRIU's place our line comes when CRIU has gone on.
	if log := h.s.criuLog(hook.Dir); log != "" {
		h.mu.Lock()
		h.log = log
		h.mu.Unlock()
	}
	c.Write([]byte(answer + "\n"))
}

// Handle sets what answers the hooks from now on, those of two CRIUs at the same
// time; an error makes CRIU's script fail. It forgets the hooks seen before.
func (h *Hooks) Handle(f func(Hook) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.handle, h.seen = f, nil
	if f != nil {
		h.log = ""
	}
}

// Seen lists the hooks since Handle.
func (h *Hooks) Seen() []Hook {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]Hook(nil), h.seen...)
}

// Log is CRIU's log as it stood at the last hook: some engines remove it with the
// task.
func (h *Hooks) Log() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.log
}

// criuLog is the log that was written to last in a work folder.
func (s *Session) criuLog(dir string) string {
	var newest time.Time
	var text string
	for _, name := range []string{"dump.log", "restore.log"} {
		name = s.Path(filepath.Join(dir, name))
		if st, err := os.Stat(name); err == nil && st.ModTime().After(newest) {
			b, _ := os.ReadFile(name)
			newest, text = st.ModTime(), string(b)
		}
	}
	return text
}

// Close ends the listening.
func (h *Hooks) Close() error {
	err := h.l.Close()
	h.wg.Wait()
	return err
}

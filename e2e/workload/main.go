// The workload is what the tests run inside a container, a static program: a
// server of numbered streams and of connections that do as they are told. Started
// by CRIU as an action script it passes the hook on to the test and gives CRIU
// the test's answer.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/criu-netlock/criu-netlock/e2e/testbed"
	"github.com/criu-netlock/criu-netlock/e2e/traffic"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("workload: ")
	if os.Getenv("CRTOOLS_SCRIPT_ACTION") != "" {
		if err := relay(); err != nil {
			log.Fatal(err)
		}
		return
	}
	if len(os.Args) > 1 {
		if err := other(os.Args[1:]); err != nil {
			log.Fatal(err)
		}
		return
	}
	if err := serve(); err != nil {
		log.Fatal(err)
	}
}

// other is what the workload's companions in a pod do: "pause" nothing, which keeps
// the pod's namespaces; "stream PORT" serves numbered streams at that port; "numbers"
// is for a traffic.Client.
func other(args []string) error {
	switch {
	case len(args) == 1 && args[0] == "pause":
		for {
			time.Sleep(time.Hour)
		}
	case len(args) == 2 && args[0] == "stream":
		port, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		return listen(map[int]func(*net.TCPConn){port: stream})
	case len(args) == 1 && args[0] == "numbers":
		c, err := net.ListenPacket("udp4", ":"+strconv.Itoa(traffic.EchoPort))
		if err != nil {
			return err
		}
		// While it is frozen nobody reads what is delivered: as much room as there is to be had.
		if err := c.(*net.UDPConn).SetReadBuffer(16 << 20); err != nil {
			return err
		}
		go func() { log.Fatal(traffic.ServeNumbers(c)) }()
		return listen(map[int]func(*net.TCPConn){traffic.EchoPort: traffic.Echo, traffic.StreamPort: stream})
	}
	return fmt.Errorf("unknown arguments %q", args)
}

// relay asks the test, at the socket beside this program, what to answer CRIU.
func relay() error {
	c, err := net.DialTimeout("unix", filepath.Join(filepath.Dir(os.Args[0]), testbed.HookSocket), 5*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	pid, pidSet := os.LookupEnv("CRTOOLS_INIT_PID")
	if err := json.NewEncoder(c).Encode(testbed.Hook{Action: os.Getenv("CRTOOLS_SCRIPT_ACTION"), PID: pid, PIDSet: pidSet, Dir: dir, CRIU: os.Getppid()}); err != nil {
		return err
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	if answer = strings.TrimSpace(answer); answer != "ok" {
		return fmt.Errorf("the test says: %s", answer)
	}
	return nil
}

func serve() error {
	var states traffic.Commander
	return listen(map[int]func(*net.TCPConn){
		traffic.StreamPort:  stream,
		traffic.StatesPort:  states.Add,
		traffic.MutedPort:   states.Add,
		traffic.ControlPort: func(c *net.TCPConn) { states.Control(c) },
	})
}

func stream(c *net.TCPConn) {
	if err := traffic.Serve(c); err != nil {
		log.Print(err)
	}
}

// listen accepts connections at ports until that fails.
func listen(handlers map[int]func(*net.TCPConn)) error {
	errs := make(chan error)
	for port, handle := range handlers {
		// A listener for each family: IPv4 as such, and not mapped into IPv6.
		for _, family := range []string{"tcp4", "tcp6"} {
			// Go's listeners are MPTCP by default, which CRIU cannot dump.
			var lc net.ListenConfig
			lc.SetMultipathTCP(false)
			l, err := lc.Listen(context.Background(), family, ":"+strconv.Itoa(port))
			if err != nil {
				return err
			}
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						errs <- err
						return
					}
					go handle(c.(*net.TCPConn))
				}
			}()
		}
	}
	return <-errs
}

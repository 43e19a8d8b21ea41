package main

// What check says of each engine on this host: whether it would call us, and from where.

import (
	"os"

	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/setup"
)

// engineProgram is what tells that an engine is there.
var engineProgram = map[string]string{"runc": "runc", "crun": "crun", "podman": "podman", "docker": "dockerd", "lxc": "lxc-checkpoint"}

func (k *checker) engines(scripts []script, v criuVersion) {
	for _, e := range setup.Engines {
		program := engineProgram[e.Name]
		if program == "" || lookPath(program) == "" {
			continue
		}
		where := ""
		for _, s := range scripts {
			if s.ours && s.bad == "" && (!s.file.rpc || s.file.path == e.File) {
				where = s.where
			}
		}
		advice := "run criu-netlock setup " + e.Name
		switch {
		case where == "" && e.Name == "lxc":
			k.warn(e.Name, advice+", or give lxc-checkpoint -A", "no file that its CRIU reads names criu-netlock")
		case where == "":
			k.warn(e.Name, advice, "no file that its CRIU reads names criu-netlock")
		case e.RPC && v.below(3, 19):
			k.warn(e.Name, "use CRIU 3.19 or newer", "%s names criu-netlock, but this CRIU does not run scripts of a file for an RPC client", where)
		case e.Name == "docker" && !experimental("/etc/docker/daemon.json"):
			k.warn(e.Name, `put "experimental": true into /etc/docker/daemon.json and restart docker`, "calls criu-netlock, by %s; docker checkpoint needs an experimental daemon", where)
		case e.Name == "docker" && !hasOption(setup.RuncConf, "tcp-established"):
			k.warn(e.Name, "run criu-netlock setup docker --tcp-established", "calls criu-netlock, by %s; containers with live TCP connections cannot be checkpointed", where)
		default:
			k.ok(e.Name, "calls criu-netlock, by %s", where)
		}
	}
}

// hasOption tells whether a configuration file of CRIU has an option.
func hasOption(path, option string) bool {
	b, err := os.ReadFile(path)
	if err != nil {
		return false
	}
	for _, o := range parseCRIU(string(b)) {
		if o.name == option {
			return true
		}
	}
	return false
}

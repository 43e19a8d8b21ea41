package main

// What check says of each engine on this host: whether it would call us, and from where.

import (
	"github.com/criu-netlock/criu-netlock/cmd/criu-netlock/setup"
)

func (k *checker) engines(scripts []script, v criuVersion) {
	for _, e := range setup.Engines {
		if e.Name == "criu" || lookPath(e.Program) == "" { // CRIU itself has lines of its own
			continue
		}
		where, script := "", true
		for _, s := range scripts {
			if s.ours && s.bad == "" && (!s.file.rpc || s.file.path == e.File) {
				where = s.where
			}
		}
		here := inPlace()
		if e.RPC && here != "" { // whatever the files say
			where, script = here+", in CRIU's place", false
		}
		made := linkOf(e)
		advice := "run criu-netlock setup " + e.Name
		switch {
		case made != "" && here == "":
			k.warn(e.Name, advice+" --as-criu="+made+" again, and look what else is called criu in PATH", "was set up with criu-netlock as %s, which is not the criu in PATH", made)
		case where == "" && e.Name == "lxc":
			k.warn(e.Name, advice+", or give lxc-checkpoint -A", "no file that its CRIU reads names criu-netlock")
		case where == "":
			k.warn(e.Name, advice, "no file that its CRIU reads names criu-netlock")
		case script && e.RPC && v.below(3, 19):
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

// linkOf is the link that setup made for an engine.
func linkOf(e setup.Engine) string {
	f, err := setup.ReadFile(e.File)
	if err != nil {
		return ""
	}
	links, err := setup.Links(f.Text)
	if err != nil {
		return ""
	}
	return links[e.Name]
}

// hasOption tells whether a file of CRIU's has an option.
func hasOption(path, option string, values ...string) bool {
	f, err := setup.ReadFile(path)
	return err == nil && setup.Has(f.Text, option, values...)
}

package iptables

// Tools returns the paths of the programs that a lock by a variant runs, for IPv4 and
// for IPv6: those that the backend itself would take, wherever a user's PATH leads. The
// error names one that is missing.
func Tools(v Variant) (paths []string, err error) {
	for _, f := range families() {
		for _, verb := range []string{"restore", "save"} {
			if v == NFT && verb == "save" {
				continue // its rules are read by netlink
			}
			p, e := findTool(v, f, verb)
			if e != nil {
				err = e
				continue
			}
			paths = append(paths, p)
		}
	}
	return paths, err
}

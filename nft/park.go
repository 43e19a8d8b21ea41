package nft

import "github.com/criu-netlock/criu-netlock/nft/nfnl"

// Park is nfnl.Park.
func Park(fd int) { nfnl.Park(fd) }

//go:build !older

package e2e

import "github.com/criu-netlock/criu-netlock/e2e/testbed"

// The root that the tests run in, and what of the machine they need for it.
var (
	recipe = testbed.Default
	tools  = testbed.Tools
)

// patience is by how much more than usual everything may take.
const patience = 1

// least is the least of a lock that CRIU can be told to have.
const least = "skip"

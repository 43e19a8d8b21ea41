package early

// Capabilities, as bits of linux/capability.h's numbers.
const (
	capDACReadSearch = 1 << 2
	capNetAdmin      = 1 << 12
	capNetRaw        = 1 << 13
	capSysModule     = 1 << 16
	capSysPtrace     = 1 << 19
	capSysAdmin      = 1 << 21

	// Needs are the capabilities with which a process of ours goes from one namespace to the
	// next: to enter them, to change their rules, to look at their tasks, for legacy
	// iptables, and to read a configuration wherever it is.
	Needs = uint64(capSysAdmin | capNetAdmin | capSysPtrace | capNetRaw | capDACReadSearch)
	// NeedsInside are those that are left to need in the one namespace that was entered.
	NeedsInside = uint64(capNetAdmin | capNetRaw)
	// Lends is what a hook does not use, but what it executes may: legacy iptables has
	// modprobe load its modules.
	Lends = uint64(capSysModule)
)

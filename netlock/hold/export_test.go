package hold

import "time"

// SetLateTime changes how long a packet that is on its way is waited for, and returns what puts it back.
func SetLateTime(d time.Duration) (back func()) {
	was := lateTime
	lateTime = d
	return func() { lateTime = was }
}

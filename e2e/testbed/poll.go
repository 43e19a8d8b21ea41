package testbed

import (
	"context"
	"fmt"
	"time"
)

// Poll calls f until it returns nil. When ctx ends first, it returns the last error
// that f had while there was time.
func Poll(ctx context.Context, f func() error) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	var err error
	for {
		last := err
		if err = f(); err == nil {
			return nil
		}
		if ctx.Err() != nil && last != nil {
			err = last
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (%w)", err, ctx.Err())
		case <-tick.C:
		}
	}
}

package wire

import (
	"log/slog"
	"strings"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/action"
)

// HoldAttrs is what a log is told of mode hold, and whether it is a warning.
func HoldAttrs(rep action.Report) (attrs []slog.Attr, warn bool) {
	if rep.Mode == netlock.Hold {
		attrs = append(attrs, slog.String("mode", string(rep.Mode)))
	}
	if rep.NotHeld != nil {
		attrs = append(attrs, slog.String("mode", string(rep.Mode)), slog.String("not_held", OneLine(rep.NotHeld.Error())))
	}
	if rep.NotDelivered != nil {
		attrs = append(attrs, slog.String("not_delivered", OneLine(rep.NotDelivered.Error())))
	}
	if q := rep.Queue; q != (netlock.Queue{}) {
		attrs = append(attrs, slog.Uint64("delivered", q.Delivered), slog.Uint64("overflowed", q.Overflowed), slog.Uint64("lost", q.Lost))
		warn = q.Overflowed > 0 || q.Lost > 0
	}
	return attrs, warn || rep.NotHeld != nil || rep.NotDelivered != nil
}

// OneLine keeps joined errors, and whatever a user gave, on one line.
func OneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ReplaceAll(s, "\n", "; "))
}

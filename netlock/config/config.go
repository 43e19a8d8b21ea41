// Package config reads what a user can set, /etc/criu/netlock.toml. CRIU gives its
// action scripts no arguments, so a file is the only way in. See netlock.toml beside
// this file for every key.
package config

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
	"github.com/criu-netlock/criu-netlock/netlock/guard"
)

// DefaultPath is the file that is read where EnvPath names no other.
const DefaultPath = "/etc/criu/netlock.toml"

// EnvPath is the environment variable that names another file.
const EnvPath = "CRIU_NETLOCK_CONFIG"

// Bounds of the file's size, in bytes, and of the timeout. A timeout below a second
// leaves no time for the work, since netlock.UndoTime of it is kept for undoing.
const (
	MaxSize    = 64 << 10
	MinTimeout = time.Second
	MaxTimeout = time.Minute
	// MaxGuardTimeout bounds guard-timeout; nobody waits for the guard.
	MaxGuardTimeout = time.Hour
)

// The values of the key backend.
const (
	Auto     = "auto"
	NFT      = "nft"
	IPTables = "iptables"
)

// The values of the key mode.
const (
	Drop = "drop"
	Hold = "hold"
)

// Bounds of hold-packets and hold-bytes. Linux 6.18 keeps no more than 65,536 packets in a
// queue, whatever it is told.
const (
	MaxHoldPackets = 65536
	MinHoldBytes   = 64 << 10
	MaxHoldBytes   = 4 << 30
)

// Config is what a user can set.
type Config struct {
	// Backend is Auto, NFT or IPTables.
	Backend string
	// Timeout bounds a hook or a command in all, undoing included.
	Timeout time.Duration
	// LogLevel is "debug", "info", "warn" or "error".
	LogLevel string
	// Allow is what passes in spite of the lock.
	Allow []netlock.Rule
	// Guard: a resident process watches every checkpoint.
	Guard bool
	// GuardTimeout is how long the guard tries an unlock that fails again.
	GuardTimeout time.Duration
	// OnFailedRestore is "previous", "keep" or "unlock".
	OnFailedRestore string
	// CRIU is the program that criu-netlock in CRIU's place hands on to, an absolute path;
	// empty for the next criu in PATH.
	CRIU string
	// Mode is Drop, Hold or Auto: what becomes of what comes in.
	Mode string
	// HoldPackets and HoldBytes bound what is held in a namespace.
	HoldPackets uint32
	HoldBytes   uint64
	// CPULatency is how long a processor may take to wake up during a checkpoint;
	// guard.AutoLatency chooses, guard.NoLatency leaves them alone.
	CPULatency time.Duration
}

// Default is what an absent file means.
func Default() Config {
	return Config{
		Backend: Auto, Timeout: 5 * time.Second, LogLevel: "info", Guard: true, GuardTimeout: time.Minute, OnFailedRestore: "previous",
		Mode: Drop, HoldPackets: 16384, HoldBytes: 64 << 20, CPULatency: guard.AutoLatency,
	}
}

// Path is the file that the environment names.
func Path(lookup func(string) (string, bool)) string {
	if p, _ := lookup(EnvPath); p != "" {
		return p
	}
	return DefaultPath
}

// ParseBackend checks a value of the key backend.
func ParseBackend(s string) (string, error) { return oneOf(s, Auto, NFT, IPTables) }

// ParseLogLevel checks a value of the key log-level.
func ParseLogLevel(s string) (string, error) { return oneOf(s, "debug", "info", "warn", "error") }

// ParseOnFailedRestore checks a value of the key on-failed-restore.
func ParseOnFailedRestore(s string) (string, error) { return oneOf(s, "previous", "keep", "unlock") }

// ParseMode checks a value of the key mode.
func ParseMode(s string) (string, error) { return oneOf(s, Drop, Hold, Auto) }

// ParseCPULatency checks a value of the key cpu-latency.
func ParseCPULatency(s string) (time.Duration, error) {
	switch s {
	case Auto:
		return guard.AutoLatency, nil
	case "off":
		return guard.NoLatency, nil
	}
	d, err := time.ParseDuration(s)
	switch {
	case err != nil:
		return 0, fmt.Errorf("%q is none of auto, off and a duration such as 0s or 20us", clip(s))
	case d%time.Microsecond != 0:
		return 0, fmt.Errorf("%q is no whole number of microseconds", clip(s))
	}
	return duration(s, 0, guard.MaxLatency)
}

// checkNumber checks a number as TOML writes it.
func checkNumber(key, s string) error {
	var least, most int64
	switch key {
	case "hold-packets":
		least, most = 1, MaxHoldPackets
	case "hold-bytes":
		least, most = MinHoldBytes, MaxHoldBytes
	default:
		return nil // of a wrong type, which the decoder tells
	}
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil || n < least || n > most {
		return fmt.Errorf("%s is out of range; want %d to %d", clip(s), least, most)
	}
	return nil
}

// ParseCRIU checks a value of the key criu.
func ParseCRIU(s string) (string, error) {
	if s != "" && (s[0] != '/' || strings.ContainsRune(s, 0)) {
		return "", fmt.Errorf("%q is no absolute path", clip(s))
	}
	return s, nil
}

func oneOf(s string, words ...string) (string, error) {
	for _, w := range words {
		if s == w {
			return s, nil
		}
	}
	last := len(words) - 1
	return "", fmt.Errorf("%q is none of %s and %s", clip(s), strings.Join(words[:last], ", "), words[last])
}

// ParseTimeout reads a value of the key timeout.
func ParseTimeout(s string) (time.Duration, error) { return duration(s, MinTimeout, MaxTimeout) }

// ParseGuardTimeout reads a value of the key guard-timeout.
func ParseGuardTimeout(s string) (time.Duration, error) {
	return duration(s, MinTimeout, MaxGuardTimeout)
}

func duration(s string, least, most time.Duration) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	switch {
	case err != nil:
		return 0, fmt.Errorf("%q is not a duration; want one such as 5s or 1500ms", clip(s))
	case d < least || d > most:
		return 0, fmt.Errorf("%q is out of range; want %v to %v", clip(s), least, most)
	}
	return d, nil
}

// clip keeps what a user gave from filling the one line that tells about it.
func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}

// Load reads a file. One that is not there means the defaults. Every error is a
// *netlock.Error of KindInput, and with it come the defaults.
func Load(path string) (Config, error) {
	b, err := Read(path, true)
	return FromRead(path, b, err)
}

// FromRead is Load for a caller who has called Read.
func FromRead(path string, text []byte, err error) (Config, error) {
	if errors.Is(err, os.ErrNotExist) {
		return Default(), nil
	}
	if err != nil {
		return Default(), fail(fmt.Errorf("%s: %w", name(path), err))
	}
	return Parse(path, text)
}

// Read reads a regular file or /dev/null: what else a path can name may block, or never
// end. Unless patient, it answers ErrMayWait of a file system that may never answer.
func Read(path string, patient bool) ([]byte, error) {
	if strings.ContainsRune(path, 0) {
		return nil, errors.New("a NUL in the file's name")
	}
	open := openLocal
	if patient {
		open = func(path string) (int, error) {
			return unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
		}
	}
	fd, err := open(path)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if isNull := st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3); !isNull && st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errors.New("not a regular file")
	}
	var b []byte
	buf := make([]byte, 4096)
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, err
		case n == 0:
			return b, nil
		}
		if b = append(b, buf[:n]...); len(b) > MaxSize {
			return nil, fmt.Errorf("larger than %d bytes", MaxSize)
		}
	}
}

// Parse reads the text of a file; path is for its errors alone, which begin with
// FILE:LINE:COLUMN. The column counts bytes from 1.
func Parse(path string, text []byte) (Config, error) {
	cfg := Default()
	var raw struct {
		Backend  *string  `toml:"backend"`
		Timeout  *string  `toml:"timeout"`
		LogLevel *string  `toml:"log-level"`
		Allow    []string `toml:"allow"`
		Guard    *bool    `toml:"guard"`

		GuardTimeout    *string `toml:"guard-timeout"`
		OnFailedRestore *string `toml:"on-failed-restore"`
		CRIU            *string `toml:"criu"`
		Mode            *string `toml:"mode"`
		HoldPackets     *int64  `toml:"hold-packets"`
		HoldBytes       *int64  `toml:"hold-bytes"`
		CPULatency      *string `toml:"cpu-latency"`
	}
	if err := strict(path, text); err != nil {
		return cfg, fail(err)
	}
	if err := decode(text, &raw); err != nil {
		return cfg, fail(position(path, err))
	}

	// The decoder has checked the types. The values are checked here, and should one be
	// wrong, decoding once more with fields that check for themselves tells where it stands.
	set := Default()
	fields := struct {
		Backend  value   `toml:"backend"`
		Timeout  value   `toml:"timeout"`
		LogLevel value   `toml:"log-level"`
		Allow    []allow `toml:"allow"`
		Guard    bool    `toml:"guard"`

		GuardTimeout    value `toml:"guard-timeout"`
		OnFailedRestore value `toml:"on-failed-restore"`
		CRIU            value `toml:"criu"`
		Mode            value `toml:"mode"`
		HoldPackets     int64 `toml:"hold-packets"`
		HoldBytes       int64 `toml:"hold-bytes"`
		CPULatency      value `toml:"cpu-latency"`
	}{
		Backend:         value{func(s string) (err error) { set.Backend, err = ParseBackend(s); return err }},
		Timeout:         value{func(s string) (err error) { set.Timeout, err = ParseTimeout(s); return err }},
		LogLevel:        value{func(s string) (err error) { set.LogLevel, err = ParseLogLevel(s); return err }},
		GuardTimeout:    value{func(s string) (err error) { set.GuardTimeout, err = ParseGuardTimeout(s); return err }},
		OnFailedRestore: value{func(s string) (err error) { set.OnFailedRestore, err = ParseOnFailedRestore(s); return err }},
		CRIU:            value{func(s string) (err error) { set.CRIU, err = ParseCRIU(s); return err }},
		Mode:            value{func(s string) (err error) { set.Mode, err = ParseMode(s); return err }},
		CPULatency:      value{func(s string) (err error) { set.CPULatency, err = ParseCPULatency(s); return err }},
	}
	check := func() error {
		for _, f := range []struct {
			s *string
			v value
		}{{raw.Backend, fields.Backend}, {raw.Timeout, fields.Timeout}, {raw.LogLevel, fields.LogLevel}, {raw.GuardTimeout, fields.GuardTimeout}, {raw.OnFailedRestore, fields.OnFailedRestore}, {raw.CRIU, fields.CRIU}, {raw.Mode, fields.Mode}, {raw.CPULatency, fields.CPULatency}} {
			if f.s != nil {
				if err := f.v.set(*f.s); err != nil {
					return err
				}
			}
		}
		if raw.Guard != nil {
			set.Guard = *raw.Guard
		}
		if raw.HoldPackets != nil { // strict has checked these
			set.HoldPackets = uint32(*raw.HoldPackets)
		}
		if raw.HoldBytes != nil {
			set.HoldBytes = uint64(*raw.HoldBytes)
		}
		for _, s := range raw.Allow {
			r, err := netlock.ParseRule(s)
			if err != nil {
				return err
			}
			set.Allow = append(set.Allow, r)
		}
		return nil
	}
	if err := check(); err != nil {
		if placed := decode(text, &fields); placed != nil {
			err = placed
		}
		return cfg, fail(position(path, err))
	}
	return set, nil
}

// value is a field that checks itself. It is a struct because go-toml sets a string
// kind without asking its UnmarshalText.
type value struct{ set func(string) error }

func (v *value) UnmarshalText(b []byte) error { return v.set(string(b)) }

// allow is a rule that no table can fill field by field.
type allow struct{ rule netlock.Rule }

func (a *allow) UnmarshalText(b []byte) error { return a.rule.UnmarshalText(b) }

func decode(text []byte, v any) error {
	return toml.NewDecoder(strings.NewReader(string(text))).DisallowUnknownFields().Decode(v)
}

// strict finds the mistakes that the decoder takes, or cannot place: numbers out of range; it matches keys
// whatever their case, so that Backend beside backend would be the same key twice, and
// it says 1:1 of an array within an array. Broken TOML is left to it.
func strict(path string, text []byte) error {
	var p unstable.Parser
	p.Reset(text)
	for p.NextExpression() {
		e := p.Expression()
		switch e.Kind {
		case unstable.KeyValue, unstable.Table, unstable.ArrayTable:
		default:
			continue
		}
		key := e.Key()
		if !key.Next() {
			continue
		}
		first := key.Node()
		if name := string(first.Data); !slices.Contains(keys[:], name) {
			return placedAt(path, text, int(first.Raw.Offset), unknownKey(name))
		}
		if e.Kind != unstable.KeyValue || !key.IsLast() {
			continue
		}
		if e.Value().Kind == unstable.Integer {
			if err := checkNumber(string(first.Data), string(e.Value().Data)); err != nil {
				return placedAt(path, text, skip(text, int(first.Raw.Offset+first.Raw.Length), " \t="), err)
			}
		}
		if e.Value().Kind != unstable.Array {
			continue
		}
		// An array has no range of its own: it begins behind what comes before it.
		at := skip(text, int(first.Raw.Offset+first.Raw.Length), " \t=")
		at++ // the bracket
		for items := e.Value().Children(); items.Next(); {
			item := items.Node()
			if item.Kind == unstable.Array {
				return placedAt(path, text, skip(text, at, " \t\r\n,"), wrongType("array"))
			}
			if item.Kind != unstable.String {
				break // the decoder places that well
			}
			at = int(item.Raw.Offset + item.Raw.Length)
		}
	}
	return nil
}

// skip returns where, from at on, something else than the given characters and comments
// begins.
func skip(text []byte, at int, chars string) int {
	for ; at < len(text); at++ {
		switch {
		case text[at] == '#':
			for at+1 < len(text) && text[at+1] != '\n' {
				at++
			}
		case !strings.ContainsRune(chars, rune(text[at])):
			return at
		}
	}
	return at
}

// keys are all that a file can set.
var keys = [...]string{"backend", "timeout", "log-level", "allow", "guard", "guard-timeout", "on-failed-restore", "criu", "mode", "hold-packets", "hold-bytes", "cpu-latency"}

func unknownKey(key string) error {
	return fmt.Errorf("unknown key %q; want one of %s, in small letters", clip(key), strings.Join(keys[:], ", "))
}

func wrongType(got string) error {
	return errors.New("wrong type: " + got + ", where a string, for allow a list of strings, for guard true or false, for hold-packets and hold-bytes a number, is wanted")
}

// placedAt words an error at an offset.
func placedAt(path string, text []byte, offset int, err error) error {
	before := string(text[:min(offset, len(text))])
	return fmt.Errorf("%s:%d:%d: %w", name(path), 1+strings.Count(before, "\n"), len(before)-strings.LastIndex(before, "\n"), err)
}

// position words a decoder's error as FILE:LINE:COLUMN: what is wrong.
func position(path string, err error) error {
	var (
		at      *toml.DecodeError
		unknown *toml.StrictMissingError
	)
	switch {
	case errors.As(err, &unknown) && len(unknown.Errors) > 0:
		at = &unknown.Errors[0]
		err = unknownKey(strings.Join(at.Key(), "."))
	case errors.As(err, &at):
		msg := strings.TrimPrefix(at.Error(), "toml: ")
		err = errors.New(msg)
		if got, _, ok := strings.Cut(msg, " into "); ok && strings.HasPrefix(got, "cannot decode TOML ") {
			err = wrongType(strings.TrimPrefix(got, "cannot decode TOML "))
		}
	default:
		return fmt.Errorf("%s: %w", name(path), err)
	}
	line, column := at.Position()
	return fmt.Errorf("%s:%d:%d: %w", name(path), line, column, err)
}

// name is the path in a form that fits on one line.
func name(path string) string {
	for _, r := range path {
		if r < ' ' || r == 0x7f {
			return fmt.Sprintf("%q", path)
		}
	}
	return path
}

func fail(err error) error {
	return &netlock.Error{Kind: netlock.KindInput, Op: "read configuration", Err: err}
}

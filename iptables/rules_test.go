package iptables

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/criu-netlock/criu-netlock/netlock"
)

var moment = time.Date(2026, 11, 23, 15, 13, 55, 0, time.UTC)

func TestParseMatch(t *testing.T) {
	for spec, want := range map[string]match{
		"-j DROP": {target: "DROP"},
		"-i lo -p tcp -m mark --mark 0xc114 -j ACCEPT":                                                    {in: "lo", proto: "tcp", mark: "0xc114", target: "ACCEPT"},
		"-i lo -p 6 -m tcp -m mark --mark 0xc114/0xffffffff -j ACCEPT":                                    {in: "lo", proto: "tcp", mark: "0xc114", target: "ACCEPT"},
		"-p icmpv6 -m icmp6 --icmpv6-type 135 -j ACCEPT":                                                  {proto: "ipv6-icmp", icmpType: "135", target: "ACCEPT"},
		"-p 58 -m icmp6 --icmpv6-type 135 -j ACCEPT":                                                      {proto: "ipv6-icmp", icmpType: "135", target: "ACCEPT"},
		"-s 10.0.0.5 -d fd00::/8 -j ACCEPT":                                                               {src: "10.0.0.5/32", dst: "fd00::/8", target: "ACCEPT"},
		`-m comment --comment "was -j CRIU-NETLOCK-IN" -j ACCEPT`:                                         {comment: "was -j CRIU-NETLOCK-IN", target: "ACCEPT"},
		`-m comment --comment "a\"b\\c" -j DROP`:                                                          {comment: `a"b\c`, target: "DROP"},
		`-m comment --comment x -g CRIU-NETLOCK-IN`:                                                       {comment: "x", target: chainIn, rest: "-g "},
		"-p tcp ! --dport 22 -j ACCEPT":                                                                   {proto: "tcp", dport: "22", target: "ACCEPT", rest: "! "},
		"-p tcp -m tcp --tcp-flags SYN,ACK SYN -j DROP":                                                   {proto: "tcp", target: "DROP", rest: "--tcp-flags SYN,ACK SYN "},
		"-m mark --mark 0x1 -m mark --mark 0x2 -j DROP":                                                   {mark: "0x1", target: "DROP", rest: "--mark 0x2 "},
		`-m comment --comment "open`:                                                                      {comment: "open", rest: `-m comment --comment "open`},
		"-m string --string \"-j CRIU-NETLOCK-OUT\" --algo bm":                                            {rest: "-m string --string -j CRIU-NETLOCK-OUT --algo bm "},
		"-m comment --comment \"criu-netlock 1 x\" -m mark --mark 0x5 -m comment --comment \"y\" -j DROP": {comment: "criu-netlock 1 x", mark: "0x5", target: "DROP", rest: "--comment y "},
	} {
		if got := parseMatch(spec); got != want {
			t.Errorf("%s\n got %+v\nwant %+v", spec, got, want)
		}
	}
}

// Every rule that we write reads back as the rule that it was made from.
func TestSpecsReadBack(t *testing.T) {
	for _, s := range []string{"tcp dport 22", "ip daddr 10.0.0.5 tcp dport 2049", "ip6 saddr fd00::/8 udp sport 53 dport 1024", "icmp", "icmpv6", "sctp sport 7", "ip6 daddr ::1"} {
		r, err := netlock.ParseRule(s)
		if err != nil {
			t.Fatal(err)
		}
		m := parseMatch(allowSpec(r))
		if m.rest != "" || m.target != "ACCEPT" {
			t.Errorf("%s became %+v", s, m)
		}
	}
}

// lockText is a table with a lock as iptables-save prints it.
func lockText(name string) string {
	var b strings.Builder
	b.WriteString("# a comment\n*" + name + "\n")
	for _, h := range hooks(name) {
		b.WriteString(":" + h[0] + " ACCEPT [1:2]\n")
	}
	b.WriteString(":" + chainIn + " - [0:0]\n:" + chainOut + " - [0:0]\n")
	for _, h := range hooks(name) {
		b.WriteString("[9:540] -A " + h[0] + " -j " + h[1] + "\n")
	}
	for i, c := range []string{chainIn, chainOut} {
		for _, s := range specs(c, "lo", false, nil) {
			b.WriteString("[0:0] -A " + c + " " + s + "\n")
		}
		b.WriteString([]string{"[3:180]", "[4:240]"}[i] + " -A " + c + " " + dropSpec(netlock.Comment(moment, netlock.Caller{PID: 7, Name: "criu"})) + "\n")
	}
	return b.String() + "COMMIT\n"
}

func TestJudge(t *testing.T) {
	drop := dropSpec(netlock.Comment(moment, netlock.Caller{PID: 7, Name: "criu"}))
	accept := "-A " + chainIn + " -i lo -p tcp"
	for name, c := range map[string]struct {
		table    string
		old, new string // replaced in the table's text
		dead     string
		locks    bool
		why      string // part of it; "" if intact
	}{
		"raw":                        {table: "raw", locks: true},
		"filter":                     {table: "filter", locks: true},
		"foreign rule behind":        {table: "raw", old: "[9:540] -A OUTPUT -j " + chainOut, new: "-A OUTPUT -j " + chainOut + "\n-A OUTPUT -j ACCEPT", locks: true},
		"dead":                       {table: "raw", dead: "is dormant", why: "dormant"},
		"jump not first":             {table: "raw", old: "[9:540] -A OUTPUT -j " + chainOut, new: "-A OUTPUT -p udp -j ACCEPT\n-A OUTPUT -j " + chainOut, why: "begin chain OUTPUT"},
		"jump doubled":               {table: "raw", old: "[9:540] -A OUTPUT -j " + chainOut, new: "-A OUTPUT -j " + chainOut + "\n-A OUTPUT -j " + chainOut, locks: true, why: "3 times"},
		"jump with a match":          {table: "raw", old: "-A OUTPUT -j", new: "-A OUTPUT -p tcp -j", why: "begin chain OUTPUT"},
		"goto":                       {table: "raw", old: "-A OUTPUT -j", new: "-A OUTPUT -g", why: "begin chain OUTPUT"},
		"jump exchanged":             {table: "raw", old: "-A PREROUTING -j " + chainIn, new: "-A PREROUTING -j " + chainOut, why: "begin chain PREROUTING"},
		"jump missing in FORWARD":    {table: "filter", old: "[9:540] -A FORWARD -j " + chainIn + "\n", why: "begin chain FORWARD"},
		"jump from elsewhere":        {table: "raw", old: "COMMIT", new: "-A FOO -p udp -j " + chainIn + "\nCOMMIT", locks: true, why: "3 times"},
		"only named in a comment":    {table: "raw", old: "COMMIT", new: `-A FOO -m comment --comment "-j ` + chainIn + `" -j ACCEPT` + "\nCOMMIT", locks: true},
		"no out":                     {table: "raw", old: ":" + chainOut + " - [0:0]\n", why: "no chain " + chainOut},
		"accept in front":            {table: "raw", old: accept, new: "-A " + chainIn + " -j ACCEPT\n" + accept, why: "foreign rule"},
		"return in front":            {table: "raw", old: accept, new: "-A " + chainIn + " -j RETURN\n" + accept, why: "foreign rule"},
		"accept behind":              {table: "raw", old: "COMMIT", new: "-A " + chainIn + " -j ACCEPT\nCOMMIT", locks: true, why: "more rules"},
		"accept twice":               {table: "raw", old: accept, new: accept + " -m mark --mark 0xc114 -j ACCEPT\n" + accept, locks: true, why: "twice"},
		"accept missing":             {table: "raw", old: "[0:0] " + accept + " -m mark --mark 0xc114 -j ACCEPT\n", locks: true, why: "twice or out of order"},
		"drops only some":            {table: "raw", old: "-A " + chainOut + " -m comment", new: "-A " + chainOut + " -p udp -m comment", why: "foreign rule"},
		"drops only some, disguised": {table: "raw", old: "-A " + chainOut + " " + drop, new: "-A " + chainOut + " " + strings.TrimSuffix(drop, "-j DROP") + `-m mark --mark 0x5 -m comment --comment "x" -j DROP`, why: "foreign rule"},
		"forged comment":             {table: "raw", old: "criu-netlock 1", new: "criu-netlock 9", locks: true, why: "no metadata"},
		"comment elsewhere":          {table: "raw", old: "--mark 0xc114", new: "--mark 0xc114 -m comment --comment x", locks: true, why: "comments"},
		"holds":                      {table: "raw", old: "-A " + chainIn + " " + drop, new: "-A " + chainIn + " " + lastSpec(chainIn, "7", netlock.Comment(moment, netlock.Caller{PID: 7, Name: "criu"})), locks: true},
		"holds, fails open":          {table: "raw", old: "-A " + chainIn + " " + drop, new: "-A " + chainIn + " " + lastSpec(chainIn, "7", netlock.Comment(moment, netlock.Caller{PID: 7, Name: "criu"})) + " --queue-bypass", why: "foreign rule"},
		"holds in many queues":       {table: "raw", old: "-A " + chainIn + " " + drop, new: "-A " + chainIn + " " + strings.Replace(lastSpec(chainIn, "7", netlock.Comment(moment, netlock.Caller{PID: 7, Name: "criu"})), "--queue-num 7", "--queue-balance 7:9", 1), why: "foreign rule"},
		"holds what goes out":        {table: "raw", old: "-A " + chainOut + " " + drop, new: "-A " + chainOut + " " + lastSpec(chainIn, "7", netlock.Comment(moment, netlock.Caller{PID: 7, Name: "criu"})), why: "foreign rule"},
		"rejects":                    {table: "raw", old: "-j DROP", new: "-j REJECT", why: "foreign rule"},
	} {
		text := lockText(c.table)
		if c.old != "" {
			if !strings.Contains(text, c.old) {
				t.Fatalf("%s: the table has no %q:\n%s", name, c.old, text)
			}
			text = strings.Replace(text, c.old, c.new, 1)
		}
		v := parseSave(text)[0].judge(false, "lo", nil, c.dead)
		if v.locks != c.locks || (v.why == "") != (c.why == "") || !strings.Contains(v.why, c.why) {
			t.Errorf("%s: locks %v, why %q; want %v, %q", name, v.locks, v.why, c.locks, c.why)
		}
		if c.old == "" && (v.in != 3 || v.out != 4 || !v.since.Equal(moment) || v.caller.PID != 7) {
			t.Errorf("%s: read as %+v", name, v)
		}
	}
}

func TestInputs(t *testing.T) {
	c := netlock.Comment(moment, netlock.Caller{PID: 7, Name: "criu"})
	tab := parseSave(`*raw
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:CRIU-NETLOCK-IN - [0:0]
:FOO - [0:0]
-A PREROUTING -j CRIU-NETLOCK-IN
-A PREROUTING -j CRIU-NETLOCK-IN
-A PREROUTING -p udp -m comment --comment "x \"y" -j CRIU-NETLOCK-IN
-A FOO -m comment --comment "-j CRIU-NETLOCK-IN" -j ACCEPT
-A CRIU-NETLOCK-IN -j FOO
COMMIT
`)[0]
	deletes := `-D PREROUTING -j CRIU-NETLOCK-IN
-D PREROUTING -j CRIU-NETLOCK-IN
-D PREROUTING -p udp -m comment --comment "x \"y" -j CRIU-NETLOCK-IN
`
	want := `*raw
:CRIU-NETLOCK-IN - [0:0]
:CRIU-NETLOCK-OUT - [0:0]
` + deletes + `-A CRIU-NETLOCK-IN -i lo -p tcp -m mark --mark 0xc114 -j ACCEPT
-A CRIU-NETLOCK-IN -m comment --comment "criu-netlock 1 2026-11-23T15:13:55Z 7 criu" -j DROP
-A CRIU-NETLOCK-OUT -o lo -p tcp -m mark --mark 0xc114 -j ACCEPT
-A CRIU-NETLOCK-OUT -m comment --comment "criu-netlock 1 2026-11-23T15:13:55Z 7 criu" -j DROP
-I PREROUTING 1 -j CRIU-NETLOCK-IN
-I OUTPUT 1 -j CRIU-NETLOCK-OUT
COMMIT
`
	if got := tab.lockInput(false, "lo", nil, "", c); got != want {
		t.Errorf("lock:\n%s\nwant:\n%s", got, want)
	}
	hold := tab.lockInput(false, "lo", nil, "7", c)
	if want := strings.Replace(want, "criu\" -j DROP", "criu\" -j NFQUEUE --queue-num 7", 1); hold != want {
		t.Errorf("hold:\n%s\nwant:\n%s", hold, want)
	}
	chains, accept := ":CRIU-NETLOCK-IN - [0:0]\n:CRIU-NETLOCK-OUT - [0:0]\n", "-A CRIU-NETLOCK-IN -i lo -p tcp -m mark --mark 0xc114 -j ACCEPT\n"
	queue, unmark := "-A CRIU-NETLOCK-IN -m mark ! --mark 0xc114 -m comment --comment \""+c+"\" -j NFQUEUE --queue-num 7\n", "-A CRIU-NETLOCK-IN -m mark --mark 0xc114 -j MARK --set-mark 0\n"
	for keep, unmark := range map[bool]string{false: unmark, true: ""} {
		if got, want := tab.passInput(false, "lo", nil, "7", keep, c), "*raw\n"+chains+accept+queue+unmark+"COMMIT\n"; got != want {
			t.Errorf("let marked ones pass:\n%s\nwant:\n%s", got, want)
		}
		if got, want := tab.openInput(keep, c), "*raw\n:CRIU-NETLOCK-IN - [0:0]\n"+unmark+"-A CRIU-NETLOCK-IN -m comment --comment \""+c+"\" -j RETURN\nCOMMIT\n"; got != want {
			t.Errorf("open:\n%s\nwant:\n%s", got, want)
		}
	}
	want = "*raw\n" + deletes + "-F CRIU-NETLOCK-IN\n-X CRIU-NETLOCK-IN\nCOMMIT\n"
	if got := tab.unlockInput(); got != want {
		t.Errorf("unlock:\n%s\nwant:\n%s", got, want)
	}
}

// The words of iptables 1.8.9.
func TestDiagnose(t *testing.T) {
	none := machine{table: func() error { return nil }, has: func(int) bool { return true }}
	noTable := func(err error) machine { m := none; m.table = func() error { return err }; return m }
	lacks := func(c int) machine { m := none; m.has = func(x int) bool { return x != c }; return m }
	noMark := none
	noMark.match = "mark"
	const initialize = "iptables-restore v1.8.9 (legacy): iptables-restore: unable to initialize table 'raw'\nError occurred at line: 1\nTry `iptables-restore -h' or 'iptables-restore --help' for more information.\n"
	for name, c := range map[string]struct {
		v    Variant
		code int
		text string
		m    machine
		kind netlock.Kind
		is   error
	}{
		"lock held":          {Legacy, 4, "Can't lock /run/xtables.lock: Resource temporarily unavailable\nAnother app is currently holding the xtables lock. Stopped waiting after 1s.\n", none, netlock.KindDeadline, nil},
		"no raw":             {Legacy, 2, initialize, noTable(unix.ENOENT), netlock.KindNoBackend, errNoTable},
		"no legacy":          {Legacy, 2, initialize, noTable(unix.ENOPROTOOPT), netlock.KindNoBackend, netlock.ErrUnsupported},
		"no admin":           {Legacy, 2, initialize, noTable(unix.EPERM), netlock.KindPrivilege, nil},
		"no raw sockets":     {Legacy, 2, initialize, lacks(unix.CAP_NET_RAW), netlock.KindPrivilege, nil},
		"unknown why":        {Legacy, 2, initialize, none, netlock.KindOther, nil},
		"save without admin": {Legacy, 1, "iptables-save v1.8.9 (legacy): Cannot initialize: Permission denied (you must be root)\n", noTable(unix.EPERM), netlock.KindPrivilege, nil},
		"nft without admin":  {NFT, 4, "iptables-nft-restore v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)\n", none, netlock.KindPrivilege, nil},
		"nft, no nf_tables":  {NFT, 4, "iptables-nft-restore v1.8.9 (nf_tables): Could not fetch rule set generation id: Invalid argument\n", none, netlock.KindNoBackend, netlock.ErrUnsupported},
		"nft, owned table":   {NFT, 4, "iptables-nft-restore v1.8.9 (nf_tables): \nline 3: CHAIN_ADD failed (Operation not permitted): chain X\n", none, netlock.KindHeld, errNoTable},
		"legacy, line":       {Legacy, 1, "iptables-restore: line 4 failed\n", none, netlock.KindOther, errChanged},
		"legacy, no match":   {Legacy, 1, "iptables-restore: line 4 failed\n", noMark, netlock.KindNoBackend, netlock.ErrUnsupported},
		"nft, bad rule":      {NFT, 1, "iptables-nft-restore: line 4 failed: Bad rule (does a matching rule exist in that chain?).\n", none, netlock.KindOther, errChanged},
		"nft, chain in use":  {NFT, 4, "iptables-nft-restore v1.8.9 (nf_tables): \nline 4: CHAIN_DEL failed (Device or resource busy): chain CRIU-NETLOCK-IN\n", none, netlock.KindOther, errChanged},
		"legacy, chain gone": {Legacy, 2, "iptables-restore v1.8.9 (legacy): Couldn't load target `CRIU-NETLOCK-IN':No such file or directory\n\nError occurred at line: 2\n", none, netlock.KindOther, errChanged},
		"nft, chain gone":    {NFT, 2, "iptables-nft-restore v1.8.9 (nf_tables): Chain 'CRIU-NETLOCK-IN' does not exist\nError occurred at line: 3\n", none, netlock.KindOther, errChanged},
		"no plug-in":         {Legacy, 2, "iptables-restore v1.8.9 (legacy): Couldn't load match `mark':No such file or directory\n", none, netlock.KindNoBackend, netlock.ErrUnsupported},
		"too old":            {Legacy, 1, "iptables-restore: invalid option -- 'w'\n", none, netlock.KindNoBackend, netlock.ErrUnsupported},
		"nft, foreign table": {NFT, 1, "iptables-nft-restore v1.8.9 (nf_tables): table `raw' is incompatible, use 'nft' tool.\n", none, netlock.KindNoBackend, errNoTable},
		"crash":              {NFT, -1, "", none, netlock.KindOther, nil},
	} {
		e := &toolError{tool: "iptables-restore", code: c.code, text: c.text}
		v := e.diagnose(c.v, c.m)
		if v.kind != c.kind || !errors.Is(v.is, c.is) || (c.is == nil) != (v.is == nil) {
			t.Errorf("%s: %+v; want %v, %v", name, v, c.kind, c.is)
		}
		if strings.ContainsAny(e.Error(), "\n\r") || strings.Contains(e.Error(), "Try `") {
			t.Errorf("%s: not one line of sense: %q", name, e)
		}
	}
}

// -w is bounded by what is left, and never bare, 0 or without a number.
func TestWaitSeconds(t *testing.T) {
	for left, want := range map[time.Duration]string{-time.Second: "1", time.Millisecond: "1", 2500 * time.Millisecond: "2", 10*time.Second + time.Millisecond*500: "10"} {
		ctx, cancel := context.WithTimeout(context.Background(), left)
		if got := waitSeconds(ctx); got != want {
			t.Errorf("%v left: -w %s, want %s", left, got, want)
		}
		cancel()
	}
	if got := waitSeconds(context.Background()); got != "5" {
		t.Errorf("no deadline: -w %s", got)
	}
}

func FuzzSave(f *testing.F) {
	f.Add(lockText("raw"))
	f.Add(lockText("filter"))
	f.Add("*raw\n[1:2] -A CRIU-NETLOCK-IN \"\n:\n[x\n-A \n")
	f.Fuzz(func(t *testing.T, s string) {
		for _, tab := range parseSave(s) {
			v := tab.judge(true, "lo", nil, "")
			if v.why == "" && !v.locks {
				t.Fatal("intact and does not lock")
			}
			// Whatever stands there, our input stays one commit of one table.
			if in := tab.unlockInput(); strings.Count("\n"+in, "\nCOMMIT\n") != 1 || strings.Count("\n"+in, "\n*") != 1 {
				t.Fatalf("unlock:\n%s", in)
			}
		}
	})
}

func FuzzEntries(f *testing.F) {
	f.Add(make([]byte, 400), true)
	f.Fuzz(func(_ *testing.T, b []byte, v6 bool) {
		i := 0
		if v6 {
			i = 1
		}
		families()[i].countUses(b)
	})
}

package nfnl

import "encoding/binary"

// Attr appends one netlink attribute, padded.
func Attr(b []byte, typ uint16, data []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(data)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, data...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// AttrString appends a NUL-terminated string.
func AttrString(b []byte, typ uint16, s string) []byte {
	return Attr(b, typ, append([]byte(s), 0))
}

// typeMask takes NLA_F_NESTED and NLA_F_NET_BYTEORDER off a type.
const typeMask = 0x3fff

// Walk calls f for each attribute in b and tells whether all of b was sound.
func Walk(b []byte, f func(typ uint16, data []byte)) bool {
	for len(b) >= 4 {
		size := int(binary.NativeEndian.Uint16(b))
		if size < 4 || size > len(b) {
			return false
		}
		f(binary.NativeEndian.Uint16(b[2:])&typeMask, b[4:size])
		b = b[min(len(b), (size+3)&^3):]
	}
	return len(b) == 0
}

// U32 reads a big-endian number, as nf_tables has them; 0 if it is not one.
func U32(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

// U64 is U32 for eight bytes.
func U64(b []byte) uint64 {
	if len(b) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

// Str reads a NUL-terminated string.
func Str(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// Comment finds the comment in a rule's user data, which anybody in the
// namespace can fill with anything. (userdata.Get of google/nftables panics on a
// length that is too long: found by FuzzRead.)
func Comment(b []byte) string {
	for len(b) >= 2 {
		typ, size := b[0], int(b[1])
		if b = b[2:]; size > len(b) {
			return ""
		}
		if typ == 0 { // NFTNL_UDATA_RULE_COMMENT
			return Str(b[:size])
		}
		b = b[size:]
	}
	return ""
}

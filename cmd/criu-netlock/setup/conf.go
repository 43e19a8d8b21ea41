package setup

import "strings"

// Option is an option of a configuration file.
type Option struct {
	Name, Value string
	Line        int
	Words       int // CRIU refuses more than two
}

// Parse reads a file as CRIU does: an option and its value on a line, a value with
// spaces in double quotes, # for a comment.
func Parse(text string) []Option {
	var out []Option
	for i, line := range strings.Split(text, "\n") {
		w := split(line)
		if len(w) == 0 {
			continue
		}
		o := Option{Name: strings.TrimPrefix(w[0], "--"), Line: i + 1, Words: len(w)}
		if len(w) > 1 {
			o.Value = w[1]
		}
		out = append(out, o)
	}
	return out
}

func split(line string) []string {
	var (
		out    []string
		word   strings.Builder
		inWord bool
		quoted bool
	)
	end := func() {
		if inWord {
			out = append(out, word.String())
		}
		word.Reset()
		inWord = false
	}
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '\\' && quoted && i+1 < len(line):
			i++
			word.WriteByte(line[i])
		case c == '"':
			quoted, inWord = !quoted, true
		case quoted:
			word.WriteByte(c)
		case c == ' ' || c == '\t' || c == '\r':
			end()
		case c == '#' && !inWord:
			return out
		default:
			word.WriteByte(c)
			inWord = true
		}
	}
	end()
	return out
}

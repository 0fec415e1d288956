package configs

import (
	"strconv"
	"strings"
)

// keyLines returns the line of every key and table in doc, a valid TOML document, by path. The TOML
// library keeps one position per key name, which array tables share: a message needs each one's own.
func keyLines(doc string) map[string]int {
	s := scanner{
		rest:  strings.TrimPrefix(doc, "\ufeff"),
		line:  1,
		lines: map[string]int{},
		count: map[string]int{},
	}
	table := ""
	for s.space(); s.rest != ""; s.space() {
		if strings.HasPrefix(s.rest, "[") {
			table = s.header()
		} else {
			s.pair(table)
		}
	}
	return s.lines
}

type scanner struct {
	rest  string
	line  int
	lines map[string]int
	count map[string]int // elements so far of each array of tables
}

// skip drops n bytes, counting lines.
func (s *scanner) skip(n int) {
	n = min(n, len(s.rest))
	s.line += strings.Count(s.rest[:n], "\n")
	s.rest = s.rest[n:]
}

// space drops white space, line ends and comments.
func (s *scanner) space() {
	for s.rest != "" {
		switch s.rest[0] {
		case ' ', '\t', '\r', '\n':
			s.skip(1)
		case '#':
			s.until("\n")
		default:
			return
		}
	}
}

// until returns the text before the first of the given bytes and drops it.
func (s *scanner) until(stop string) string {
	i := strings.IndexAny(s.rest, stop)
	if i < 0 {
		i = len(s.rest)
	}
	text := s.rest[:i]
	s.skip(i)
	return text
}

// header reads [table] or [[table]] and returns the path of the table that it opens.
func (s *scanner) header() string {
	array := strings.HasPrefix(s.rest, "[[")
	s.skip(1)
	if array {
		s.skip(1)
	}
	line, keys := s.line, s.key("]")
	path := ""
	for i, key := range keys {
		path = join(path, key)
		if i == len(keys)-1 && array {
			s.mark(path, line) // the first element's line, for messages about the array
			s.count[path]++
		}
		if n := s.count[path]; n > 0 {
			path = index(path, n-1)
		}
		s.mark(path, line)
	}
	s.skip(1)
	if array {
		s.skip(1)
	}
	return path
}

func (s *scanner) mark(path string, line int) {
	if s.lines[path] == 0 {
		s.lines[path] = line
	}
}

// key reads a dotted key up to, not including, the byte end.
func (s *scanner) key(end string) (keys []string) {
	for {
		s.space()
		switch {
		case s.rest == "" || strings.HasPrefix(s.rest, end):
			return keys
		case s.rest[0] == '.':
			s.skip(1)
		case s.rest[0] == '"' || s.rest[0] == '\'':
			keys = append(keys, s.str())
		default:
			keys = append(keys, strings.TrimRight(s.until(". \t\r\n"+end), " \t"))
		}
	}
}

// pair reads key = value in the table at path.
func (s *scanner) pair(path string) {
	line := s.line
	for _, key := range s.key("=") {
		path = join(path, key)
		s.mark(path, line)
	}
	s.skip(1)
	s.value(path)
}

func (s *scanner) value(path string) {
	s.space()
	switch {
	case s.rest == "":
	case s.rest[0] == '"' || s.rest[0] == '\'':
		s.str()
	case s.rest[0] == '[':
		s.list(']', func(i int) {
			s.mark(index(path, i), s.line)
			s.value(index(path, i))
		})
	case s.rest[0] == '{':
		s.list('}', func(int) { s.pair(path) })
	default:
		if s.until(",]}#\n") == "" {
			s.skip(1)
		}
	}
}

// list reads an array or an inline table up to the byte end.
func (s *scanner) list(end byte, item func(i int)) {
	s.skip(1)
	for i := 0; ; i++ {
		s.space()
		if s.rest == "" || s.rest[0] == end {
			break
		}
		item(i)
		if s.space(); strings.HasPrefix(s.rest, ",") {
			s.skip(1)
		}
	}
	s.skip(1)
}

// str reads a string of any of the four kinds.
func (s *scanner) str() string {
	quote := s.rest[:1]
	if long := strings.Repeat(quote, 3); strings.HasPrefix(s.rest, long) {
		quote = long
	}
	s.skip(len(quote))
	text := s.rest
	n := 0
	for n < len(text) && !strings.HasPrefix(text[n:], quote) {
		if text[n] == '\\' && quote[0] == '"' {
			n++
		}
		n++
	}
	n = min(n, len(text))
	s.skip(n + len(quote))
	if len(quote) == 3 {
		for strings.HasPrefix(s.rest, quote[:1]) { // up to two quotes may end the text itself
			s.skip(1)
		}
	}
	if plain, err := strconv.Unquote(`"` + text[:n] + `"`); err == nil && quote == `"` {
		return plain
	}
	return text[:n]
}

package configs

import (
	"cmp"
	"encoding"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/agext/levenshtein"
)

// Error is one mistake in a configuration.
type Error struct {
	File string
	Line int // from 1
	Msg  string
}

func (e Error) Error() string { return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Msg) }

// Errors is every mistake in a configuration, in the order of its lines.
type Errors []Error

// Error returns one line per mistake.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, err := range e {
		lines[i] = err.Error()
	}
	return strings.Join(lines, "\n")
}

// Parse reads and checks a configuration; name stands for the file in messages. The error is an Errors.
func Parse(name string, data []byte) (*Config, error) {
	if len(data) > maxFile {
		return nil, Errors{{name, 1, fmt.Sprintf("the file is larger than %s", Size(maxFile))}}
	}
	var tree map[string]any
	if _, err := toml.Decode(string(data), &tree); err != nil {
		line := 1
		var pe toml.ParseError
		if errors.As(err, &pe) {
			line, err = max(pe.Position.Line, 1), errors.New(pe.Message)
		}
		return nil, Errors{{name, line, err.Error()}}
	}
	d := decoder{file: name, lines: keyLines(string(data)), wrong: map[string]bool{}}
	c := new(Config)
	c.defaults()
	d.table("", tree, reflect.ValueOf(c).Elem())
	d.validate(c)
	if len(d.errs) > 0 {
		slices.SortStableFunc(d.errs, func(a, b Error) int { return a.Line - b.Line })
		return nil, d.errs
	}
	c.derive()
	return c, nil
}

// decoder fills a Config from the tree that the TOML library made, and goes on after an error: the
// library's own decoder stops at the first, and knows no line inside an array of tables.
type decoder struct {
	file  string
	lines map[string]int  // line of each key by its path, such as "subsystem[0].nqn"
	wrong map[string]bool // paths that hold no usable value, so that validate is silent about them
	errs  Errors
}

// errorf reports a mistake at path, or at the nearest table around it that the file has.
func (d *decoder) errorf(path, format string, args ...any) {
	if d.wrong[path] {
		return
	}
	d.wrong[path] = true
	d.errs = append(d.errs, Error{d.file, d.line(path), fmt.Sprintf(format, args...)})
}

func (d *decoder) line(path string) int {
	for ; path != ""; path = parent(path) {
		if d.has(path) {
			return cmp.Or(d.lines[path], d.lines[single(path)])
		}
	}
	return 1
}

// has says whether the file has a key.
func (d *decoder) has(path string) bool { return d.lines[path]+d.lines[single(path)] > 0 }

// single is the path of a key where [table] was written for [[table]], which is decoded as its first element.
func single(path string) string { return strings.ReplaceAll(path, "[0]", "") }

// join and index are the paths of a key in a table and of an element in an array.
func join(path, key string) string {
	if strings.ContainsAny(key, ".[]") {
		key = strconv.Quote(key)
	}
	if path == "" {
		return key
	}
	return path + "." + key
}

func index(path string, i int) string { return path + "[" + strconv.Itoa(i) + "]" }

func parent(path string) string { return path[:max(strings.LastIndexAny(path, ".["), 0)] }

// keyName is a path as a person writes it: "subsystem.namespace.size".
func keyName(path string) string {
	var b strings.Builder
	for {
		i := strings.IndexByte(path, '[')
		if i < 0 {
			break
		}
		b.WriteString(path[:i])
		path = path[i+strings.IndexByte(path[i:], ']')+1:]
	}
	return b.String() + path
}

// value decodes v, found at path, into dst.
func (d *decoder) value(path string, v any, dst reflect.Value) {
	if done := d.text(path, v, dst); done {
		return
	}
	switch dst.Kind() {
	case reflect.Struct:
		switch v := v.(type) {
		case map[string]any:
			d.table(path, v, dst)
		case []map[string]any:
			d.errorf(path, "%s is one table: write [%[1]s]", keyName(path))
			for i, table := range v {
				d.table(index(path, i), table, dst)
			}
		default:
			d.mismatch(path, "a table", v)
		}
	case reflect.Slice:
		d.slice(path, v, dst)
	case reflect.Bool:
		if b, ok := v.(bool); ok {
			dst.SetBool(b)
		} else {
			d.mismatch(path, "true or false", v)
		}
	case reflect.String:
		if s, ok := v.(string); ok {
			dst.SetString(s)
		} else {
			d.mismatch(path, "a string", v)
		}
	case reflect.Int, reflect.Int64, reflect.Uint32:
		n, ok := v.(int64)
		limit := int64(math.MaxInt64)
		if dst.Kind() == reflect.Uint32 {
			limit = math.MaxUint32
		}
		switch {
		case !ok:
			d.mismatch(path, "an integer", v)
		case n < 0 || n > limit:
			d.errorf(path, "%s: %d is out of range", keyName(path), n)
		case dst.CanInt():
			dst.SetInt(n)
		default:
			dst.SetUint(uint64(n))
		}
	default:
		panic("configs: no decoding for " + dst.Type().String())
	}
}

// text decodes the types that are written as strings in a form of their own, and sizes, which may be
// integers too. It answers false for all other types.
func (d *decoder) text(path string, v any, dst reflect.Value) bool {
	if n, ok := v.(int64); ok && dst.Type() == reflect.TypeFor[Size]() {
		if n < 0 {
			d.errorf(path, "%s: a size is not negative", keyName(path))
		} else {
			dst.SetInt(n)
		}
		return true
	}
	u, ok := dst.Addr().Interface().(encoding.TextUnmarshaler)
	if !ok {
		return false
	}
	s, ok := v.(string)
	if !ok {
		want := "a string"
		if dst.Type() == reflect.TypeFor[Size]() {
			want = `a size such as "64MiB"`
		}
		d.mismatch(path, want, v)
		return true
	}
	err := u.UnmarshalText([]byte(s))
	switch u := u.(type) {
	case *slog.Level:
		if err != nil {
			err = fmt.Errorf("%q is not a log level: write debug, info, warn or error", s)
		}
	case *netip.AddrPort:
		if err != nil || !u.IsValid() {
			err = fmt.Errorf("%q is not an IP address and port such as 192.0.2.7:4420 or [2001:db8::7]:4420", s)
		}
	}
	if err != nil {
		d.errorf(path, "%s: %v", keyName(path), err)
	}
	return true
}

func (d *decoder) slice(path string, v any, dst reflect.Value) {
	var elems []any
	switch v := v.(type) {
	case []any:
		elems = v
	case []map[string]any:
		for _, table := range v {
			elems = append(elems, table)
		}
	case map[string]any:
		if dst.Type().Elem().Kind() != reflect.Struct {
			d.mismatch(path, "an array", v)
			return
		}
		d.errorf(path, "%s is an array of tables: write [[%[1]s]]", keyName(path))
		elems = []any{v}
	default:
		d.mismatch(path, "an array", v)
		return
	}
	dst.Set(reflect.MakeSlice(dst.Type(), len(elems), len(elems)))
	for i, e := range elems {
		elem := dst.Index(i)
		if e, ok := elem.Addr().Interface().(interface{ defaults() }); ok {
			e.defaults()
		}
		d.value(index(path, i), e, elem)
	}
}

// table decodes the keys of a table into the struct dst.
func (d *decoder) table(path string, table map[string]any, dst reflect.Value) {
	fields := make(map[string]reflect.Value)
	for i := range dst.NumField() {
		fields[dst.Type().Field(i).Tag.Get("toml")] = dst.Field(i)
	}
	for _, key := range slices.Sorted(maps.Keys(table)) {
		at := join(path, key)
		if f, ok := fields[key]; ok {
			d.value(at, table[key], f)
			continue
		}
		d.errorf(at, "unknown key %q%s: %s", key, in(path), nearest(key, slices.Sorted(maps.Keys(fields))))
	}
}

func in(path string) string {
	if path == "" {
		return ""
	}
	return " in " + keyName(path)
}

// nearest is the advice for an unknown key.
func nearest(key string, known []string) string {
	best := slices.MinFunc(known, func(a, b string) int {
		return levenshtein.Distance(key, a, nil) - levenshtein.Distance(key, b, nil)
	})
	if levenshtein.Distance(key, best, nil) <= max(2, len(best)/2) {
		return fmt.Sprintf("did you mean %q?", best)
	}
	return "the keys here are " + strings.Join(known, ", ")
}

// mismatch reports a value of the wrong TOML type.
func (d *decoder) mismatch(path, want string, v any) {
	found := fmt.Sprintf("%T", v)
	switch v.(type) {
	case string:
		found = "a string"
	case int64:
		found = "an integer"
	case float64:
		found = "a float"
	case bool:
		found = "a boolean"
	case time.Time:
		found = "a date"
	case []any:
		found = "an array"
	case map[string]any:
		found = "a table"
	case []map[string]any:
		found = "an array of tables"
	}
	d.errorf(path, "%s: expected %s, found %s", keyName(path), want, found)
}

package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLineHandler(t *testing.T) {
	undated := func(b []byte, r slog.Record) []byte { return levelName(b, r.Level) }
	for _, test := range []struct {
		name   string
		prefix func([]byte, slog.Record) []byte
		log    func(*slog.Logger)
		want   string
	}{
		{"plain", undated, func(l *slog.Logger) { l.Info("serving") }, "INFO  serving\n"},
		{"attributes", undated, func(l *slog.Logger) { l.Warn("slow", "nsid", 1, "error", errors.New("too slow")) }, "WARN  slow nsid=1 error=\"too slow\"\n"},
		{"level and msg as keys", undated, func(l *slog.Logger) { l.Info("set", "level", "debug", "msg", "") }, "INFO  set level=debug msg=\"\"\n"},
		{"group", undated, func(l *slog.Logger) { l.With("a", 1).WithGroup("host").Error("gone", "nqn", "x") }, "ERROR gone a=1 host.nqn=x\n"},
		{"forged line", undated, func(l *slog.Logger) { l.Info("a\n<0>b", "nqn", "c\nd") }, "INFO  \"a\\n<0>b\" nqn=\"c\\nd\"\n"},
		{"below the level", undated, func(l *slog.Logger) { l.Debug("hidden") }, ""},
		{"journal info", journalPrefix, func(l *slog.Logger) { l.Info("up") }, "<6>up\n"},
		{"journal warning", journalPrefix, func(l *slog.Logger) { l.Warn("hm") }, "<4>hm\n"},
		{"journal error", journalPrefix, func(l *slog.Logger) { l.Error("no") }, "<3>no\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var out bytes.Buffer
			test.log(slog.New(newLineHandler(&out, new(slog.LevelVar), test.prefix)))
			if out.String() != test.want {
				t.Errorf("%q, want %q", out.String(), test.want)
			}
		})
	}
}

func TestLevelChangesLive(t *testing.T) {
	var out bytes.Buffer
	level := new(slog.LevelVar)
	log := slog.New(newLineHandler(&out, level, journalPrefix)).With("a", 1)
	log.Debug("before")
	level.Set(slog.LevelDebug)
	log.Debug("after")
	if out.String() != "<7>after a=1\n" {
		t.Errorf("logged %q", out.String())
	}
}

func TestDatedPrefix(t *testing.T) {
	var out bytes.Buffer
	slog.New(newLineHandler(&out, new(slog.LevelVar), datedPrefix)).Info("up")
	date, rest, _ := strings.Cut(out.String(), " ")
	if len(date) < len("2006-01-02T15:04:05.000Z") || rest != "INFO  up\n" {
		t.Errorf("logged %q", out.String())
	}
}

func TestLoggerFollowsStderr(t *testing.T) {
	var stat unix.Stat_t
	if err := unix.Fstat(2, &stat); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ name, stream, want string }{
		{"journal", fmt.Sprintf("%d:%d", stat.Dev, stat.Ino), "<6>up\n"},
		{"a file", "", " INFO  up\n"},
		{"started by a service, redirected since", "1:1", " INFO  up\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Setenv("JOURNAL_STREAM", test.stream)
			file, err := os.Create(filepath.Join(t.TempDir(), "log"))
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			newLogger(file, new(slog.LevelVar)).Info("up")
			got, err := os.ReadFile(file.Name())
			if err != nil || !strings.HasSuffix(string(got), test.want) {
				t.Errorf("logged %q, %v", got, err)
			}
		})
	}
}

package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
	"golang.org/x/term"
)

// newLogger logs to stderr: for a person on a terminal, for the journal under systemd, with whole dates
// elsewhere. Changing level takes effect at once.
//
// The journal gets its level from a <N> prefix (sd-daemon(3)) and not over its own socket, so that log
// lines, panics and a supervisor other than systemd all go one way, in order.
func newLogger(stderr *os.File, level *slog.LevelVar) *slog.Logger {
	prefix := datedPrefix
	if ok, err := journal.StderrIsJournalStream(); ok && err == nil {
		prefix = journalPrefix
	} else if term.IsTerminal(int(stderr.Fd())) {
		prefix = terminalPrefix
	}
	return slog.New(newLineHandler(stderr, level, prefix))
}

func terminalPrefix(b []byte, r slog.Record) []byte {
	return levelName(r.Time.AppendFormat(b, "15:04:05 "), r.Level)
}

func datedPrefix(b []byte, r slog.Record) []byte {
	return levelName(r.Time.AppendFormat(b, "2006-01-02T15:04:05.000Z07:00 "), r.Level)
}

func levelName(b []byte, level slog.Level) []byte {
	name := level.String()
	return append(append(b, name...), "      "[:max(6-len(name), 1)]...)
}

func journalPrefix(b []byte, r slog.Record) []byte {
	p := journal.PriDebug
	switch {
	case r.Level >= slog.LevelError:
		p = journal.PriErr
	case r.Level >= slog.LevelWarn:
		p = journal.PriWarning
	case r.Level >= slog.LevelInfo:
		p = journal.PriInfo
	}
	return append(strconv.AppendInt(append(b, '<'), int64(p), 10), '>')
}

// lineHandler writes a record as one line: prefix, message, and the attributes as slog's text.
type lineHandler struct {
	level  slog.Leveler
	prefix func([]byte, slog.Record) []byte
	out    *lineOutput
	text   slog.Handler // writes to out.text
}

// lineOutput is what a handler and those derived from it share.
type lineOutput struct {
	mu   sync.Mutex
	w    io.Writer
	line []byte
	text bytes.Buffer
}

func newLineHandler(w io.Writer, level slog.Leveler, prefix func([]byte, slog.Record) []byte) *lineHandler {
	out := &lineOutput{w: w}
	return &lineHandler{level, prefix, out, slog.NewTextHandler(&out.text, &slog.HandlerOptions{Level: slog.LevelDebug})}
}

func (h *lineHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= h.level.Level()
}

// noMessage is how slog's text of a record without time and message begins.
var noMessage = []byte(`level=INFO msg=""`)

func (h *lineHandler) Handle(ctx context.Context, r slog.Record) error {
	h.out.mu.Lock()
	defer h.out.mu.Unlock()
	line := append(h.prefix(h.out.line[:0], r), oneLine(r.Message)...)

	attrs := slog.NewRecord(time.Time{}, slog.LevelInfo, "", 0)
	r.Attrs(func(a slog.Attr) bool { attrs.AddAttrs(a); return true })
	h.out.text.Reset()
	if err := h.text.Handle(ctx, attrs); err != nil {
		return err
	}
	line = append(line, bytes.TrimPrefix(h.out.text.Bytes(), noMessage)...)
	h.out.line = line
	_, err := h.out.w.Write(line)
	return err
}

func (h *lineHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	c.text = h.text.WithAttrs(attrs)
	return &c
}

func (h *lineHandler) WithGroup(name string) slog.Handler {
	c := *h
	c.text = h.text.WithGroup(name)
	return &c
}

// oneLine keeps a message from looking like several: attributes are quoted already.
func oneLine(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return strconv.Quote(s)
	}
	return s
}

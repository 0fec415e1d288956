package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/nvmeof"
)

// transferJSON is the result of put and get in JSON output.
type transferJSON struct {
	keyJSON
	Bytes   int64   `json:"bytes"`
	Files   int     `json:"files,omitempty"`  // of a directory, links and directories counted too
	Chunks  int     `json:"chunks,omitempty"` // of a manifest
	Seconds float64 `json:"seconds"`
}

func (t *transferJSON) String() string {
	s := humanize.IBytes(uint64(t.Bytes))
	if t.Files > 0 {
		s += fmt.Sprintf(", %d files", t.Files)
	}
	if t.Chunks > 0 {
		s += fmt.Sprintf(", %d chunks", t.Chunks)
	}
	return s
}

// putter stores one value, file or directory.
type putter struct {
	c     *client
	kv    *host.KV
	key   []byte
	mode  host.StoreMode
	chunk int64
}

func newPutCommand() *cobra.Command {
	var kf keyFlags
	var ifAbsent, ifExists bool
	chunk := sizeFlag(defaultChunk)
	cmd := &cobra.Command{
		Use:   "put KEY FILE|DIR|-",
		Short: "Store a file, a directory or standard input",
		Long: "Store a file, a directory or standard input (-) under a key. What fits into one value is stored as it is.\n" +
			"Larger files and directories are stored as chunks, each under a key made from its content, and a manifest\n" +
			"under KEY, written last, which get reads.",
		Args: cobra.ExactArgs(2),
	}
	kf.add(cmd)
	cmd.Flags().BoolVar(&ifAbsent, "if-absent", false, "only if the key is absent")
	cmd.Flags().BoolVar(&ifExists, "if-exists", false, "only if the key exists")
	cmd.MarkFlagsMutuallyExclusive("if-absent", "if-exists")
	cmd.Flags().Var(&chunk, "chunk", "size of the chunks of what does not fit into one value")
	c := newClient(cmd, "queue-depth", defaultQueueDepth)
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		key, err := kf.parse(args[0])
		if err != nil {
			return err
		}
		mode := host.StoreAlways
		switch {
		case ifAbsent:
			mode = host.StoreIfAbsent
		case ifExists:
			mode = host.StoreIfExists
		}
		if args[1] != "-" { // before connecting
			if _, err := os.Stat(args[1]); err != nil {
				return err
			}
		}
		return c.withKV(func(ctx context.Context, kv *host.KV) error {
			p := &putter{c: c, kv: kv, key: key, mode: mode, chunk: min(int64(chunk), maxValue(kv))}
			if p.chunk < 1 {
				return usageError{errors.New("chunks are of 1 byte or more")}
			}
			start := time.Now()
			result, err := p.put(ctx, args[1])
			if err != nil {
				return storeError(key, err)
			}
			result.keyJSON, result.Seconds = newKeyJSON(key), time.Since(start).Seconds()
			return c.print(result, "%s stored: %s\n", args[0], result)
		})
	}
	return cmd
}

// maxValue is the largest value that one Store takes, bytes.
func maxValue(kv *host.KV) int64 {
	if n := kv.MaxValue(); n > 0 && n < 1<<30 {
		return int64(n)
	}
	return 1 << 30 // more would not be wise to hold in memory
}

func (p *putter) put(ctx context.Context, path string) (*transferJSON, error) {
	if path == "-" {
		return p.stream(ctx, p.c.cmd.InOrStdin(), -1, 0o644)
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		return p.tree(ctx, path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return p.stream(ctx, f, info.Size(), info.Mode().Perm())
}

// stream stores what r holds: as one value when it fits, else as chunks. size is a hint for the progress bar.
func (p *putter) stream(ctx context.Context, r io.Reader, size int64, mode fs.FileMode) (*transferJSON, error) {
	limit := maxValue(p.kv)
	var head bytes.Buffer
	if size >= 0 {
		head.Grow(int(min(size, limit)) + bytes.MinRead)
	}
	n, err := head.ReadFrom(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	bar := p.c.progress(size, "storing")
	defer bar.Close()
	if n <= limit && !isManifest(head.Bytes()) { // what looks like a manifest must not come back as one
		err := p.kv.Store(ctx, p.key, head.Bytes(), p.mode)
		return &transferJSON{Bytes: n}, err
	}
	e := manifestEntry{Mode: uint32(mode)}
	m := &manifest{}
	err = p.chunks(ctx, bar, func(w *chunkWriter) error { return w.add(io.MultiReader(&head, r), &e) })
	if err != nil {
		return nil, err
	}
	m.Files = []manifestEntry{e}
	return &transferJSON{Bytes: e.Size, Chunks: len(e.Chunks)}, p.storeManifest(ctx, m)
}

// tree stores a directory.
func (p *putter) tree(ctx context.Context, dir string) (*transferJSON, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	m := &manifest{Tree: true}
	total := int64(0)
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		e := manifestEntry{Path: filepath.ToSlash(rel), Mode: uint32(info.Mode().Perm())}
		switch info.Mode().Type() {
		case 0:
			total += info.Size()
		case fs.ModeDir:
			e.Dir = true
		case fs.ModeSymlink:
			if e.Link, err = os.Readlink(path); err != nil {
				return err
			}
			if !localLink(e.Path, e.Link) {
				return fmt.Errorf("%s is a symbolic link to %s, outside the directory", path, e.Link)
			}
		default:
			return fmt.Errorf("%s is neither a file, a directory nor a symbolic link", path)
		}
		m.Files = append(m.Files, e)
		return nil
	})
	if err != nil {
		return nil, err
	}
	bar := p.c.progress(total, "storing")
	defer bar.Close()
	err = p.chunks(ctx, bar, func(w *chunkWriter) error {
		for i := range m.Files {
			e := &m.Files[i]
			if e.Dir || e.Link != "" {
				continue
			}
			f, err := root.Open(filepath.FromSlash(e.Path))
			if err != nil {
				return err
			}
			err = w.add(f, e)
			f.Close()
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	t := &transferJSON{Files: len(m.Files)}
	for _, e := range m.Files {
		t.Bytes += e.Size
		t.Chunks += len(e.Chunks)
	}
	return t, p.storeManifest(ctx, m)
}

// chunks runs add with a chunk writer and waits for all chunks. A key that the mode rules out is refused first.
func (p *putter) chunks(ctx context.Context, bar *progressbar.ProgressBar, add func(*chunkWriter) error) error {
	if p.mode != host.StoreAlways {
		ok, err := p.kv.Exist(ctx, p.key)
		switch {
		case err != nil:
			return err
		case ok && p.mode == host.StoreIfAbsent:
			return nvmeof.KeyExists
		case !ok && p.mode == host.StoreIfExists:
			return nvmeof.KeyDoesNotExist
		}
	}
	w := newChunkWriter(ctx, p.kv, p.chunk, func(n int) { bar.Add(n) })
	err := add(w)
	if e := w.wait(); e != nil {
		return e
	}
	return err
}

func (p *putter) storeManifest(ctx context.Context, m *manifest) error {
	b, err := m.encode()
	if err != nil {
		return err
	}
	if int64(len(b)) > maxValue(p.kv) {
		return fmt.Errorf("the manifest of %s is larger than a value: use larger chunks", humanize.IBytes(uint64(len(b))))
	}
	return p.kv.Store(ctx, p.key, b, p.mode)
}

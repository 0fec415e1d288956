package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"

	"golang.org/x/sync/errgroup"

	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/nvmeof"
)

// A file larger than one value, or a directory, is stored as chunks and a manifest. A chunk's key is the first 16
// bytes of the SHA-256 of its content, so equal chunks are stored once. The manifest, stored last under the key
// asked for, is manifestMagic and then JSON; whoever finds it finds all its chunks.

const manifestMagic = "kvof-manifest 1\n"

const (
	defaultChunk = 4 << 20 // bytes
	chunkWindow  = 8       // chunks in flight
)

type manifest struct {
	Tree  bool            `json:"tree"` // a directory; else the one entry is a file's content
	Files []manifestEntry `json:"files"`
}

type manifestEntry struct {
	Path   string   `json:"path,omitempty"` // slash separated, below the directory stored
	Mode   uint32   `json:"mode"`           // permission bits
	Dir    bool     `json:"dir,omitempty"`
	Link   string   `json:"link,omitempty"` // target of a symbolic link
	Size   int64    `json:"size,omitempty"` // bytes
	Chunk  int64    `json:"chunk,omitempty"`
	Chunks []string `json:"chunks,omitempty"` // keys, hexadecimal
}

func (m *manifest) encode() ([]byte, error) {
	b, err := json.Marshal(m)
	return append([]byte(manifestMagic), b...), err
}

func isManifest(value []byte) bool { return bytes.HasPrefix(value, []byte(manifestMagic)) }

// decodeManifest reads and checks a manifest, so that sizes and chunks fit and no path leads out of the tree.
func decodeManifest(value []byte) (*manifest, error) {
	m := new(manifest)
	if err := json.Unmarshal(value[len(manifestMagic):], m); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	if !m.Tree && (len(m.Files) != 1 || m.Files[0].Dir || m.Files[0].Link != "") {
		return nil, errors.New("manifest of a file does not have one file")
	}
	for _, e := range m.Files {
		if err := e.check(m.Tree); err != nil {
			return nil, fmt.Errorf("manifest: %q: %w", e.Path, err)
		}
	}
	return m, nil
}

func (e *manifestEntry) check(tree bool) error {
	if tree && (!fs.ValidPath(e.Path) || e.Path == "." || bytes.ContainsRune([]byte(e.Path), 0)) {
		return errors.New("not a path below the directory")
	}
	if e.Link != "" && !localLink(e.Path, e.Link) {
		return errors.New("symbolic link leads out of the directory")
	}
	if e.Mode > 0o777 {
		return errors.New("not a file mode")
	}
	if len(e.Chunks) == 0 && e.Size == 0 {
		return nil
	}
	if e.Dir || e.Link != "" || e.Chunk <= 0 || e.Size < 0 || (e.Size+e.Chunk-1)/e.Chunk != int64(len(e.Chunks)) || e.Chunk > 1<<30 {
		return errors.New("size and chunks do not agree")
	}
	for _, c := range e.Chunks {
		if b, err := hex.DecodeString(c); err != nil || len(b) != nvmeof.MaxKeyLen {
			return errors.New("not a chunk key")
		}
	}
	return nil
}

// localLink tells whether a symbolic link at p to target stays inside the tree.
func localLink(p, target string) bool {
	return !path.IsAbs(target) && fs.ValidPath(path.Join(path.Dir(p), target))
}

func chunkKey(b []byte) []byte {
	sum := sha256.Sum256(b)
	return sum[:nvmeof.MaxKeyLen]
}

// chunkWriter stores chunks, several at a time.
type chunkWriter struct {
	kv     *host.KV
	group  *errgroup.Group
	ctx    context.Context
	size   int64
	bufs   chan []byte
	stored func(n int)
}

func newChunkWriter(ctx context.Context, kv *host.KV, size int64, stored func(int)) *chunkWriter {
	w := &chunkWriter{kv: kv, size: size, bufs: make(chan []byte, chunkWindow), stored: stored}
	w.group, w.ctx = errgroup.WithContext(ctx)
	for range chunkWindow {
		w.bufs <- nil
	}
	return w
}

// add reads r to its end and stores its chunks, into e after wait.
func (w *chunkWriter) add(r io.Reader, e *manifestEntry) error {
	e.Chunk = w.size
	for {
		var buf []byte
		select {
		case buf = <-w.bufs:
		case <-w.ctx.Done():
			return context.Cause(w.ctx)
		}
		if buf == nil {
			buf = make([]byte, w.size)
		}
		n, err := io.ReadFull(r, buf)
		if n == 0 {
			w.bufs <- buf
		} else {
			key := chunkKey(buf[:n])
			e.Size += int64(n)
			e.Chunks = append(e.Chunks, hex.EncodeToString(key))
			w.group.Go(func() error {
				defer func() { w.bufs <- buf }()
				if err := w.kv.Store(w.ctx, key, buf[:n], host.StoreIfAbsent); err != nil && !errors.Is(err, nvmeof.KeyExists) {
					return storeError(key, err)
				}
				w.stored(n)
				return nil
			})
		}
		switch err {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF:
			return nil
		default:
			return err
		}
	}
}

// wait waits until all chunks are stored.
func (w *chunkWriter) wait() error { return w.group.Wait() }

// readChunks retrieves a file's chunks, several at a time, checks them, and calls yield with each in order.
func readChunks(ctx context.Context, kv *host.KV, e *manifestEntry, yield func([]byte) error) error {
	type chunk struct {
		buf, data []byte
		err       error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	bufs := make(chan []byte, chunkWindow)
	for range chunkWindow {
		bufs <- nil
	}
	order := make(chan chan chunk, chunkWindow)
	go func() {
		defer close(order)
		for i, c := range e.Chunks {
			var buf []byte
			select {
			case buf = <-bufs:
			case <-ctx.Done():
				return
			}
			if buf == nil {
				buf = make([]byte, min(e.Chunk, e.Size))
			}
			done := make(chan chunk, 1)
			order <- done
			go func() {
				want := int(min(e.Chunk, e.Size-int64(i)*e.Chunk))
				key, _ := hex.DecodeString(c)
				n, err := kv.Retrieve(ctx, key, buf[:want])
				switch {
				case errors.Is(err, nvmeof.KeyDoesNotExist):
					err = fmt.Errorf("chunk %s is absent", c)
				case err == nil && (n != want || !bytes.Equal(chunkKey(buf[:want]), key)):
					err = fmt.Errorf("chunk %s does not have the content that its key says", c)
				}
				done <- chunk{buf, buf[:want], err}
			}()
		}
	}()
	for done := range order {
		c := <-done
		if c.err != nil {
			return c.err
		}
		if err := yield(c.data); err != nil {
			return err
		}
		bufs <- c.buf
	}
	return ctx.Err()
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvof/kvof/host"
)

func newGetCommand() *cobra.Command {
	var kf keyFlags
	var raw bool
	cmd := &cobra.Command{
		Use:   "get KEY [FILE|DIR|-]",
		Short: "Retrieve a value, a file or a directory",
		Long: "Retrieve what put stored: into a file, to standard output (-, the default), or a directory into DIR. A file\n" +
			"appears under its name only when it is complete and checked.",
		Args: cobra.RangeArgs(1, 2),
	}
	kf.add(cmd)
	cmd.Flags().BoolVar(&raw, "raw", false, "the value as it is stored, even if it is a manifest")
	c := newClient(cmd, "queue-depth", defaultQueueDepth)
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		key, err := kf.parse(args[0])
		if err != nil {
			return err
		}
		to := "-"
		if len(args) == 2 {
			to = args[1]
		}
		if to == "-" && c.json {
			return usageError{errors.New("--json and the value both want standard output: name a file")}
		}
		return c.withKV(func(ctx context.Context, kv *host.KV) error {
			start := time.Now()
			t, err := get(ctx, c, kv, key, to, raw)
			if err != nil {
				return storeError(key, err)
			}
			if to == "-" {
				return nil
			}
			t.keyJSON, t.Seconds = newKeyJSON(key), time.Since(start).Seconds()
			return c.print(t, "%s retrieved: %s\n", args[0], t)
		})
	}
	return cmd
}

func get(ctx context.Context, c *client, kv *host.KV, key []byte, to string, raw bool) (*transferJSON, error) {
	value, err := retrieve(ctx, kv, key)
	if err != nil {
		return nil, err
	}
	if raw || !isManifest(value) {
		t := &transferJSON{Bytes: int64(len(value))}
		return t, c.writeTo(to, 0o644, func(w io.Writer) error {
			_, err := w.Write(value)
			return err
		})
	}
	m, err := decodeManifest(value)
	if err != nil {
		return nil, err
	}
	t := &transferJSON{}
	for _, e := range m.Files {
		t.Bytes += e.Size
		t.Chunks += len(e.Chunks)
	}
	bar := c.progress(t.Bytes, "retrieving")
	defer bar.Close()
	content := func(e *manifestEntry) func(io.Writer) error {
		return func(w io.Writer) error {
			return readChunks(ctx, kv, e, func(b []byte) error {
				_, err := w.Write(b)
				bar.Add(len(b))
				return err
			})
		}
	}
	if !m.Tree {
		e := &m.Files[0]
		return t, c.writeTo(to, fs.FileMode(e.Mode), content(e))
	}
	if to == "-" {
		return nil, usageError{errors.New("the key holds a directory: name one to restore it into")}
	}
	t.Files = len(m.Files)
	return t, restore(to, m, content)
}

// retrieve reads a whole value, whatever its size.
func retrieve(ctx context.Context, kv *host.KV, key []byte) ([]byte, error) {
	size, err := kv.Retrieve(ctx, key, nil)
	for err == nil {
		buf := make([]byte, size)
		if size, err = kv.Retrieve(ctx, key, buf); err == nil && size <= len(buf) {
			return buf[:size], nil
		} // else it has grown meanwhile
	}
	return nil, err
}

// writeTo has write fill a file, or standard output for "-".
func (c *client) writeTo(path string, mode fs.FileMode, write func(io.Writer) error) error {
	if path == "-" {
		return write(c.cmd.OutOrStdout())
	}
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		if info.IsDir() {
			return fmt.Errorf("%s is a directory: name a file in it", path)
		}
		f, err := os.OpenFile(path, os.O_WRONLY, 0) // a device or pipe
		if err != nil {
			return err
		}
		return errors.Join(write(f), f.Close())
	}
	root, err := os.OpenRoot(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer root.Close()
	return writeFile(root, filepath.Base(path), mode, write)
}

// writeFile has write fill a new file, which takes its name only when it is complete.
func writeFile(root *os.Root, name string, mode fs.FileMode, write func(io.Writer) error) error {
	part := name + ".kvof-part"
	if err := root.Remove(part); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := root.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.Chmod(mode.Perm())
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = root.Rename(part, name)
	}
	if err != nil {
		root.Remove(part)
	}
	return err
}

// restore writes a tree into dir, which is made if it is not there. Nothing is written outside it.
func restore(dir string, m *manifest, content func(*manifestEntry) func(io.Writer) error) error {
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for i := range m.Files {
		e := &m.Files[i]
		name := filepath.FromSlash(e.Path)
		switch {
		case e.Dir:
			err = root.MkdirAll(name, 0o777)
		case e.Link != "":
			if err = root.Remove(name); err == nil || errors.Is(err, fs.ErrNotExist) {
				err = root.Symlink(e.Link, name)
			}
		default:
			err = writeFile(root, name, fs.FileMode(e.Mode), content(e))
		}
		if err != nil {
			return err
		}
	}
	for i := len(m.Files) - 1; i >= 0; i-- { // last, since a directory may be read-only
		if e := &m.Files[i]; e.Dir {
			if err := root.Chmod(filepath.FromSlash(e.Path), fs.FileMode(e.Mode)); err != nil {
				return err
			}
		}
	}
	return nil
}

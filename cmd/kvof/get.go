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
	var extract bool
	cmd := &cobra.Command{
		Use:   "get KEY [FILE|DIR|-]",
		Short: "Retrieve a value, a file or a directory",
		Long: "Retrieve a value into a file, to standard output (-, the default) or, with --extract, the files of a directory that put\n" +
			"stored into DIR. A file appears under its name only when it is complete and checked.",
		Args: cobra.RangeArgs(1, 2),
	}
	kf.add(cmd)
	cmd.Flags().BoolVarP(&extract, "extract", "x", false, "the value is a directory, a tar archive: restore it into DIR")
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
		switch {
		case to == "-" && extract:
			return usageError{errors.New("name a directory to restore into")}
		case to == "-" && c.json:
			return usageError{errors.New("--json and the value both want standard output: name a file")}
		}
		return c.withValues(0, func(ctx context.Context, v *host.Values) error {
			start := time.Now()
			t, err := get(ctx, c, v, key, to, extract)
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

func get(ctx context.Context, c *client, v *host.Values, key []byte, to string, extract bool) (*transferJSON, error) {
	size, err := v.Size(ctx, key)
	if err != nil {
		return nil, err
	}
	bar := c.progress(size, "retrieving")
	defer bar.Close()
	t := &transferJSON{}
	retrieve := func(w io.Writer) (err error) {
		t.Bytes, err = v.RetrieveTo(ctx, key, io.MultiWriter(w, bar))
		return err
	}
	if !extract {
		return t, c.writeTo(to, retrieve)
	}
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		var err error
		t.Files, err = extractTree(to, r)
		r.CloseWithError(err)
		done <- err
	}()
	err = retrieve(w)
	w.CloseWithError(err)
	if e := <-done; e != nil {
		err = e
	}
	return t, err
}

// writeTo has write fill a file, or standard output for "-".
func (c *client) writeTo(path string, write func(io.Writer) error) error {
	if path == "-" {
		return write(c.cmd.OutOrStdout())
	}
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		if info.IsDir() {
			return fmt.Errorf("%s is a directory: name a file in it, or restore a directory into it with --extract", path)
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
	return writeFile(root, filepath.Base(path), 0o644, write)
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

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/kvof/kvof/host"
)

// transferJSON is the result of put and get in JSON output.
type transferJSON struct {
	keyJSON
	Bytes   int64   `json:"bytes"`           // of the value
	Files   int     `json:"files,omitempty"` // of a directory, links and directories counted too
	Seconds float64 `json:"seconds"`
}

func (t *transferJSON) String() string {
	s := humanize.IBytes(uint64(t.Bytes))
	if t.Files > 0 {
		s += fmt.Sprintf(", %d files", t.Files)
	}
	return s
}

func newPutCommand() *cobra.Command {
	var kf keyFlags
	var ifAbsent, ifExists bool
	var part sizeFlag
	cmd := &cobra.Command{
		Use:   "put KEY FILE|DIR|-",
		Short: "Store a file, a directory or standard input",
		Long: "Store a file, a directory (as a tar archive) or standard input (-) under a key. What one command carries is stored as\n" +
			"it is. More is split into parts under keys of their own, with a root under KEY, written last.",
		Args: cobra.ExactArgs(2),
	}
	kf.add(cmd)
	cmd.Flags().BoolVar(&ifAbsent, "if-absent", false, "only if the key is absent")
	cmd.Flags().BoolVar(&ifExists, "if-exists", false, "only if the key exists")
	cmd.MarkFlagsMutuallyExclusive("if-absent", "if-exists")
	cmd.Flags().Var(&part, "part", "split what is larger than this, for other readers than kvof whose path carries no more (default: only what one command does not carry)")
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
		return c.withValues(int(part), func(ctx context.Context, v *host.Values) error {
			start := time.Now()
			result, err := put(ctx, c, v, key, args[1], mode)
			if err != nil {
				return storeError(key, err)
			}
			result.keyJSON, result.Seconds = newKeyJSON(key), time.Since(start).Seconds()
			return c.print(result, "%s stored: %s\n", args[0], result)
		})
	}
	return cmd
}

func put(ctx context.Context, c *client, v *host.Values, key []byte, from string, mode host.StoreMode) (*transferJSON, error) {
	t := &transferJSON{}
	if from == "-" {
		return t, t.store(ctx, c, v, key, c.cmd.InOrStdin(), -1, mode)
	}
	info, err := os.Stat(from)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		r, w := io.Pipe()
		done := make(chan error, 1)
		go func() {
			var err error
			t.Files, err = archiveTree(from, w)
			w.CloseWithError(err)
			done <- err
		}()
		err := t.store(ctx, c, v, key, r, -1, mode)
		r.CloseWithError(err)
		<-done
		return t, err
	}
	f, err := os.Open(from)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return t, t.store(ctx, c, v, key, f, info.Size(), mode)
}

func (t *transferJSON) store(ctx context.Context, c *client, v *host.Values, key []byte, r io.Reader, size int64, mode host.StoreMode) (err error) {
	bar := c.progress(size, "storing")
	defer bar.Close()
	t.Bytes, err = v.StoreFrom(ctx, key, io.TeeReader(r, bar), mode)
	return err
}

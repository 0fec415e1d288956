package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/nvmeof"
)

func newListCommand() *cobra.Command {
	type entry struct {
		keyJSON
		Size *int64 `json:"size,omitempty"`
	}
	var kf keyFlags
	var from string
	var limit int
	var sizes, all bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List keys, printable ones as text and others in hexadecimal",
		Args:  cobra.NoArgs,
	}
	kf.add(cmd)
	cmd.Flags().StringVar(&from, "from", "", "start at this `KEY`, or where it would be")
	cmd.Flags().IntVar(&limit, "limit", 0, "at most this many keys; 0 = all")
	cmd.Flags().BoolVar(&sizes, "sizes", false, "also show the size of each value in bytes")
	cmd.Flags().BoolVar(&all, "all", false, "also list the parts of split values, and show the sizes of what keys themselves hold")
	c := newClient(cmd, "queue-depth", defaultQueueDepth)
	cmd.RunE = func(*cobra.Command, []string) error {
		var first []byte
		if from != "" {
			var err error
			if first, err = kf.parse(from); err != nil {
				return err
			}
		}
		return c.withValues(0, func(ctx context.Context, v *host.Values) error {
			list, sizeOf := v.List, v.Size
			if all {
				list = v.KV().List
				sizeOf = func(ctx context.Context, key []byte) (int64, error) {
					n, err := v.KV().Retrieve(ctx, key, nil)
					return int64(n), err
				}
			}
			out := bufio.NewWriter(cmd.OutOrStdout())
			entries := []entry{}
			n := 0
			for key, err := range list(ctx, first) {
				if err != nil {
					return err
				}
				key = bytes.Clone(key)
				e := entry{keyJSON: newKeyJSON(key)}
				if sizes {
					size, err := sizeOf(ctx, key)
					if errors.Is(err, nvmeof.KeyDoesNotExist) {
						continue // deleted meanwhile
					}
					if err != nil {
						return err
					}
					e.Size = &size
				}
				switch {
				case c.json:
					entries = append(entries, e)
				case sizes:
					fmt.Fprintf(out, "%s\t%d\n", e.Key, *e.Size)
				default:
					fmt.Fprintln(out, e.Key)
				}
				if n++; n == limit {
					break
				}
			}
			if c.json {
				return c.print(entries, "")
			}
			return out.Flush()
		})
	}
	return cmd
}

package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvof/kvof/host"
)

const defaultQueueDepth = 32

func newExistCommand() *cobra.Command {
	return newKeysCommand(&cobra.Command{
		Use:   "exist KEY...",
		Short: "Tell whether keys are present; exit status 1 when one is absent",
	}, "exists", func(ctx context.Context, v *host.Values, keys [][]byte, found []bool) error {
		return v.KV().ExistMany(ctx, keys, found)
	})
}

func newDeleteCommand() *cobra.Command {
	return newKeysCommand(&cobra.Command{
		Use:   "delete KEY...",
		Short: "Delete keys; exit status 1 when one is absent",
	}, "deleted", func(ctx context.Context, v *host.Values, keys [][]byte, found []bool) (err error) {
		for i, key := range keys {
			found[i], err = v.Exist(ctx, key) // the target need not tell, when deleting (EDNEK)
			if found[i] {
				err = v.Delete(ctx, key)
			}
			if err != nil {
				return storeError(key, err)
			}
		}
		return nil
	})
}

// newKeysCommand makes a command that does something with keys, which the result word says of those that it found.
func newKeysCommand(cmd *cobra.Command, word string, do func(ctx context.Context, v *host.Values, keys [][]byte, found []bool) error) *cobra.Command {
	type result struct {
		keyJSON
		Result string `json:"result"`
	}
	var kf keyFlags
	kf.add(cmd)
	c := newClient(cmd, "queue-depth", defaultQueueDepth)
	cmd.Args = cobra.MinimumNArgs(1)
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		keys, err := kf.parseAll(args)
		if err != nil {
			return err
		}
		return c.withValues(0, func(ctx context.Context, v *host.Values) error {
			var all []result
			var text strings.Builder
			absent := false
			found := make([]bool, len(keys))
			if err := do(ctx, v, keys, found); err != nil {
				return err
			}
			for i, key := range keys {
				r := result{newKeyJSON(key), word}
				if !found[i] {
					r.Result, absent = "absent", true
				}
				all = append(all, r)
				fmt.Fprintf(&text, "%s %s\n", args[i], r.Result)
			}
			if err := c.print(all, "%s", text.String()); err != nil {
				return err
			}
			if absent {
				return errReported
			}
			return nil
		})
	}
	return cmd
}

func newSweepCommand() *cobra.Command {
	var age time.Duration
	cmd := &cobra.Command{
		Use:   "sweep",
		Short: "Delete parts that belong to no value",
		Long: "Delete parts of split values that writers left when they died, or when two of them replaced the same value at the same\n" +
			"time. It lists all keys.",
		Args: cobra.NoArgs,
	}
	cmd.Flags().DurationVar(&age, "older-than", 24*time.Hour, "leave younger ones alone: longer than any put takes")
	c := newClient(cmd, "queue-depth", defaultQueueDepth)
	cmd.RunE = func(*cobra.Command, []string) error {
		return c.withValues(0, func(ctx context.Context, v *host.Values) error {
			s, err := v.Sweep(ctx, age)
			if err != nil {
				return err
			}
			type result struct {
				Live    int `json:"live"`
				Young   int `json:"young"`
				Unknown int `json:"unknown"`
				Deleted int `json:"deleted"`
				Parts   int `json:"parts"`
			}
			return c.print(result(s), "%d split values, deleted %d parts of %d others; %d are too young, %d unknown\n", s.Live, s.Parts, s.Deleted, s.Young, s.Unknown)
		})
	}
	return cmd
}

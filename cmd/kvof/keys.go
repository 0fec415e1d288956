package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kvof/kvof/host"
)

const defaultQueueDepth = 32

func newExistCommand() *cobra.Command {
	return newKeysCommand(&cobra.Command{
		Use:   "exist KEY...",
		Short: "Tell whether keys are present; exit status 1 when one is absent",
	}, "exists", func(ctx context.Context, kv *host.KV, key []byte) (bool, error) { return kv.Exist(ctx, key) })
}

func newDeleteCommand() *cobra.Command {
	return newKeysCommand(&cobra.Command{
		Use:   "delete KEY...",
		Short: "Delete keys; exit status 1 when one is absent",
		Long: "Delete keys; exit status 1 when one is absent. Deleting the manifest of a large file or a directory leaves its\n" +
			"chunks, which other manifests may share.",
	}, "deleted", func(ctx context.Context, kv *host.KV, key []byte) (bool, error) {
		ok, err := kv.Exist(ctx, key) // the target need not tell, when deleting (EDNEK)
		if !ok || err != nil {
			return false, err
		}
		return true, kv.Delete(ctx, key)
	})
}

// newKeysCommand makes a command that does something with each key, which the result word says.
func newKeysCommand(cmd *cobra.Command, word string, do func(context.Context, *host.KV, []byte) (bool, error)) *cobra.Command {
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
		return c.withKV(func(ctx context.Context, kv *host.KV) error {
			var all []result
			var text strings.Builder
			absent := false
			for i, key := range keys {
				ok, err := do(ctx, kv, key)
				if err != nil {
					return storeError(key, err)
				}
				r := result{newKeyJSON(key), word}
				if !ok {
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

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/target"
)

func newPinCommand() *cobra.Command {
	return newPinningCommand(http.MethodPut, "pinned", &cobra.Command{
		Use:   "pin KEY...",
		Short: "Keep keys of a server on this machine from being evicted",
		Long: "Keep the values of keys from being evicted, until they are unpinned, replaced or deleted.\n" +
			"It asks the server on this machine, through its management socket.",
	})
}

func newUnpinCommand() *cobra.Command {
	return newPinningCommand(http.MethodDelete, "unpinned", &cobra.Command{Use: "unpin KEY...", Short: "Let keys that were pinned be evicted again"})
}

func newPinningCommand(method, word string, cmd *cobra.Command) *cobra.Command {
	var kf keyFlags
	var socket, nqn string
	var nsid uint32
	kf.add(cmd)
	f := cmd.Flags()
	f.StringVar(&socket, "socket", configs.DefaultSocket(), "the server's management socket")
	f.StringVar(&nqn, "nqn", "", "the subsystem; not needed when the server has one Key Value namespace")
	f.Uint32Var(&nsid, "namespace", 0, "the namespace; not needed when the server has one Key Value namespace")
	cmd.Args = cobra.MinimumNArgs(1)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		keys, err := kf.parseAll(args)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), statusTime)
		defer cancel()
		socket = serverSocket(cmd, socket)
		nqn, nsid, err := findNamespace(ctx, socket, nqn, nsid)
		if err != nil {
			return err
		}
		for i, key := range keys {
			q := url.Values{"subsystem": {nqn}, "nsid": {fmt.Sprint(nsid)}, "key": {fmt.Sprintf("%x", key)}}
			code, body, err := askServer(ctx, method, socket, "/v1/pin?"+q.Encode())
			if err != nil {
				return err
			}
			if code != http.StatusNoContent {
				return fmt.Errorf("%s: %s", args[i], strings.TrimSpace(string(body)))
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s %s\n", args[i], word)
		}
		return nil
	}
	return cmd
}

// findNamespace finds the only Key Value namespace of a server that fits what is known of it.
func findNamespace(ctx context.Context, socket, nqn string, nsid uint32) (string, uint32, error) {
	code, body, err := askServer(ctx, http.MethodGet, socket, "/v1/status")
	if err != nil {
		return "", 0, err
	}
	var s target.Status
	if err := json.Unmarshal(body, &s); code != http.StatusOK || err != nil {
		return "", 0, fmt.Errorf("the server at %s: %s", socket, cmp.Or(strings.TrimSpace(string(body)), fmt.Sprint(err)))
	}
	var subsystem string
	var id uint32
	found := 0
	for _, sub := range s.Subsystems {
		for _, n := range sub.Namespaces {
			if n.Type == configs.KeyValue && (nqn == "" || nqn == sub.NQN) && (nsid == 0 || nsid == n.NSID) {
				subsystem, id = sub.NQN, n.NSID
				found++
			}
		}
	}
	switch found {
	case 0:
		return "", 0, errors.New("the server has no such Key Value namespace")
	case 1:
		return subsystem, id, nil
	}
	return "", 0, errors.New("the server has several Key Value namespaces: name one with --nqn and --namespace")
}

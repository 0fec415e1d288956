package main

import (
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/kvof/kvof/nvmeof"
)

// discoverJSON is a discovery record in JSON output.
type discoverJSON struct {
	Transport string `json:"transport"`
	Family    string `json:"address_family"`
	Address   string `json:"address"`
	Service   string `json:"service"`
	Type      string `json:"type"`
	NQN       string `json:"nqn"`
	PortID    uint16 `json:"port_id"`
	CNTLID    uint16 `json:"cntlid"`
	EFlags    uint16 `json:"eflags"`
}

func newDiscoverCommand() *cobra.Command {
	var referrals bool
	cmd := &cobra.Command{
		Use:   "discover",
		Short: "List the subsystems that a target offers to this host",
		Args:  cobra.NoArgs,
	}
	c := &client{cmd: cmd}
	c.addressFlags()
	cmd.Flags().BoolVar(&referrals, "referrals", true, "also ask the discovery controllers that the log refers to")
	cmd.RunE = func(*cobra.Command, []string) error {
		entries, err := c.discover(cmd.Context(), referrals)
		if err != nil {
			return err
		}
		name := func(names map[uint8]string, v uint8) string {
			if s, ok := names[v]; ok {
				return s
			}
			return fmt.Sprint(v)
		}
		out := make([]discoverJSON, len(entries))
		for i, e := range entries {
			out[i] = discoverJSON{
				Transport: name(map[uint8]string{nvmeof.TRTypeTCP: "tcp", nvmeof.TRTypeRDMA: "rdma"}, e.TRType),
				Family:    name(map[uint8]string{nvmeof.AdrFamIPv4: "ipv4", nvmeof.AdrFamIPv6: "ipv6"}, e.AdrFam),
				Type:      name(map[uint8]string{nvmeof.SubtypeNVM: "nvm", nvmeof.SubtypeReferral: "referral", nvmeof.SubtypeDiscovery: "discovery"}, e.SubType),
				Address:   e.TRAddr, Service: e.TRSVCID, NQN: e.SubNQN, PortID: e.PortID, CNTLID: e.CNTLID, EFlags: e.EFlags,
			}
		}
		var text strings.Builder
		w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "TRANSPORT\tADDRESS\tSERVICE\tTYPE\tNQN")
		for _, e := range out {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", e.Transport, printable(e.Address), printable(e.Service), e.Type, printable(e.NQN))
		}
		w.Flush()
		return c.print(out, "%s", text.String())
	}
	return cmd
}

// printable makes a target's text safe to show on a terminal.
func printable(s string) string {
	q := fmt.Sprintf("%q", s)
	return q[1 : len(q)-1]
}

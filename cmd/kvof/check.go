package main

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kvof/kvof/configs"
)

func newCheckCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE...",
		Short: "Check configuration files and report every mistake",
		Long: "Check reads configuration files and reports every mistake with its file and line.\n" +
			"It opens no device and binds no address. The exit status is 1 when any file has a mistake.",
		Example: "  kvof check /etc/kvof/kvof.toml",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, files []string) error {
			var failed error
			for _, file := range files {
				c, err := configs.Load(file)
				if err != nil {
					cmd.PrintErrln(err)
					failed = errReported
					continue
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: ok: %s\n", file, summary(c))
			}
			return failed
		},
	}
}

// summary says in one line what a configuration serves.
func summary(c *configs.Config) string {
	namespaces := 0
	for _, s := range c.Subsystems {
		namespaces += len(s.Namespaces)
	}
	parts := []string{plural(len(c.Subsystems), "subsystem"), plural(namespaces, "namespace")}
	var tcp, rdma []netip.AddrPort
	for _, l := range c.Listeners {
		if l.Transport == configs.TransportRDMA {
			rdma = append(rdma, l.Address)
		} else {
			tcp = append(tcp, l.Address)
		}
	}
	parts = append(parts, addresses("I/O on", tcp)...)
	parts = append(parts, addresses("RDMA on", rdma)...)
	parts = append(parts, addresses("discovery on", c.Discovery.Addresses)...)
	return strings.Join(parts, ", ")
}

func addresses(what string, addrs []netip.AddrPort) []string {
	if len(addrs) == 0 {
		return nil
	}
	var b strings.Builder
	b.WriteString(what)
	for _, a := range addrs {
		b.WriteString(" " + a.String())
	}
	return []string{b.String()}
}

func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

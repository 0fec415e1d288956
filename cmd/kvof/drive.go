package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/kvof/kvof/uring"
)

func newDriveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "drive",
		Short: "Look at this machine's NVMe drives",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newDriveListCommand(), newDriveInspectCommand())
	return cmd
}

func newDriveListCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the NVMe drives of this machine, what they can do, and what is on them",
		Long: "List the NVMe namespaces of this machine: their size, the size of their LBAs, the most that one command moves, how many\n" +
			"placement handles they have (Flexible Data Placement), and what uses them or is on them. It writes to none of them.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			drives, err := uring.ListDrives()
			if err != nil {
				for line := range strings.SplitSeq(err.Error(), "\n") {
					cmd.PrintErrln(strings.TrimPrefix(line, "uring: "))
				}
				if len(drives) == 0 {
					return errReported
				}
			}
			list := make([]listedDrive, len(drives))
			for i, d := range drives {
				list[i] = describeDrive(d)
			}
			return printDrives(cmd.OutOrStdout(), list, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// listedDrive is a drive with what is to say of it.
type listedDrive struct {
	*uring.Drive
	Unfit    string   `json:"unfit,omitempty"`    // why kvof cannot use it
	Used     []string `json:"used,omitempty"`     // what of the running system uses it
	Contents string   `json:"contents,omitempty"` // what is on it
}

func describeDrive(d *uring.Drive) listedDrive {
	l := listedDrive{Drive: d, Used: usedBy("/proc", "/sys", d)}
	if err := d.Unsupported(); err != nil {
		l.Unfit = strings.TrimPrefix(err.Error(), "uring: ")
	}
	if d.Block == "" {
		return l
	}
	f, err := os.OpenFile(d.Block, os.O_RDONLY, 0)
	if err == nil {
		l.Contents, err = contentsOf(f, d.Size)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		l.Contents = fmt.Sprintf("unknown: %v", err)
	}
	return l
}

func printDrives(out io.Writer, list []listedDrive, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(list)
	}
	if len(list) == 0 {
		_, err := fmt.Fprintln(out, "This machine has no NVMe drive.")
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "DRIVE\tSIZE\tLBA\tCOMMAND\tCACHE\tPLACEMENTS\tMODEL\tSERIAL\tCONTENTS")
	for _, d := range list {
		cache := "none"
		if d.VolatileCache {
			cache = "volatile"
		}
		state := d.Contents
		switch {
		case d.Unfit != "":
			state = "unfit: " + d.Unfit
		case len(d.Used) > 0:
			state = "in use: " + strings.Join(d.Used, ", ")
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%d\t%s\t%s\t%s\n", d.Path, humanize.IBytes(uint64(d.Size)), d.LBASize, humanize.IBytes(uint64(d.MaxTransfer)), cache,
			d.Placements, quoteUnprintable(d.Model), quoteUnprintable(d.Serial), state)
	}
	return w.Flush()
}

package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/kvof/kvof/kvlayer"
	"github.com/kvof/kvof/uring"
)

func newDriveInspectCommand() *cobra.Command {
	var verify, keys, asJSON bool
	cmd := &cobra.Command{
		Use:   "inspect PATH",
		Short: "Show what kvof keeps on a drive, block device or file that no server has open",
		Long: "Show what kvof keeps on a drive, block device or file: its pool, its segments and their fill, and the keys. Nothing is written.\n" +
			"The exit status is 1 when something is damaged, which only --verify finds in values.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			dev, err := openForInspection(args[0])
			if err != nil {
				return err
			}
			defer dev.Close()
			all := inspection{Segments: []kvlayer.InspectedSegment{}}
			if all.Superblock, err = kvlayer.Inspect(dev, verify, func(s kvlayer.InspectedSegment) error {
				if all.Damaged += s.Damaged; s.State == "damaged" {
					all.Damaged++
				}
				all.Segments = append(all.Segments, s)
				return cmd.Context().Err()
			}); err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			text := all.text(keys, verify)
			if asJSON {
				b, err := json.MarshalIndent(all, "", "  ")
				if err != nil {
					return err
				}
				text = string(b) + "\n"
			}
			if _, err := fmt.Fprint(cmd.OutOrStdout(), text); err != nil {
				return err
			}
			if all.Damaged > 0 {
				return errReported
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&verify, "verify", false, "read all values and compare every checksum")
	f.BoolVar(&keys, "keys", false, "list the keys")
	f.BoolVar(&asJSON, "json", false, "print JSON, with the keys")
	return cmd
}

// openForInspection opens a device as a server would, but makes none.
func openForInspection(path string) (uring.Device, error) {
	if strings.HasPrefix(path, "/dev/ng") {
		d, err := uring.OpenNVMe(path, uring.NVMeOptions{})
		if err != nil {
			return nil, err // not a nil *NVMe
		}
		return d, nil
	}
	return uring.OpenFile(path, uring.FileOptions{})
}

// inspection is all that was found.
type inspection struct {
	Superblock kvlayer.Inspection         `json:"superblock"`
	Segments   []kvlayer.InspectedSegment `json:"segments"`
	Damaged    int                        `json:"damaged"` // segments and values
}

func (in *inspection) text(keys, verify bool) string {
	var b strings.Builder
	s := in.Superblock
	fmt.Fprintf(&b, "format %d, device %d of the %d of pool %v, generation %d, %d of 2 superblocks whole\n", s.Version, s.Member, s.Members, s.Pool, s.Generation, s.Copies)
	fmt.Fprintf(&b, "%s of %s, extents of %s, %s\n", plural(int(s.Segments), "segment"), humanize.IBytes(uint64(s.SegmentSize)),
		humanize.IBytes(uint64(s.Extent)), plural(len(s.Tenants), "tenant"))
	w := newTable(&b, "\nSEGMENT\tOFFSET\tSTATE\tTENANT\tCLASS\tFILL\tRECORDS\tLIVE\tLIVE BYTES\tDAMAGED")
	live, bytes, unused := 0, int64(0), 0
	for _, g := range in.Segments {
		live, bytes = live+g.Live, bytes+g.LiveBytes
		if g.State == "unused" || g.State == "free" {
			unused++
			continue
		}
		fmt.Fprintf(w, "%d\t%d\t%s\t%d\t%d\t%s\t%d\t%d\t%s\t%d\n", g.Index, g.Offset, g.State, g.Tenant, g.Class, bar(g.Tail, s.SegmentSize),
			g.Records, g.Live, humanize.IBytes(uint64(g.LiveBytes)), g.Damaged)
	}
	w.Flush()
	fmt.Fprintf(&b, "%d free; %s with %s live", unused, plural(live, "record"), humanize.IBytes(uint64(bytes)))
	if verify {
		fmt.Fprintf(&b, ", %d damaged", in.Damaged)
	}
	b.WriteByte('\n')
	if keys {
		w := newTable(&b, "\nKEY\tPART\tBYTES\tTENANT\tSTORED\tOFFSET\tDAMAGE")
		for _, g := range in.Segments {
			for _, r := range g.List {
				fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%s\t%d\t%s\n", r.Key, r.Part, r.Size, g.Tenant, r.Stored.Format(time.RFC3339), r.Offset, r.Damage)
			}
		}
		w.Flush()
	}
	return b.String()
}

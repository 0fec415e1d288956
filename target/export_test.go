package target

import "github.com/kvof/kvof/uring"

// StatusOf is how errors become statuses.
var StatusOf = statusOf

// PutDrive puts a drive under a block namespace: dev is made of the device that is there.
func (t *Target) PutDrive(nqn string, nsid uint32, drive *uring.Drive, dev func(uring.Device) uring.Device) {
	for _, n := range t.subsystem(nqn).list() {
		if n.NSID == nsid {
			n.dev, n.drive, n.inline = dev(n.dev), drive, false
		}
	}
}

// ReadsTo is readsTo.
var ReadsTo = readsTo

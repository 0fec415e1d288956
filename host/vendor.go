package host

import (
	"context"
	"errors"
	"io/fs"

	"github.com/kvof/kvof/nvmeof"
)

// vendor is what is known of a target's vendor specific commands (docs/vendor-commands.md).
type vendor struct {
	existMany   bool
	granularity int64 // of Retrieve Range, bytes; 0: there is none
}

// vendorCommands says which the target has. It asks once.
func (k *KV) vendorCommands(ctx context.Context) vendor {
	v := k.vendor.Load()
	if v == nil {
		var err error
		if v, err = k.askVendor(ctx); err != nil {
			return vendor{} // next time again
		}
		k.vendor.Store(v)
	}
	return *v
}

// askVendor reads the log page that advertises them. It fails when there is no answer.
func (k *KV) askVendor(ctx context.Context) (*vendor, error) {
	v, b := new(vendor), make([]byte, nvmeof.VendorLogSize)
	if err := k.path.LogPage(ctx, nvmeof.LogVendor, 0, b); unsupported(err) {
		return v, nil
	} else if err != nil {
		return nil, err
	}
	commands, _ := nvmeof.DecodeVendorLog(b) // none if the page is another vendor's
	for _, c := range commands {
		switch {
		case c.CSI != nvmeof.CSIKV || c.Version < 1:
		case c.Opcode == nvmeof.OpExistMany:
			v.existMany = c.Limit >= nvmeof.MaxExistMany
		case c.Opcode == nvmeof.OpRetrieveRange && c.Limit%4 == 0:
			v.granularity = int64(c.Limit)
		}
	}
	return v, nil
}

// lacks tells whether err says that what the target advertised is not there after all: another has taken the namespace over, or
// the kernel does not let this user send it. Then it is not asked for again.
func (k *KV) lacks(err error) bool {
	if !errors.Is(err, nvmeof.InvalidOpcode) && !errors.Is(err, fs.ErrPermission) {
		return false
	}
	k.vendor.Store(new(vendor))
	return true
}

// unsupported tells whether the answer to a log page is that there is none, or none for this user.
func unsupported(err error) bool {
	var st nvmeof.Status
	return errors.As(err, &st) || errors.Is(err, fs.ErrPermission)
}

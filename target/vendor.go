package target

import (
	"github.com/kvof/kvof/kvlayer"
	"github.com/kvof/kvof/nvmeof"
)

// existMany is the vendor specific command Exist Many (docs/vendor-commands.md): it asks the index about many keys, and
// waits for nothing but its data.
func existMany(r *Request) {
	n := r.Cmd.KVSize()
	switch {
	case n > r.Length:
		r.fail(nvmeof.DataSGLLength)
		return
	case n > nvmeof.MaxExistManySize:
		r.fail(nvmeof.InvalidField)
		return
	}
	r.receive(n, r.list(), lookUp)
}

func lookUp(r *Request) {
	var found uint64
	i, bad := 0, false
	err := nvmeof.DecodeKeyList(r.ranges.b[:r.ranges.n], func(b []byte) bool {
		if bad = i == nvmeof.MaxExistMany; bad {
			return false
		}
		k, err := kvlayer.MakeKey(b)
		if err != nil {
			panic(err) // DecodeKeyList has checked the length
		}
		if _, ok := r.ns.store.Exist(k); ok {
			found |= 1 << i
		}
		i++
		return true
	})
	if err != nil || bad {
		r.fail(nvmeof.InvalidField)
		return
	}
	r.finish(nvmeof.Success, uint32(found), uint32(found>>32))
}

// vendorLog is the log page that advertises the vendor specific commands: Exist Many and Retrieve Range.
func vendorLog() []byte {
	b := make([]byte, nvmeof.VendorLogSize)
	nvmeof.EncodeVendorLog(b,
		nvmeof.VendorCommand{Opcode: nvmeof.OpExistMany, CSI: nvmeof.CSIKV, Version: 1, Limit: nvmeof.MaxExistMany},
		nvmeof.VendorCommand{Opcode: nvmeof.OpRetrieveRange, CSI: nvmeof.CSIKV, Version: 1, Limit: kvlayer.Granularity})
	return b
}

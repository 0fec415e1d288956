package nvmeof

// Flexible Data Placement (Base 2.1, "Flexible Data Placement").

const (
	// FDPConfigSize is the size in bytes of an FDP configuration descriptor without its list of reclaim unit handles.
	FDPConfigSize = 64
	// FDPConfigHeader is the size in bytes of the FDP Configurations log's header.
	FDPConfigHeader = 16
	// RUHSHeader and RUHSSize are the sizes in bytes of the header and a descriptor of the Reclaim Unit Handle Status.
	RUHSHeader = 16
	RUHSSize   = 32

	// DirectivePlacement is the directive type (DTYPE) of a write that names a placement identifier (DSPEC).
	DirectivePlacement = 2
	// MgmtRUHStatus is the management operation (MO) of I/O Management Receive that returns the Reclaim Unit Handle Status.
	MgmtRUHStatus = 1
)

// FDPConfig is one descriptor of the FDP Configurations log (log 20h).
type FDPConfig struct {
	Valid         bool   // FDPA bit 7
	ReclaimGroups uint32 // NRG
	Handles       uint16 // NRUH, reclaim unit handles
	MaxPIDs       uint16 // placement identifiers of a namespace, 0's based
	ReclaimUnit   uint64 // RUNS, nominal size in bytes
}

// DecodeFDPConfigs reads the descriptors of the log as far as b has them.
func DecodeFDPConfigs(b []byte) (cs []FDPConfig) {
	if len(b) < FDPConfigHeader {
		return nil
	}
	n := int(le.Uint16(b)) + 1
	for b = b[FDPConfigHeader:]; n > 0 && len(b) >= FDPConfigSize; n-- {
		cs = append(cs, FDPConfig{Valid: b[2]&0x80 != 0, ReclaimGroups: le.Uint32(b[4:]), Handles: le.Uint16(b[8:]), MaxPIDs: le.Uint16(b[10:]),
			ReclaimUnit: le.Uint64(b[16:])})
		size := int(le.Uint16(b))
		if size < FDPConfigSize || size > len(b) {
			break
		}
		b = b[size:]
	}
	return cs
}

// DecodePlacements reads the placement identifiers of a namespace, in the order of its placement handles, from a
// Reclaim Unit Handle Status, as far as b has them.
func DecodePlacements(b []byte) (pids []uint16) {
	if len(b) < RUHSHeader {
		return nil
	}
	n := int(le.Uint16(b[14:]))
	for b = b[RUHSHeader:]; n > 0 && len(b) >= RUHSSize; n-- {
		pids = append(pids, le.Uint16(b))
		b = b[RUHSSize:]
	}
	return pids
}

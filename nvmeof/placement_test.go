package nvmeof

import (
	"reflect"
	"testing"
)

var (
	testFDPConfigs = fields{0: "0100 01", 4: "e0000000",
		16: "5000 87 00 01000000 1000 0700 00010000 0000006000000000", 16 + 64: "01 00 00 00", // a handle list of 16 bytes follows
		96: "4000 07 00 02000000 0800 0300 00010000 0000003000000000"}.bytes(160)
	testRUHStatus = fields{14: "0300", 16: "0000 0100", 48: "0100 0200", 80: "0001 0300"}.bytes(112)
)

func TestFDPConfigs(t *testing.T) {
	want := []FDPConfig{{Valid: true, ReclaimGroups: 1, Handles: 16, MaxPIDs: 7, ReclaimUnit: 0x60000000},
		{ReclaimGroups: 2, Handles: 8, MaxPIDs: 3, ReclaimUnit: 0x30000000}}
	for n, want := range map[int][]FDPConfig{160: want, 159: want[:1], 96: want[:1], 95: want[:1], 79: nil, 15: nil, 0: nil} {
		if got := DecodeFDPConfigs(testFDPConfigs[:n]); !reflect.DeepEqual(got, want) {
			t.Errorf("%d bytes: %+v, want %+v", n, got, want)
		}
	}
	endless := append([]byte{0xFF, 0xFF}, make([]byte, 100)...) // descriptors of no size
	if got := DecodeFDPConfigs(endless); len(got) != 1 {
		t.Errorf("%d configurations of no size", len(got))
	}
}

func TestPlacements(t *testing.T) {
	for n, want := range map[int][]uint16{112: {0, 1, 0x100}, 111: {0, 1}, 16: nil, 15: nil, 0: nil} {
		if got := DecodePlacements(testRUHStatus[:n]); !reflect.DeepEqual(got, want) {
			t.Errorf("%d bytes: %v, want %v", n, got, want)
		}
	}
}

// TestIdentifyManyFormats reads the format in use when its index needs the high bits of FLBAS.
func TestIdentifyManyFormats(t *testing.T) {
	var ns IdentifyNamespace
	if err := ns.Decode(fields{25: "14", 26: "21", 128 + 4*17: "0800 0c"}.bytes(IdentifySize)); err != nil || ns.LBADS != 12 || ns.MS != 8 {
		t.Errorf("%+v, %v", ns, err)
	}
	var nvm IdentifyNVMController
	if err := nvm.Decode(fields{0: "05 06 07 08 09000000 0a"}.bytes(IdentifySize)); err != nil ||
		nvm != (IdentifyNVMController{VSL: 5, WZSL: 6, DMRL: 8, DMRSL: 9, DMSL: 10}) {
		t.Errorf("%+v, %v", nvm, err)
	}
}

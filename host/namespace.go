package host

import (
	"context"
	"errors"
	"fmt"

	"github.com/kvof/kvof/nvmeof"
)

// Namespace describes an active namespace.
type Namespace struct {
	NSID           uint32
	CSI            nvmeof.CSI
	NGUID          [16]byte // zero when the target gives none
	UUID           [16]byte
	Size           uint64 // bytes
	Used           uint64 // bytes
	WriteProtected bool

	BlockSize int // block namespaces: bytes in a logical block

	MaxKey   int    // KV: bytes in a key
	MaxValue uint64 // KV: bytes in a value
	MaxKeys  uint64 // KV: 0 = none stated
	Optimal  uint32 // KV: optimal value granularity in bytes, 0 = none stated
}

// Namespaces lists the active namespaces. Those of command sets other than NVM and Key Value have only NSID, CSI and
// identifiers.
func (c *Controller) Namespaces(ctx context.Context) ([]Namespace, error) {
	page := make([]byte, nvmeof.IdentifySize)
	var all []Namespace
	for after := uint32(0); ; {
		if err := c.identify(ctx, nvmeof.CNSActiveList, after, 0, page); err != nil {
			return nil, fmt.Errorf("list namespaces: %w", err)
		}
		ids := nvmeof.DecodeNSIDList(page)
		for _, id := range ids {
			if id <= after {
				return nil, protocolError("namespace list is not ascending")
			}
			after = id
			ns, err := c.Namespace(ctx, id)
			if errors.Is(err, nvmeof.InvalidNamespace) {
				continue // gone meanwhile
			}
			if err != nil {
				return nil, err
			}
			all = append(all, ns)
		}
		if len(ids) < nvmeof.IdentifySize/4 {
			return all, nil
		}
	}
}

// Namespace describes one namespace.
func (c *Controller) Namespace(ctx context.Context, nsid uint32) (Namespace, error) {
	ns, err := c.namespace(ctx, nsid)
	if err != nil {
		return ns, fmt.Errorf("namespace %d: %w", nsid, err)
	}
	return ns, nil
}

func (c *Controller) namespace(ctx context.Context, nsid uint32) (Namespace, error) {
	ns := Namespace{NSID: nsid}
	page := make([]byte, nvmeof.IdentifySize)
	err := c.identify(ctx, nvmeof.CNSDescriptors, nsid, 0, page)
	var st nvmeof.Status
	switch {
	case errors.As(err, &st) && st.Code() != nvmeof.InvalidNamespace:
		// Targets before 1.3 have no descriptors, and only NVM namespaces.
	case err != nil:
		return ns, err
	default:
		var ids nvmeof.NamespaceIDs
		if err := ids.Decode(page); err != nil {
			return ns, err
		}
		ns.CSI, ns.NGUID, ns.UUID = ids.CSI, ids.NGUID, ids.UUID
	}
	switch ns.CSI {
	case nvmeof.CSINVM:
		if err := c.identify(ctx, nvmeof.CNSNamespace, nsid, 0, page); err != nil {
			return ns, err
		}
		var d nvmeof.IdentifyNamespace
		if err := d.Decode(page); err != nil {
			return ns, err
		}
		if d.NSZE == 0 {
			return ns, nvmeof.InvalidNamespace // not active
		}
		if d.LBADS < 9 || d.LBADS > 24 || d.NSZE > 1<<62>>d.LBADS {
			return ns, protocolError("%d blocks of 2^%d bytes", d.NSZE, d.LBADS)
		}
		ns.BlockSize = 1 << d.LBADS
		ns.Size, ns.Used = d.NSZE<<d.LBADS, d.NUSE<<d.LBADS
		ns.WriteProtected = d.NSATTR&1 != 0
		if ns.NGUID == [16]byte{} {
			ns.NGUID = d.NGUID
		}
	case nvmeof.CSIKV:
		if err := c.identify(ctx, nvmeof.CNSNamespaceCSI, nsid, nvmeof.CSIKV, page); err != nil {
			return ns, err
		}
		if err := ns.decodeKV(page); err != nil {
			return ns, err
		}
	}
	return ns, nil
}

// decodeKV reads the Identify data of a Key Value namespace.
func (ns *Namespace) decodeKV(page []byte) error {
	var d nvmeof.IdentifyKV
	if err := d.Decode(page); err != nil {
		return err
	}
	ns.Size, ns.Used = d.NSZE, d.NUSE
	ns.WriteProtected = d.NSATTR&1 != 0
	ns.MaxKey, ns.MaxValue, ns.MaxKeys, ns.Optimal = min(int(d.MaxKey), nvmeof.MaxKeyLen), uint64(d.MaxValue), uint64(d.MaxKeys), d.NOVG
	if ns.NGUID == [16]byte{} {
		ns.NGUID = d.NGUID
	}
	return nil
}

// Find returns the namespace with an NGUID.
func (c *Controller) Find(ctx context.Context, nguid [16]byte) (Namespace, error) {
	all, err := c.Namespaces(ctx)
	if err != nil {
		return Namespace{}, err
	}
	for _, ns := range all {
		if ns.NGUID == nguid {
			return ns, nil
		}
	}
	return Namespace{}, fmt.Errorf("%w: NGUID %x", ErrNoNamespace, nguid)
}

// KV opens a Key Value namespace.
func (c *Controller) KV(ctx context.Context, nsid uint32) (*KV, error) {
	ns, err := c.Namespace(ctx, nsid)
	if err != nil {
		return nil, err
	}
	if ns.CSI != nvmeof.CSIKV {
		return nil, fmt.Errorf("%w: namespace %d is not a Key Value namespace", ErrNoNamespace, nsid)
	}
	return &KV{path: c, ns: ns}, nil
}

// Block opens a block (NVM command set) namespace.
func (c *Controller) Block(ctx context.Context, nsid uint32) (*Block, error) {
	ns, err := c.Namespace(ctx, nsid)
	if err != nil {
		return nil, err
	}
	if ns.CSI != nvmeof.CSINVM {
		return nil, fmt.Errorf("%w: namespace %d is not a block namespace", ErrNoNamespace, nsid)
	}
	return &Block{c: c, ns: ns}, nil
}

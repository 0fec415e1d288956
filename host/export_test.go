package host

// Narrow is the namespace by a path that carries limit bytes in one command.
func (k *KV) Narrow(limit uint64) *KV {
	return &KV{path: narrow{k.path.(*Controller), limit}, ns: k.ns}
}

type narrow struct {
	*Controller
	limit uint64
}

func (n narrow) maxTransfer([]byte) uint64 { return n.limit }

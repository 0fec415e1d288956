//go:build !cgo || !rdma

package rdma

import "fmt"

// System returns the machine's own RDMA, through rdma-core. The first call opens its libraries.
func System() (Verbs, error) {
	return nil, fmt.Errorf("%w: this kvof was built without it (packages libibverbs-dev and librdmacm-dev, then make build)", ErrUnavailable)
}

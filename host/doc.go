// Package host is a user-space NVMe over Fabrics host: discovery, controllers, Key Value and block namespaces over
// NVMe/TCP and NVMe/RDMA.
//
// [Discover] lists what a target offers, [Connect] brings up a controller, and [Controller.KV] and
// [Controller.Block] give its namespaces. All methods may be called by many goroutines at once: their commands
// share the controller's I/O queues and are in flight together, up to the queue depth.
//
// Payloads are neither copied nor kept: data is sent from, and received into, the caller's buffer, which belongs to
// the package until the call returns and to the caller again afterwards, also when a context ends it early.
// An I/O allocates nothing. Over RDMA the caller's memory should be registered ([Controller.Register]); data of at most
// 8 KiB is copied if it is not.
//
// A command that the controller refuses returns its [nvmeof.Status]. A lost connection, a broken protocol or a
// missed keep alive ends the whole controller: every waiting command returns [ErrConnectionLost] at once, unless the
// controller reconnects ([Options.Reconnect]).
//
// [OpenDevice] gives the same Key Value namespace through the kernel's own host, and [KV.Values] values of any size.
package host

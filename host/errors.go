package host

import (
	"errors"
	"fmt"
)

var (
	// ErrConnectionLost is wrapped by the error of every command that was waiting when a controller's connection
	// ended, and of every later one.
	ErrConnectionLost = errors.New("connection to the controller is lost")
	// ErrOutcomeUnknown is wrapped, too, when the command had been sent: it may or may not have been carried out.
	ErrOutcomeUnknown = errors.New("the command may have been carried out")
	// ErrClosed is the error of commands after or during [Controller.Close].
	ErrClosed = errors.New("controller is closed")
	// ErrProtocol is wrapped when the target breaks the NVMe/TCP or NVMe protocol.
	ErrProtocol = errors.New("target broke the protocol")
	// ErrDigest is returned by a command whose data arrived with a wrong data digest. The connection goes on.
	ErrDigest = errors.New("data digest of the received data does not match")
	// ErrTransferSize is wrapped when a command's data is larger than the path to the namespace carries in one command:
	// the controller's MDTS, or the kernel's limit for a [Device].
	ErrTransferSize = errors.New("more than one command carries")
	// ErrDeviceMemory is wrapped when the path does not carry data from or to the memory of a dma-buf: it is not RDMA, or its device or
	// driver takes none; or a piece of data lies in such memory in part only. See [Controller.RegisterDMABuf].
	ErrDeviceMemory = errors.New("the path takes no memory of this device")
	// ErrDamaged is wrapped when a split value is not as it was stored: a part is absent or differs, or its root is wrong.
	// A cache may take it for a miss, and store the value again.
	ErrDamaged = errors.New("the split value is damaged")
	// ErrReplaced is returned when a value was replaced again and again while it was being read, or once after a part of
	// it was passed on.
	ErrReplaced = errors.New("the value was replaced while it was read")
	// ErrNoNamespace is wrapped when the controller has no such namespace.
	ErrNoNamespace = errors.New("no such namespace")
)

func protocolError(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}

func tooLarge(n int, limit uint64) error {
	return fmt.Errorf("%d bytes: %w (%d bytes)", n, ErrTransferSize, limit)
}

package host

import (
	"errors"
	"fmt"
)

var (
	// ErrConnectionLost is wrapped by the error of every command that was waiting when a controller's connection
	// ended, and of every later one. A command may or may not have been carried out.
	ErrConnectionLost = errors.New("connection to the controller is lost")
	// ErrClosed is the error of commands after or during [Controller.Close].
	ErrClosed = errors.New("controller is closed")
	// ErrProtocol is wrapped when the target breaks the NVMe/TCP or NVMe protocol.
	ErrProtocol = errors.New("target broke the protocol")
	// ErrDigest is returned by a command whose data arrived with a wrong data digest. The connection goes on.
	ErrDigest = errors.New("data digest of the received data does not match")
	// ErrTransferSize is wrapped when a command's data is larger than the controller takes in one command (MDTS).
	ErrTransferSize = errors.New("larger than the controller's maximum data transfer size")
	// ErrNoNamespace is wrapped when the controller has no such namespace.
	ErrNoNamespace = errors.New("no such namespace")
)

func protocolError(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}

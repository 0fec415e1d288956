package client

import (
	"context"
	"errors"

	"github.com/kvof/kvof/host"
	"github.com/kvof/kvof/nvmeof"
)

// Status is how an operation ended. The values are those of enum kvof_status in kvof.h.
type Status int32

// Statuses. OK and Exists are success.
const (
	OK          Status = 0
	Exists      Status = 1  // put: the key was there already
	Miss        Status = 2  // no such key; get: also a value that is not the key's, or damaged
	Truncated   Status = 3  // get: the value is larger than the memory
	Unavailable Status = 4  // no path to the target is up, or the last broke
	Timeout     Status = 5  // the target did not answer in time
	Full        Status = 6  // put: the target has no room
	TooLarge    Status = 7  // put: larger than the target's values may be
	ReadOnly    Status = 8  // put, delete: the namespace is write protected
	IO          Status = 9  // the target failed in another way
	Cancelled   Status = 10 // the client was closed
	Invalid     Status = 11 // an argument that is not allowed
	Unsupported Status = 14 // get, put: no path that is up carries data from or to this memory
	Pending     Status = 255
)

// Success tells whether s is OK or Exists.
func (s Status) Success() bool { return s == OK || s == Exists }

var (
	// ErrAgain is returned by Submit when as many operations as allowed are in flight.
	ErrAgain = errors.New("too many operations in flight")
	// ErrClosed is returned by calls on a closed client.
	ErrClosed = errors.New("client is closed")
	// ErrUnavailable is wrapped by Open's error when no target could be reached.
	ErrUnavailable = errors.New("no target can be reached")
	// ErrUnsupported is returned by Register for memory that no transport in use can take.
	ErrUnsupported = errors.New("not supported by any transport in use")

	errTimeout = errors.New("the target did not answer in time")
)

// statusOf maps what package host returns; detail is the NVMe status behind it, 0 if there is none. lost tells that the path's
// connection is gone, so that another may try.
func statusOf(err error) (s Status, detail uint32, lost bool) {
	if err == nil {
		return OK, 0, false
	}
	return statusOfError(err)
}

func statusOfError(err error) (s Status, detail uint32, lost bool) {
	var st nvmeof.Status
	switch {
	case errors.As(err, &st):
		detail = uint32(st.Code())
		switch st.Code() {
		case nvmeof.KeyDoesNotExist:
			return Miss, detail, false
		case nvmeof.KeyExists:
			return Exists, detail, false
		case nvmeof.CapacityExceeded:
			return Full, detail, false
		case nvmeof.InvalidValueSize:
			return TooLarge, detail, false
		case nvmeof.WriteProtected:
			return ReadOnly, detail, false
		case nvmeof.AbortSQDeleted, nvmeof.InvalidNamespace: // the controller goes, or no longer has the namespace
			return IO, detail, true
		}
		return IO, detail, false
	case errors.Is(err, errTimeout), errors.Is(err, context.DeadlineExceeded):
		return Timeout, 0, false
	case errors.Is(err, ErrClosed):
		return Cancelled, 0, false
	case errors.Is(err, host.ErrTransferSize):
		return TooLarge, 0, false
	case errors.Is(err, host.ErrDeviceMemory):
		return Unsupported, 0, false
	case errors.Is(err, host.ErrConnectionLost), errors.Is(err, host.ErrClosed):
		return Unavailable, 0, true
	}
	return IO, 0, false // a broken protocol or a data digest that does not match
}

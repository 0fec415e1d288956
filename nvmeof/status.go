package nvmeof

import "fmt"

// Status is the 15-bit status field of a completion without the phase bit: SC in bits 7:0, SCT in bits 10:8,
// CRD in bits 12:11, More in bit 13, DNR in bit 14 (Base, Completion Queue Entry: Status Field).
// A Status is also a Go error; Success is not an error and must be compared before it is returned as one.
type Status uint16

// DNR (Do Not Retry) is set by the controller when the same command would fail again.
const DNR Status = 1 << 14

// Generic command status (SCT 0) values.
const (
	Success              Status = 0x00
	InvalidOpcode        Status = 0x01
	InvalidField         Status = 0x02
	CommandIDConflict    Status = 0x03
	DataTransferError    Status = 0x04
	InternalError        Status = 0x06
	AbortRequested       Status = 0x07
	AbortSQDeleted       Status = 0x08
	InvalidNamespace     Status = 0x0B
	CommandSequenceError Status = 0x0C
	InvalidSegment       Status = 0x0D // Invalid SGL Segment Descriptor
	InvalidSGLCount      Status = 0x0E // Invalid Number of SGL Descriptors
	DataSGLLength        Status = 0x0F // Data SGL Length Invalid
	SGLTypeInvalid       Status = 0x11 // SGL Descriptor Type Invalid
	SGLOffsetInvalid     Status = 0x16 // SGL Offset Invalid (in-capsule data)
	KeepAliveInvalid     Status = 0x1A // Keep Alive Timeout Invalid
	WriteProtected       Status = 0x20 // Namespace is Write Protected
	CommandInterrupted   Status = 0x21
	TransientTransport   Status = 0x22
	LBAOutOfRange        Status = 0x80
	CapacityExceeded     Status = 0x81
	NamespaceNotReady    Status = 0x82
	InvalidValueSize     Status = 0x85 // KV
	InvalidKeySize       Status = 0x86 // KV
	KeyDoesNotExist      Status = 0x87 // KV
	UnrecoveredError     Status = 0x88 // KV
	KeyExists            Status = 0x89 // KV
)

// Command specific status (SCT 1) values.
const (
	InvalidQueueID          Status = 0x101
	AsyncEventLimitExceeded Status = 0x105
	InvalidLogPage          Status = 0x109
	FeatureNotSaveable      Status = 0x10D
	FeatureNotChangeable    Status = 0x10E
	CommandSetRejected      Status = 0x12B // I/O Command Set Combination Rejected
	InvalidCommandSet       Status = 0x12C // Invalid I/O Command Set
	ConnectIncompatible     Status = 0x180 // Connect Incompatible Format
	ConnectBusy             Status = 0x181 // Connect Controller Busy
	ConnectInvalidParam     Status = 0x182 // Connect Invalid Parameters
	ConnectRestart          Status = 0x183 // Connect Restart Discovery
	ConnectInvalidHost      Status = 0x184 // Connect Invalid Host
	ValueReplaced           Status = 0x1C0 // kvof's Retrieve Range: the value has another tag
)

// Media and data integrity (SCT 2) values.
const (
	WriteFault             Status = 0x280
	UnrecoveredReadError   Status = 0x281
	CompareFailure         Status = 0x285
	DeallocatedOrUnwritten Status = 0x287
)

var statusText = map[Status]string{
	Success: "success", InvalidOpcode: "invalid command opcode", InvalidField: "invalid field in command",
	CommandIDConflict: "command ID conflict", DataTransferError: "data transfer error", InternalError: "internal error",
	AbortRequested: "command abort requested", AbortSQDeleted: "command aborted due to SQ deletion",
	InvalidNamespace: "invalid namespace or format", CommandSequenceError: "command sequence error",
	InvalidSegment: "invalid SGL segment descriptor", InvalidSGLCount: "invalid number of SGL descriptors", DataSGLLength: "data SGL length invalid",
	SGLTypeInvalid: "SGL descriptor type invalid", SGLOffsetInvalid: "SGL offset invalid",
	KeepAliveInvalid: "keep alive timeout invalid", WriteProtected: "namespace is write protected",
	CommandInterrupted: "command interrupted", TransientTransport: "transient transport error", InvalidCommandSet: "invalid I/O command set",
	LBAOutOfRange: "LBA out of range", CapacityExceeded: "capacity exceeded", NamespaceNotReady: "namespace not ready",
	InvalidValueSize: "invalid value size", InvalidKeySize: "invalid key size", KeyDoesNotExist: "key does not exist",
	UnrecoveredError: "unrecovered error", KeyExists: "key exists",
	InvalidQueueID: "invalid queue identifier", AsyncEventLimitExceeded: "asynchronous event request limit exceeded",
	InvalidLogPage: "invalid log page", FeatureNotSaveable: "feature identifier not saveable",
	FeatureNotChangeable: "feature not changeable", CommandSetRejected: "I/O command set combination rejected",
	ConnectIncompatible: "connect: incompatible format", ConnectBusy: "connect: controller busy",
	ConnectInvalidParam: "connect: invalid parameters", ConnectRestart: "connect: restart discovery",
	ConnectInvalidHost: "connect: invalid host",
	ValueReplaced:      "value replaced",
	WriteFault:         "write fault", UnrecoveredReadError: "unrecovered read error", CompareFailure: "compare failure",
	DeallocatedOrUnwritten: "deallocated or unwritten logical block",
}

// Code is the status without CRD, More and DNR: what the constants above name.
func (s Status) Code() Status { return s & 0x7FF }

// Retry reports whether the controller allows the same command to be sent again.
func (s Status) Retry() bool { return s&DNR == 0 }

// Error gives the specification's name for the status and its code, as nvme-cli prints them.
func (s Status) Error() string {
	if t, ok := statusText[s.Code()]; ok {
		return fmt.Sprintf("%s (%02Xh)", t, uint16(s.Code()))
	}
	return fmt.Sprintf("NVMe status %03Xh", uint16(s.Code()))
}

// Is lets errors.Is compare a status without its DNR bit.
func (s Status) Is(target error) bool {
	t, ok := target.(Status)
	return ok && s.Code() == t.Code()
}

// Helper does in the guest what nvme-cli cannot:
//
//	helper uring-cmd DEVICE NSID OPCODE CDW2 CDW3 CDW10 CDW11 CDW12 CDW13 CDW14 CDW15 LENGTH FILE
//	    sends one command by io_uring passthrough and prints its status and DW0, both in hexadecimal;
//	    FILE holds, or gets, the LENGTH bytes of data, by the direction in the opcode
//	helper engine DEVICE read|write SIZE DEPTH SECONDS [block] [poll] [whole] [each] [store]
//	    measures kvof's engine on a drive; see engine
//	helper rdma-connect HOST:PORT PRIVATE_DATA READS
//	    asks for an RDMA connection with private data, in hexadecimal, and prints "accepted CRQSIZE" or "refused STATUS"
//	helper rdma-wrong-key HOST:PORT N
//	    N times, sends a Connect whose data has a key that was never given out, and waits for the connection's end
//	helper rdma-burst HOST:PORT N
//	    makes N controllers with one connection each, all at the same time, and leaves when the last of them is there
//	helper uevents
//	    prints the kernel's uevents, one per line, until it is killed
package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	run := map[string]func(args []string) error{"uring-cmd": uringCmd, "engine": engine, "rdma-connect": rdmaConnect,
		"rdma-wrong-key": rdmaWrongKey, "rdma-burst": rdmaBurst, "uevents": uevents}[os.Args[1]]
	if err := run(os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "helper:", err)
		os.Exit(1)
	}
}

// nvmeUringCmd is struct nvme_uring_cmd of linux/nvme_ioctl.h.
type nvmeUringCmd struct {
	opcode, flags        uint8
	_                    uint16
	nsid, cdw2, cdw3     uint32
	metadata, addr       uint64
	metadataLen, dataLen uint32
	cdw10, cdw11, cdw12  uint32
	cdw13, cdw14, cdw15  uint32
	timeoutMillis, _     uint32
}

const nvmeURingCmdIO = 0xC0484E80 // NVME_URING_CMD_IO: _IOWR('N', 0x80, struct nvme_uring_cmd)

func uringCmd(args []string) error {
	if len(args) != 13 {
		return fmt.Errorf("uring-cmd takes 13 arguments, not %d", len(args))
	}
	var n [12]uint32 // the numbers, at the index of their argument
	for i := 1; i < len(n); i++ {
		v, err := strconv.ParseUint(args[i], 0, 32)
		if err != nil {
			return err
		}
		n[i] = uint32(v)
	}
	cmd := nvmeUringCmd{
		nsid: n[1], opcode: uint8(n[2]), cdw2: n[3], cdw3: n[4],
		cdw10: n[5], cdw11: n[6], cdw12: n[7], cdw13: n[8], cdw14: n[9], cdw15: n[10],
		dataLen: n[11], timeoutMillis: 60_000,
	}
	file, toHost := args[12], n[2]&3 == 2
	var data []byte
	if cmd.dataLen > 0 {
		var err error
		data, err = unix.Mmap(-1, 0, int(cmd.dataLen), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return fmt.Errorf("mmap: %w", err)
		}
		cmd.addr = uint64(uintptr(unsafe.Pointer(&data[0])))
		if !toHost {
			content, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			copy(data, content)
		}
	}
	device, err := os.OpenFile(args[0], os.O_RDWR, 0)
	if err != nil {
		return err
	}
	status, dw0, err := submit(int(device.Fd()), &cmd)
	if err != nil {
		return err
	}
	if toHost {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			return err
		}
	}
	fmt.Printf("%x %x\n", status, dw0)
	return nil
}

// ringParams is struct io_uring_params of linux/io_uring.h: sq and cq hold the rings' offsets.
type ringParams struct {
	entries, cqEntries, flags, cpu, idle, features, wqFD uint32
	_                                                    [3]uint32
	sq, cq                                               [10]uint32
}

// submit sends one command through a ring of its own, with the 128-byte entries and 32-byte
// completions that passthrough asks for.
func submit(fd int, cmd *nvmeUringCmd) (status, dw0 uint32, err error) {
	const (
		sqe128, cqe32, opUringCmd      = 1 << 10, 1 << 11, 46
		offsetSQ, offsetCQ, offsetSQEs = 0, 0x8000000, 0x10000000
	)
	p := ringParams{flags: sqe128 | cqe32}
	ring, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return 0, 0, fmt.Errorf("io_uring_setup: %w", errno)
	}
	area := func(offset int64, size uint32) (b []byte) {
		if err == nil {
			b, err = unix.Mmap(int(ring), offset, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
		}
		return b
	}
	sqTail, sqArray, cqes := p.sq[1], p.sq[6], p.cq[5]
	sq := area(offsetSQ, sqArray+4*p.entries)
	cq := area(offsetCQ, cqes+32*p.cqEntries)
	sqe := area(offsetSQEs, 128*p.entries)
	if err != nil {
		return 0, 0, fmt.Errorf("mmap: %w", err)
	}
	sqe[0] = opUringCmd
	binary.NativeEndian.PutUint32(sqe[4:], uint32(fd))
	binary.NativeEndian.PutUint32(sqe[8:], nvmeURingCmdIO)
	*(*nvmeUringCmd)(unsafe.Pointer(&sqe[48])) = *cmd
	binary.NativeEndian.PutUint32(sq[sqTail:], 1) // the system call below orders it
	const getEvents = 1
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, ring, 1, 1, getEvents, 0, 0); errno != 0 {
		return 0, 0, fmt.Errorf("io_uring_enter: %w", errno)
	}
	cqe := cq[cqes:]
	if res := int32(binary.NativeEndian.Uint32(cqe[8:])); res < 0 {
		return 0, 0, fmt.Errorf("passthrough: %w", syscall.Errno(-res))
	}
	return binary.NativeEndian.Uint32(cqe[8:]), binary.NativeEndian.Uint32(cqe[16:]), nil
}

func uevents([]string) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return err
	}
	for b := make([]byte, 64<<10); ; {
		n, err := unix.Read(fd, b)
		if err != nil {
			return err
		}
		fmt.Printf("%s\n", bytes.ReplaceAll(bytes.TrimRight(b[:n], "\x00"), []byte{0}, []byte{' '}))
	}
}

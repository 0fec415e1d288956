package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/rdma"
)

const disks = "nqn.2026-11.dev.kvof:disks" // as in lib.sh

// dial opens a queue pair to HOST:PORT with this private data, and room for one command and its response. It answers so many RDMA READs
// at a time.
func dial(peer string, private []byte, reads uint8) (id rdma.ID, qp rdma.QP, ch rdma.Channel, answer rdma.ConnParam, err error) {
	addr, err := netip.ParseAddrPort(peer)
	if err != nil {
		return
	}
	v, err := rdma.System()
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if id, err = v.Resolve(ctx, netip.Addr{}, addr); err != nil {
		return
	}
	if ch, err = id.Device().NewChannel(); err != nil {
		return
	}
	cq, err := ch.NewCQ(64)
	if err != nil {
		return
	}
	if qp, err = id.CreateQP(rdma.QPAttr{SendCQ: cq, RecvCQ: cq, RecvDepth: 32, SendDepth: 32, SendSGE: 1}); err != nil {
		return
	}
	answer, err = id.Connect(ctx, rdma.ConnParam{Private: private, InitiatorDepth: 1, ResponderResources: reads})
	return
}

// rdmaConnect prints "accepted CRQSIZE", or "refused STATUS" with the status in the private data of the refusal.
func rdmaConnect(args []string) error {
	if len(args) != 3 {
		return errors.New("rdma-connect takes HOST:PORT, private data in hexadecimal, and the RDMA READs that are answered at a time")
	}
	private, err := hex.DecodeString(args[1])
	if err != nil {
		return err
	}
	reads, err := strconv.ParseUint(args[2], 10, 8)
	if err != nil {
		return err
	}
	_, _, _, answer, err := dial(args[0], private, uint8(reads))
	if refused := (*rdma.RejectedError)(nil); errors.As(err, &refused) {
		fmt.Println("refused", uint16(nvmeof.DecodeRDMAReject(refused.Private)))
		return nil
	} else if err != nil {
		return err
	}
	crqsize, err := nvmeof.DecodeRDMAAccept(answer.Private)
	if err == nil {
		fmt.Println("accepted", crqsize)
	}
	return err
}

// rdmaWrongKey sends a Connect whose data has a key that was never given out, and waits for the queue pair's end.
func rdmaWrongKey(args []string) error {
	if len(args) != 2 {
		return errors.New("rdma-wrong-key takes HOST:PORT and a number of connections")
	}
	times, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	for range times {
		if err := wrongKey(args[0]); err != nil {
			return err
		}
	}
	return nil
}

func wrongKey(peer string) error {
	id, answer, err := sendConnect(peer, 0x5a5a)
	if err != nil {
		return err
	}
	for {
		if answer() != nil {
			return errors.New("the command was answered")
		}
		select {
		case <-id.Ended():
			return nil
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// rdmaBurst makes controllers with one connection each, all at the same time, and leaves when the last of them is there.
func rdmaBurst(args []string) error {
	if len(args) != 2 {
		return errors.New("rdma-burst takes HOST:PORT and a number of connections")
	}
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	ends := make(chan error, n)
	for range n {
		go func() {
			id, answer, err := sendConnect(args[0], 0)
			for err == nil {
				if cqe := answer(); cqe != nil {
					if cqe.Status() != nvmeof.Success {
						err = cqe.Status()
					}
					break
				}
				select {
				case <-id.Ended():
					err = errors.New("the connection ended")
				case <-time.After(10 * time.Millisecond):
				}
			}
			ends <- err
		}()
	}
	var errs []error
	for range n {
		errs = append(errs, <-ends)
	}
	return errors.Join(errs...)
}

// sendConnect opens an admin queue pair and sends a Connect on it, whose data has a key that differs from the right one in the bits
// wrong. answer returns its response, as soon as it has come.
func sendConnect(peer string, wrong uint32) (id rdma.ID, answer func() *nvmeof.Completion, err error) {
	private := make([]byte, nvmeof.RDMARequestSize)
	(&nvmeof.RDMARequest{HRQSIZE: 32, HSQSIZE: 31}).Encode(private)
	id, qp, ch, _, err := dial(peer, private, 1)
	if err != nil {
		return
	}
	mem, err := unix.Mmap(-1, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return
	}
	region, err := id.Device().Register(mem, rdma.RemoteRead)
	if err != nil {
		return
	}
	capsule, response, data := mem[:64], mem[64:80], mem[4096:]
	(&nvmeof.ConnectData{HostID: [16]byte{1}, CNTLID: nvmeof.CNTLIDDynamic, SubNQN: disks, HostNQN: "nqn.2026-11.dev.kvof:helper"}).Encode(data)
	s, key := region.Split(data)
	cmd := nvmeof.MakeConnect(0, 0, 31, nvmeof.CATTRNoFlowControl, 0)
	cmd.SetSGL(nvmeof.MakeKeyedSGL(nvmeof.SGLKeyed, s.Addr, nvmeof.ConnectDataSize, key^wrong))
	copy(capsule, cmd[:])
	var b rdma.Batch
	b.Recv(qp)
	s, _ = region.Split(response)
	b.Add(rdma.WR{ID: 1}, s)
	b.Send(qp)
	s, _ = region.Split(capsule)
	b.Add(rdma.WR{ID: 2, Op: rdma.OpSend, Flags: rdma.FlagSignaled}, s)
	post := &b
	return id, func() *nvmeof.Completion {
		var wc [2]rdma.WC
		n := ch.Turn(post, wc[:])
		post = nil
		if !slices.ContainsFunc(wc[:n], func(w rdma.WC) bool { return w.ID == 1 && w.Status == rdma.WCSuccess }) {
			return nil
		}
		return (*nvmeof.Completion)(response)
	}, nil
}

package target_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/kvof/kvof/configs"
	"github.com/kvof/kvof/nvmeof"
	"github.com/kvof/kvof/target"
	"github.com/kvof/kvof/uring"
)

// TestScripts runs testdata: hosts' commands with the expected answers, which `go test -run TestScripts -rewrite`
// writes anew. $DEVICE in a configuration is a memory device in one run and a file in the other; the answers are the same.
func TestScripts(t *testing.T) {
	for _, device := range []string{"memory", "file"} {
		t.Run(device, func(t *testing.T) {
			datadriven.Walk(t, "testdata/scripts", func(t *testing.T, path string) {
				s := &script{t: t, device: device, dir: t.TempDir(), ports: map[string]*target.Port{}, conns: map[string]*fakeConn{}}
				defer s.close()
				datadriven.RunTest(t, path, s.run)
			})
		})
	}
}

// script is the state of one script: a target, and connections by name.
type script struct {
	t           *testing.T
	device, dir string
	arena       *uring.Arena
	target      *target.Target
	ports       map[string]*target.Port
	conns       map[string]*fakeConn
	cid         uint16
	tags        []uint32 // of values, in the order they were seen
}

func (s *script) close() {
	if s.target == nil {
		return
	}
	for _, c := range s.conns {
		c.end()
	}
	if n := len(s.target.Status().Controllers); n > 0 {
		s.t.Errorf("%d controllers are left", n)
	}
	if err := errors.Join(s.target.Close(), s.arena.Close()); err != nil {
		s.t.Error(err)
	}
}

// args reads a line's arguments with their defaults.
type args struct {
	t *testing.T
	d *datadriven.TestData
}

func (a args) str(key, def string) string {
	if v, ok := a.d.Arg(key); ok && len(v.Vals) == 1 {
		return v.Vals[0]
	}
	return def
}

func (a args) num(key string, def uint64) uint64 {
	v, ok := a.d.Arg(key)
	if !ok {
		return def
	}
	n, err := strconv.ParseUint(v.SingleVal(a.t), 0, 64)
	if err != nil {
		a.d.Fatalf(a.t, "%v", err)
	}
	return n
}

func (a args) hex(key string) []byte {
	b, err := hex.DecodeString(a.str(key, ""))
	if err != nil {
		a.d.Fatalf(a.t, "%s: %v", key, err)
	}
	return b
}

// data is the host's data: fill=5a for size bytes of it, or data=HEX.
func (a args) data(size uint64) []byte {
	if b := a.hex("data"); len(b) > 0 {
		return b
	}
	return bytes.Repeat(append(a.hex("fill"), 0)[:1], int(size))
}

var properties = map[string]uint32{"CAP": nvmeof.PropCAP, "VS": nvmeof.PropVS, "CC": nvmeof.PropCC, "CSTS": nvmeof.PropCSTS, "NSSR": nvmeof.PropNSSR, "CRTO": nvmeof.PropCRTO}

var opcodes = map[string]uint8{"store": nvmeof.OpStore, "retrieve": nvmeof.OpRetrieve, "list": nvmeof.OpList, "delete": nvmeof.OpDelete, "exist": nvmeof.OpExist,
	"retrieve-range": nvmeof.OpRetrieve, "flush": nvmeof.OpFlush, "read": nvmeof.OpRead, "write": nvmeof.OpWrite, "compare": nvmeof.OpCompare, "verify": nvmeof.OpVerify, "write-zeroes": nvmeof.OpWriteZeroes}

// run carries out one line of a script. conn=NAME chooses the connection, "a" unless told.
func (s *script) run(t *testing.T, d *datadriven.TestData) string {
	a := args{t, d}
	name := a.str("conn", "a")
	if d.Cmd == "connect" && s.conns[name] == nil {
		s.conns[name] = newFake(t, s.target, s.ports[a.str("port", "io")], name)
	}
	c := s.conns[name]
	var cmd nvmeof.Command
	s.cid++
	send := func(length uint64, data []byte) string {
		cmd.SetCID(s.cid)
		x := &command{hold: d.HasArg("hold"), late: d.HasArg("hold")}
		c.start(cmd, uint32(a.num("sgl", length)), data, d.HasArg("capsule"), x)
		if x.hold {
			return "held\n"
		}
		await(t, x.done, "completion")
		return show(x)
	}
	nsid := uint32(a.num("nsid", 1))
	switch d.Cmd {
	case "config": // applies the configuration: its input
		text := strings.NewReplacer("$DEVICE", map[string]string{"memory": `device = "memory"`, "file": `path = "` + s.dir + `/$NSID"`}[s.device], "$DIR", s.dir).Replace(d.Input)
		for i := 1; strings.Contains(text, "$NSID"); i++ {
			text = strings.Replace(text, "$NSID", strconv.Itoa(i), 1)
		}
		cfg, err := configs.Parse("config", []byte(text+"\n[[listener]]\naddress = \"127.0.0.1:4420\"\n"))
		if err != nil {
			d.Fatalf(t, "%v", err)
		}
		if s.target == nil {
			if s.arena, err = uring.NewArena(16 << 20); err != nil {
				t.Fatal(err)
			}
			s.target = target.New(s.arena, cfg.Limits, discard)
			for _, p := range []struct {
				name, addr string
				discovery  bool
			}{{"io", "0.0.0.0:4420", false}, {"io6", "[2001:db8::1]:4420", false}, {"discovery", "192.0.2.1:8009", true}} {
				s.ports[p.name] = &target.Port{TRType: nvmeof.TRTypeTCP, Address: netip.MustParseAddrPort(p.addr), Discovery: p.discovery,
					InCapsule: target.InCapsule, MSDBD: 1}
				s.target.AddPort(s.ports[p.name])
			}
		}
		if err := s.target.Apply(cfg); err != nil {
			return strings.ReplaceAll(err.Error(), s.dir, "$DIR") + "\n"
		}
		return "ok\n"
	case "controllers":
		var b strings.Builder
		for _, k := range s.target.Status().Controllers {
			fmt.Fprintf(&b, "%d %s %s ready=%v queues=%d\n", k.CNTLID, k.HostNQN, k.Subsystem, k.Ready, len(k.Queues))
		}
		return b.String()
	case "connect":
		cd := nvmeof.ConnectData{CNTLID: uint16(a.num("cntlid", nvmeof.CNTLIDDynamic)), SubNQN: a.str("subnqn", "nqn.2026-11.dev.kvof:one"), HostNQN: a.str("hostnqn", "nqn.2014-08.org.nvmexpress:uuid:host")}
		copy(cd.HostID[:], a.str("hostid", "host"))
		cmd = nvmeof.MakeConnect(0, uint16(a.num("qid", 0)), uint16(a.num("sqsize", 31)), uint8(a.num("cattr", 0)), uint32(a.num("kato", 0)))
		cmd[40] = uint8(a.num("recfmt", 0))
		b := make([]byte, nvmeof.ConnectDataSize)
		cd.Encode(b)
		return send(nvmeof.ConnectDataSize, b)
	case "disconnect":
		c.end()
		return ""
	case "ended": // waits until the target has ended the connection
		select {
		case <-c.gone:
			return c.reason + "\n"
		case <-time.After(patience / 4):
			return "not ended\n"
		}
	case "send": // the data that was held back
		n := c.release(int(a.num("n", 0)))
		return fmt.Sprintf("%d commands\n", n)
	case "events": // the completions of held commands
		return s.events(c, int(a.num("n", 0)))
	case "sleep":
		time.Sleep(time.Duration(a.num("ms", 0)) * time.Millisecond)
		return ""
	case "property-get":
		off := properties[d.CmdArgs[0].Key]
		size := 4
		if off == nvmeof.PropCAP {
			size = 8
		}
		cmd = nvmeof.MakePropertyGet(uint32(a.num("offset", uint64(off))), int(a.num("size", uint64(size))))
		return send(0, nil)
	case "property-set":
		cmd = nvmeof.MakePropertySet(properties[d.CmdArgs[0].Key], uint32(a.num("v", 0)))
		cmd[40] = uint8(a.num("attrib", 0))
		return send(0, nil)
	case "identify":
		cmd = nvmeof.MakeIdentify(uint8(a.num("cns", 0)), uint32(a.num("nsid", 0)), nvmeof.CSI(a.num("csi", 0)))
		cmd[42] = uint8(a.num("cntid", 0))
		return send(nvmeof.IdentifySize, nil)
	case "log":
		n := a.num("n", 4096)
		cmd = nvmeof.MakeGetLogPage(uint8(a.num("lid", 0)), uint32(a.num("nsid", 0)), uint32(n), a.num("off", 0), nvmeof.CSI(a.num("csi", 0)), d.HasArg("rae"))
		return send(n, nil)
	case "discover":
		cmd = nvmeof.MakeGetLogPage(nvmeof.LogDiscovery, 0, 16<<10, 0, 0, d.HasArg("rae"))
		cmd.SetCID(s.cid)
		return showDiscovery(c.do(cmd, 16<<10, nil, false).out)
	case "errors":
		cmd = nvmeof.MakeGetLogPage(nvmeof.LogError, 0, 4096, 0, 0, false)
		cmd.SetCID(s.cid)
		return showErrors(c.do(cmd, 4096, nil, false).out)
	case "set-feature":
		cmd.SetHeader(nvmeof.OpSetFeatures, 0, uint32(a.num("nsid", 0)))
		cmd.SetDW(10, uint32(a.num("fid", 0)|a.num("save", 0)<<31))
		cmd.SetDW(11, uint32(a.num("v", 0)))
		return send(a.num("size", 0), a.data(a.num("size", 0)))
	case "get-feature":
		cmd.SetHeader(nvmeof.OpGetFeatures, 0, uint32(a.num("nsid", 0)))
		cmd.SetDW(10, uint32(a.num("fid", 0)|a.num("sel", 0)<<8))
		return send(a.num("size", 0), nil)
	case "aer":
		cmd.SetHeader(nvmeof.OpAsyncEvent, s.cid, 0)
		x := c.start(cmd, 0, nil, false, &command{late: true})
		select {
		case <-x.done:
			return s.events(c, 1)
		default:
			return "held\n"
		}
	case "raw": // any command
		cmd.SetHeader(uint8(a.num("op", 0)), 0, uint32(a.num("nsid", 0)))
		cmd[1] |= uint8(a.num("fuse", 0))
		for i := 10; i < 16; i++ {
			cmd.SetDW(i, uint32(a.num(fmt.Sprintf("dw%d", i), 0)))
		}
		return send(0, nil)
	case "store", "retrieve", "retrieve-range", "list", "delete", "exist":
		size := a.num("size", uint64(len(a.hex("data"))))
		cmd.SetHeader(opcodes[d.Cmd], 0, nsid)
		cmd.SetKV(uint32(size), uint8(a.num("opt", 0)))
		cmd.SetDW(12, uint32(a.num("dw12", 0)))
		cmd.SetDW(13, uint32(a.num("dw13", 0)))
		key := a.hex("key")
		cmd.SetKey(key[:min(len(key), 16)])
		cmd[44] = uint8(a.num("keylen", uint64(len(key))))
		var data []byte
		if d.Cmd == "store" {
			data = a.data(a.num("sgl", size))
		}
		switch d.Cmd {
		case "list":
			return s.list(c, cmd, uint32(a.num("sgl", size)))
		case "retrieve-range":
			return s.retrieveRange(c, cmd, a, uint32(a.num("sgl", size)))
		}
		return send(size, data)
	case "exist-many": // keys=(hex, ...), or data=hex as it is
		keys, _ := d.Arg("keys")
		data := a.hex("data")
		if len(keys.Vals) > 0 {
			data = manyKeys(t, d, keys.Vals)
		}
		n := a.num("size", uint64(len(data)))
		cmd = nvmeof.MakeExistMany(nsid, uint32(n))
		return send(uint64(len(data)), data)
	case "flush", "read", "write", "compare", "verify", "write-zeroes":
		n := a.num("n", 1) * a.num("lba", 512)
		cmd.SetHeader(opcodes[d.Cmd], 0, nsid)
		slba := a.num("slba", 0)
		cmd.SetDW(10, uint32(slba))
		cmd.SetDW(11, uint32(slba>>32))
		cmd.SetDW(12, uint32(a.num("n", 1)-1)|uint32(a.num("cdw12", 0)))
		switch d.Cmd {
		case "write", "compare":
			return send(n, a.data(a.num("sgl", n)))
		case "read":
			return send(n, nil)
		}
		return send(0, nil)
	case "dsm": // ranges=(SLBA+BLOCKS, ...)
		var b []byte
		v, _ := d.Arg("ranges")
		for _, r := range v.Vals {
			slba, blocks, _ := strings.Cut(r, "+")
			from, err1 := strconv.ParseUint(slba, 0, 64)
			n, err2 := strconv.ParseUint(blocks, 0, 32)
			if err := errors.Join(err1, err2); err != nil {
				d.Fatalf(t, "%v", err)
			}
			g := nvmeof.DSMRange{SLBA: from, Blocks: uint32(n)}
			b = append(b, make([]byte, nvmeof.DSMRangeSize)...)
			g.Encode(b[len(b)-nvmeof.DSMRangeSize:])
		}
		cmd.SetHeader(nvmeof.OpDSM, 0, nsid)
		cmd.SetDW(10, uint32(len(v.Vals)-1))
		cmd.SetDW(11, uint32(a.num("attributes", 4)))
		return send(uint64(len(b)), b)
	}
	d.Fatalf(t, "unknown command %s", d.Cmd)
	return ""
}

// events returns what held commands completed with, having waited for n of them.
func (s *script) events(c *fakeConn, n int) string {
	var late []nvmeof.Completion
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		c.mu.Lock()
		if len(c.late) >= n || time.Now().After(end) {
			late, c.late = c.late, nil
			c.mu.Unlock()
			break
		}
		c.mu.Unlock()
	}
	var b strings.Builder
	for _, cqe := range late {
		b.WriteString(show(&command{cqe: cqe}))
	}
	return b.String()
}

// manyKeys is an Exist Many's data: keys in hex, each with a repeat count after *.
func manyKeys(t *testing.T, d *datadriven.TestData, keys []string) []byte {
	l := nvmeof.NewKeyList(make([]byte, 0, 8<<10))
	for _, k := range keys {
		k, times, _ := strings.Cut(k, "*")
		key, err := hex.DecodeString(k)
		n := 1
		if times != "" && err == nil {
			n, err = strconv.Atoi(times)
		}
		if err != nil {
			d.Fatalf(t, "%v", err)
		}
		for range n {
			l.Add(key)
		}
	}
	return l.Bytes()
}

// retrieveRange shows a Retrieve Range from off on. A value's tag is shown as the number of the value, and asked for by it.
func (s *script) retrieveRange(c *fakeConn, cmd nvmeof.Command, a args, sgl uint32) string {
	var tag uint32
	if n := a.num("tag", 0); n > 0 {
		tag = s.tags[n-1]
	}
	cmd.SetRange(uint32(a.num("off", 0)), tag)
	cmd.SetCID(s.cid)
	x := c.do(cmd, sgl, nil, false)
	tag = x.cqe.DW1()
	if tag == 0 {
		return show(x)
	}
	if !slices.Contains(s.tags, tag) {
		s.tags = append(s.tags, tag)
	}
	clear(x.cqe[4:8])
	return fmt.Sprintf("tag %d ", slices.Index(s.tags, tag)+1) + show(x)
}

// list shows the keys of a List.
func (s *script) list(c *fakeConn, cmd nvmeof.Command, sgl uint32) string {
	cmd.SetCID(s.cid)
	x := c.do(cmd, sgl, nil, false)
	out := x.out
	x.out = nil
	var b strings.Builder
	b.WriteString(show(x))
	if len(out) > 0 {
		err := nvmeof.DecodeKeyList(out, func(k []byte) bool { fmt.Fprintf(&b, "%x\n", k); return true })
		fmt.Fprintf(&b, "%d bytes", len(out))
		if err != nil {
			fmt.Fprintf(&b, ": %v", err)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// show is a command's outcome: its status, its result, its data.
func show(x *command) string {
	var b strings.Builder
	if st := x.cqe.Status(); st == nvmeof.Success {
		b.WriteString("ok")
	} else {
		b.WriteString(st.Error())
		if !st.Retry() {
			b.WriteString(" DNR")
		}
	}
	if v := uint64(x.cqe.DW1())<<32 | uint64(x.cqe.DW0()); v != 0 {
		fmt.Fprintf(&b, " %#x", v)
	}
	b.WriteString("\n")
	switch runs := runLengths(x.out); {
	case len(x.out) == 0:
	case len(runs) <= 8 && len(x.out) >= 512:
		fmt.Fprintf(&b, "%s\n", strings.Join(runs, " "))
	case len(x.out) <= 16:
		fmt.Fprintf(&b, "%x\n", x.out)
	case len(x.out) <= 4096:
		dump(&b, x.out)
	default:
		fmt.Fprintf(&b, "%d bytes, CRC32 %08x\n", len(x.out), crc32.ChecksumIEEE(x.out))
	}
	return b.String()
}

// dump shows bytes with their offsets, without lines of zeroes.
func dump(b *strings.Builder, data []byte) {
	lines := strings.SplitAfter(hex.Dump(data), "\n")
	for i := 0; 16*i < len(data); i++ {
		if slices.Max(data[16*i:min(16*i+16, len(data))]) != 0 {
			b.WriteString(strings.TrimPrefix(lines[i], "0000"))
		}
	}
	fmt.Fprintf(b, "%d bytes\n", len(data))
}

func runLengths(data []byte) (runs []string) {
	for len(data) > 0 && len(runs) <= 8 {
		n := 1
		for n < len(data) && data[n] == data[0] {
			n++
		}
		runs = append(runs, fmt.Sprintf("%02x*%d", data[0], n))
		data = data[n:]
	}
	return runs
}

func showDiscovery(page []byte) string {
	var b strings.Builder
	genctr, n, err := nvmeof.DecodeDiscoveryHeader(page)
	if err != nil {
		return err.Error() + "\n"
	}
	fmt.Fprintf(&b, "generation %d\n", genctr)
	for i := range n {
		var e nvmeof.DiscoveryEntry
		if err := e.Decode(page[nvmeof.DiscoveryHeaderSize+i*nvmeof.DiscoveryEntrySize:]); err != nil {
			return err.Error() + "\n"
		}
		fmt.Fprintf(&b, "%+v\n", e)
	}
	return b.String()
}

func showErrors(page []byte) string {
	var b strings.Builder
	for ; len(page) > 0; page = page[nvmeof.ErrorEntrySize:] {
		if count := page[0]; count != 0 {
			st := nvmeof.Status(uint16(page[12]) | uint16(page[13])<<8)
			fmt.Fprintf(&b, "%d qid=%d nsid=%d %v\n", count, page[8], page[24], st>>1)
		}
	}
	return b.String()
}

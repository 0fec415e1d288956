package client

import (
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"

	"github.com/kvof/kvof/nvmeof"
)

// Transports of paths.
const (
	schemeTCP      = "tcp"
	schemeRDMA     = "rdma"
	schemeDiscover = "discover"
)

// pathSpec is how to reach one namespace.
type pathSpec struct {
	transport string // "tcp", "rdma"
	addr      string // host:port
	nqn       string
	nsid      uint32 // 0: the first Key Value namespace
}

func (p pathSpec) String() string { return p.transport + "://" + p.addr + "/" + p.nqn }

// targetSpec is a target with all its paths.
type targetSpec struct {
	name  string
	paths []pathSpec
}

// sourceSpec is one entry of a list of targets: a target, or discovery controllers to ask for targets.
type sourceSpec struct {
	target    targetSpec // not with discovery
	discovery []string   // addresses, alternatives
	nqn       string     // of the only subsystem to take; all if empty
	nsid      uint32
	named     string // discovery: a name in the place of the only subsystem's NQN
}

// parseTargets reads the list of targets whose syntax kvof.h describes.
func parseTargets(s string) ([]sourceSpec, error) {
	var sources []sourceSpec
	names := map[string]bool{}
	for entry := range strings.SplitSeq(s, ",") {
		src, err := parseSource(strings.TrimSpace(entry))
		if err != nil {
			return nil, err
		}
		if n := src.target.name; n != "" {
			if names[n] {
				return nil, fmt.Errorf("two targets are called %s: give one another name, as in name=tcp://..., or join two paths to one target with |", n)
			}
			names[n] = true
		}
		sources = append(sources, src)
	}
	return sources, nil
}

func parseSource(s string) (src sourceSpec, err error) {
	name, rest, ok := strings.Cut(s, "=")
	if ok && !strings.ContainsAny(name, ":/?") {
		if name = strings.TrimSpace(name); name == "" {
			return src, fmt.Errorf("target %q has an empty name", s)
		}
		s = rest
	} else {
		name = ""
	}
	for i, text := range strings.Split(s, "|") {
		p, err := parsePath(strings.TrimSpace(text))
		if err != nil {
			return src, err
		}
		discover := p.transport == schemeDiscover
		if i > 0 && discover != (src.discovery != nil) {
			return src, fmt.Errorf("%q mixes paths with discovery", s)
		}
		if !discover {
			src.target.paths = append(src.target.paths, p)
			continue
		}
		if i > 0 && (p.nqn != src.nqn || p.nsid != src.nsid) {
			return src, fmt.Errorf("%q: alternative discovery controllers are asked for the same subsystem", s)
		}
		src.discovery, src.nqn, src.nsid = append(src.discovery, p.addr), p.nqn, p.nsid
	}
	if src.discovery != nil {
		if src.named = name; name != "" && src.nqn == "" {
			return src, fmt.Errorf("%q names all subsystems that discovery finds: give the subsystem's NQN", s)
		}
		return src, nil
	}
	if src.target.name = name; name == "" {
		src.target.name = targetName(src.target.paths[0].nqn, src.target.paths[0].nsid)
	}
	return src, nil
}

// targetName is what a target without a name of its own is called.
func targetName(nqn string, nsid uint32) string {
	if nsid != 0 {
		return fmt.Sprintf("%s?ns=%d", nqn, nsid)
	}
	return nqn
}

func parsePath(s string) (p pathSpec, err error) {
	u, err := url.Parse(s)
	if err != nil {
		return p, fmt.Errorf("path %q: %w", s, err)
	}
	p = pathSpec{transport: u.Scheme, nqn: strings.TrimPrefix(u.Path, "/")}
	port := u.Port()
	switch {
	case u.Scheme == schemeTCP, u.Scheme == schemeRDMA:
		if port == "" {
			port = "4420"
		}
	case u.Scheme == schemeDiscover:
		if port == "" {
			port = "8009"
		}
	default:
		return p, fmt.Errorf("path %q does not begin with tcp://, rdma:// or discover://", s)
	}
	if u.Hostname() == "" || u.User != nil || u.Fragment != "" {
		return p, fmt.Errorf("path %q is not of the form tcp://host:port/subsystem-nqn", s)
	}
	p.addr = net.JoinHostPort(u.Hostname(), port)
	if p.nqn != "" || u.Scheme != schemeDiscover {
		if err := nvmeof.CheckNQN(p.nqn); err != nil {
			return p, fmt.Errorf("path %q: %w", s, err)
		}
	}
	for k, v := range u.Query() {
		n, err := strconv.ParseUint(v[0], 10, 32)
		if k != "ns" || err != nil || n == 0 || n >= nvmeof.BroadcastNSID {
			return p, fmt.Errorf("path %q: only ns=NSID may follow the question mark", s)
		}
		p.nsid = uint32(n)
	}
	return p, nil
}

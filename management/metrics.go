package management

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"runtime"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/kvof/kvof/target"
)

// family writes one metric family in Prometheus's text format: its header, then a line for each sample.
type family struct {
	b    *bytes.Buffer
	name string
}

func newFamily(b *bytes.Buffer, name, kind, help string) family {
	fmt.Fprintf(b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
	return family{b, name}
}

// sample writes one line. Labels are name and value in turn.
func (f family) sample(v float64, labels ...string) { f.line("", v, labels) }

func (f family) line(suffix string, v float64, labels []string) {
	f.b.WriteString(f.name + suffix)
	for i := 0; i < len(labels); i += 2 {
		sep := ","
		if i == 0 {
			sep = "{"
		}
		f.b.WriteString(sep + labels[i] + `="` + escape.Replace(labels[i+1]) + `"`)
	}
	if len(labels) > 0 {
		f.b.WriteByte('}')
	}
	f.b.WriteString(" " + strconv.FormatFloat(v, 'g', -1, 64) + "\n")
}

var escape = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)

// histogram writes the cumulative buckets of one histogram, in seconds. There is one count more than there are bounds.
func (f family) histogram(bounds []time.Duration, counts []uint64, sum float64, labels ...string) {
	bucket := append(labels[:len(labels):len(labels)], "le", "")
	var n uint64
	for i, c := range counts {
		n += c
		if bucket[len(bucket)-1] = "+Inf"; i < len(bounds) {
			bucket[len(bucket)-1] = strconv.FormatFloat(bounds[i].Seconds(), 'g', -1, 64)
		}
		f.line("_bucket", float64(n), bucket)
	}
	f.line("_sum", sum, labels)
	f.line("_count", float64(n), labels)
}

// served calls f for every namespace that is served.
func served(s target.Status, f func(n target.NamespaceStatus, labels ...string)) {
	for _, sub := range s.Subsystems {
		for _, n := range sub.Namespaces {
			if n.State == target.NamespaceServed {
				f(n, "subsystem", sub.NQN, "nsid", strconv.FormatUint(uint64(n.NSID), 10))
			}
		}
	}
}

// writeMetrics writes all metrics of a server: its own from s, and those of the process.
func writeMetrics(b *bytes.Buffer, s target.Status) {
	newFamily(b, "kvof_info", "gauge", "The server's version.").sample(1, "version", s.Version)
	newFamily(b, "kvof_uptime_seconds", "gauge", "Time since the server started.").sample(s.Uptime)
	namespaceMetrics(b, s)
	storeMetrics(b, s)
	commandMetrics(b, s)

	f := newFamily(b, "kvof_controllers", "gauge", "Controllers, by subsystem.")
	perSubsystem := map[string]int{}
	queues, inflight := 0, 0
	for _, k := range s.Controllers {
		perSubsystem[k.Subsystem]++
		queues += len(k.Queues)
		for _, q := range k.Queues {
			inflight += q.InFlight
		}
	}
	for _, sub := range s.Subsystems {
		f.sample(float64(perSubsystem[sub.NQN]), "subsystem", sub.NQN)
		delete(perSubsystem, sub.NQN)
	}
	for nqn, n := range perSubsystem { // discovery
		f.sample(float64(n), "subsystem", nqn)
	}
	newFamily(b, "kvof_queues", "gauge", "Queue pairs of all controllers, admin queues among them.").sample(float64(queues))
	newFamily(b, "kvof_commands_in_flight", "gauge", "Commands being processed.").sample(float64(inflight))

	fabricMetrics(b, s.Fabrics)
	newFamily(b, "kvof_arena_bytes", "gauge", "Payload buffers, in use or not.").sample(float64(s.Arena.Size))
	f = newFamily(b, "kvof_arena_buffers", "gauge", "Payload buffers by class and state.")
	f.sample(float64(s.Arena.Small.Used), "class", "small", "state", "used")
	f.sample(float64(s.Arena.Small.Free), "class", "small", "state", "free")
	f.sample(float64(s.Arena.Medium.Used), "class", "medium", "state", "used")
	f.sample(float64(s.Arena.Medium.Free), "class", "medium", "state", "free")
	f.sample(float64(s.Arena.Large.Used), "class", "large", "state", "used")
	f.sample(float64(s.Arena.Large.Free), "class", "large", "state", "free")
	f = newFamily(b, "kvof_arena_waits_total", "counter", "Times that a command waited for a payload buffer.")
	f.sample(float64(s.Arena.Small.Waits), "class", "small")
	f.sample(float64(s.Arena.Medium.Waits), "class", "medium")
	f.sample(float64(s.Arena.Large.Waits), "class", "large")

	processMetrics(b)
}

func namespaceMetrics(b *bytes.Buffer, s target.Status) {
	f := newFamily(b, "kvof_namespace_served", "gauge", "1 for a configured namespace that hosts can use, 0 for one that is opening or failed.")
	for _, sub := range s.Subsystems {
		for _, n := range sub.Namespaces {
			v := 0.0
			if n.State == target.NamespaceServed {
				v = 1
			}
			f.sample(v, "subsystem", sub.NQN, "nsid", strconv.FormatUint(uint64(n.NSID), 10), "type", string(n.Type))
		}
	}
	for _, m := range []struct {
		name, kind, help string
		value            func(n *target.NamespaceStatus) float64
	}{
		{"kvof_namespace_capacity_bytes", "gauge", "Bytes that can be in use.", func(n *target.NamespaceStatus) float64 { return float64(n.Capacity) }},
		{"kvof_namespace_used_bytes", "gauge", "Bytes in use.", func(n *target.NamespaceStatus) float64 { return float64(n.Used) }},
		{"kvof_received_bytes_total", "counter", "Data from hosts.", func(n *target.NamespaceStatus) float64 { return float64(n.BytesIn) }},
		{"kvof_sent_bytes_total", "counter", "Data to hosts.", func(n *target.NamespaceStatus) float64 { return float64(n.BytesOut) }},
		{"kvof_media_errors_total", "counter", "Commands that failed because of the device.", func(n *target.NamespaceStatus) float64 { return float64(n.MediaErrors) }},
	} {
		f := newFamily(b, m.name, m.kind, m.help)
		served(s, func(n target.NamespaceStatus, labels ...string) { f.sample(m.value(&n), labels...) })
	}
	for _, m := range []struct {
		name, kind, help string
		value            func(k *target.StoreStatus) float64
	}{
		{"kvof_keys", "gauge", "Keys in a Key Value namespace.", func(k *target.StoreStatus) float64 { return float64(k.Keys) }},
		{"kvof_hits_total", "counter", "Retrieve and Exist commands whose key was there.", func(k *target.StoreStatus) float64 { return float64(k.Hits) }},
		{"kvof_misses_total", "counter", "Retrieve and Exist commands whose key was absent.", func(k *target.StoreStatus) float64 { return float64(k.Misses) }},
		{"kvof_corrupt_total", "counter", "Headers and pieces of values that failed their checksum.", func(k *target.StoreStatus) float64 { return float64(k.Corrupt) }},
		{"kvof_quota_bytes", "gauge", "The most bytes that a Key Value namespace takes; 0 for no limit.", func(k *target.StoreStatus) float64 { return float64(k.Quota) }},
		{"kvof_share_bytes", "gauge", "The bytes that no other namespace of the pool can take.", func(k *target.StoreStatus) float64 { return float64(k.Share) }},
		{"kvof_stored_bytes_total", "counter", "Bytes of records that Stores wrote, with headers and padding.", func(k *target.StoreStatus) float64 { return float64(k.Written) }},
		{"kvof_moved_bytes_total", "counter", "Bytes of records that reclaiming wrote again.", func(k *target.StoreStatus) float64 { return float64(k.Moved) }},
		{"kvof_write_amplification", "gauge", "Bytes written for each byte stored.", func(k *target.StoreStatus) float64 { return k.WriteAmplification }},
		{"kvof_reclaimed_segments_total", "counter", "Segments made free.", func(k *target.StoreStatus) float64 { return float64(k.Reclaimed) }},
		{"kvof_not_admitted_total", "counter", "Stores whose value was not kept, as its key was stored for the first time.", func(k *target.StoreStatus) float64 { return float64(k.NotAdmitted) }},
		{"kvof_index_bytes", "gauge", "Memory of the index, that of the whole pool.", func(k *target.StoreStatus) float64 { return float64(k.IndexBytes) }},
		{"kvof_scrubbed_bytes_total", "counter", "Bytes verified in the background, in the whole pool.", func(k *target.StoreStatus) float64 { return float64(k.Scrubbed) }},
	} {
		f := newFamily(b, m.name, m.kind, m.help)
		served(s, func(n target.NamespaceStatus, labels ...string) {
			if n.Store != nil {
				f.sample(m.value(n.Store), labels...)
			}
		})
	}
}

// storeMetrics are those with more labels than a namespace's.
func storeMetrics(b *bytes.Buffer, s target.Status) {
	for _, m := range []struct {
		name, kind, help, label string
		values                  func(k *target.StoreStatus) map[string]float64
	}{
		{"kvof_evictions_total", "counter", "Values that are gone, but were not replaced or deleted by a host, by reason.", "reason", func(k *target.StoreStatus) map[string]float64 {
			return floats(k.Evictions)
		}},
		{"kvof_segments", "gauge", "Segments by state, those of the whole pool.", "state", func(k *target.StoreStatus) map[string]float64 { return floats(k.Segments) }},
	} {
		f := newFamily(b, m.name, m.kind, m.help)
		served(s, func(n target.NamespaceStatus, labels ...string) {
			if n.Store == nil {
				return
			}
			values := m.values(n.Store)
			for _, name := range slices.Sorted(maps.Keys(values)) {
				f.sample(values[name], append(labels[:len(labels):len(labels)], m.label, name)...)
			}
		})
	}
	f := newFamily(b, "kvof_eviction_age_seconds", "histogram", "Time from a value's Store to its eviction for capacity.")
	served(s, func(n target.NamespaceStatus, labels ...string) {
		if n.Store != nil {
			a := n.Store.EvictionAge
			f.histogram(a.Bounds, a.Counts, float64(a.Sum), labels...)
		}
	})
	f = newFamily(b, "kvof_pool_device_lost", "gauge", "1 for a device of a pool that is lost.")
	for _, p := range s.Pools {
		for _, d := range p.Devices {
			v := 0.0
			if d.Lost {
				v = 1
			}
			f.sample(v, "pool", p.Name, "member", strconv.Itoa(d.Member), "device", d.Device.Path)
		}
	}
}

func floats[V int | uint64](m map[string]V) map[string]float64 {
	f := make(map[string]float64, len(m))
	for k, v := range m {
		f[k] = float64(v)
	}
	return f
}

func commandMetrics(b *bytes.Buffer, s target.Status) {
	commands := func(f func(c target.CommandStats, labels ...string)) {
		served(s, func(n target.NamespaceStatus, labels ...string) {
			for _, c := range n.Commands {
				f(c, append(labels[:len(labels):len(labels)], "command", c.Name)...)
			}
		})
	}
	f := newFamily(b, "kvof_commands_total", "counter", "Commands completed.")
	commands(func(c target.CommandStats, labels ...string) { f.sample(float64(c.Latency.Count), labels...) })
	f = newFamily(b, "kvof_command_errors_total", "counter", "Commands that ended with an error; an absent or present key is none.")
	commands(func(c target.CommandStats, labels ...string) { f.sample(float64(c.Errors), labels...) })
	f = newFamily(b, "kvof_command_duration_seconds", "histogram", "Time from a command's arrival to its completion.")
	commands(func(c target.CommandStats, labels ...string) {
		f.histogram(c.Latency.Bounds, c.Latency.Counts, c.Latency.Sum.Seconds(), labels...)
	})
}

// processMetrics writes what Prometheus's own client libraries do about every process, under the same names.
func processMetrics(b *bytes.Buffer) {
	if statm, err := os.ReadFile("/proc/self/statm"); err == nil {
		var size, resident float64 // pages
		if _, err := fmt.Sscan(string(statm), &size, &resident); err == nil {
			newFamily(b, "process_resident_memory_bytes", "gauge", "Resident memory.").sample(resident * float64(os.Getpagesize()))
		}
	}
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) == nil {
		newFamily(b, "process_cpu_seconds_total", "counter", "User and system time.").sample(float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9)
	}
	if fds, err := os.ReadDir("/proc/self/fd"); err == nil {
		newFamily(b, "process_open_fds", "gauge", "Open file descriptors.").sample(float64(len(fds)))
	}
	newFamily(b, "go_goroutines", "gauge", "Goroutines.").sample(float64(runtime.NumGoroutine()))
	samples := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/total:bytes"}, {Name: "/gc/cycles/total:gc-cycles"}}
	metrics.Read(samples)
	newFamily(b, "go_memstats_heap_alloc_bytes", "gauge", "Bytes of objects on the Go heap.").sample(float64(samples[0].Value.Uint64()))
	newFamily(b, "go_memstats_sys_bytes", "gauge", "Memory that the Go runtime has mapped.").sample(float64(samples[1].Value.Uint64()))
	newFamily(b, "go_gc_cycles_total", "counter", "Garbage collections.").sample(float64(samples[2].Value.Uint64()))
}

// fabricMetrics is for the RDMA devices in use.
func fabricMetrics(b *bytes.Buffer, devices []target.FabricStatus) {
	for _, m := range []struct {
		name, kind, help string
		of               func(*target.FabricStatus) float64
	}{
		{"kvof_rdma_queue_pairs", "gauge", "Queue pairs of hosts.", func(f *target.FabricStatus) float64 { return float64(f.QueuePairs) }},
		{"kvof_rdma_registered_bytes", "gauge", "Payload memory that is registered.", func(f *target.FabricStatus) float64 { return float64(f.Registered) }},
		{"kvof_rdma_registrations_total", "counter", "Registrations of memory.", func(f *target.FabricStatus) float64 { return float64(f.Registrations) }},
		{"kvof_rdma_commands_total", "counter", "Command capsules taken.", func(f *target.FabricStatus) float64 { return float64(f.Commands) }},
		{"kvof_rdma_completions_total", "counter", "Completions polled.", func(f *target.FabricStatus) float64 { return float64(f.Completions) }},
		{"kvof_rdma_turns_total", "counter", "Calls to the device by its lanes.", func(f *target.FabricStatus) float64 { return float64(f.Turns) }},
		{"kvof_rdma_sleeps_total", "counter", "Times that a lane waited for an interrupt.", func(f *target.FabricStatus) float64 { return float64(f.Sleeps) }},
	} {
		if len(devices) == 0 {
			return
		}
		f := newFamily(b, m.name, m.kind, m.help)
		for i := range devices {
			f.sample(m.of(&devices[i]), "device", devices[i].Device)
		}
	}
}

// libplugin_KVOF.so: kvof as a storage backend of NIXL: transfers between host (or GPU) memory and objects, each the value of a key.
//
// An object's key is the meta info of its registration, or its device ID as a decimal number when that is empty. Descriptors of one
// object are merged into one command, so a transfer of any number of descriptors costs one command for each object.
// docs/nixl.md tells how to use it.
#include "abi.hpp"
#include "kvof.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>

namespace {

using namespace nixl;

constexpr uint32_t BATCH_OPS = 8192; // of one kvof_submit
constexpr uint32_t QUEUE_DEPTH = 4096;
constexpr char COUNTERS[] = "kvof:counters"; // a name to query: answers with what happened since the backend was made

Status status_of(int kvof) {
	switch (kvof) {
	case KVOF_OK:
	case KVOF_EXISTS:
		return SUCCESS;
	case KVOF_MISS:
		return ERR_NOT_FOUND;
	case KVOF_TRUNCATED:
		return ERR_MISMATCH;
	case KVOF_TOO_LARGE:
	case KVOF_INVALID:
		return ERR_INVALID_PARAM;
	case KVOF_READ_ONLY:
		return ERR_NOT_ALLOWED;
	case KVOF_UNSUPPORTED:
		return ERR_NOT_SUPPORTED;
	case KVOF_CANCELLED:
		return ERR_CANCELED;
	default:
		return ERR_BACKEND;
	}
}

// ---- Options ----

// What a user may say: name and default, as get_backend_options shows them.
const Params DEFAULTS = {
    {"targets", ""},         {"tenant", ""},           {"model", ""},
    {"rank", ""},            {"group", ""},            {"salt", ""},
    {"host_nqn", ""},        {"overwrite", "true"},    {"hash_all", "false"},
    {"checksum", "true"},    {"key_rule", "kvof"},     {"timeout_ms", "3000"},
    {"io_queues", "1"},      {"queue_depth", "128"},   {"lookup_timeout_ms", "500"},
    {"reconnect_ms", "1000"}, {"keep_alive_ms", "5000"}, {"connect_timeout_ms", "5000"},
};

class Options {
public:
	explicit Options(const Params &given) : values_(DEFAULTS) {
		for (auto &[name, value] : given)
			if (!value.empty()) values_[name] = value;
		// Who asks for the OBJ backend by name names an endpoint and a bucket.
		if (values_["targets"].empty()) values_["targets"] = values_["endpoint_override"];
		if (values_["tenant"].empty()) values_["tenant"] = values_["bucket"];
		if (const char *env = getenv("KVOF_TARGETS"); env && values_["targets"].empty()) values_["targets"] = env;
		if (values_["targets"].empty())
			throw std::invalid_argument("no targets: give the parameter targets (or endpoint_override), or set KVOF_TARGETS");
		if (auto rule = text("key_rule"); rule != "kvof" && rule != "memos")
			throw std::invalid_argument("key_rule is kvof or memos");
	}

	// Valid as long as the options.
	const std::string &text(const char *name) const { return values_.at(name); }

	bool flag(const char *name) const {
		auto &v = text(name);
		if (v == "true" || v == "1") return true;
		if (v == "false" || v == "0") return false;
		throw std::invalid_argument(std::string(name) + " is true or false");
	}

	uint32_t number(const char *name) const {
		auto &v = text(name);
		if (v.empty() || v.size() > 9 || v.find_first_not_of("0123456789") != v.npos)
			throw std::invalid_argument(std::string(name) + " is a number");
		return std::stoul(v);
	}

private:
	Params values_;
};

// ---- GPU memory ----

// cuMemGetHandleForAddressRange of the driver's own library, null where there is no GPU or the driver has no dma-bufs.
using GetHandle = int (*)(void *handle, uint64_t addr, size_t len, int type, unsigned long long flags);
GetHandle get_handle() {
	static const GetHandle get = []() -> GetHandle {
		if (access("/dev/nvidiactl", F_OK) != 0) return nullptr;
		void *cuda = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
		return cuda ? reinterpret_cast<GetHandle>(dlsym(cuda, "cuMemGetHandleForAddressRange")) : nullptr;
	}();
	return get;
}

// Makes r, whose addr and len are set, a region of a dma-buf, of the whole pages that GPU memory is shared in. The caller closes
// dmabuf_fd, -1 when there is none.
void share(kvof_region &r) {
	auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), addr = reinterpret_cast<uintptr_t>(r.addr);
	r.dmabuf = 1;
	r.dmabuf_fd = -1;
	r.dmabuf_offset = addr % page;
	uintptr_t first = addr - r.dmabuf_offset, end = (addr + r.len + page - 1) / page * page;
	int fd = -1;
	auto get = get_handle();
	if (get && get(&fd, first, end - first, 1 /* CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD */, 0) == 0) r.dmabuf_fd = fd;
}

// ---- Metadata and transfers ----

struct Memory final : Metadata {
	uintptr_t addr = 0;
	Memory() : Metadata(true) {}
};

struct Object final : Metadata {
	std::string key;
	explicit Object(std::string k) : Metadata(true), key(std::move(k)) {}
};

// A transfer: made by prepXfer, it can be posted again and again.
struct Transfer final : Request {
	std::vector<kvof_op> ops;
	std::vector<std::vector<kvof_iov>> pieces; // of ops that have several
	std::vector<std::string> keys;
	std::vector<uint64_t> lengths;

	std::mutex mutex; // of submitted
	size_t submitted = 0; // ops
	std::atomic<size_t> ended{0}; // ops
	std::atomic<int> failed{KVOF_OK}; // the first failure of kvof_submit

	bool idle() const { return ended.load(std::memory_order_acquire) == submitted; }
};

Params describe(const struct kvof_counters &c) {
	Params p;
#define COUNTER(name) p[#name] = std::to_string(c.name)
	COUNTER(targets);
	COUNTER(targets_up);
	COUNTER(paths);
	COUNTER(paths_up);
	COUNTER(in_flight);
	COUNTER(get_hits);
	COUNTER(get_misses);
	COUNTER(get_bytes);
	COUNTER(puts);
	COUNTER(put_exists);
	COUNTER(put_bytes);
	COUNTER(exist_hits);
	COUNTER(exist_misses);
	COUNTER(mismatches);
	COUNTER(truncated);
	COUNTER(unavailable);
	COUNTER(timeouts);
	COUNTER(full);
	COUNTER(errors);
	COUNTER(connects);
	COUNTER(disconnects);
	COUNTER(connect_failures);
	COUNTER(retries);
#undef COUNTER
	return p;
}

int hex(char c) {
	if (c >= '0' && c <= '9') return c - '0';
	c |= 0x20;
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

class KvofEngine final : public Engine {
public:
	explicit KvofEngine(const InitParams &init) : Engine(init), options_(*init.params) {
		kvof_options o = {};
		o.size = sizeof o;
		o.targets = options_.text("targets").c_str();
		if (!options_.text("host_nqn").empty()) o.host_nqn = options_.text("host_nqn").c_str();
		o.scope = {options_.text("tenant").c_str(), options_.text("model").c_str(), options_.text("rank").c_str(),
		           options_.text("group").c_str(), options_.text("salt").c_str()};
		o.timeout_ms = options_.number("timeout_ms");
		o.lookup_timeout_ms = options_.number("lookup_timeout_ms");
		o.connect_timeout_ms = options_.number("connect_timeout_ms");
		o.reconnect_ms = options_.number("reconnect_ms");
		o.keep_alive_ms = options_.number("keep_alive_ms");
		o.io_queues = options_.number("io_queues");
		o.queue_depth = options_.number("queue_depth");
		if (options_.flag("hash_all")) o.flags |= KVOF_HASH_ALL;
		if (!options_.flag("checksum")) o.flags |= KVOF_NO_CHECKSUM;
		overwrite_ = options_.flag("overwrite");
		memos_keys_ = options_.text("key_rule") == "memos";

		int status = kvof_open(&o, &client_);
		if (status == KVOF_UNAVAILABLE) {
			// An engine starts without its store, and finds it when it comes up.
			fprintf(stderr, "kvof: %s; connecting in the background\n", kvof_last_error());
			o.flags |= KVOF_NOWAIT;
			status = kvof_open(&o, &client_);
		}
		if (status != KVOF_OK) throw std::runtime_error(kvof_last_error());
		status = kvof_queue_open(client_, QUEUE_DEPTH, &queue_);
		if (status != KVOF_OK) {
			std::string why = kvof_last_error();
			kvof_close(client_);
			throw std::runtime_error(why);
		}
	}

	~KvofEngine() override { kvof_close(client_); }

	bool supportsRemote() const override { return false; }
	bool supportsLocal() const override { return true; }
	bool supportsNotif() const override { return false; }
	// VRAM where a path that is up takes dma-bufs: kvof_register tells, without one.
	Mems getSupportedMems() const override {
		static char page[4096];
		kvof_region r = {};
		r.size = sizeof r;
		r.addr = page;
		r.len = sizeof page;
		r.dmabuf = 1;
		r.dmabuf_fd = -1;
		r.dmabuf_offset = reinterpret_cast<uintptr_t>(page) % 4096;
		return get_handle() && kvof_register(client_, &r) != KVOF_UNSUPPORTED ? Mems{OBJ, DRAM, VRAM} : Mems{OBJ, DRAM};
	}
	Status connect(const std::string &) override { return SUCCESS; }
	Status disconnect(const std::string &) override { return SUCCESS; }
	Status unloadMD(Metadata *) override { return SUCCESS; }

	Status loadLocalMD(Metadata *in, Metadata *&out) override {
		out = in;
		return SUCCESS;
	}

	Status registerMem(const BlobDesc &mem, const Mem &type, Metadata *&out) override try {
		switch (type) {
		case OBJ: {
			auto key = key_of(mem);
			if (key.size() > KVOF_MAX_KEY) return ERR_INVALID_PARAM;
			out = new Object(std::move(key));
			return SUCCESS;
		}
		case DRAM:
		case VRAM: {
			auto md = std::make_unique<Memory>();
			if (auto s = register_memory(mem, type == VRAM); s != SUCCESS) return s;
			md->addr = mem.addr;
			out = md.release();
			return SUCCESS;
		}
		default:
			return ERR_NOT_SUPPORTED;
		}
	} catch (const std::exception &) {
		return ERR_BACKEND;
	}

	Status deregisterMem(Metadata *md) override {
		if (auto *memory = dynamic_cast<Memory *>(md)) unregister_memory(memory->addr);
		delete md;
		return SUCCESS;
	}

	Status prepXfer(const Op &op, const MetaList &local, const MetaList &remote, const std::string &, Request *&out,
	                const OptionalArgs *) const override try {
		if (op != READ && op != WRITE) return ERR_INVALID_PARAM;
		if ((local.type != DRAM && local.type != VRAM) || remote.type != OBJ) return ERR_INVALID_PARAM;
		if (local.descs.empty() || local.descs.size() != remote.descs.size()) return ERR_INVALID_PARAM;
		auto t = std::make_unique<Transfer>();
		if (auto s = plan(op, local.descs, remote.descs, *t); s != SUCCESS) return s;
		out = t.release();
		return SUCCESS;
	} catch (const std::exception &) {
		return ERR_BACKEND;
	}

	Status postXfer(const Op &, const MetaList &, const MetaList &, const std::string &, Request *&request,
	                const OptionalArgs *) const override {
		auto *t = static_cast<Transfer *>(request);
		if (!t) return ERR_INVALID_PARAM;
		{
			std::lock_guard lock(t->mutex);
			if (!t->idle()) return ERR_REPOST_ACTIVE;
			t->submitted = 0;
			t->ended = 0;
			t->failed = KVOF_OK;
			for (auto &op : t->ops) op.status = KVOF_PENDING;
		}
		return progress(*t);
	}

	Status checkXfer(Request *request) const override {
		auto *t = static_cast<Transfer *>(request);
		return t ? progress(*t) : ERR_INVALID_PARAM;
	}

	// Waits for what is in flight, at most for the time-out of a command: after it nobody uses the caller's memory any more.
	Status releaseReqH(Request *request) const override {
		auto *t = static_cast<Transfer *>(request);
		if (!t) return SUCCESS;
		while (!in_flight_ended(*t)) {
			kvof_completion done[16];
			note(done, kvof_wait(queue_, done, 16, 1));
		}
		delete t;
		return SUCCESS;
	}

	// One round trip for all keys. Whatever cannot be asked is a miss.
	Status queryMem(const BlobList &list, std::vector<QueryResponse> &out) const override try {
		out.assign(list.descs.size(), std::nullopt);
		std::vector<std::string> keys;
		keys.reserve(list.descs.size());
		std::vector<kvof_op> ops(list.descs.size());
		for (size_t i = 0; i < ops.size(); i++) {
			keys.push_back(key_of(list.descs[i]));
			ops[i].kind = KVOF_EXIST;
			ops[i].key = keys[i].data();
			ops[i].key_len = keys[i].size();
			ops[i].status = KVOF_PENDING;
		}
		kvof_queue *q = take_lookup_queue();
		if (!q) return SUCCESS;
		for (size_t at = 0; at < ops.size(); at += BATCH_OPS) {
			kvof_batch b = {};
			b.size = sizeof b;
			b.op_size = sizeof(kvof_op);
			b.ops = &ops[at];
			b.count = std::min<size_t>(BATCH_OPS, ops.size() - at);
			kvof_completion done;
			if (kvof_submit(q, &b) != KVOF_OK) break;
			kvof_wait(q, &done, 1, -1);
		}
		give_lookup_queue(q);
		for (size_t i = 0; i < ops.size(); i++) {
			if (ops[i].status == KVOF_OK) out[i].emplace();
			if (keys[i] == COUNTERS) {
				struct kvof_counters c = {};
				c.size = sizeof c;
				if (::kvof_counters(client_, &c) == KVOF_OK) out[i] = describe(c);
			}
		}
		return SUCCESS;
	} catch (const std::exception &) {
		return ERR_BACKEND;
	}

private:
	Options options_;
	kvof_client *client_ = nullptr;
	kvof_queue *queue_ = nullptr;
	bool overwrite_ = true;
	bool memos_keys_ = false;

	mutable std::mutex mutex_;
	mutable std::vector<kvof_queue *> lookup_queues_; // not in use just now
	std::map<uintptr_t, size_t> registered_;          // address: how often

	std::string key_of(const BlobDesc &d) const {
		if (d.meta_info.empty()) return std::to_string(d.dev_id);
		// DOCA Memos takes an even number of up to 32 hexadecimal digits for the bytes of the key.
		auto &name = d.meta_info;
		if (!memos_keys_ || name.size() > 32 || name.size() % 2 != 0) return name;
		std::string raw;
		for (size_t i = 0; i < name.size(); i += 2) {
			int high = hex(name[i]), low = hex(name[i + 1]);
			if (high < 0 || low < 0) return name;
			raw.push_back(static_cast<char>(high << 4 | low));
		}
		return raw;
	}

	Status register_memory(const BlobDesc &mem, bool gpu) {
		std::lock_guard lock(mutex_);
		auto &count = registered_[mem.addr];
		if (count++ > 0) return SUCCESS;
		kvof_region r = {};
		r.size = sizeof r;
		r.addr = reinterpret_cast<void *>(mem.addr);
		r.len = mem.len;
		if (gpu) {
			share(r);
			int status = r.dmabuf_fd < 0 ? KVOF_UNSUPPORTED : kvof_register(client_, &r);
			if (r.dmabuf_fd >= 0) close(r.dmabuf_fd);
			if (status != KVOF_OK) {
				registered_.erase(mem.addr);
				return status_of(status);
			}
			return SUCCESS;
		}
		// Host memory works unregistered too, only slower over RDMA.
		if (kvof_register(client_, &r) != KVOF_OK) registered_.erase(mem.addr);
		return SUCCESS;
	}

	void unregister_memory(uintptr_t addr) {
		std::lock_guard lock(mutex_);
		auto it = registered_.find(addr);
		if (it == registered_.end() || --it->second > 0) return;
		registered_.erase(it);
		kvof_unregister(client_, reinterpret_cast<void *>(addr));
	}

	// Turns descriptors into one op for each object. The descriptors of an object may be anywhere in the list, but together they
	// must be its bytes from the first on, without gaps: a value is stored and loaded as a whole.
	Status plan(Op op, const std::vector<MetaDesc> &local, const std::vector<MetaDesc> &remote, Transfer &t) const {
		std::vector<uint32_t> order(remote.size());
		for (uint32_t i = 0; i < order.size(); i++) {
			order[i] = i;
			if (!remote[i].metadata || remote[i].len != local[i].len) return ERR_INVALID_PARAM;
		}
		auto key = [&](uint32_t i) -> const std::string & { return static_cast<Object *>(remote[i].metadata)->key; };
		auto same = [&](uint32_t a, uint32_t b) { return remote[a].metadata == remote[b].metadata || key(a) == key(b); };
		std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
			if (!same(a, b)) return key(a) < key(b);
			return remote[a].addr < remote[b].addr;
		});
		for (size_t i = 0; i < order.size();) {
			std::vector<kvof_iov> pieces;
			uint64_t length = 0;
			size_t first = i;
			for (; i < order.size() && same(order[first], order[i]); i++) {
				if (remote[order[i]].addr != length) return ERR_NOT_SUPPORTED;
				auto *base = reinterpret_cast<char *>(local[order[i]].addr);
				auto len = local[order[i]].len;
				if (!pieces.empty() && static_cast<char *>(pieces.back().base) + pieces.back().len == base)
					pieces.back().len += len;
				else
					pieces.push_back({base, len});
				length += len;
			}
			if (pieces.size() > KVOF_MAX_IOV) return ERR_NOT_SUPPORTED;
			kvof_op o = {};
			o.kind = op == WRITE ? KVOF_PUT : KVOF_GET;
			o.flags = op == WRITE && overwrite_ ? KVOF_REPLACE : 0;
			o.len = pieces[0].len;
			o.data = pieces[0].base;
			o.iov_count = pieces.size() > 1 ? pieces.size() : 0;
			t.ops.push_back(o);
			t.keys.push_back(key(order[first]));
			t.pieces.push_back(std::move(pieces));
			t.lengths.push_back(length);
		}
		// The vectors stay where they are from here on.
		for (size_t i = 0; i < t.ops.size(); i++) {
			t.ops[i].key = t.keys[i].data();
			t.ops[i].key_len = t.keys[i].size();
			if (t.ops[i].iov_count > 0) t.ops[i].data = t.pieces[i].data();
		}
		return SUCCESS;
	}

	// Submits what is left to submit, takes completions, of whichever transfer, and tells how t stands. Never blocks.
	Status progress(Transfer &t) const {
		kvof_completion done[64];
		while (auto n = kvof_poll(queue_, done, 64)) note(done, n);
		size_t submitted;
		{
			std::lock_guard lock(t.mutex);
			while (t.submitted < t.ops.size() && t.failed == KVOF_OK) {
				kvof_batch b = {};
				b.size = sizeof b;
				b.op_size = sizeof(kvof_op);
				b.ops = &t.ops[t.submitted];
				b.count = std::min<size_t>(BATCH_OPS, t.ops.size() - t.submitted);
				b.user_data = reinterpret_cast<uintptr_t>(&t);
				int status = kvof_submit(queue_, &b);
				if (status == KVOF_AGAIN) break; // the next check tries again
				if (status == KVOF_OK)
					t.submitted += b.count;
				else
					t.failed = status;
			}
			submitted = t.submitted;
			if (t.failed == KVOF_OK && submitted < t.ops.size()) return IN_PROG;
		}
		if (t.ended.load(std::memory_order_acquire) < submitted) return IN_PROG;
		if (t.failed != KVOF_OK) return status_of(t.failed);
		for (size_t i = 0; i < t.ops.size(); i++) {
			auto &op = t.ops[i];
			if (auto s = status_of(op.status); s != SUCCESS) return s;
			if (op.kind == KVOF_GET && op.result != t.lengths[i]) return ERR_MISMATCH;
		}
		return SUCCESS;
	}

	static void note(const kvof_completion *done, uint32_t n) {
		for (uint32_t i = 0; i < n; i++)
			reinterpret_cast<Transfer *>(done[i].user_data)->ended.fetch_add(done[i].count, std::memory_order_release);
	}

	static bool in_flight_ended(Transfer &t) {
		std::lock_guard lock(t.mutex);
		return t.idle();
	}

	kvof_queue *take_lookup_queue() const {
		{
			std::lock_guard lock(mutex_);
			if (!lookup_queues_.empty()) {
				auto *q = lookup_queues_.back();
				lookup_queues_.pop_back();
				return q;
			}
		}
		kvof_queue *q = nullptr;
		return kvof_queue_open(client_, 16, &q) == KVOF_OK ? q : nullptr;
	}

	void give_lookup_queue(kvof_queue *q) const {
		std::lock_guard lock(mutex_);
		lookup_queues_.push_back(q);
	}
};

Plugin plugin = {
    API_VERSION,
    [](const InitParams *init) -> Engine * {
	    try {
		    return new KvofEngine(*init);
	    } catch (const std::exception &e) {
		    fprintf(stderr, "kvof: %s\n", e.what());
		    return nullptr;
	    }
    },
    [](Engine *engine) { delete engine; },
    [] { return "KVOF"; },
    [] { return kvof_version(); },
    [] { return DEFAULTS; },
    [] { return get_handle() ? Mems{OBJ, DRAM, VRAM} : Mems{OBJ, DRAM}; },
};

} // namespace

extern "C" __attribute__((visibility("default"))) nixl::Plugin *nixl_plugin_init() { return &plugin; }
extern "C" __attribute__((visibility("default"))) void nixl_plugin_fini() {}

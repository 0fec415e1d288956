// abi.hpp: the binary interface between a NIXL agent and its backend plugins, version 1, as this plugin needs it.
//
// NIXL's Python wheels carry the agent and no headers. This is the project's own description of what the agent of NIXL 1.0 to 1.5
// calls and reads: the order of the virtual functions and the layout of the data, nothing else. An agent and a plugin exchange
// pointers only, never symbols, so the names here are free; all of it is hidden from the linker. test_abi.py compares the
// order of the virtual functions with a plugin of the installed wheel.
//
// x86-64 and arm64 Linux, libstdc++ with the C++11 ABI, like the wheels.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace nixl {

enum Mem : int { DRAM = 0, VRAM = 1, BLK = 2, OBJ = 3, FILE = 4 };
enum Op : int { READ = 0, WRITE = 1 };

enum Status : int {
	IN_PROG = 1,
	SUCCESS = 0,
	ERR_NOT_POSTED = -1,
	ERR_INVALID_PARAM = -2,
	ERR_BACKEND = -3,
	ERR_NOT_FOUND = -4,
	ERR_MISMATCH = -5,
	ERR_NOT_ALLOWED = -6,
	ERR_REPOST_ACTIVE = -7,
	ERR_NOT_SUPPORTED = -9,
	ERR_CANCELED = -11,
};

using Params = std::unordered_map<std::string, std::string>;
using Mems = std::vector<Mem>;
using QueryResponse = std::optional<Params>;
using Notifications = std::vector<std::pair<std::string, std::string>>;

// What the agent gives to create_engine. It keeps params only during the call.
struct InitParams {
	std::string local_agent;
	std::string type;
	Params *params;
	bool progress_thread;
	uint64_t progress_delay_us;
	int sync_mode;
	bool telemetry;
};

// A plugin's own data beside a registered descriptor.
class Metadata {
public:
	explicit Metadata(bool is_private) : is_private_(is_private) {}
	virtual ~Metadata() = default;

protected:
	bool is_private_;
};

// A plugin's own data of a transfer.
class Request {
public:
	virtual ~Request() = default;
};

// A descriptor of memory (addr is an address) or of an object (addr is an offset into it).
struct Desc {
	uintptr_t addr;
	size_t len;
	uint64_t dev_id;
};
struct MetaDesc : Desc {
	Metadata *metadata;
};
struct BlobDesc : Desc {
	std::string meta_info;
};

// The agent's descriptor lists have a virtual table that a plugin has no use for.
template <class T> struct DescList {
	void *virtual_table;
	Mem type;
	std::vector<T> descs;
};
using MetaList = DescList<MetaDesc>;
using BlobList = DescList<BlobDesc>;

struct OptionalArgs; // never looked into

// The base of every engine. The agent reads the data members and calls the virtual functions by their place.
class Engine {
	std::string type_;
	Params params_;
	std::vector<char> telemetry_events_;
	std::mutex telemetry_mutex_;

protected:
	bool init_error_ = false;
	const std::string local_agent_;
	const bool telemetry_;

	explicit Engine(const InitParams &p)
	    : type_(p.type), params_(*p.params), local_agent_(p.local_agent), telemetry_(false) {}

public:
	Engine(const Engine &) = delete;
	void operator=(const Engine &) = delete;

	virtual ~Engine() = default;
	virtual bool supportsRemote() const = 0;
	virtual bool supportsLocal() const = 0;
	virtual bool supportsNotif() const = 0;
	virtual Mems getSupportedMems() const = 0;
	virtual Status registerMem(const BlobDesc &, const Mem &, Metadata *&) = 0;
	virtual Status deregisterMem(Metadata *) = 0;
	virtual Status connect(const std::string &) = 0;
	virtual Status disconnect(const std::string &) = 0;
	virtual Status unloadMD(Metadata *) = 0;
	virtual Status prepXfer(const Op &, const MetaList &local, const MetaList &remote, const std::string &agent, Request *&,
	                        const OptionalArgs *) const = 0;
	virtual Status postXfer(const Op &, const MetaList &local, const MetaList &remote, const std::string &agent, Request *&,
	                        const OptionalArgs *) const = 0;
	virtual Status checkXfer(Request *) const = 0;
	virtual Status releaseReqH(Request *) const = 0;
	// The rest is for backends with remote agents, notifications or GPU-initiated transfers.
	virtual Status prepMemView(const void *remote, void *&, const OptionalArgs *) const { return ERR_NOT_SUPPORTED; }
	virtual Status prepMemView(const MetaList &, void *&, const OptionalArgs *) const { return ERR_NOT_SUPPORTED; }
	virtual void releaseMemView(void *) const {}
	virtual Status getPublicData(const Metadata *, std::string &) const { return ERR_BACKEND; }
	virtual Status getConnInfo(std::string &) const { return ERR_BACKEND; }
	virtual Status loadRemoteConnInfo(const std::string &, const std::string &) { return ERR_BACKEND; }
	virtual Status loadRemoteMD(const BlobDesc &, const Mem &, const std::string &, Metadata *&) { return ERR_BACKEND; }
	virtual Status loadLocalMD(Metadata *, Metadata *&) { return ERR_BACKEND; }
	virtual Status getNotifs(Notifications &) { return ERR_BACKEND; }
	virtual Status genNotif(const std::string &, const std::string &) const { return ERR_BACKEND; }
	virtual Status queryMem(const BlobList &, std::vector<QueryResponse> &) const { return ERR_NOT_SUPPORTED; }
	virtual Status estimateXferCost(const Op &, const MetaList &, const MetaList &, const std::string &, Request *const &,
	                                std::chrono::microseconds &, std::chrono::microseconds &, int &method, const void *) const {
		return ERR_NOT_SUPPORTED;
	}
};

constexpr int API_VERSION = 1;

// What nixl_plugin_init returns a pointer to.
struct Plugin {
	int api_version;
	Engine *(*create_engine)(const InitParams *);
	void (*destroy_engine)(Engine *);
	const char *(*get_plugin_name)();
	const char *(*get_plugin_version)();
	Params (*get_backend_options)();
	Mems (*get_backend_mems)();
};

static_assert(sizeof(void *) == 8 && sizeof(std::string) == 32, "another ABI than that of NIXL's wheels");

} // namespace nixl

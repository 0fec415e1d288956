// The C side of package rdma: calls into rdma-core, whose libraries are opened at run time.
//go:build cgo && rdma

#ifndef KVOF_VERBS_H
#define KVOF_VERBS_H

#include <stdint.h>
#include <infiniband/verbs.h>
#include <rdma/rdma_cma.h>

// The Go types of the same names, member for member.
struct kvof_wr {
	uint64_t id, remote;
	uint32_t rkey;
	uint8_t op, flags;
	uint16_t num_sge;
	uint32_t sge, unused;
};

struct kvof_chain {
	uintptr_t queue;
	uint32_t first, num, posted;
	int32_t err;
	uint8_t recv;
	uint8_t unused[7];
};

enum { CHAIN_SEND, CHAIN_RECV, CHAIN_SRQ };

// Posts chains; then polls the completion queues cqs[start], cqs[start+1]... around for up to nwc completions and returns
// how many it found. What could not be posted is noted in its chain.
int kvof_turn(struct kvof_chain *chains, int nchains, struct kvof_wr *wrs, struct ibv_sge *sges,
	uintptr_t *cqs, int ncqs, int start, struct ibv_wc *wc, int nwc);

// Asks for an event at the next completion of the queue; an errno or 0.
int kvof_arm(struct ibv_cq *cq);

enum { MAX_FILES = 16 };

// Asks for events at the next completions of the queues arm and, if there are any, polls cqs as kvof_turn does. Unless it found
// something, waits until the completion channel has an event, or the eventfd wake was written, or one of the first MAX_FILES files
// can be read, and polls again. Returns how many completions it found, or a negative errno. Of the event, which it takes and
// acknowledges, *event is the queue; else it is 0.
int kvof_channel_wait(struct ibv_comp_channel *ch, int wake, uintptr_t *arm, int narm, int32_t *files, int nfiles, uintptr_t *cqs, int ncqs, int start,
	struct ibv_wc *wc, int nwc, uintptr_t *event);

// One connection manager event with what Go wants of it.
struct kvof_cm_event {
	struct rdma_cm_id *id, *listen_id;
	int32_t event, status;
	uint8_t initiator_depth, responder_resources, private_len;
	uint8_t private_data[256];
};

// Takes and acknowledges one event: 1, or 0 when there is none, or a negative errno.
int kvof_cm_event_take(struct rdma_event_channel *ch, struct kvof_cm_event *out);

// Takes and acknowledges one asynchronous event: as above. For a queue pair's event *qp is that.
int kvof_async_event(struct ibv_context *ctx, int *event, struct ibv_qp **qp);

struct kvof_attr {
	uint64_t max_mr_size, flags;
	int max_qp, max_qp_wr, max_sge, max_sge_rd, max_cqe, max_initiator, max_responder, max_srq, max_srq_wr, max_srq_sge;
	int iwarp, infiniband, port_state, mtu;
	uint32_t max_msg;
	char name[64], firmware[64];
};

int kvof_query(struct ibv_context *ctx, struct kvof_attr *a);
void kvof_nonblock(int fd);
const char *kvof_load(void); // what is missing, NULL when nothing

// rdma-core's functions that are not inline. Those with a result of int return 0 or set errno, or return it.
#define KVOF_FUNCTIONS(X) \
	X(rdma_create_event_channel) X(rdma_destroy_event_channel) X(rdma_create_id) X(rdma_destroy_id) X(rdma_bind_addr) \
	X(rdma_resolve_addr) X(rdma_resolve_route) X(rdma_create_qp) X(rdma_destroy_qp) X(rdma_connect) X(rdma_listen) X(rdma_accept) \
	X(rdma_reject) X(rdma_disconnect) X(rdma_get_cm_event) X(rdma_ack_cm_event) X(rdma_get_devices) X(rdma_free_devices) \
	X(rdma_set_option)
#define KVOF_VERBS(X) \
	X(ibv_get_device_name) X(ibv_query_device) X(ibv_alloc_pd) X(ibv_dealloc_pd) X(ibv_dereg_mr) \
	X(ibv_create_comp_channel) X(ibv_destroy_comp_channel) X(ibv_create_cq) X(ibv_destroy_cq) X(ibv_get_cq_event) X(ibv_ack_cq_events) \
	X(ibv_create_srq) X(ibv_destroy_srq) X(ibv_modify_qp) X(ibv_get_async_event) X(ibv_ack_async_event) X(ibv_event_type_str)

struct rdma_event_channel *kvof_create_event_channel(void);
int kvof_create_id(struct rdma_event_channel *ch, struct rdma_cm_id **id);
int kvof_destroy_id(struct rdma_cm_id *id);
int kvof_bind(struct rdma_cm_id *id, struct sockaddr *addr);
int kvof_listen(struct rdma_cm_id *id, int backlog);
int kvof_resolve_addr(struct rdma_cm_id *id, struct sockaddr *src, struct sockaddr *dst, int ms);
int kvof_resolve_route(struct rdma_cm_id *id, int ms);
int kvof_create_qp(struct rdma_cm_id *id, struct ibv_pd *pd, struct ibv_cq *scq, struct ibv_cq *rcq, struct ibv_srq *srq,
	int send_wr, int recv_wr, int send_sge, int *inline_data);
void kvof_destroy_qp(struct rdma_cm_id *id);
int kvof_fail_qp(struct ibv_qp *qp);
int kvof_connect(struct rdma_cm_id *id, const void *data, int len, int initiator_depth, int responder_resources, int accept);
int kvof_reject(struct rdma_cm_id *id, const void *data, int len);
int kvof_disconnect(struct rdma_cm_id *id);
void kvof_addrs(struct rdma_cm_id *id, struct sockaddr_storage *src, struct sockaddr_storage *dst);

struct ibv_context **kvof_get_devices(int *n);
void kvof_free_devices(struct ibv_context **list);
const char *kvof_device_name(struct ibv_context *ctx);
struct ibv_pd *kvof_alloc_pd(struct ibv_context *ctx);
int kvof_dealloc_pd(struct ibv_pd *pd);
struct ibv_mr *kvof_reg_mr(struct ibv_pd *pd, void *addr, size_t len, int access);
// As ibv_reg_dmabuf_mr; ENOSYS where rdma-core is older than that.
struct ibv_mr *kvof_reg_dmabuf_mr(struct ibv_pd *pd, uint64_t offset, size_t len, uint64_t iova, int fd, int access);
int kvof_dereg_mr(struct ibv_mr *mr);
struct ibv_comp_channel *kvof_create_channel(struct ibv_context *ctx);
int kvof_destroy_channel(struct ibv_comp_channel *ch);
struct ibv_cq *kvof_create_cq(struct ibv_context *ctx, struct ibv_comp_channel *ch, int depth);
int kvof_destroy_cq(struct ibv_cq *cq);
struct ibv_srq *kvof_create_srq(struct ibv_pd *pd, int depth);
int kvof_destroy_srq(struct ibv_srq *srq);
const char *kvof_event_text(int event);

#endif

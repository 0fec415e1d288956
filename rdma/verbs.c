//go:build cgo && rdma

#define _GNU_SOURCE
#include "verbs.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#undef ibv_reg_mr
#undef ibv_query_port

static struct {
#define MEMBER(f) __typeof__(f) *f;
	KVOF_FUNCTIONS(MEMBER) KVOF_VERBS(MEMBER)
#undef MEMBER
	struct ibv_mr *(*ibv_reg_mr)(struct ibv_pd *, void *, size_t, int);
	int (*ibv_query_port)(struct ibv_context *, uint8_t, struct ibv_port_attr *);
	struct ibv_mr *(*ibv_reg_dmabuf_mr)(struct ibv_pd *, uint64_t, size_t, uint64_t, int, int); // since rdma-core 34, or NULL
} lib;

const char *kvof_load(void) {
	static char missing[256];
	void *verbs = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_GLOBAL);
	void *cm = verbs ? dlopen("librdmacm.so.1", RTLD_NOW) : NULL;
	if (!cm) {
		snprintf(missing, sizeof missing, "%s", dlerror());
		return missing;
	}
#define FIND(from, f) \
	if (!(*(void **)&lib.f = dlsym(from, #f))) { \
		snprintf(missing, sizeof missing, "%s", dlerror()); \
		return missing; \
	}
#define CM(f) FIND(cm, f)
#define VERBS(f) FIND(verbs, f)
	KVOF_FUNCTIONS(CM)
	KVOF_VERBS(VERBS)
	VERBS(ibv_reg_mr)
	VERBS(ibv_query_port)
	*(void **)&lib.ibv_reg_dmabuf_mr = dlsym(verbs, "ibv_reg_dmabuf_mr");
	return NULL;
}

enum { CHUNK = 32, MAX_SGE = 256 };

// positive makes an error number of what providers return, by their fashion: one, its negative, or -1 beside errno.
static int positive(int err) { return err == -1 ? errno : err < 0 ? -err : err; }

// ibv_post_* take a chain whose memory they do not keep: it is built here, from Go's compact form, a chunk at a time.
static int post_sends(struct kvof_chain *c, struct kvof_wr *wrs, struct ibv_sge *sges) {
	struct ibv_send_wr chunk[CHUNK], *bad;
	while (c->posted < c->num) {
		int n = 0;
		for (; n < CHUNK && c->posted + n < c->num; n++) {
			struct kvof_wr *w = &wrs[c->first + c->posted + n];
			struct ibv_send_wr *s = &chunk[n];
			memset(s, 0, sizeof *s);
			s->wr_id = w->id;
			s->opcode = w->op;
			s->send_flags = w->flags;
			s->sg_list = &sges[w->sge];
			s->num_sge = w->num_sge;
			if (w->op == IBV_WR_SEND_WITH_INV)
				s->invalidate_rkey = w->rkey;
			s->wr.rdma.remote_addr = w->remote;
			s->wr.rdma.rkey = w->rkey; // of SEND_WITH_INV too: siw takes the key from here
			s->next = &chunk[n + 1];
		}
		chunk[n - 1].next = NULL;
		bad = NULL;
		int err = ibv_post_send((struct ibv_qp *)c->queue, chunk, &bad);
		if (err) {
			c->posted += bad ? bad - chunk : 0;
			return positive(err);
		}
		c->posted += n;
	}
	return 0;
}

static int post_recvs(struct kvof_chain *c, struct kvof_wr *wrs, struct ibv_sge *sges) {
	struct ibv_recv_wr chunk[CHUNK], *bad;
	while (c->posted < c->num) {
		int n = 0;
		for (; n < CHUNK && c->posted + n < c->num; n++) {
			struct kvof_wr *w = &wrs[c->first + c->posted + n];
			chunk[n] = (struct ibv_recv_wr){.wr_id = w->id, .sg_list = &sges[w->sge], .num_sge = w->num_sge, .next = &chunk[n + 1]};
		}
		chunk[n - 1].next = NULL;
		bad = NULL;
		int err = c->recv == CHAIN_SRQ ? ibv_post_srq_recv((struct ibv_srq *)c->queue, chunk, &bad)
			: ibv_post_recv((struct ibv_qp *)c->queue, chunk, &bad);
		if (err) {
			c->posted += bad ? bad - chunk : 0;
			return positive(err);
		}
		c->posted += n;
	}
	return 0;
}

static int poll_cqs(uintptr_t *cqs, int ncqs, int start, struct ibv_wc *wc, int nwc) {
	int found = 0;
	for (int i = 0; i < ncqs && found < nwc; i++) {
		int n = ibv_poll_cq((struct ibv_cq *)cqs[(start + i) % ncqs], nwc - found, wc + found);
		if (n > 0)
			found += n;
	}
	return found;
}

int kvof_turn(struct kvof_chain *chains, int nchains, struct kvof_wr *wrs, struct ibv_sge *sges,
	uintptr_t *cqs, int ncqs, int start, struct ibv_wc *wc, int nwc) {
	for (int i = 0; i < nchains; i++) {
		struct kvof_chain *c = &chains[i];
		c->posted = 0;
		c->err = c->recv == CHAIN_SEND ? post_sends(c, wrs, sges) : post_recvs(c, wrs, sges);
	}
	return poll_cqs(cqs, ncqs, start, wc, nwc);
}

int kvof_arm(struct ibv_cq *cq) { return positive(ibv_req_notify_cq(cq, 0)); }

static int again(void) { return errno == EAGAIN || errno == EINTR ? 0 : -errno; }

int kvof_channel_wait(struct ibv_comp_channel *ch, int wake, uintptr_t *arm, int narm, int32_t *files, int nfiles, uintptr_t *cqs, int ncqs, int start,
	struct ibv_wc *wc, int nwc, uintptr_t *event) {
	*event = 0;
	for (int i = 0; i < narm; i++) {
		int err = kvof_arm((struct ibv_cq *)arm[i]);
		if (err)
			return -err;
	}
	if (narm > 0) { // what came before is announced by no event
		int found = poll_cqs(cqs, ncqs, start, wc, nwc);
		if (found > 0)
			return found;
	}
	struct pollfd fds[2 + MAX_FILES] = {{.fd = ch->fd, .events = POLLIN}, {.fd = wake, .events = POLLIN}};
	if (nfiles > MAX_FILES)
		nfiles = MAX_FILES;
	for (int i = 0; i < nfiles; i++)
		fds[2 + i] = (struct pollfd){.fd = files[i], .events = POLLIN};
	if (poll(fds, 2 + nfiles, -1) < 0)
		return again();
	if (fds[1].revents) {
		uint64_t n;
		if (read(wake, &n, sizeof n) < 0 && errno != EAGAIN)
			return -errno;
	}
	if (fds[0].revents & POLLIN) {
		struct ibv_cq *cq;
		void *context;
		if (lib.ibv_get_cq_event(ch, &cq, &context))
			return again();
		lib.ibv_ack_cq_events(cq, 1);
		*event = (uintptr_t)cq;
	} else if (fds[0].revents) {
		return -EIO;
	}
	return poll_cqs(cqs, ncqs, start, wc, nwc);
}

int kvof_cm_event_take(struct rdma_event_channel *ch, struct kvof_cm_event *out) {
	struct rdma_cm_event *e;
	if (lib.rdma_get_cm_event(ch, &e))
		return again();
	memset(out, 0, sizeof *out);
	out->id = e->id;
	out->listen_id = e->listen_id;
	out->event = e->event;
	out->status = e->status;
	switch (e->event) {
	case RDMA_CM_EVENT_CONNECT_REQUEST:
	case RDMA_CM_EVENT_CONNECT_RESPONSE:
	case RDMA_CM_EVENT_ESTABLISHED:
	case RDMA_CM_EVENT_REJECTED:
		out->initiator_depth = e->param.conn.initiator_depth;
		out->responder_resources = e->param.conn.responder_resources;
		if (e->param.conn.private_data) {
			out->private_len = e->param.conn.private_data_len;
			memcpy(out->private_data, e->param.conn.private_data, out->private_len);
		}
	default:;
	}
	lib.rdma_ack_cm_event(e);
	return 1;
}

int kvof_async_event(struct ibv_context *ctx, int *event, struct ibv_qp **qp) {
	struct ibv_async_event e;
	if (lib.ibv_get_async_event(ctx, &e))
		return again();
	*event = e.event_type;
	*qp = NULL;
	switch (e.event_type) {
	case IBV_EVENT_QP_FATAL:
	case IBV_EVENT_QP_REQ_ERR:
	case IBV_EVENT_QP_ACCESS_ERR:
	case IBV_EVENT_COMM_EST:
	case IBV_EVENT_SQ_DRAINED:
	case IBV_EVENT_PATH_MIG:
	case IBV_EVENT_PATH_MIG_ERR:
	case IBV_EVENT_QP_LAST_WQE_REACHED:
		*qp = e.element.qp;
	default:;
	}
	lib.ibv_ack_async_event(&e);
	return 1;
}

int kvof_query(struct ibv_context *ctx, struct kvof_attr *a) {
	struct ibv_device_attr d;
	struct ibv_port_attr p;
	memset(a, 0, sizeof *a);
	memset(&p, 0, sizeof p);
	int err = lib.ibv_query_device(ctx, &d);
	if (!err)
		err = lib.ibv_query_port(ctx, 1, &p);
	if (err)
		return err;
	a->max_mr_size = d.max_mr_size;
	a->flags = d.device_cap_flags;
	a->max_qp = d.max_qp;
	a->max_qp_wr = d.max_qp_wr;
	a->max_sge = d.max_sge;
	a->max_sge_rd = d.max_sge_rd;
	a->max_cqe = d.max_cqe;
	a->max_initiator = d.max_qp_init_rd_atom;
	a->max_responder = d.max_qp_rd_atom;
	a->max_srq = d.max_srq;
	a->max_srq_wr = d.max_srq_wr;
	a->max_srq_sge = d.max_srq_sge;
	a->iwarp = ctx->device->transport_type == IBV_TRANSPORT_IWARP;
	a->infiniband = p.link_layer == IBV_LINK_LAYER_INFINIBAND;
	a->port_state = p.state;
	a->mtu = p.active_mtu ? 128 << p.active_mtu : 0;
	a->max_msg = p.max_msg_sz;
	snprintf(a->name, sizeof a->name, "%s", lib.ibv_get_device_name(ctx->device));
	snprintf(a->firmware, sizeof a->firmware, "%.63s", d.fw_ver);
	return 0;
}

void kvof_nonblock(int fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }

struct rdma_event_channel *kvof_create_event_channel(void) { return lib.rdma_create_event_channel(); }
int kvof_create_id(struct rdma_event_channel *ch, struct rdma_cm_id **id) { return lib.rdma_create_id(ch, id, NULL, RDMA_PS_TCP); }
int kvof_destroy_id(struct rdma_cm_id *id) { return lib.rdma_destroy_id(id); }

int kvof_bind(struct rdma_cm_id *id, struct sockaddr *addr) {
	int on = 1;
	// An IPv6 listener is that alone, so that one on 0.0.0.0 can stand beside it; a restarted server gets its port back.
	lib.rdma_set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_REUSEADDR, &on, sizeof on);
	if (addr->sa_family == AF_INET6)
		lib.rdma_set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_AFONLY, &on, sizeof on);
	return lib.rdma_bind_addr(id, addr);
}

int kvof_listen(struct rdma_cm_id *id, int backlog) { return lib.rdma_listen(id, backlog); }

int kvof_resolve_addr(struct rdma_cm_id *id, struct sockaddr *src, struct sockaddr *dst, int ms) {
	return lib.rdma_resolve_addr(id, src && src->sa_family ? src : NULL, dst, ms);
}

int kvof_resolve_route(struct rdma_cm_id *id, int ms) { return lib.rdma_resolve_route(id, ms); }

int kvof_create_qp(struct rdma_cm_id *id, struct ibv_pd *pd, struct ibv_cq *scq, struct ibv_cq *rcq, struct ibv_srq *srq,
	int send_wr, int recv_wr, int send_sge, int *inline_data) {
	for (;;) {
		struct ibv_qp_init_attr a = {
			.send_cq = scq, .recv_cq = rcq, .srq = srq, .qp_type = IBV_QPT_RC,
			.cap = {.max_send_wr = send_wr, .max_recv_wr = srq ? 0 : recv_wr, .max_send_sge = send_sge,
				.max_recv_sge = srq ? 0 : 1, .max_inline_data = *inline_data},
		};
		int err = lib.rdma_create_qp(id, pd, &a);
		if (err && *inline_data) { // devices differ in what they inline, and do not tell: do without
			*inline_data = 0;
			continue;
		}
		*inline_data = a.cap.max_inline_data;
		return err;
	}
}

void kvof_destroy_qp(struct rdma_cm_id *id) {
	if (id->qp)
		lib.rdma_destroy_qp(id);
}

int kvof_fail_qp(struct ibv_qp *qp) {
	struct ibv_qp_attr a = {.qp_state = IBV_QPS_ERR};
	return lib.ibv_modify_qp(qp, &a, IBV_QP_STATE);
}

int kvof_connect(struct rdma_cm_id *id, const void *data, int len, int initiator_depth, int responder_resources, int accept) {
	struct rdma_conn_param p = {
		.private_data = len ? data : NULL, .private_data_len = len, .initiator_depth = initiator_depth,
		.responder_resources = responder_resources, .flow_control = 1, .retry_count = 7, .rnr_retry_count = 7,
	};
	return accept ? lib.rdma_accept(id, &p) : lib.rdma_connect(id, &p);
}

int kvof_reject(struct rdma_cm_id *id, const void *data, int len) { return lib.rdma_reject(id, len ? data : NULL, len); }
int kvof_disconnect(struct rdma_cm_id *id) { return lib.rdma_disconnect(id); }

void kvof_addrs(struct rdma_cm_id *id, struct sockaddr_storage *src, struct sockaddr_storage *dst) {
	*src = id->route.addr.src_storage;
	*dst = id->route.addr.dst_storage;
}

struct ibv_context **kvof_get_devices(int *n) { return lib.rdma_get_devices(n); }
void kvof_free_devices(struct ibv_context **list) { lib.rdma_free_devices(list); }
const char *kvof_device_name(struct ibv_context *ctx) { return lib.ibv_get_device_name(ctx->device); }
struct ibv_pd *kvof_alloc_pd(struct ibv_context *ctx) { return lib.ibv_alloc_pd(ctx); }
int kvof_dealloc_pd(struct ibv_pd *pd) { return lib.ibv_dealloc_pd(pd); }
struct ibv_mr *kvof_reg_mr(struct ibv_pd *pd, void *addr, size_t len, int access) { return lib.ibv_reg_mr(pd, addr, len, access); }

struct ibv_mr *kvof_reg_dmabuf_mr(struct ibv_pd *pd, uint64_t offset, size_t len, uint64_t iova, int fd, int access) {
	if (!lib.ibv_reg_dmabuf_mr) {
		errno = ENOSYS;
		return NULL;
	}
	return lib.ibv_reg_dmabuf_mr(pd, offset, len, iova, fd, access);
}

int kvof_dereg_mr(struct ibv_mr *mr) { return lib.ibv_dereg_mr(mr); }
struct ibv_comp_channel *kvof_create_channel(struct ibv_context *ctx) { return lib.ibv_create_comp_channel(ctx); }
int kvof_destroy_channel(struct ibv_comp_channel *ch) { return lib.ibv_destroy_comp_channel(ch); }

struct ibv_cq *kvof_create_cq(struct ibv_context *ctx, struct ibv_comp_channel *ch, int depth) {
	return lib.ibv_create_cq(ctx, depth, NULL, ch, 0);
}

int kvof_destroy_cq(struct ibv_cq *cq) { return lib.ibv_destroy_cq(cq); }

struct ibv_srq *kvof_create_srq(struct ibv_pd *pd, int depth) {
	struct ibv_srq_init_attr a = {.attr = {.max_wr = depth, .max_sge = 1}};
	return lib.ibv_create_srq(pd, &a);
}

int kvof_destroy_srq(struct ibv_srq *srq) { return lib.ibv_destroy_srq(srq); }
const char *kvof_event_text(int event) { return lib.ibv_event_type_str(event); }

// The kernel's half of the kernel path: inside connect() of a process in a consumer's control group, the VIP becomes an endpoint.
//
// Whenever there is a doubt, the destination stays as it is: then the NAT rule captures the connection, and the proxy serves it.
// src/kernel/layout.rs has the same structures in Rust. docs/decisions/0007-the-kernel-path.md says why it is built this way.
//
// The programs must load with CAP_BPF and CAP_NET_ADMIN alone (no CAP_PERFMON: no kernel structures are read, and there is no
// variable index into socket storage), and in the verifier of Linux 5.15 (loops have a constant bound).

#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define AF_INET6 10
#define IPPROTO_TCP 6

// A power of two: clang masks the index with it.
#define ENDPOINTS_OF_A_SERVICE 64
// Depths at which control groups of containers are.
#define LEVELS 4
// Turns that a connection may draw before it is left to the proxy.
#define TURNS 4
// A power of two; 11 are used.
#define BUCKETS 16
// More than any load: of an endpoint that gets no connection,
#define UNUSABLE (1LL << 54)
// and of one that does not answer.
#define SUSPECT (1LL << 55)
// Values of `out`.
#define IS_OUT 1
#define IS_DRAINED 2

// The user space loader sets the number of entries of each map of its kind.
#define ANY 1

struct key {
	__u64 cgroup;
	// IPv4 addresses are v4-mapped everywhere. Network byte order.
	__u32 vip[4];
	__u16 port;
	__u8 protocol;
	__u8 zero[5];
};

struct route {
	// Compared with what was looked up: an element of the hash may be used again at once.
	struct key key;
	__u32 service;
	__u32 generation;
	__u32 least_connections;
	// While an endpoint of its service is in doubt, its connections are left to the proxy.
	__u32 cautious;
};

struct set {
	__u32 service;
	__u32 generation;
	// The turn of the first.
	__u64 base;
	__u32 length;
	// So many of them, the first, were in the set before.
	__u32 stay;
	__u32 endpoint[ENDPOINTS_OF_A_SERVICE];
};

struct endpoint {
	__u32 address[4];
	__u16 port;
	__u16 zero;
	__u32 generation;
	// When it was added to a service that had others (CLOCK_MONOTONIC), else 0.
	__u64 since;
};

// What user space knows of an endpoint.
struct mark {
	// 0: it is used. IS_OUT: ejected, or its check fails. IS_DRAINED: nobody is to use it, and nothing is held against it.
	__u32 out;
	// Connections of the proxy to it.
	__u32 active;
};

// What the kernel knows of an endpoint.
struct live {
	__u64 active;
	// Connections that wait for the answer to their SYN, and since when at the longest.
	__u64 waiting;
	__u64 waiting_since;
	// How long a connect usually takes, ns.
	__u64 usual;
};

struct counts {
	__u64 started;
	__u64 opened;
	__u64 failed;
	__u64 closed;
	__u64 reset;
	__u64 reset_after_close;
	__u64 route_gone;
	__u64 endpoint_gone;
	__u64 bytes_up;
	__u64 bytes_down;
	__u64 micros;
	__u64 bucket[BUCKETS];
	// Of UDP.
	__u64 datagrams_up;
	__u64 datagrams_down;
};

enum state {
	NOT_OURS,
	CHOSEN,
	CONNECTING,
	OPEN,
};

// Of a socket that went this way.
struct peer {
	__u32 vip[4];
	__u32 address[4];
	__u16 vip_port;
	__u16 port;
	__u32 state;
	__u32 route;
	__u32 route_generation;
	__u32 endpoint;
	__u32 endpoint_generation;
	__u64 start;
	__u64 took;
};

enum outcome {
	CLOSED,
	RESET,
	RESET_AFTER_CLOSE,
	FAILED,
	// It has not ended: the SYN was not answered for a second.
	UNANSWERED,
	// User space ended it, and said so in `doomed`.
	ROUTE_GONE,
	ENDPOINT_GONE,
};

// Of a connection that has ended, or that waits in vain.
struct record {
	__u32 route;
	__u32 route_generation;
	__u32 endpoint;
	__u32 endpoint_generation;
	__u64 start;
	__u64 end;
	__u64 took;
	__u64 bytes_up;
	__u64 bytes_down;
	__u32 vip[4];
	__u32 local[4];
	__u16 local_port;
	__u16 vip_port;
	__u32 outcome;
};

// Why a connection was left to the proxy, and what was lost: an index of `notes`.
enum note {
	// There is no entry for the control group, VIP and port. Not counted: it is so for every other program of the host.
	NOTE_CHANGING,
	NOTE_NO_ENDPOINT,
	NOTE_NONE_USABLE,
	NOTE_NO_MEMORY,
	NOTE_RECORD_LOST,
	NOTE_DOUBTED,
	NOTES,
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, ANY);
	__type(key, struct key);
	__type(value, __u32);
} routes SEC(".maps");

#define ARRAY(name, of)                                                                                                         \
	struct {                                                                                                               \
		__uint(type, BPF_MAP_TYPE_ARRAY);                                                                              \
		__uint(max_entries, ANY);                                                                                      \
		__type(key, __u32);                                                                                            \
		__type(value, of);                                                                                             \
	} name SEC(".maps")

ARRAY(route_table, struct route);
ARRAY(route_counts, struct counts);
// The set of a service: its place in `sets`, and in the upper half its generation.
ARRAY(services, __u64);
// Whose turn it is. It outlives the sets.
ARRAY(turns, __u64);
// Whether an endpoint of a service is in doubt; 0: all are proved. Set here at once, and cleared by user space alone.
ARRAY(doubts, __u64);
ARRAY(sets, struct set);
ARRAY(endpoints, struct endpoint);
ARRAY(marks, struct mark);
ARRAY(lives, struct live);
// When a connect to an endpoint failed (CLOCK_MONOTONIC); 0: not since then, or user space has proved it since.
ARRAY(failures, __u64);
ARRAY(endpoint_counts, struct counts);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LEVELS);
	__type(key, __u32);
	__type(value, __u32);
} levels SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, NOTES);
	__type(key, __u32);
	__type(value, __u64);
} notes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct peer);
} peers SEC(".maps");

// The cookies of sockets that user space ends, and the outcome.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, ANY);
	__type(key, __u64);
	__type(value, __u32);
} doomed SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} records SEC(".maps");

static __always_inline void note(__u32 what)
{
	__u64 *count = bpf_map_lookup_elem(&notes, &what);
	if (count)
		__sync_fetch_and_add(count, 1);
}

static __always_inline bool same_key(const struct key *a, const struct key *b)
{
	return a->cgroup == b->cgroup && a->vip[0] == b->vip[0] && a->vip[1] == b->vip[1] && a->vip[2] == b->vip[2] &&
	       a->vip[3] == b->vip[3] && a->port == b->port && a->protocol == b->protocol;
}

// The route of the process that connects: by its own control group, then by those above it at which containers are.
static __always_inline struct route *find_route(struct key *key, __u32 *index)
{
	key->cgroup = bpf_get_current_cgroup_id();
	__u32 *found = bpf_map_lookup_elem(&routes, key);
#pragma unroll
	for (__u32 n = 0; n < LEVELS; n++) {
		__u32 at = n;
		__u32 *level;
		if (found)
			break;
		level = bpf_map_lookup_elem(&levels, &at);
		// One more than the depth; 0: there are no more.
		if (!level || !*level)
			break;
		key->cgroup = bpf_get_current_ancestor_cgroup_id(*level - 1);
		// A process that is not so deep has none.
		if (!key->cgroup)
			continue;
		found = bpf_map_lookup_elem(&routes, key);
	}
	if (!found)
		return 0;
	*index = *found;
	struct route *route = bpf_map_lookup_elem(&route_table, index);
	if (!route || !same_key(&route->key, key))
		return 0;
	return route;
}

static __always_inline bool is_mapped(const __u32 address[4])
{
	return !address[0] && !address[1] && address[2] == bpf_htonl(0xffff);
}

// How busy an endpoint would be with one more connection, in thousandths of one, as EndpointState::load in src/balance.rs; UNUSABLE
// or SUSPECT if this connection must not go there. The verifier looks at a function that is not static once, and not for each way to its
// call: inside the loops below there would be too many.
__noinline __u64 load_of(__u32 index, __u32 only_mapped, __u64 now)
{
	struct endpoint *endpoint = bpf_map_lookup_elem(&endpoints, &index);
	struct mark *mark = bpf_map_lookup_elem(&marks, &index);
	struct live *live = bpf_map_lookup_elem(&lives, &index);
	__u64 *failed = bpf_map_lookup_elem(&failures, &index);
	if (!endpoint || !mark || !live || !failed)
		return UNUSABLE;
	if (mark->out == IS_DRAINED)
		return UNUSABLE;
	if (*failed)
		return SUSPECT;
	if (mark->out)
		return UNUSABLE;
	if (only_mapped && !is_mapped(endpoint->address))
		return UNUSABLE;
	if (live->waiting) {
		// One on this host answers in a tenth of a millisecond. One far away is given four times its usual time.
		__u64 patience = 20000000;
		if (live->usual * 4 > patience)
			patience = live->usual * 4;
		if (now > live->waiting_since + patience)
			return SUSPECT;
	}
	__u64 share = 1000;
	if (endpoint->since && now > endpoint->since) {
		__u64 age_ms = (now - endpoint->since) / 1000000;
		if (age_ms < 10000)
			share = age_ms / 10;
		if (share < 100)
			share = 100;
	}
	return (live->active + mark->active + 1) * 1000000 / share;
}

// Where in a set's order a turn is. Turns go on from set to set: one that was drawn before this set was made is counted back from its
// first, among those that were in the set before. Not static, as `load_of`.
__noinline __u32 place_of(__u64 turn, __u64 base, __u32 length, __u32 stay)
{
	__u64 ahead = turn - base;
	if (!length)
		return 0;
	if ((__s64)ahead >= 0)
		return ahead % length;
	if (!stay || stay > length)
		stay = length;
	return stay - 1 - (-ahead - 1) % stay;
}

static __always_inline void set_doubt(__u32 service, __u64 now)
{
	__u64 *doubt = bpf_map_lookup_elem(&doubts, &service);
	if (doubt)
		*doubt = now;
}

// The endpoint for this connection. Null: it is left to the proxy.
static __always_inline struct endpoint *choose(const struct route *route, bool only_mapped, __u32 *index)
{
	__u32 service = route->service;
	__u32 cautious = route->cautious;
	__u64 *current = bpf_map_lookup_elem(&services, &service);
	__u64 *turn = bpf_map_lookup_elem(&turns, &service);
	__u64 *doubt = bpf_map_lookup_elem(&doubts, &service);
	if (!current || !turn || !doubt)
		return 0;
	if (cautious && *(volatile __u64 *)doubt) {
		note(NOTE_DOUBTED);
		return 0;
	}
	// Drawn before it is known which set is current: so a turn after a change of sets is one of the new set, and no turn is an
	// endpoint's of both.
	__u64 drawn = __sync_fetch_and_add(turn, 1);
	__u64 now_current = *(volatile __u64 *)current;
	__u32 slot = now_current;
	__u32 generation = now_current >> 32;
	struct set *set = bpf_map_lookup_elem(&sets, &slot);
	if (!set || set->service != service || set->generation != generation) {
		note(NOTE_CHANGING);
		return 0;
	}
	__u64 length = set->length;
	if (!length || length > ENDPOINTS_OF_A_SERVICE) {
		note(NOTE_NO_ENDPOINT);
		return 0;
	}
	__u64 now = bpf_ktime_get_ns();
	if (route->least_connections) {
		// The load, and below it how many turns later it is: equal loads are taken in turn. Without branches, because to the
		// verifier each would be another way to go on.
		__s64 least = UNUSABLE << 6;
		__u64 all = 0;
		__u64 first = place_of(drawn, set->base, length, set->stay);
		for (__u32 n = 0; n < ENDPOINTS_OF_A_SERVICE; n++) {
			if (n >= length)
				break;
			__u64 i = (first + n) % length;
			asm volatile("" : "+r"(i));
			i &= ENDPOINTS_OF_A_SERVICE - 1;
			__u64 load = load_of(set->endpoint[i], only_mapped, now);
			all |= load;
			__s64 more = (__s64)(load << 6 | n) - least;
			asm volatile("" : "+r"(more));
			least += more & (more >> 63);
		}
		if (cautious && (all & SUSPECT)) {
			set_doubt(service, now);
			note(NOTE_DOUBTED);
			return 0;
		}
		if (least >> 6 >= UNUSABLE) {
			note(NOTE_NONE_USABLE);
			return 0;
		}
		__u64 i = (first + (least & (ENDPOINTS_OF_A_SERVICE - 1))) % length;
		asm volatile("" : "+r"(i));
		i &= ENDPOINTS_OF_A_SERVICE - 1;
		*index = set->endpoint[i];
		return bpf_map_lookup_elem(&endpoints, index);
	}
	// Unrolled: to the verifier, which follows what a processor may guess, a loop of a process without CAP_PERFMON has no end.
#pragma unroll
	for (__u32 n = 0; n < TURNS; n++) {
		__u64 i = place_of(drawn, set->base, length, set->stay);
		asm volatile("" : "+r"(i));
		i &= ENDPOINTS_OF_A_SERVICE - 1;
		*index = set->endpoint[i];
		__u64 load = load_of(*index, only_mapped, now);
		if (load < UNUSABLE)
			return bpf_map_lookup_elem(&endpoints, index);
		if (cautious && (load & SUSPECT)) {
			set_doubt(service, now);
			note(NOTE_DOUBTED);
			return 0;
		}
		drawn = __sync_fetch_and_add(turn, 1);
	}
	note(NOTE_NONE_USABLE);
	return 0;
}

// The endpoint for a connection, with the VIP in `key`, remembered with its socket. Null: it is left to the proxy.
static __always_inline struct endpoint *route_socket(struct bpf_sock_addr *ctx, struct key *key, bool only_mapped)
{
	__u32 route_index = 0, endpoint_index = 0;
	struct peer *peer = bpf_sk_storage_get(&peers, ctx->sk, 0, 0);
	// The socket may have been somewhere else before.
	if (peer)
		peer->state = NOT_OURS;
	key->protocol = IPPROTO_TCP;
	struct route *route = find_route(key, &route_index);
	if (!route)
		return 0;
	struct endpoint *endpoint = choose(route, only_mapped, &endpoint_index);
	if (!endpoint)
		return 0;
	if (!peer)
		peer = bpf_sk_storage_get(&peers, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!peer) {
		note(NOTE_NO_MEMORY);
		return 0;
	}
	peer->vip[0] = key->vip[0];
	peer->vip[1] = key->vip[1];
	peer->vip[2] = key->vip[2];
	peer->vip[3] = key->vip[3];
	peer->vip_port = key->port;
	peer->address[0] = endpoint->address[0];
	peer->address[1] = endpoint->address[1];
	peer->address[2] = endpoint->address[2];
	peer->address[3] = endpoint->address[3];
	peer->port = endpoint->port;
	peer->route = route_index;
	peer->route_generation = route->generation;
	peer->endpoint = endpoint_index;
	peer->endpoint_generation = endpoint->generation;
	peer->start = bpf_ktime_get_ns();
	peer->took = 0;
	peer->state = CHOSEN;
	return endpoint;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct key key = {};
	if (ctx->protocol != IPPROTO_TCP)
		return 1;
	key.vip[2] = bpf_htonl(0xffff);
	key.vip[3] = ctx->user_ip4;
	key.port = ctx->user_port;
	struct endpoint *endpoint = route_socket(ctx, &key, true);
	if (endpoint) {
		ctx->user_ip4 = endpoint->address[3];
		ctx->user_port = endpoint->port;
	}
	return 1;
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct key key = {};
	if (ctx->protocol != IPPROTO_TCP)
		return 1;
	key.vip[0] = ctx->user_ip6[0];
	key.vip[1] = ctx->user_ip6[1];
	key.vip[2] = ctx->user_ip6[2];
	key.vip[3] = ctx->user_ip6[3];
	key.port = ctx->user_port;
	struct endpoint *endpoint = route_socket(ctx, &key, false);
	if (endpoint) {
		ctx->user_ip6[0] = endpoint->address[0];
		ctx->user_ip6[1] = endpoint->address[1];
		ctx->user_ip6[2] = endpoint->address[2];
		ctx->user_ip6[3] = endpoint->address[3];
		ctx->user_port = endpoint->port;
	}
	return 1;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	struct peer *peer = bpf_sk_storage_get(&peers, ctx->sk, 0, 0);
	// A socket can be used again for another address.
	if (peer && peer->state != NOT_OURS && ctx->user_ip4 == peer->address[3] && ctx->user_port == peer->port) {
		ctx->user_ip4 = peer->vip[3];
		ctx->user_port = peer->vip_port;
	}
	return 1;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	struct peer *peer = bpf_sk_storage_get(&peers, ctx->sk, 0, 0);
	if (peer && peer->state != NOT_OURS && ctx->user_ip6[0] == peer->address[0] && ctx->user_ip6[1] == peer->address[1] &&
	    ctx->user_ip6[2] == peer->address[2] && ctx->user_ip6[3] == peer->address[3] && ctx->user_port == peer->port) {
		ctx->user_ip6[0] = peer->vip[0];
		ctx->user_ip6[1] = peer->vip[1];
		ctx->user_ip6[2] = peer->vip[2];
		ctx->user_ip6[3] = peer->vip[3];
		ctx->user_port = peer->vip_port;
	}
	return 1;
}

// The bucket of a duration; the bounds are `BOUNDS` in src/counts.rs. Not static, so that the verifier sees a number and not eleven
// ways to one: without CAP_PERFMON it refuses an index that depends on the way.
__noinline __u32 bucket_of(__u64 micros)
{
	return micros <= 250 ? 0 :
	       micros <= 500 ? 1 :
	       micros <= 1000 ? 2 :
	       micros <= 2500 ? 3 :
	       micros <= 10000 ? 4 :
	       micros <= 50000 ? 5 :
	       micros <= 250000 ? 6 :
	       micros <= 1000000 ? 7 :
	       micros <= 2500000 ? 8 :
	       micros <= 5000000 ? 9 :
				   10;
}

static __always_inline void observe(struct counts *counts, __u64 micros)
{
	__u64 n = bucket_of(micros);
	asm volatile("" : "+r"(n));
	n &= BUCKETS - 1;
	__sync_fetch_and_add(&counts->bucket[n], 1);
	__sync_fetch_and_add(&counts->micros, micros);
	__sync_fetch_and_add(&counts->opened, 1);
}

// The kernel skips the endpoint from now on, and cautious routes leave all connections of its service to the proxy. A consumer can make
// its own connects fail, so user space probes the endpoint before it ejects it.
static __always_inline void set_failed(struct peer *peer, __u64 now)
{
	__u32 index = peer->endpoint;
	__u64 *failed = bpf_map_lookup_elem(&failures, &index);
	if (failed)
		*failed = now;
	index = peer->route;
	struct route *route = bpf_map_lookup_elem(&route_table, &index);
	if (route && route->generation == peer->route_generation)
		set_doubt(route->service, now);
}

// The endpoint's counts, if its place was not given to another since.
static __always_inline struct live *live_of(struct peer *peer, struct counts **counts)
{
	__u32 index = peer->endpoint;
	struct endpoint *endpoint = bpf_map_lookup_elem(&endpoints, &index);
	if (!endpoint || endpoint->generation != peer->endpoint_generation)
		return 0;
	*counts = bpf_map_lookup_elem(&endpoint_counts, &index);
	if (!*counts)
		return 0;
	return bpf_map_lookup_elem(&lives, &index);
}

static __always_inline struct counts *counts_of_route(struct peer *peer)
{
	__u32 index = peer->route;
	struct route *route = bpf_map_lookup_elem(&route_table, &index);
	if (!route || route->generation != peer->route_generation)
		return 0;
	return bpf_map_lookup_elem(&route_counts, &index);
}

static __always_inline void count_end(struct counts *counts, __u32 outcome, __u64 up, __u64 down)
{
	// First: once a connection is counted as ended, its counts may be read for the last time.
	if (up)
		__sync_fetch_and_add(&counts->bytes_up, up);
	if (down)
		__sync_fetch_and_add(&counts->bytes_down, down);
	if (outcome == FAILED)
		__sync_fetch_and_add(&counts->failed, 1);
	else if (outcome == RESET)
		__sync_fetch_and_add(&counts->reset, 1);
	else if (outcome == RESET_AFTER_CLOSE)
		__sync_fetch_and_add(&counts->reset_after_close, 1);
	else if (outcome == ROUTE_GONE)
		__sync_fetch_and_add(&counts->route_gone, 1);
	else if (outcome == ENDPOINT_GONE)
		__sync_fetch_and_add(&counts->endpoint_gone, 1);
	else
		__sync_fetch_and_add(&counts->closed, 1);
}

static __always_inline void connecting(struct bpf_sock_ops *ctx, struct peer *peer, __u64 now)
{
	struct counts *counts = 0;
	struct live *live = live_of(peer, &counts);
	struct counts *of_route = counts_of_route(peer);
	if (peer->state != CHOSEN)
		return;
	peer->state = CONNECTING;
	// The flags are of all programs at this socket. Ours stay: another program may have set the same.
	__u32 flags = ctx->bpf_sock_ops_cb_flags;
	bpf_sock_ops_cb_flags_set(ctx, flags | BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG);
	if (live) {
		__sync_fetch_and_add(&live->active, 1);
		// Written first: with an old time the endpoint would look late at once.
		if (!live->waiting)
			live->waiting_since = now;
		__sync_fetch_and_add(&live->waiting, 1);
		__sync_fetch_and_add(&counts->started, 1);
	}
	if (of_route)
		__sync_fetch_and_add(&of_route->started, 1);
}

static __always_inline void opened(struct peer *peer, __u64 now)
{
	struct counts *counts = 0;
	struct live *live = live_of(peer, &counts);
	struct counts *of_route = counts_of_route(peer);
	__u64 took = now - peer->start;
	peer->state = OPEN;
	peer->took = took ? took : 1;
	if (live) {
		__sync_fetch_and_add(&live->waiting, -1);
		// Others that wait are not late: it answers.
		live->waiting_since = now;
		live->usual = live->usual ? live->usual - live->usual / 8 + took / 8 : took;
		observe(counts, took / 1000);
	}
	if (of_route)
		observe(of_route, took / 1000);
}

static __always_inline void write_record(struct bpf_sock_ops *ctx, struct peer *peer, __u32 outcome, __u64 up, __u64 down, __u64 now)
{
	// Who reads it looks now and then: to wake it would cost each connection more than all the rest.
	struct record *record = bpf_ringbuf_reserve(&records, sizeof(struct record), 0);
	if (!record) {
		note(NOTE_RECORD_LOST);
		return;
	}
	record->route = peer->route;
	record->route_generation = peer->route_generation;
	record->endpoint = peer->endpoint;
	record->endpoint_generation = peer->endpoint_generation;
	record->start = peer->start;
	record->end = now;
	record->took = peer->took;
	record->bytes_up = up;
	record->bytes_down = down;
	record->vip[0] = peer->vip[0];
	record->vip[1] = peer->vip[1];
	record->vip[2] = peer->vip[2];
	record->vip[3] = peer->vip[3];
	record->vip_port = bpf_ntohs(peer->vip_port);
	// Read one by one, and before the branch: clang would join the two loads and read by another pointer, which is refused.
	__u32 local4 = ctx->local_ip4;
	asm volatile("" : "+r"(local4));
	__u32 local60 = ctx->local_ip6[0];
	asm volatile("" : "+r"(local60));
	__u32 local61 = ctx->local_ip6[1];
	asm volatile("" : "+r"(local61));
	__u32 local62 = ctx->local_ip6[2];
	asm volatile("" : "+r"(local62));
	__u32 local63 = ctx->local_ip6[3];
	asm volatile("" : "+r"(local63));
	bool mapped = is_mapped(peer->address);
	record->local[0] = mapped ? 0 : local60;
	record->local[1] = mapped ? 0 : local61;
	record->local[2] = mapped ? bpf_htonl(0xffff) : local62;
	record->local[3] = mapped ? local4 : local63;
	record->local_port = ctx->local_port;
	record->outcome = outcome;
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
}

static __always_inline void ended(struct bpf_sock_ops *ctx, struct peer *peer, __u32 before, __u64 now)
{
	struct counts *counts = 0;
	struct live *live = live_of(peer, &counts);
	struct counts *of_route = counts_of_route(peer);
	__u64 up = ctx->bytes_acked, down = ctx->bytes_received;
	__u32 outcome = CLOSED;
	if (peer->state == CONNECTING)
		outcome = FAILED;
	else if (before == BPF_TCP_ESTABLISHED)
		outcome = RESET;
	else if (before == BPF_TCP_CLOSE_WAIT || before == BPF_TCP_FIN_WAIT1)
		outcome = RESET_AFTER_CLOSE;
	// The kernel counts a SYN and a FIN as a byte each.
	__u64 more_up = outcome == CLOSED ? 2 : 1;
	__u64 more_down = outcome == CLOSED || before == BPF_TCP_CLOSE_WAIT ? 1 : 0;
	up = up > more_up ? up - more_up : 0;
	down = down > more_down ? down - more_down : 0;
	__u64 cookie = bpf_get_socket_cookie(ctx);
	__u32 *why = bpf_map_lookup_elem(&doomed, &cookie);
	if (why) {
		outcome = *why;
		bpf_map_delete_elem(&doomed, &cookie);
	}
	if (live) {
		if (peer->state == CONNECTING)
			__sync_fetch_and_add(&live->waiting, -1);
		// Refused, no way there, or the application gave up: user space finds out which.
		if (outcome == FAILED)
			set_failed(peer, now);
		count_end(counts, outcome, up, down);
		// Last: an endpoint without connections may be removed.
		__sync_fetch_and_add(&live->active, -1);
	}
	if (of_route)
		count_end(of_route, outcome, up, down);
	peer->state = NOT_OURS;
	write_record(ctx, peer, outcome, up, down, now);
}

SEC("sockops")
int sock_ops(struct bpf_sock_ops *ctx)
{
	__u32 op = ctx->op;
	if (op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_STATE_CB && op != BPF_SOCK_OPS_RTO_CB)
		return 1;
	struct bpf_sock *sk = ctx->sk;
	if (!sk)
		return 1;
	struct peer *peer = bpf_sk_storage_get(&peers, sk, 0, 0);
	if (!peer || peer->state == NOT_OURS)
		return 1;
	__u64 now = bpf_ktime_get_ns();
	if (op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		connecting(ctx, peer, now);
	} else if (op == BPF_SOCK_OPS_RTO_CB) {
		// No answer to the SYN for a second.
		if (peer->state == CONNECTING) {
			struct counts *counts = 0;
			struct live *live = live_of(peer, &counts);
			if (live) {
				set_failed(peer, now);
				write_record(ctx, peer, UNANSWERED, 0, 0, now);
			}
		}
	} else if (ctx->args[1] == BPF_TCP_ESTABLISHED) {
		if (peer->state == CONNECTING)
			opened(peer, now);
	} else if (ctx->args[1] == BPF_TCP_CLOSE) {
		// A socket that is used again says that it is closed before it connects.
		if (peer->state == CONNECTING || peer->state == OPEN)
			ended(ctx, peer, ctx->args[0], now);
	}
	return 1;
}

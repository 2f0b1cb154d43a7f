// UDP on the kernel path. A flow is one socket's traffic to one port of a VIP: its endpoint is chosen once, and kept until it is gone or
// nothing was sent or received for a minute.
//
// The choice is kept in the storage of the socket, never in a table that all sockets share: such a table fills up, and forgets what is in use.
// A connected socket runs a program once, in connect(); one that is not connected, for each datagram. There is no proxy for UDP: with
// a doubt the call fails.

#define IPPROTO_UDP 17
#define ECONNREFUSED 111

// Services that one socket can talk to at the same time. A power of two.
#define FLOWS 8
#define IDLE 60000000000ULL
// Attempts to find an endpoint that this socket does not have for another VIP or port, and a place for a flow.
#define ATTEMPTS 4
// More than the load of an endpoint in use: it is taken only if there is no other.
#define LAST_RESORT (1LL << 48)
#define NO_ENDPOINT 0xffffffffU

// Whether the kernel has bpf_set_retval (Linux 5.18). Set before the programs are loaded.
const volatile __u32 has_set_retval = 0;

enum flow_state {
	FREE,
	USED,
	// A program is at it.
	BUSY,
};

struct flow {
	__u32 vip[4];
	__u32 address[4];
	__u16 vip_port;
	__u16 port;
	__u32 connected;
	__u32 route;
	__u32 route_generation;
	__u32 endpoint;
	__u32 endpoint_generation;
	__u64 state;
	// The word in `services` when it was last known that the service has the endpoint.
	__u64 set;
	__u64 start;
	// The last datagram in either direction, and the last that was sent.
	__u64 last;
	__u64 sent;
	__u64 up;
	__u64 down;
	__u32 local_port;
	__u32 zero;
};

struct flows {
	struct flow flow[FLOWS];
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct flows);
} flows_of SEC(".maps");

// An index of `udp_notes`: src/kernel/layout.rs has the same order.
enum udp_note {
	// There was no endpoint to use.
	UDP_NO_ENDPOINT,
	// There was no memory for the socket's flows, or other threads of the process changed them at the same time.
	UDP_NO_PLACE,
	// The socket talks to more services than there are places: the flow that was idle for longest has ended.
	UDP_EVICTED,
	// One endpoint serves two ports or VIPs of one socket: an answer bears the one that was sent to last.
	UDP_SHARED,
	UDP_NOTES,
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, UDP_NOTES);
	__type(key, __u32);
	__type(value, __u64);
} udp_notes SEC(".maps");

static __always_inline void udp_note(__u32 what)
{
	__u64 *count = bpf_map_lookup_elem(&udp_notes, &what);
	if (count)
		__sync_fetch_and_add(count, 1);
}

// An index as a number of which the verifier knows nothing: without CAP_PERFMON it refuses one that depends on the way to it.
__noinline __u32 unknown(__u32 index)
{
	asm volatile("" : "+r"(index));
	return index;
}

static __always_inline struct flow *flow_at(struct flows *flows, __u32 index)
{
	__u64 i = unknown(index);
	asm volatile("" : "+r"(i));
	i &= FLOWS - 1;
	return &flows->flow[i];
}

static __always_inline bool same_address(const __u32 a[4], const __u32 b[4])
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

static __always_inline void copy_address(__u32 to[4], const __u32 from[4])
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
}

// How busy an endpoint would be with one more flow. UNUSABLE: it is of another family, or drained.
__noinline __u64 load_of_flow(__u32 index, __u32 is_ipv4, __u64 now)
{
	struct endpoint *endpoint = bpf_map_lookup_elem(&endpoints, &index);
	struct mark *mark = bpf_map_lookup_elem(&marks, &index);
	if (!endpoint || !mark || mark->out & IS_DRAINED)
		return UNUSABLE;
	if (is_mapped(endpoint->address) != (is_ipv4 != 0))
		return UNUSABLE;
	// Ejected, or a connect to it failed: nothing says whether it answers by UDP, so it is used if there is no other.
	__u64 load = load_of(index, is_ipv4, now);
	return load < LAST_RESORT ? load : LAST_RESORT;
}

// The set of a service that is in use, and its length. Null: there is none.
static __always_inline struct set *set_of(__u32 service, __u64 word)
{
	__u32 slot = word;
	struct set *set = bpf_map_lookup_elem(&sets, &slot);
	if (!set || set->service != service || set->generation != (__u32)(word >> 32))
		return 0;
	if (!set->length || set->length > ENDPOINTS_OF_A_SERVICE)
		return 0;
	return set;
}

// The endpoint for a new flow, or NO_ENDPOINT.
__noinline __u32 pick(__u32 service, __u32 least_connections, __u32 is_ipv4)
{
	__u64 *current = bpf_map_lookup_elem(&services, &service);
	__u64 *turn = bpf_map_lookup_elem(&turns, &service);
	if (!current || !turn)
		return NO_ENDPOINT;
	// Drawn before the set is read, as in `choose`.
	__u64 drawn = __sync_fetch_and_add(turn, 1);
	struct set *set = set_of(service, *(volatile __u64 *)current);
	// It was replaced just now.
	if (!set)
		set = set_of(service, *(volatile __u64 *)current);
	if (!set)
		return NO_ENDPOINT;
	__u64 length = set->length;
	if (!length)
		return NO_ENDPOINT;
	__u64 now = bpf_ktime_get_ns();
	if (!least_connections) {
#pragma unroll
		for (__u32 n = 0; n < TURNS; n++) {
			__u64 i = place_of(drawn, set->base, length, set->stay);
			asm volatile("" : "+r"(i));
			i &= ENDPOINTS_OF_A_SERVICE - 1;
			__u32 index = set->endpoint[i];
			if (load_of_flow(index, is_ipv4, now) < LAST_RESORT)
				return index;
			drawn = __sync_fetch_and_add(turn, 1);
		}
	}
	__u64 first = place_of(drawn, set->base, length, set->stay);
	// The least load, and of equal ones the first in turn. Without branches: see `choose`.
	__s64 least = UNUSABLE << 6;
#pragma unroll
	for (__u32 n = 0; n < ENDPOINTS_OF_A_SERVICE; n++) {
		if (n >= length)
			continue;
		__u64 i = (first + n) % length;
		asm volatile("" : "+r"(i));
		i &= ENDPOINTS_OF_A_SERVICE - 1;
		__s64 more = (__s64)(load_of_flow(set->endpoint[i], is_ipv4, now) << 6 | n) - least;
		asm volatile("" : "+r"(more));
		least += more & (more >> 63);
	}
	if (least >> 6 >= UNUSABLE)
		return NO_ENDPOINT;
	__u64 i = (first + (least & (ENDPOINTS_OF_A_SERVICE - 1))) % length;
	asm volatile("" : "+r"(i));
	i &= ENDPOINTS_OF_A_SERVICE - 1;
	return set->endpoint[i];
}

// Whether a set has an endpoint that is no last resort. The loops over a set are unrolled: a processor may go on beyond the last turn of a
// loop for a moment, and the verifier would follow it.
__noinline __u64 has_better(__u32 slot, __u32 is_ipv4, __u64 now)
{
	struct set *set = bpf_map_lookup_elem(&sets, &slot);
	__u64 better = 0;
	if (!set)
		return 0;
	__u64 length = set->length;
#pragma unroll
	for (__u32 n = 0; n < ENDPOINTS_OF_A_SERVICE; n++) {
		if (n < length)
			better |= (load_of_flow(set->endpoint[n], is_ipv4, now) - LAST_RESORT) >> 63;
	}
	return better;
}

// Whether a set has an endpoint. Without branches: to the verifier each would be another way to go on.
__noinline __u64 has_endpoint(__u32 slot, __u32 index)
{
	struct set *set = bpf_map_lookup_elem(&sets, &slot);
	__u64 found = 0;
	if (!set)
		return 0;
	__u64 length = set->length;
#pragma unroll
	for (__u32 n = 0; n < ENDPOINTS_OF_A_SERVICE; n++) {
		__u64 is_it = (__u64)(set->endpoint[n] ^ index) - 1;
		found |= is_it & ((__u64)n - length);
		// One after the other: all at once would need more stack than there is.
		asm volatile("" : "+r"(found), "+r"(length) : : "memory");
	}
	return found >> 63;
}

// The word in `services` now, if a flow by this service to this endpoint goes on; 0 if it has to be chosen anew.
__noinline __u64 still(__u32 service, __u64 word, __u32 index, __u32 is_ipv4)
{
	__u64 *current = bpf_map_lookup_elem(&services, &service);
	if (!current)
		return 0;
	__u64 now = bpf_ktime_get_ns();
	__u64 load = load_of_flow(index, is_ipv4, now);
	__u64 now_current = *(volatile __u64 *)current;
	__u32 slot = now_current;
	if (load == UNUSABLE)
		return 0;
	if (now_current != word && (!set_of(service, now_current) || !has_endpoint(slot, index)))
		return 0;
	if (load == LAST_RESORT && has_better(slot, is_ipv4, now))
		return 0;
	return now_current;
}

// The functions that follow are not static, so that the verifier looks at each once, and not at all ways through one after each way through
// another. They take the whole storage or numbers: a pointer to one of its flows cannot be passed, because the verifier follows what a
// processor may do with it before the index is checked.

// The flow to a port of a VIP of a socket that is not connected to it: its index, or FLOWS.
__noinline __u32 find_flow(struct flows *flows, const struct key *key)
{
	__u32 found = FLOWS;
	if (!flows || !key)
		return FLOWS;
#pragma unroll
	for (__u32 n = 0; n < FLOWS; n++) {
		struct flow *flow = &flows->flow[n];
		if (flow->state == USED && !flow->connected && flow->vip_port == key->port && same_address(flow->vip, key->vip))
			found = n;
	}
	return found;
}

struct source {
	__u32 address[4];
	__u32 port;
};

// The flow whose endpoint this is: of several the one that was sent to last. Its index, or FLOWS.
__noinline __u32 find_source(struct flows *flows, const struct source *from)
{
	__u32 found = FLOWS;
	__u64 sent = 0;
	if (!flows || !from)
		return FLOWS;
#pragma unroll
	for (__u32 n = 0; n < FLOWS; n++) {
		struct flow *flow = &flows->flow[n];
		if (flow->state == USED && flow->port == from->port && same_address(flow->address, from->address) && flow->sent >= sent) {
			sent = flow->sent;
			found = n;
		}
	}
	return found;
}

// Whether the socket has the endpoint for another port or VIP.
__noinline __u32 is_taken(struct flows *flows, const struct endpoint *endpoint, const struct key *key)
{
	__u32 taken = 0;
	if (!flows || !endpoint || !key)
		return 0;
#pragma unroll
	for (__u32 n = 0; n < FLOWS; n++) {
		struct flow *flow = &flows->flow[n];
		if (flow->state == USED && flow->port == endpoint->port && same_address(flow->address, endpoint->address))
			taken |= flow->vip_port != key->port || !same_address(flow->vip, key->vip);
	}
	return taken;
}

// The place that is free, or whose flow was idle for longest.
__noinline __u32 oldest(struct flows *flows)
{
	__u32 found = 0;
	__u64 last = ~0ULL;
	if (!flows)
		return 0;
#pragma unroll
	for (__u32 n = 0; n < FLOWS; n++) {
		struct flow *flow = &flows->flow[n];
		__u64 its_last = flow->state == FREE ? 0 : flow->last;
		// A connected one ends with its connect() alone.
		if (flow->state == BUSY || (flow->state == USED && flow->connected))
			its_last = ~0ULL;
		if (its_last < last) {
			last = its_last;
			found = n;
		}
	}
	return found;
}

static __always_inline struct counts *counts_of_flow_route(__u32 index, __u32 generation)
{
	struct route *route = bpf_map_lookup_elem(&route_table, &index);
	if (!route || route->generation != generation)
		return 0;
	return bpf_map_lookup_elem(&route_counts, &index);
}

static __always_inline struct counts *counts_of_flow_endpoint(__u32 index, __u32 generation)
{
	struct endpoint *endpoint = bpf_map_lookup_elem(&endpoints, &index);
	if (!endpoint || endpoint->generation != generation)
		return 0;
	return bpf_map_lookup_elem(&endpoint_counts, &index);
}

__noinline int count_in_tables(__u32 route, __u32 route_generation, __u32 endpoint, __u32 endpoint_generation, __u32 up)
{
	struct counts *of_route = counts_of_flow_route(route, route_generation);
	struct counts *of_endpoint = counts_of_flow_endpoint(endpoint, endpoint_generation);
	// One or none. A pointer that depends on it would be refused.
	__u64 down = up ^ 1;
	if (of_route) {
		__sync_fetch_and_add(&of_route->datagrams_up, up);
		__sync_fetch_and_add(&of_route->datagrams_down, down);
	}
	if (of_endpoint) {
		__sync_fetch_and_add(&of_endpoint->datagrams_up, up);
		__sync_fetch_and_add(&of_endpoint->datagrams_down, down);
	}
	return 0;
}

static __always_inline void count_datagram(struct flow *flow, bool is_up, __u64 now)
{
	flow->last = now;
	if (is_up) {
		flow->sent = now;
		__sync_fetch_and_add(&flow->up, 1);
	} else {
		__sync_fetch_and_add(&flow->down, 1);
	}
	count_in_tables(flow->route, flow->route_generation, flow->endpoint, flow->endpoint_generation, is_up);
}

// A call to a service without an endpoint.
static __always_inline int refuse(__u32 what, __u32 index, __u32 generation)
{
	struct counts *of_route = counts_of_flow_route(index, generation);
	udp_note(what);
	if (of_route) {
		// Last what ends it: see `count_end`.
		__sync_fetch_and_add(&of_route->started, 1);
		__sync_fetch_and_add(&of_route->failed, 1);
	}
	// Else the application gets EPERM.
	if (has_set_retval)
		bpf_set_retval(-ECONNREFUSED);
	return 0;
}

__noinline int count_end_in_tables(__u32 route, __u32 route_generation, __u32 endpoint, __u32 endpoint_generation)
{
	struct counts *of_route = counts_of_flow_route(route, route_generation);
	struct counts *of_endpoint = counts_of_flow_endpoint(endpoint, endpoint_generation);
	struct live *live = bpf_map_lookup_elem(&lives, &endpoint);
	if (of_route)
		__sync_fetch_and_add(&of_route->closed, 1);
	if (of_endpoint)
		__sync_fetch_and_add(&of_endpoint->closed, 1);
	// Last: an endpoint without flows may be removed.
	if (of_endpoint && live)
		__sync_fetch_and_add(&live->active, -1);
	return 0;
}

// Ends a flow, if nobody else does: it is counted, recorded, and BUSY then. Whether it was so.
static __always_inline bool end_flow(struct flow *flow, __u64 now)
{
	if (__sync_val_compare_and_swap(&flow->state, USED, BUSY) != USED)
		return false;
	count_end_in_tables(flow->route, flow->route_generation, flow->endpoint, flow->endpoint_generation);
	struct record *record = bpf_ringbuf_reserve(&records, sizeof(struct record), 0);
	if (!record) {
		note(NOTE_RECORD_LOST);
		return true;
	}
	record->route = flow->route;
	record->route_generation = flow->route_generation;
	record->endpoint = flow->endpoint;
	record->endpoint_generation = flow->endpoint_generation;
	record->start = flow->start;
	record->end = now;
	record->took = 0;
	// Of UDP these are datagrams.
	record->bytes_up = flow->up;
	record->bytes_down = flow->down;
	copy_address(record->vip, flow->vip);
	record->vip_port = bpf_ntohs(flow->vip_port);
	// The address that the socket is bound to is usually none: user space knows the consumer's.
	record->local[0] = record->local[1] = record->local[2] = record->local[3] = 0;
	record->local_port = flow->local_port;
	record->outcome = CLOSED;
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	return true;
}

// Takes a place for a flow. What was there ends.
static __always_inline bool claim(struct flow *flow, __u64 now)
{
	if (!flow->connected && end_flow(flow, now)) {
		if (now < flow->last + IDLE)
			udp_note(UDP_EVICTED);
		return true;
	}
	return __sync_val_compare_and_swap(&flow->state, FREE, BUSY) == FREE;
}

// Ends the flow of the endpoint that the socket was connected to until now.
static __always_inline void disconnect(struct flows *flows, __u64 now)
{
#pragma unroll
	for (__u32 n = 0; n < FLOWS; n++) {
		struct flow *flow = flow_at(flows, n);
		if (flow->connected && end_flow(flow, now)) {
			flow->connected = 0;
			flow->state = FREE;
		}
	}
}

enum verdict {
	REFUSED,
	LEFT_ALONE,
	REDIRECTED,
};

// The endpoint for a datagram or a connect() to the VIP in `key`. REDIRECTED: its address is in the key then.
static __always_inline int route_datagram(struct bpf_sock_addr *ctx, struct key *key, bool connects)
{
	__u32 route_index = 0;
	__u64 now = bpf_ktime_get_ns();
	__u32 is_ipv4 = is_mapped(key->vip);
	key->protocol = IPPROTO_UDP;
	struct route *route = find_route(key, &route_index);
	if (!route) {
		if (connects) {
			struct flows *before = bpf_sk_storage_get(&flows_of, ctx->sk, 0, 0);
			if (before)
				disconnect(before, now);
		}
		return LEFT_ALONE;
	}
	__u32 route_generation = route->generation;
	__u32 service = route->service;
	__u32 least_connections = route->least_connections;
	// Not only once an endpoint is chosen: a pointer that is null on some ways may not be tested again, because the verifier follows what a
	// processor may do that guesses wrong.
	struct flows *flows = bpf_sk_storage_get(&flows_of, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!flows)
		return refuse(UDP_NO_PLACE, route_index, route_generation);
	if (!connects) {
		__u32 found = find_flow(flows, key);
		if (found < FLOWS) {
			struct flow *flow = flow_at(flows, found);
			__u64 known = 0;
			// A socket may be in the hands of another consumer now: it has its own routes.
			if (flow->route == route_index && flow->route_generation == route_generation && now < flow->last + IDLE)
				known = still(service, flow->set, flow->endpoint, is_ipv4);
			if (known) {
				flow->set = known;
				flow->local_port = ctx->sk->src_port;
				count_datagram(flow, true, now);
				copy_address(key->vip, flow->address);
				key->port = flow->port;
				return REDIRECTED;
			}
			if (end_flow(flow, now))
				flow->state = FREE;
		}
	}
	// Read before the choice: if the set is replaced meanwhile, the next datagram looks whether the new one has the endpoint.
	__u64 *current = bpf_map_lookup_elem(&services, &service);
	if (!current)
		return refuse(UDP_NO_ENDPOINT, route_index, route_generation);
	__u64 word = *(volatile __u64 *)current;
	struct endpoint *endpoint;
	__u32 endpoint_index;
#pragma unroll
	for (__u32 n = 0; n < ATTEMPTS; n++) {
		endpoint_index = pick(service, least_connections, is_ipv4);
		endpoint = bpf_map_lookup_elem(&endpoints, &endpoint_index);
		if (!endpoint)
			return refuse(UDP_NO_ENDPOINT, route_index, route_generation);
		if (!is_taken(flows, endpoint, key))
			goto chosen;
	}
	udp_note(UDP_SHARED);
chosen:;
	struct live *live = bpf_map_lookup_elem(&lives, &endpoint_index);
	struct counts *of_endpoint = bpf_map_lookup_elem(&endpoint_counts, &endpoint_index);
	struct counts *of_route = bpf_map_lookup_elem(&route_counts, &route_index);
	if (!live || !of_endpoint || !of_route)
		return REFUSED;
	// Only now: a connect() that fails leaves the socket connected as it was.
	if (connects)
		disconnect(flows, now);
	struct flow *flow;
#pragma unroll
	for (__u32 n = 0; n < ATTEMPTS; n++) {
		flow = flow_at(flows, oldest(flows));
		if (claim(flow, now))
			goto claimed;
	}
	return refuse(UDP_NO_PLACE, route_index, route_generation);
claimed:
	copy_address(flow->vip, key->vip);
	copy_address(flow->address, endpoint->address);
	flow->vip_port = key->port;
	flow->port = endpoint->port;
	flow->connected = connects;
	flow->route = route_index;
	flow->route_generation = route_generation;
	flow->endpoint = endpoint_index;
	flow->endpoint_generation = endpoint->generation;
	flow->set = word;
	flow->start = now;
	flow->last = now;
	flow->sent = now;
	flow->up = 0;
	flow->down = 0;
	flow->local_port = ctx->sk->src_port;
	__sync_fetch_and_add(&live->active, 1);
	__sync_fetch_and_add(&of_endpoint->started, 1);
	__sync_fetch_and_add(&of_endpoint->opened, 1);
	__sync_fetch_and_add(&of_route->started, 1);
	__sync_fetch_and_add(&of_route->opened, 1);
	if (!connects)
		count_datagram(flow, true, now);
	copy_address(key->vip, flow->address);
	key->port = flow->port;
	flow->state = USED;
	return REDIRECTED;
}

static __always_inline int redirect4(struct bpf_sock_addr *ctx, bool connects)
{
	struct key key = {};
	// A ping socket is a datagram socket too.
	if (ctx->protocol != IPPROTO_UDP)
		return 1;
	key.vip[2] = bpf_htonl(0xffff);
	key.vip[3] = ctx->user_ip4;
	key.port = ctx->user_port;
	int verdict = route_datagram(ctx, &key, connects);
	if (verdict == REDIRECTED) {
		ctx->user_ip4 = key.vip[3];
		ctx->user_port = key.port;
	}
	return verdict != REFUSED;
}

static __always_inline int redirect6(struct bpf_sock_addr *ctx, bool connects)
{
	struct key key = {};
	if (ctx->protocol != IPPROTO_UDP)
		return 1;
	key.vip[0] = ctx->user_ip6[0];
	key.vip[1] = ctx->user_ip6[1];
	key.vip[2] = ctx->user_ip6[2];
	key.vip[3] = ctx->user_ip6[3];
	key.port = ctx->user_port;
	int verdict = route_datagram(ctx, &key, connects);
	if (verdict == REDIRECTED) {
		ctx->user_ip6[0] = key.vip[0];
		ctx->user_ip6[1] = key.vip[1];
		ctx->user_ip6[2] = key.vip[2];
		ctx->user_ip6[3] = key.vip[3];
		ctx->user_port = key.port;
	}
	return verdict != REFUSED;
}

SEC("cgroup/connect4")
int udp_connect4(struct bpf_sock_addr *ctx)
{
	return redirect4(ctx, true);
}

SEC("cgroup/connect6")
int udp_connect6(struct bpf_sock_addr *ctx)
{
	return redirect6(ctx, true);
}

// Also for what a socket of IPv6 sends to a v4-mapped address.
SEC("cgroup/sendmsg4")
int udp_sendmsg4(struct bpf_sock_addr *ctx)
{
	return redirect4(ctx, false);
}

SEC("cgroup/sendmsg6")
int udp_sendmsg6(struct bpf_sock_addr *ctx)
{
	return redirect6(ctx, false);
}

// The flow that a received datagram, or the peer's name, is of. Null: it is none of ours.
static __always_inline struct flow *flow_from(struct bpf_sock_addr *ctx, const struct source *from)
{
	if (ctx->protocol != IPPROTO_UDP)
		return 0;
	struct flows *flows = bpf_sk_storage_get(&flows_of, ctx->sk, 0, 0);
	if (!flows)
		return 0;
	__u32 found = find_source(flows, from);
	if (found >= FLOWS)
		return 0;
	return flow_at(flows, found);
}

static __always_inline struct flow *received(struct bpf_sock_addr *ctx, const struct source *from)
{
	struct flow *flow = flow_from(ctx, from);
	if (flow) {
		flow->local_port = ctx->sk->src_port;
		count_datagram(flow, false, bpf_ktime_get_ns());
	}
	return flow;
}

SEC("cgroup/recvmsg4")
int udp_recvmsg4(struct bpf_sock_addr *ctx)
{
	struct source from = {{0, 0, bpf_htonl(0xffff), ctx->user_ip4}, ctx->user_port};
	struct flow *flow = received(ctx, &from);
	if (flow) {
		ctx->user_ip4 = flow->vip[3];
		ctx->user_port = flow->vip_port;
	}
	return 1;
}

static __always_inline void show6(struct bpf_sock_addr *ctx, struct flow *flow)
{
	ctx->user_ip6[0] = flow->vip[0];
	ctx->user_ip6[1] = flow->vip[1];
	ctx->user_ip6[2] = flow->vip[2];
	ctx->user_ip6[3] = flow->vip[3];
	ctx->user_port = flow->vip_port;
}

SEC("cgroup/recvmsg6")
int udp_recvmsg6(struct bpf_sock_addr *ctx)
{
	struct source from = {{ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]}, ctx->user_port};
	struct flow *flow = received(ctx, &from);
	if (flow)
		show6(ctx, flow);
	return 1;
}

SEC("cgroup/getpeername4")
int udp_getpeername4(struct bpf_sock_addr *ctx)
{
	struct source from = {{0, 0, bpf_htonl(0xffff), ctx->user_ip4}, ctx->user_port};
	struct flow *flow = flow_from(ctx, &from);
	if (flow) {
		ctx->user_ip4 = flow->vip[3];
		ctx->user_port = flow->vip_port;
	}
	return 1;
}

SEC("cgroup/getpeername6")
int udp_getpeername6(struct bpf_sock_addr *ctx)
{
	struct source from = {{ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]}, ctx->user_port};
	struct flow *flow = flow_from(ctx, &from);
	if (flow)
		show6(ctx, flow);
	return 1;
}

// A socket ends, and all its flows.
SEC("cgroup/sock_release")
int udp_release(struct bpf_sock *ctx)
{
	if (ctx->protocol != IPPROTO_UDP)
		return 1;
	struct flows *flows = bpf_sk_storage_get(&flows_of, ctx, 0, 0);
	if (!flows)
		return 1;
	__u64 now = bpf_ktime_get_ns();
#pragma unroll
	for (__u32 n = 0; n < FLOWS; n++) {
		struct flow *flow = flow_at(flows, n);
		if (end_flow(flow, now))
			flow->state = FREE;
	}
	return 1;
}

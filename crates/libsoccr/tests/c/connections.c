/* The interface of the wiki: connections in every state, saved, closed and restored. */
#include "kit.h"

#include <errno.h>
#include <fcntl.h>

static void established(enum family family)
{
	struct pair pair = kit_pair(family, TCP_ESTABLISHED);
	struct saved saved;

	kit_send(pair.there, "unread", 6);
	kit_wait_unread(pair.here, 6);
	kit_deafen(pair.there);
	kit_send(pair.here, "unacknowledged", 14);
	saved = kit_move(&pair);
	SAME(saved.data.state, TCP_ESTABLISHED);
	SAME(saved.data.inq_len, 6);
	SAME(saved.data.outq_len, 14);
	SAME(saved.data.unsq_len, 0);
	CHECK(saved.data.flags & SOCCR_FLAGS_WINDOW);
	SAME(kit_state(pair.here), TCP_ESTABLISHED);
	kit_hear(pair.there);
	kit_expect(pair.here, "unread", 6);
	kit_expect(pair.there, "unacknowledged", 14);
	kit_talk(&pair);
}

static void an_established_connection_moves(void)
{
	established(IPV4);
}

static void an_established_connection_moves_over_ipv6(void)
{
	established(IPV6);
}

static void an_established_connection_moves_over_mapped_ipv4(void)
{
	established(MAPPED);
}

static void close_wait(enum family family)
{
	struct pair pair = kit_connect(family);

	kit_send(pair.there, "unread", 6);
	shutdown(pair.there, SHUT_WR);
	kit_wait_state(pair.here, TCP_CLOSE_WAIT);
	SAME(kit_move(&pair).data.inq_len, 6);
	SAME(kit_state(pair.here), TCP_CLOSE_WAIT);
	kit_expect(pair.here, "unread", 6);
	kit_expect_end(pair.here);
	kit_send(pair.here, "answer", 6);
	kit_expect(pair.there, "answer", 6);
}

static void close_wait_moves(void)
{
	close_wait(IPV4);
}

static void close_wait_moves_over_ipv6(void)
{
	close_wait(IPV6);
}

static void close_wait_moves_over_mapped_ipv4(void)
{
	close_wait(MAPPED);
}

static void fin_wait1_moves(void)
{
	struct pair pair = kit_connect(IPV4);
	struct saved saved;

	kit_send(pair.there, "unread", 6);
	kit_wait_unread(pair.here, 6);
	kit_deafen(pair.there);
	kit_send(pair.here, "last", 4);
	shutdown(pair.here, SHUT_WR);
	kit_wait_state(pair.here, TCP_FIN_WAIT1);
	saved = kit_move(&pair);
	SAME(saved.data.outq_len, 4);
	SAME(kit_state(pair.here), TCP_FIN_WAIT1);
	kit_hear(pair.there);
	kit_expect(pair.there, "last", 4);
	kit_expect_end(pair.there);
	kit_wait_state(pair.here, TCP_FIN_WAIT2);
	kit_expect(pair.here, "unread", 6);
	kit_send(pair.there, "answer", 6);
	kit_expect(pair.here, "answer", 6);
}

static void fin_wait2_moves(void)
{
	struct pair pair = kit_pair(IPV6, TCP_FIN_WAIT2);

	kit_move(&pair);
	SAME(kit_state(pair.here), TCP_FIN_WAIT2);
	kit_send(pair.there, "answer", 6);
	kit_expect(pair.here, "answer", 6);
	close(pair.there);
	kit_expect_end(pair.here);
}

static void closing_moves(void)
{
	struct pair pair = kit_pair(IPV4, TCP_CLOSING);

	kit_move(&pair);
	SAME(kit_state(pair.here), TCP_CLOSING);
	kit_hear(pair.there);
	kit_expect_end(pair.there);
	kit_expect_end(pair.here);
	kit_wait_state(pair.here, TCP_CLOSE);
}

static void last_ack_moves(void)
{
	struct pair pair = kit_pair(IPV6, TCP_LAST_ACK);

	kit_move(&pair);
	SAME(kit_state(pair.here), TCP_LAST_ACK);
	kit_hear(pair.there);
	kit_expect_end(pair.there);
	kit_wait_state(pair.here, TCP_CLOSE);
}

static void a_closed_connection_moves_with_what_is_unread(void)
{
	struct pair pair = kit_connect(IPV4);
	struct saved saved;

	kit_send(pair.there, "unread", 6);
	shutdown(pair.there, SHUT_WR);
	kit_wait_state(pair.here, TCP_CLOSE_WAIT);
	shutdown(pair.here, SHUT_WR);
	kit_wait_state(pair.here, TCP_CLOSE);
	saved = kit_move(&pair);
	SAME(saved.data.state, TCP_CLOSE);
	SAME(kit_state(pair.here), TCP_CLOSE);
	kit_expect(pair.here, "unread", 6);
	kit_expect_end(pair.here);
}

/* The caller may never resume: the handshake begins with the restore, and a blocking socket does not wait for it. */
static void syn_sent_connects_anew(void)
{
	struct pair pair = kit_pair(IPV4, TCP_SYN_SENT);
	struct saved saved = kit_save(&pair);
	int listener = pair.there;

	SAME(saved.data.state, TCP_SYN_SENT);
	close(pair.here);
	kit_restore(&pair, &saved);
	SAME(kit_state(pair.here), TCP_SYN_SENT);
	SAME(fcntl(pair.here, F_GETFL) & O_NONBLOCK, 0);
	kit_set_option(pair.here, IPPROTO_TCP, TCP_REPAIR, 0);
	kit_hear(listener);
	pair.there = accept(listener, NULL, NULL);
	CHECK(pair.there >= 0);
	kit_talk(&pair);
}

/* Such a peer would refuse a SYN with another sequence number. */
static void syn_sent_goes_on_with_a_peer_that_has_answered(void)
{
	struct pair pair = { .lock = NULL, .peer = kit_address("127.0.0.1", 0) };
	socklen_t length = sizeof(pair.self);
	struct saved saved;
	int listener = kit_listen(&pair.peer);

	pair.there = listener;
	pair.here = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	kit_deafen(pair.here);
	CHECK(connect(pair.here, &pair.peer.sa, kit_length(&pair.peer)) == -1 && errno == EINPROGRESS);
	SAME(getsockname(pair.here, &pair.self.sa, &length), 0);
	saved = kit_save(&pair);
	SAME(saved.data.state, TCP_SYN_SENT);
	close(pair.here);
	kit_restore(&pair, &saved);
	kit_set_option(pair.here, IPPROTO_TCP, TCP_REPAIR, 0);
	kit_wait_state(pair.here, TCP_ESTABLISHED);
	pair.there = accept(listener, NULL, NULL);
	CHECK(pair.there >= 0);
	kit_talk(&pair);
}

static void pause_and_resume_change_nothing(void)
{
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_sk_data first, second;
	struct libsoccr_sk *sk;

	kit_set_option(pair.here, SOL_SOCKET, SO_REUSEADDR, 1);
	kit_send(pair.there, "unread", 6);
	kit_wait_unread(pair.here, 6);
	sk = libsoccr_pause(pair.here);
	CHECK(sk);
	SAME(kit_option(pair.here, IPPROTO_TCP, TCP_REPAIR), 1);
	SAME(libsoccr_save(sk, &first, sizeof(first)), sizeof(first));
	SAME(libsoccr_save(sk, &second, sizeof(second)), sizeof(second));
	second.timestamp = first.timestamp;
	SAME(memcmp(&first, &second, sizeof(first)), 0);
	libsoccr_resume(sk);
	SAME(kit_option(pair.here, SOL_SOCKET, SO_REUSEADDR), 1);
	kit_expect(pair.here, "unread", 6);
	kit_talk(&pair);
}

/* As CRIU does: TCP_REPAIR off by other means, and the handle never given back. */
static void a_connection_is_complete_without_resume(void)
{
	struct pair pair = kit_connect(IPV4);
	struct saved saved;
	size_t filled;

	kit_send(pair.there, "unread", 6);
	filled = kit_fill(pair.here);
	kit_wait_unread(pair.here, 6);
	saved = kit_save(&pair);
	CHECK(saved.data.unsq_len > 0);
	close(pair.here);
	kit_restore(&pair, &saved);
	kit_set_option(pair.here, IPPROTO_TCP, TCP_REPAIR, 0);
	kit_expect(pair.here, "unread", 6);
	kit_expect_filling(pair.there, filled);
	kit_talk(&pair);
}

static void check_addresses(struct pair *pair)
{
	struct libsoccr_sk *sk = libsoccr_pause(pair->here);
	union libsoccr_addr *self, *peer;

	CHECK(sk);
	self = libsoccr_get_addr(sk, 1, 0);
	peer = libsoccr_get_addr(sk, 0, SOCCR_MEM_EXCL);
	CHECK(self && peer);
	SAME(memcmp(self, &pair->self, kit_length(&pair->self)), 0);
	SAME(memcmp(peer, &pair->peer, kit_length(&pair->peer)), 0);
	libsoccr_resume(sk);
	free(peer);
}

static void addresses_are_told(void)
{
	struct pair v4 = kit_connect(IPV4), v6 = kit_connect(IPV6), mapped = kit_connect(MAPPED);

	check_addresses(&v4);
	check_addresses(&v6);
	check_addresses(&mapped);
}

/* Once both FINs have passed the kernel has forgotten the peer. */
static void a_forgotten_peer_is_asked_for(void)
{
	struct pair pair = kit_pair(IPV4, TCP_CLOSE);
	struct libsoccr_sk *sk = libsoccr_pause(pair.here);
	union libsoccr_addr *peer;

	CHECK(sk);
	CHECK(!libsoccr_get_addr(sk, 0, 0));
	kit_error_has(sk, "CLOSE");
	SAME(libsoccr_set_addr(sk, 0, &pair.peer, 0), 0);
	peer = libsoccr_get_addr(sk, 0, 0);
	CHECK(peer);
	SAME(memcmp(peer, &pair.peer, sizeof(pair.peer.v4)), 0);
	libsoccr_resume(sk);
}

static void a_released_socket_is_silent_and_free_at_once(void)
{
	struct pair pair = kit_connect(IPV4);
	struct saved saved = kit_save(&pair);

	SAME(kit_option(pair.here, IPPROTO_TCP, TCP_REPAIR), 1);
	close(pair.here);
	SAME(kit_state(pair.there), TCP_ESTABLISHED);
	libsoccr_resume(kit_restore(&pair, &saved));
	kit_talk(&pair);
}

/* What CRIU 4.2 had dumped of six connections, in the order of the structure. */
static const struct {
	uint32_t data[17];
	const char *address;
	int ports[2];
} dumped_by_criu[] = {
	{ { TCP_ESTABLISHED, 0, 2707353212, 0, 1667434012, 0, 7, 65495, 0, 10, 4032107198, 1, 2707353211, 16384, 16384, 65536,
	    2707353212 }, "127.0.0.1", { 39274, 7100 } },
	{ { TCP_ESTABLISHED, 5000, 689526990, 0, 4022507683, 0, 7, 65495, 0, 10, 714701476, 1, 689521990, 16384, 16384,
	    107520, 689526990 }, "127.0.0.1", { 57370, 7101 } },
	{ { TCP_ESTABLISHED, 0, 3146224666, 106496, 231203830, 106496, 7, 65495, 0, 10, 3684514232, 1, 3146224666, 0, 16384,
	    65536, 3146224666 }, "127.0.0.1", { 37746, 7102 } },
	{ { TCP_CLOSE_WAIT, 0, 2814034785, 0, 187334778, 0, 7, 65495, 0, 10, 3532430694, 1, 2814034784, 16384, 16384, 65536,
	    2814034785 }, "127.0.0.1", { 35520, 7103 } },
	{ { TCP_ESTABLISHED, 0, 2703248045, 0, 1864954076, 0, 7, 65476, 0, 10, 2192425978, 1, 2703248045, 16381, 16384, 65536,
	    2703248045 }, "::1", { 54402, 7104 } },
	{ { TCP_FIN_WAIT2, 0, 3995470303, 0, 1558582550, 0, 7, 65495, 0, 10, 1630527910, 1, 3995470303, 16383, 16384, 65536,
	    3995470303 }, "127.0.0.1", { 44702, 7105 } },
};

static void what_criu_has_dumped_comes_back(void)
{
	for (size_t i = 0; i < sizeof(dumped_by_criu) / sizeof(*dumped_by_criu); i++) {
		struct libsoccr_sk_data data = { .flags = 0 }, after;
		struct libsoccr_lock *lock;
		struct pair pair;
		struct saved saved;

		memcpy(&data, dumped_by_criu[i].data, sizeof(dumped_by_criu[i].data));
		pair.self = kit_address(dumped_by_criu[i].address, dumped_by_criu[i].ports[0]);
		pair.peer = kit_address(dumped_by_criu[i].address, dumped_by_criu[i].ports[1]);
		/* Nobody is at the other end: an acknowledgement would draw a reset. */
		kit_lock(&pair);
		lock = pair.lock;
		saved.data = data;
		saved.receive_queue = calloc(1, data.inq_len + 1);
		saved.send_queue = calloc(1, data.outq_len + 1);
		pair.lock = NULL;
		libsoccr_release(kit_restore(&pair, &saved));
		after = kit_read(pair.here).data;
		SAME(after.state, data.state);
		SAME(after.inq_len, data.inq_len);
		SAME(after.inq_seq, data.inq_seq);
		SAME(after.outq_len, data.outq_len);
		SAME(after.outq_seq, data.outq_seq);
		SAME(after.unsq_len, data.unsq_len);
		SAME(after.opt_mask & 0xff, data.opt_mask);
		SAME(after.mss_clamp, data.mss_clamp);
		SAME(after.snd_wscale, data.snd_wscale);
		SAME(after.rcv_wscale, data.rcv_wscale);
		SAME(after.snd_wnd, data.snd_wnd);
		SAME(after.rcv_wnd, data.rcv_wnd);
		close(pair.here);
		SAME(libsoccr_unlock(lock), 0);
	}
}

/* Options that new connections of this network ask for, or not. */
static void ask_for(const char *name, int wanted)
{
	char path[100];
	FILE *file;

	snprintf(path, sizeof(path), "/proc/sys/net/ipv4/%s", name);
	file = fopen(path, "w");
	CHECK(file);
	CHECK(fprintf(file, "%d", wanted) > 0);
	SAME(fclose(file), 0);
}

/* A number of struct tcp_info, which older headers do not have whole. */
static unsigned info(int fd, size_t place)
{
	unsigned char bytes[232];
	socklen_t length = sizeof(bytes);
	unsigned number;

	SAME(getsockopt(fd, IPPROTO_TCP, TCP_INFO, bytes, &length), 0);
	SAME(length, sizeof(bytes));
	memcpy(&number, bytes + place, sizeof(number));
	return number;
}

enum { SND_MSS = 16, DATA_SEGS_OUT = 156, SND_WND = 228 };

/* All that fits on its way goes in segments that are as long as before. */
static size_t segment_length(int from, int to)
{
	unsigned before = info(from, DATA_SEGS_OUT);
	size_t length = kit_fill(from);

	kit_expect_filling(to, length);
	kit_wait_acknowledged(from);
	return length / (info(from, DATA_SEGS_OUT) - before);
}

static void what_was_not_agreed_upon_costs_no_speed(void)
{
	static const char *const names[] = { "tcp_window_scaling", "tcp_sack", "tcp_timestamps" };
	static const unsigned masks[] = { TCPI_OPT_WSCALE, TCPI_OPT_SACK, TCPI_OPT_TIMESTAMPS };

	/* Each of them, and all. */
	for (int without = 0; without <= 3; without++) {
		struct pair pair;
		int ends[2];
		unsigned windows[2], sizes[2];
		struct saved saved;

		for (int i = 0; i < 3; i++)
			ask_for(names[i], without != i && without != 3);
		pair = kit_connect(IPV4);
		for (int i = 0; i < 3; i++)
			ask_for(names[i], 1);
		kit_talk(&pair);
		for (int i = 0; i < 2; i++) {
			ends[i] = i ? pair.there : pair.here;
			windows[i] = info(ends[i], SND_WND);
			sizes[i] = info(ends[i], SND_MSS);
		}
		saved = kit_move(&pair);
		for (int i = 0; i < 3; i++)
			SAME(!(saved.data.opt_mask & masks[i]), without == i || without == 3);
		kit_talk(&pair);
		ends[0] = pair.here;
		for (int i = 0; i < 2; i++) {
			CHECK(2 * info(ends[i], SND_WND) >= windows[i]);
			/* Room for timestamps may be counted. */
			CHECK(info(ends[i], SND_MSS) + 12 >= sizes[i]);
			CHECK(segment_length(ends[i], ends[!i]) > 1000);
		}
	}
}

static void a_lock_keeps_what_arrives(void)
{
	static const unsigned flags[] = { 0, SOCCR_LOCK_HOLD };

	for (int i = 0; i < 2; i++) {
		struct pair pair = kit_connect(IPV4);
		struct libsoccr_flow flow = { pair.self, pair.peer };
		struct libsoccr_lock *lock = libsoccr_lock(&flow, 1, flags[i]);
		struct libsoccr_sk *sk;
		struct saved saved;

		CHECK(lock);
		saved = kit_read(pair.here);
		kit_send(pair.there, "meanwhile", 9);
		close(pair.here);
		sk = kit_restore(&pair, &saved);
		SAME(libsoccr_unlock(lock), 0);
		libsoccr_resume(sk);
		kit_expect(pair.here, "meanwhile", 9);
		kit_talk(&pair);
	}
}

static void a_lock_checks_its_arguments(void)
{
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_flow flow = { pair.self, pair.peer };

	CHECK(!libsoccr_lock(NULL, 1, 0));
	CHECK(!libsoccr_lock(&flow, 1, 2));
	kit_error_has(NULL, "SOCCR_LOCK_HOLD");
	flow.peer.sa.sa_family = AF_UNIX;
	CHECK(!libsoccr_lock(&flow, 1, 0));
	kit_error_has(NULL, "address family");
	SAME(libsoccr_unlock(NULL), -1);
	kit_talk(&pair);
}

static const struct test tests[] = {
	TEST(an_established_connection_moves),
	TEST(an_established_connection_moves_over_ipv6),
	TEST(an_established_connection_moves_over_mapped_ipv4),
	TEST(close_wait_moves),
	TEST(close_wait_moves_over_ipv6),
	TEST(close_wait_moves_over_mapped_ipv4),
	TEST(fin_wait1_moves),
	TEST(fin_wait2_moves),
	TEST(closing_moves),
	TEST(last_ack_moves),
	TEST(a_closed_connection_moves_with_what_is_unread),
	TEST(syn_sent_connects_anew),
	TEST(syn_sent_goes_on_with_a_peer_that_has_answered),
	TEST(pause_and_resume_change_nothing),
	TEST(a_connection_is_complete_without_resume),
	TEST(addresses_are_told),
	TEST(a_forgotten_peer_is_asked_for),
	TEST(a_released_socket_is_silent_and_free_at_once),
	TEST(what_criu_has_dumped_comes_back),
	TEST(what_was_not_agreed_upon_costs_no_speed),
	TEST(a_lock_keeps_what_arrives),
	TEST(a_lock_checks_its_arguments),
};

KIT_MAIN(tests)

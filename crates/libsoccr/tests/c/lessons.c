/* What went wrong in the systems before this one, as far as a C program sees it. */
#include "kit.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>

/* Restores must fail, with this in the error, before anything has been done to the socket: it can still be bound. */
static void refused_up_front(struct pair *pair, struct libsoccr_sk *sk, struct libsoccr_sk_data *data, const char *error)
{
	struct libsoccr_sk_data before = *data;

	SAME(libsoccr_restore(sk, data, sizeof(*data)), -1);
	kit_error_has(sk, error);
	SAME(memcmp(data, &before, sizeof(before)), 0);
	SAME(bind(pair->here, &pair->self.sa, kit_length(&pair->self)), 0);
	SAME(kit_state(pair->here), TCP_CLOSE);
	libsoccr_release(sk);
	close(pair->here);
}

static void lengths_are_checked_against_each_other(void)
{
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_sk_data good, bad;

	kit_deafen(pair.there);
	kit_send(pair.here, "sent", 4);
	good = kit_save(&pair).data;
	close(pair.here);
#define BAD(change, error)                                                                                 \
	do {                                                                                               \
		struct libsoccr_sk *sk = kit_fresh(&pair);                                                 \
		bad = good;                                                                                \
		bad.change;                                                                                \
		SAME(libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, "sent", 0), 0);                          \
		refused_up_front(&pair, sk, &bad, error);                                                  \
	} while (0)
	BAD(unsq_len = 5, "unsq_len is larger than outq_len");
	BAD(outq_len = 0x7fffffff, "outq_len");
	BAD(inq_len = 0x7fffffff, "inq_len");
	BAD(state = 0, "state is 0");
	BAD(state = 257, "state is 257");
	BAD(state = TCP_LISTEN, "LISTEN");
	BAD(state = TCP_FIN_WAIT2, "acknowledged our FIN");
	BAD(mss_clamp = 0, "mss_clamp");
	BAD(mss_clamp = 65536, "mss_clamp");
	BAD(snd_wscale = 15, "window scale");
	BAD(rcv_wscale = 256, "rcv_wscale is 256");
	BAD(rcv_wup = good.inq_seq + 1, "rcv_wup");
	BAD(snd_wnd = good.max_window + 1, "snd_wnd");
#undef BAD
}

static void a_queue_that_is_missing_is_an_error_up_front(void)
{
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_sk_data data;
	struct libsoccr_sk *sk;

	kit_send(pair.there, "unread", 6);
	kit_wait_unread(pair.here, 6);
	data = kit_save(&pair).data;
	close(pair.here);
	refused_up_front(&pair, kit_fresh(&pair), &data, "inq_len is 6");
	sk = kit_fresh(&pair);
	SAME(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, "unread", 0), 0);
	data.outq_len = 1;
	refused_up_front(&pair, sk, &data, "outq_len is 1");
}

static void addresses_are_checked_up_front(void)
{
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_sk_data data = kit_save(&pair).data;
	struct libsoccr_sk *sk;
	union libsoccr_addr other;

	close(pair.here);
	pair.here = kit_socket(&pair.self);
	refused_up_front(&pair, libsoccr_pause(pair.here), &data, "libsoccr_set_addr");
	sk = kit_fresh(&pair);
	other = kit_address("::1", 7);
	SAME(libsoccr_set_addr(sk, 0, &other, 0), 0);
	refused_up_front(&pair, sk, &data, "two families");
	sk = kit_fresh(&pair);
	other = kit_address("127.0.0.1", 0);
	SAME(libsoccr_set_addr(sk, 0, &other, 0), 0);
	refused_up_front(&pair, sk, &data, "port is zero");
}

static void a_link_local_address_has_a_scope(void)
{
	struct pair pair = kit_connect(IPV6);
	struct libsoccr_sk_data data = kit_save(&pair).data;
	struct libsoccr_sk *sk;
	union libsoccr_addr link_local = kit_address("fe80::1", 7);

	close(pair.here);
	sk = kit_fresh(&pair);
	SAME(libsoccr_set_addr(sk, 0, &link_local, 0), 0);
	refused_up_front(&pair, sk, &data, "scope");
}

/* The queues are those of the save, whatever happens to the socket until they are asked for. */
static void the_queues_are_those_of_the_save(void)
{
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_sk_data data;
	struct libsoccr_sk *sk;
	char *bytes;

	kit_send(pair.there, "early", 5);
	kit_wait_unread(pair.here, 5);
	sk = libsoccr_pause(pair.here);
	SAME(libsoccr_save(sk, &data, sizeof(data)), sizeof(data));
	kit_send(pair.there, "late", 4);
	kit_wait_unread(pair.here, 9);
	SAME(data.inq_len, 5);
	bytes = libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 0);
	CHECK(bytes);
	SAME(memcmp(bytes, "early", 5), 0);
	SAME(libsoccr_save(sk, &data, sizeof(data)), sizeof(data));
	SAME(data.inq_len, 9);
	close(pair.here);
	bytes = libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, SOCCR_MEM_EXCL);
	CHECK(bytes);
	SAME(memcmp(bytes, "earlylate", 9), 0);
	free(bytes);
	libsoccr_release(sk);
}

static void what_was_not_sent_is_sent_once(void)
{
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_flow flow = { pair.self, pair.peer };
	size_t filled = kit_fill(pair.here);
	/* A late acknowledgement would let it send before it is counted. */
	struct libsoccr_lock *lock = libsoccr_lock(&flow, 1, 0);
	struct saved saved;
	int unsent;

	CHECK(lock);
	saved = kit_read(pair.here);
	CHECK(saved.data.unsq_len > 0 && saved.data.unsq_len <= saved.data.outq_len);
	close(pair.here);
	libsoccr_release(kit_restore(&pair, &saved));
	SAME(ioctl(pair.here, SIOCOUTQNSD, &unsent), 0);
	SAME(unsent, saved.data.unsq_len);
	SAME(libsoccr_unlock(lock), 0);
	kit_set_option(pair.here, IPPROTO_TCP, TCP_REPAIR, 0);
	kit_expect_filling(pair.there, filled);
	kit_talk(&pair);
}

static void a_fin_behind_unsent_bytes_waits_for_them(void)
{
	struct pair pair = kit_connect(IPV4);
	size_t filled = kit_fill(pair.here);
	struct saved saved;

	shutdown(pair.here, SHUT_WR);
	kit_wait_state(pair.here, TCP_FIN_WAIT1);
	saved = kit_move(&pair);
	CHECK(saved.data.unsq_len > 0);
	SAME(kit_state(pair.here), TCP_FIN_WAIT1);
	kit_expect_filling(pair.there, filled);
	kit_expect_end(pair.there);
	kit_send(pair.there, "answer", 6);
	kit_expect(pair.here, "answer", 6);
}

static void a_full_receive_queue_goes_on(void)
{
	struct pair pair = kit_connect(IPV4);
	size_t filled;
	struct saved saved;

	kit_set_option(pair.here, SOL_SOCKET, SO_RCVBUF, 65536);
	filled = kit_fill(pair.there);
	saved = kit_move(&pair);
	CHECK(saved.data.inq_len > 0);
	kit_expect_filling(pair.here, filled);
	kit_talk(&pair);
}

static void a_socket_without_a_connection_is_not_saved(void)
{
	union libsoccr_addr address = kit_address("127.0.0.1", 0);
	int fd = kit_socket(&address);
	struct libsoccr_sk_data data;
	struct libsoccr_sk *sk = libsoccr_pause(fd);

	SAME(libsoccr_save(sk, &data, sizeof(data)), -1);
	kit_error_has(sk, "not connected");
	libsoccr_resume(sk);
	CHECK(!libsoccr_pause(kit_listen(&address)));
	kit_error_has(NULL, "listening");
}

static void one_image_can_be_restored_again(void)
{
	struct pair pair = kit_connect(IPV4);
	char *expected[2];
	struct saved saved, before;

	kit_deafen(pair.there);
	kit_send(pair.here, "unacknowledged", 14);
	saved = before = kit_save(&pair);
	close(pair.here);
	for (int i = 0; i < 2; i++) {
		struct libsoccr_sk *sk = kit_fresh(&pair);

		SAME(libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, saved.send_queue, 0), 0);
		SAME(libsoccr_restore(sk, &saved.data, sizeof(saved.data)), 0);
		SAME(memcmp(&saved, &before, sizeof(saved)), 0);
		expected[i] = saved.send_queue;
		SAME(memcmp(expected[i], "unacknowledged", 14), 0);
		if (i == 0) {
			libsoccr_release(sk);
			close(pair.here);
		} else {
			kit_hear(pair.there);
			kit_unlock(&pair);
			libsoccr_resume(sk);
		}
	}
	kit_expect(pair.there, "unacknowledged", 14);
	kit_talk(&pair);
}

/* A filter in the place of a firewall: the segment that plays the peer's FIN does not arrive. */
static void a_fin_that_does_not_arrive_is_a_failure(void)
{
	struct pair pair = kit_pair(IPV4, TCP_CLOSE_WAIT);
	struct saved saved = kit_save(&pair);
	struct libsoccr_sk *sk;

	close(pair.here);
	sk = kit_fresh(&pair);
	kit_deafen(pair.here);
	SAME(libsoccr_restore(sk, &saved.data, sizeof(saved.data)), -1);
	kit_error_has(sk, "firewall");
	/* Closing what is half restored is silent, resumed or not. */
	SAME(kit_option(pair.here, IPPROTO_TCP, TCP_REPAIR), 1);
	libsoccr_resume(sk);
	SAME(kit_option(pair.here, IPPROTO_TCP, TCP_REPAIR), 1);
	close(pair.here);
	SAME(kit_state(pair.there), TCP_FIN_WAIT2);
	libsoccr_resume(kit_restore(&pair, &saved));
	kit_send(pair.here, "answer", 6);
	kit_expect(pair.there, "answer", 6);
}

static void a_failure_behind_the_unsent_bytes_does_not_reset_the_peer(void)
{
	struct pair pair = kit_pair(IPV4, TCP_CLOSE_WAIT);
	size_t filled = kit_fill(pair.here);
	struct saved saved = kit_save(&pair);
	struct libsoccr_sk *sk;

	CHECK(saved.data.unsq_len > 0);
	close(pair.here);
	sk = kit_fresh(&pair);
	kit_deafen(pair.here);
	SAME(libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, saved.send_queue, 0), 0);
	SAME(libsoccr_restore(sk, &saved.data, sizeof(saved.data)), -1);
	SAME(kit_option(pair.here, IPPROTO_TCP, TCP_REPAIR), 1);
	libsoccr_resume(sk);
	close(pair.here);
	SAME(kit_state(pair.there), TCP_FIN_WAIT2);
	libsoccr_resume(kit_restore(&pair, &saved));
	kit_expect_filling(pair.there, filled);
}

static void the_fin_of_the_peer_carries_its_window(void)
{
	struct pair pair = kit_pair(IPV4, TCP_CLOSE_WAIT);
	struct saved saved = kit_save(&pair);
	struct tcp_repair_window window;
	socklen_t length = sizeof(window);

	close(pair.here);
	libsoccr_release(kit_restore(&pair, &saved));
	SAME(getsockopt(pair.here, IPPROTO_TCP, TCP_REPAIR_WINDOW, &window, &length), 0);
	SAME(window.snd_wnd, saved.data.snd_wnd);
	SAME(window.max_window, saved.data.max_window);
	SAME(window.rcv_wnd, saved.data.rcv_wnd);
}

/* In the last 64 bits of this address ffff stands where it does in a mapped one; the 64 before are not zero. */
static void an_address_is_mapped_only_if_96_bits_say_so(void)
{
	struct pair pair;
	struct saved saved;

	kit_add_ipv6_address("fd00::ffff:1:2");
	pair = kit_connect_to("fd00::ffff:1:2");
	shutdown(pair.there, SHUT_WR);
	kit_wait_state(pair.here, TCP_CLOSE_WAIT);
	saved = kit_move(&pair);
	SAME(saved.data.state, TCP_CLOSE_WAIT);
	SAME(kit_state(pair.here), TCP_CLOSE_WAIT);
	kit_send(pair.here, "answer", 6);
	kit_expect(pair.there, "answer", 6);
}

static void a_fin_is_not_sent_while_it_is_restored(void)
{
	struct pair pair = kit_connect(IPV4);
	struct pollfd hung_up = { .events = POLLRDHUP };
	struct saved saved;
	struct libsoccr_sk *sk;

	hung_up.fd = pair.there;
	kit_send(pair.there, "unread", 6);
	kit_wait_unread(pair.here, 6);
	kit_deafen(pair.there);
	shutdown(pair.here, SHUT_WR);
	kit_wait_state(pair.here, TCP_FIN_WAIT1);
	saved = kit_save(&pair);
	close(pair.here);
	kit_hear(pair.there);
	sk = kit_restore(&pair, &saved);
	SAME(poll(&hung_up, 1, 0), 0);
	libsoccr_resume(sk);
	kit_expect_end(pair.there);
}

static struct tcp_info info(int fd)
{
	struct tcp_info info;
	socklen_t length = sizeof(info);

	SAME(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length), 0);
	return info;
}

static void segments_stay_as_large_and_buffers_as_free(void)
{
	for (int family = IPV4; family <= IPV6; family++) {
		struct pair pair = kit_connect(family);
		struct tcp_info before = info(pair.here), after;

		kit_move(&pair);
		after = info(pair.here);
		/* The option that large loopback segments need cannot be set on IPv6: 32767 at most. */
		SAME(after.tcpi_snd_mss >= (family == IPV4 ? before.tcpi_snd_mss : 32000), 1);
		SAME(after.tcpi_options & 0xf, before.tcpi_options & 0xf);
#ifdef SO_BUF_LOCK
		SAME(kit_option(pair.here, SOL_SOCKET, SO_BUF_LOCK), 0);
#endif
		kit_talk(&pair);
	}
}

static void the_timestamp_clock_goes_on(void)
{
	struct pair pair = kit_connect(IPV4);
	struct saved first = kit_move(&pair), second = kit_save(&pair);
	int step = (int)(second.data.timestamp - first.data.timestamp);

	CHECK(first.data.opt_mask & TCPI_OPT_TIMESTAMPS);
	CHECK(step >= 0 && step < 60 * 1000 * 1000);
}

static void a_failed_save_can_be_resumed(void)
{
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_sk_data data;
	struct libsoccr_sk *sk = libsoccr_pause(pair.here);

	SAME(libsoccr_save(sk, &data, 1), -1);
	libsoccr_resume(sk);
	SAME(kit_option(pair.here, IPPROTO_TCP, TCP_REPAIR), 0);
	kit_talk(&pair);
}

static void reuseaddr_survives(void)
{
	for (int on = 0; on <= 1; on++) {
		struct pair pair = kit_connect(IPV4);
		struct saved saved;
		struct libsoccr_sk *sk;

		kit_set_option(pair.here, SOL_SOCKET, SO_REUSEADDR, on);
		libsoccr_resume(libsoccr_pause(pair.here));
		SAME(kit_option(pair.here, SOL_SOCKET, SO_REUSEADDR), on);
		saved = kit_save(&pair);
		close(pair.here);
		pair.here = kit_socket(&pair.self);
		kit_set_option(pair.here, SOL_SOCKET, SO_REUSEADDR, on);
		sk = libsoccr_pause(pair.here);
		SAME(libsoccr_set_addr(sk, 1, &pair.self, 0), 0);
		SAME(libsoccr_set_addr(sk, 0, &pair.peer, 0), 0);
		SAME(libsoccr_restore(sk, &saved.data, sizeof(saved.data)), 0);
		kit_unlock(&pair);
		libsoccr_resume(sk);
		SAME(kit_option(pair.here, SOL_SOCKET, SO_REUSEADDR), on);
		kit_talk(&pair);
	}
}

/* The socket waits for room, and has less than the queue needs. */
static void a_small_send_buffer_does_not_hang(void)
{
	struct pair pair = kit_connect(IPV4);
	struct saved saved;
	struct libsoccr_sk *sk;
	size_t filled;

	filled = kit_fill(pair.here);
	saved = kit_save(&pair);
	CHECK(saved.data.outq_len > 100000);
	close(pair.here);
	sk = kit_fresh(&pair);
	kit_set_option(pair.here, SOL_SOCKET, SO_SNDBUF, 4096);
	SAME(libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, saved.send_queue, SOCCR_MEM_EXCL), 0);
	if (libsoccr_restore(sk, &saved.data, sizeof(saved.data)) == 0) {
		kit_unlock(&pair);
		libsoccr_resume(sk);
		kit_expect_filling(pair.there, filled);
		kit_talk(&pair);
	} else {
		/* Without privilege the limit of the machine stands in the way, and that is said. */
		kit_error_has(sk, "wmem_max");
		SAME(kit_option(pair.here, IPPROTO_TCP, TCP_REPAIR), 1);
	}
}

static void a_descriptor_keeps_its_flags(void)
{
	for (int flag = 0; flag <= O_NONBLOCK; flag += O_NONBLOCK) {
		struct pair pair = kit_pair(IPV4, TCP_SYN_SENT);
		struct saved saved = kit_save(&pair);
		struct libsoccr_sk *sk;

		close(pair.here);
		sk = kit_fresh(&pair);
		SAME(fcntl(pair.here, F_SETFL, flag | O_APPEND), 0);
		SAME(libsoccr_restore(sk, &saved.data, sizeof(saved.data)), 0);
		libsoccr_resume(sk);
		SAME(fcntl(pair.here, F_GETFL) & (O_NONBLOCK | O_APPEND), flag | O_APPEND);
		SAME(kit_state(pair.here), TCP_SYN_SENT);
	}
}

static const struct test tests[] = {
	TEST(lengths_are_checked_against_each_other),
	TEST(a_queue_that_is_missing_is_an_error_up_front),
	TEST(addresses_are_checked_up_front),
	TEST(a_link_local_address_has_a_scope),
	TEST(the_queues_are_those_of_the_save),
	TEST(what_was_not_sent_is_sent_once),
	TEST(a_fin_behind_unsent_bytes_waits_for_them),
	TEST(a_full_receive_queue_goes_on),
	TEST(a_socket_without_a_connection_is_not_saved),
	TEST(one_image_can_be_restored_again),
	TEST(a_fin_that_does_not_arrive_is_a_failure),
	TEST(a_failure_behind_the_unsent_bytes_does_not_reset_the_peer),
	TEST(the_fin_of_the_peer_carries_its_window),
	TEST(an_address_is_mapped_only_if_96_bits_say_so),
	TEST(a_fin_is_not_sent_while_it_is_restored),
	TEST(segments_stay_as_large_and_buffers_as_free),
	TEST(the_timestamp_clock_goes_on),
	TEST(a_failed_save_can_be_resumed),
	TEST(reuseaddr_survives),
	TEST(a_small_send_buffer_does_not_hang),
	TEST(a_descriptor_keeps_its_flags),
};

KIT_MAIN(tests)

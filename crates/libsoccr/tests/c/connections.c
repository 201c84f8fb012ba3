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
	SAME(saved.data.flags, SOCCR_FLAGS_WINDOW);
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
	struct saved saved = kit_save(pair.here);
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
	SAME(libsoccr_save(sk, &first, sizeof(first)), 68);
	SAME(libsoccr_save(sk, &second, sizeof(second)), 68);
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
	saved = kit_save(pair.here);
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
	struct saved saved = kit_save(pair.here);

	SAME(kit_option(pair.here, IPPROTO_TCP, TCP_REPAIR), 1);
	close(pair.here);
	SAME(kit_state(pair.there), TCP_ESTABLISHED);
	libsoccr_resume(kit_restore(&pair, &saved));
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
	TEST(pause_and_resume_change_nothing),
	TEST(a_connection_is_complete_without_resume),
	TEST(addresses_are_told),
	TEST(a_forgotten_peer_is_asked_for),
	TEST(a_released_socket_is_silent_and_free_at_once),
};

KIT_MAIN(tests)

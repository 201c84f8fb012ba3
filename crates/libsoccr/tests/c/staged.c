/* The staged interface of 2016: the caller binds and connects, and may fill the queues before or after the last stage. */
#define SOCCR_API_2016
#include "kit.h"

static struct saved save(struct pair *pair)
{
	struct libsoccr_sk *sk;
	struct saved saved;

	kit_lock(pair);
	sk = libsoccr_pause(pair->here);
	CHECK(sk);
	SAME(libsoccr_get_sk_data(sk, &saved.data, sizeof(saved.data)), sizeof(saved.data));
	saved.receive_queue = libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 2);
	saved.send_queue = libsoccr_get_queue_bytes(sk, TCP_SEND_QUEUE, 1);
	CHECK(saved.receive_queue && saved.send_queue);
	libsoccr_release(sk);
	close(pair->here);
	return saved;
}

/* The first stage, and the caller's own calls. */
static struct libsoccr_sk *begin(struct pair *pair, struct saved *saved)
{
	struct libsoccr_sk *sk;

	pair->here = kit_socket(&pair->self);
	sk = libsoccr_pause(pair->here);
	CHECK(sk);
	SAME(libsoccr_set_sk_data_unbound(sk, &saved->data, sizeof(saved->data)), 0);
	SAME(bind(pair->here, &pair->self.sa, kit_length(&pair->self)), 0);
	SAME(connect(pair->here, &pair->peer.sa, kit_length(&pair->peer)), 0);
	return sk;
}

static int fill(struct libsoccr_sk *sk, struct saved *saved, int queue)
{
	char *bytes = queue == TCP_RECV_QUEUE ? saved->receive_queue : saved->send_queue;

	return libsoccr_set_queue_bytes(sk, &saved->data, sizeof(saved->data), queue, bytes);
}

static void end(struct pair *pair, struct libsoccr_sk *sk, struct saved *saved)
{
	SAME(kit_state(pair->here), saved->data.state);
	SAME(kit_option(pair->here, IPPROTO_TCP, TCP_REPAIR), 1);
	kit_unlock(pair);
	libsoccr_resume(sk);
	SAME(kit_option(pair->here, IPPROTO_TCP, TCP_REPAIR), 0);
	free(saved->receive_queue);
	free(saved->send_queue);
}

/* Unread, unacknowledged and unsent bytes. */
static struct pair full_pair(enum family family, size_t *filled)
{
	struct pair pair = kit_connect(family);

	kit_send(pair.there, "unread", 6);
	kit_wait_unread(pair.here, 6);
	*filled = kit_fill(pair.here);
	return pair;
}

static void check_full_pair(struct pair *pair, size_t filled)
{
	kit_expect(pair->here, "unread", 6);
	kit_expect_filling(pair->there, filled);
	kit_talk(pair);
}

static void queues_come_before_the_last_stage(void)
{
	size_t filled;
	struct pair pair = full_pair(IPV4, &filled);
	struct saved saved = save(&pair);
	struct libsoccr_sk *sk = begin(&pair, &saved);

	SAME(libsoccr_set_sk_data_noq(sk, &saved.data, sizeof(saved.data)), 0);
	SAME(fill(sk, &saved, TCP_RECV_QUEUE), 0);
	SAME(fill(sk, &saved, TCP_SEND_QUEUE), 0);
	SAME(libsoccr_set_sk_data(sk, &saved.data, sizeof(saved.data)), 0);
	end(&pair, sk, &saved);
	check_full_pair(&pair, filled);
}

static void queues_come_after_the_last_stage(void)
{
	size_t filled;
	struct pair pair = full_pair(IPV6, &filled);
	struct saved saved = save(&pair);
	struct libsoccr_sk *sk = begin(&pair, &saved);

	SAME(libsoccr_set_sk_data(sk, &saved.data, sizeof(saved.data)), 0);
	SAME(fill(sk, &saved, TCP_SEND_QUEUE), 0);
	SAME(fill(sk, &saved, TCP_RECV_QUEUE), 0);
	end(&pair, sk, &saved);
	check_full_pair(&pair, filled);
}

static void empty_queues_may_be_left_out_or_set(void)
{
	for (int set = 0; set <= 1; set++) {
		struct pair pair = kit_connect(MAPPED);
		struct saved saved = save(&pair);
		struct libsoccr_sk *sk = begin(&pair, &saved);

		SAME(libsoccr_set_sk_data(sk, &saved.data, sizeof(saved.data)), 0);
		if (set) {
			SAME(fill(sk, &saved, TCP_RECV_QUEUE), 0);
			SAME(libsoccr_set_queue_bytes(sk, &saved.data, sizeof(saved.data), TCP_SEND_QUEUE, NULL), 0);
		}
		end(&pair, sk, &saved);
		kit_talk(&pair);
	}
}

static void every_state_can_be_staged(void)
{
	static const int states[] = { TCP_CLOSE_WAIT, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSING, TCP_LAST_ACK, TCP_CLOSE };

	for (size_t i = 0; i < sizeof(states) / sizeof(*states); i++) {
		struct pair pair = kit_pair(IPV4, states[i]);
		struct saved saved = save(&pair);
		struct libsoccr_sk *sk = begin(&pair, &saved);

		SAME(libsoccr_set_sk_data_noq(sk, &saved.data, sizeof(saved.data)), 0);
		SAME(libsoccr_set_sk_data(sk, &saved.data, sizeof(saved.data)), 0);
		end(&pair, sk, &saved);
		close(pair.here);
		close(pair.there);
	}
}

static void the_rest_can_be_left_to_restore(void)
{
	size_t filled;
	struct pair pair = full_pair(IPV4, &filled);
	struct saved saved = save(&pair);
	struct libsoccr_sk *sk = begin(&pair, &saved);

	SAME(fill(sk, &saved, TCP_RECV_QUEUE), 0);
	SAME(fill(sk, &saved, TCP_SEND_QUEUE), 0);
	SAME(libsoccr_restore(sk, &saved.data, sizeof(saved.data)), 0);
	end(&pair, sk, &saved);
	check_full_pair(&pair, filled);
}

/* Both interfaces in one host: the queues come by the present one, behind the last stage. */
static void restore_ends_what_was_begun(void)
{
	size_t filled;
	struct pair pair = full_pair(IPV4, &filled);
	struct saved saved = save(&pair);
	struct libsoccr_sk *sk = begin(&pair, &saved);

	SAME(libsoccr_set_sk_data(sk, &saved.data, sizeof(saved.data)), 0);
	SAME(kit_set_queue(sk, TCP_RECV_QUEUE, saved.receive_queue), 0);
	SAME(kit_set_queue(sk, TCP_SEND_QUEUE, saved.send_queue), 0);
	SAME(libsoccr_restore(sk, &saved.data, sizeof(saved.data)), 0);
	end(&pair, sk, &saved);
	check_full_pair(&pair, filled);
}

static void a_mistake_can_be_mended(void)
{
	size_t filled;
	struct pair pair = full_pair(IPV4, &filled);
	struct saved saved = save(&pair);
	struct libsoccr_sk *sk = begin(&pair, &saved);
	struct libsoccr_sk_data wrong = saved.data;

	wrong.inq_len -= 1;
	SAME(libsoccr_set_queue_bytes(sk, &saved.data, sizeof(saved.data), 0, saved.receive_queue), -1);
	SAME(libsoccr_set_queue_bytes(sk, &saved.data, sizeof(saved.data), TCP_RECV_QUEUE, NULL), -1);
	SAME(libsoccr_set_queue_bytes(sk, &wrong, sizeof(wrong), TCP_RECV_QUEUE, saved.receive_queue), -1);
	SAME(fill(sk, &saved, TCP_RECV_QUEUE), 0);
	SAME(fill(sk, &saved, TCP_RECV_QUEUE), -1);
	kit_error_has(sk, "already");
	SAME(libsoccr_set_sk_data(sk, &saved.data, sizeof(saved.data)), 0);
	SAME(fill(sk, &saved, TCP_SEND_QUEUE), 0);
	end(&pair, sk, &saved);
	check_full_pair(&pair, filled);
}

static void the_order_is_enforced(void)
{
	size_t filled;
	struct pair pair = full_pair(IPV4, &filled);
	struct saved saved = save(&pair);
	struct libsoccr_sk *sk;
	int fresh = kit_socket(&pair.self);

	sk = libsoccr_pause(fresh);
	SAME(libsoccr_set_sk_data_noq(sk, &saved.data, sizeof(saved.data)), -1);
	kit_error_has(sk, "libsoccr_set_sk_data_unbound comes first");
	SAME(libsoccr_set_sk_data(sk, &saved.data, sizeof(saved.data)), -1);
	SAME(fill(sk, &saved, TCP_RECV_QUEUE), -1);
	SAME(libsoccr_set_sk_data_unbound(sk, &saved.data, sizeof(saved.data)), 0);
	SAME(libsoccr_set_sk_data_unbound(sk, &saved.data, sizeof(saved.data)), -1);
	SAME(libsoccr_get_sk_data(sk, &saved.data, sizeof(saved.data)), -1);
	libsoccr_release(sk);
	close(fresh);
}

/* Addresses that the caller has told are those that the socket must have. */
static void another_port_is_refused(void)
{
	size_t filled;
	struct pair pair = full_pair(IPV4, &filled);
	struct saved saved = save(&pair);
	union libsoccr_addr self = pair.self;
	struct libsoccr_sk *sk;

	pair.self.v4.sin_port ^= htons(1);
	sk = begin(&pair, &saved);
	SAME(libsoccr_set_addr(sk, 1, &self, 0), 0);
	SAME(libsoccr_set_addr(sk, 0, &pair.peer, 0), 0);
	SAME(libsoccr_set_sk_data(sk, &saved.data, sizeof(saved.data)), -1);
	kit_error_has(sk, "not from");
	libsoccr_release(sk);
	close(pair.here);
	pair.self = self;
	sk = begin(&pair, &saved);
	SAME(libsoccr_set_addr(sk, 1, &self, 0), 0);
	SAME(libsoccr_set_addr(sk, 0, &pair.peer, 0), 0);
	SAME(libsoccr_set_sk_data(sk, &saved.data, sizeof(saved.data)), 0);
	SAME(fill(sk, &saved, TCP_RECV_QUEUE), 0);
	SAME(fill(sk, &saved, TCP_SEND_QUEUE), 0);
	end(&pair, sk, &saved);
	check_full_pair(&pair, filled);
}

/* What is half restored is not let loose: the peer would be reset. */
static void resuming_half_a_connection_is_refused(void)
{
	size_t filled;
	struct pair pair = full_pair(IPV4, &filled);
	struct saved saved = save(&pair);
	struct libsoccr_sk *sk = begin(&pair, &saved);

	SAME(libsoccr_set_sk_data(sk, &saved.data, sizeof(saved.data)), 0);
	SAME(fill(sk, &saved, TCP_RECV_QUEUE), 0);
	libsoccr_resume(sk);
	kit_error_has(NULL, "not completely restored");
	SAME(kit_option(pair.here, IPPROTO_TCP, TCP_REPAIR), 1);
	close(pair.here);
	SAME(kit_state(pair.there), TCP_ESTABLISHED);
	sk = begin(&pair, &saved);
	SAME(libsoccr_set_sk_data(sk, &saved.data, sizeof(saved.data)), 0);
	SAME(fill(sk, &saved, TCP_RECV_QUEUE), 0);
	SAME(fill(sk, &saved, TCP_SEND_QUEUE), 0);
	end(&pair, sk, &saved);
	check_full_pair(&pair, filled);
}

static const struct test tests[] = {
	TEST(queues_come_before_the_last_stage),
	TEST(queues_come_after_the_last_stage),
	TEST(empty_queues_may_be_left_out_or_set),
	TEST(every_state_can_be_staged),
	TEST(the_rest_can_be_left_to_restore),
	TEST(restore_ends_what_was_begun),
	TEST(a_mistake_can_be_mended),
	TEST(the_order_is_enforced),
	TEST(another_port_is_refused),
	TEST(resuming_half_a_connection_is_refused),
};

KIT_MAIN(tests)

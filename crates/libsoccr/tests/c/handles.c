/* One socket, one handle: which of several it is, and what becomes of one that is old or wrong. */
#include "kit.h"

#include <pthread.h>

static void a_handle_may_be_left_behind(void)
{
	for (int i = 0; i < 50; i++) {
		struct pair pair = kit_connect(IPV4);
		struct saved saved;

		kit_send(pair.there, "unread", 6);
		kit_wait_unread(pair.here, 6);
		saved = kit_save(&pair);
		close(pair.here);
		kit_restore(&pair, &saved);
		kit_set_option(pair.here, IPPROTO_TCP, TCP_REPAIR, 0);
		kit_expect(pair.here, "unread", 6);
		kit_talk(&pair);
		/* Nor is it in the way of the next one. */
		struct libsoccr_sk *next = libsoccr_pause(pair.here);
		CHECK(next);
		libsoccr_resume(next);
		kit_talk(&pair);
		close(pair.here);
		close(pair.there);
	}
}

static void one_socket_has_one_handle(void)
{
	struct pair pair;
	struct libsoccr_sk *sk = kit_pause(&pair);
	int duplicate = dup(pair.here);

	CHECK(!libsoccr_pause(pair.here));
	kit_error_has(NULL, "handle already");
	CHECK(!libsoccr_pause(duplicate));
	SAME(kit_option(pair.here, IPPROTO_TCP, TCP_REPAIR), 1);
	libsoccr_resume(sk);
	sk = libsoccr_pause(duplicate);
	CHECK(sk);
	libsoccr_resume(sk);
	kit_talk(&pair);
}

/* Whoever ends a handle that was left behind does not touch what its socket has got since. */
static void a_handle_left_behind_has_no_claim(void)
{
	for (int resumes = 0; resumes <= 1; resumes++) {
		struct pair pair = kit_connect(IPV4);
		struct saved saved = kit_save(&pair);
		struct libsoccr_sk *first, *last;

		close(pair.here);
		first = kit_restore(&pair, &saved);
		kit_set_option(pair.here, IPPROTO_TCP, TCP_REPAIR, 0);
		libsoccr_resume(libsoccr_pause(pair.here));
		last = libsoccr_pause(pair.here);
		CHECK(last);
		if (resumes)
			libsoccr_resume(first);
		else
			libsoccr_release(first);
		SAME(kit_option(pair.here, IPPROTO_TCP, TCP_REPAIR), 1);
		libsoccr_resume(last);
		SAME(kit_option(pair.here, IPPROTO_TCP, TCP_REPAIR), 0);
		kit_talk(&pair);
	}
}

/* The host has ended repair mode by itself, and the application has begun to use the socket. */
static void a_connection_that_lives_is_not_resumed_again(void)
{
	struct pair pair = kit_connect(IPV4);
	struct saved saved = kit_save(&pair);
	struct libsoccr_sk *sk;

	close(pair.here);
	sk = kit_restore(&pair, &saved);
	kit_set_option(pair.here, IPPROTO_TCP, TCP_REPAIR, 0);
	kit_set_option(pair.here, SOL_SOCKET, SO_REUSEADDR, 1);
	kit_talk(&pair);
	libsoccr_resume(sk);
	CHECK(!libsoccr_last_error(NULL));
	SAME(kit_option(pair.here, SOL_SOCKET, SO_REUSEADDR), 1);
	kit_talk(&pair);
}

/* Source and target have been mixed up. */
static void a_connection_is_not_restored_onto_another(void)
{
	struct libsoccr_sk_data data;
	struct pair pair;
	struct libsoccr_sk *sk = kit_pause(&pair);

	SAME(libsoccr_save(sk, &data, sizeof(data)), sizeof(data));
	SAME(libsoccr_set_addr(sk, 1, &pair.self, 0), 0);
	SAME(libsoccr_set_addr(sk, 0, &pair.peer, 0), 0);
	SAME(libsoccr_restore(sk, &data, sizeof(data)), -1);
	kit_error_has(sk, "has a connection");
	SAME(libsoccr_last_kind(sk), SOCCR_INVALID);
	libsoccr_resume(sk);
	kit_talk(&pair);
}

struct race {
	int fd;
	pthread_barrier_t start, end;
	struct libsoccr_sk *got[2];
};

struct racer {
	struct race *race;
	int number;
};

enum { ROUNDS = 5000 };

static void *race(void *argument)
{
	struct racer *racer = argument;
	struct race *all = racer->race;

	for (int i = 0; i < ROUNDS; i++) {
		pthread_barrier_wait(&all->start);
		all->got[racer->number] = libsoccr_pause(all->fd);
		pthread_barrier_wait(&all->end);
	}
	return NULL;
}

static void two_threads_get_one_handle(void)
{
	struct pair pair = kit_connect(IPV4);
	struct race all = { .fd = pair.here };
	struct racer racers[2] = { { &all, 0 }, { &all, 1 } };
	pthread_t threads[2];

	pthread_barrier_init(&all.start, NULL, 3);
	pthread_barrier_init(&all.end, NULL, 3);
	for (int i = 0; i < 2; i++)
		SAME(pthread_create(&threads[i], NULL, race, &racers[i]), 0);
	for (int i = 0; i < ROUNDS; i++) {
		pthread_barrier_wait(&all.start);
		pthread_barrier_wait(&all.end);
		SAME(!all.got[0] + !all.got[1], 1);
		libsoccr_resume(all.got[0] ? all.got[0] : all.got[1]);
	}
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	kit_talk(&pair);
}

/* A process that has died leaves its sockets in repair mode. */
static void a_socket_left_in_repair_mode_is_taken_over(void)
{
	struct libsoccr_sk_data data;
	struct pair pair;
	struct libsoccr_sk *sk = kit_pause(&pair);

	libsoccr_release(sk);
	SAME(kit_option(pair.here, IPPROTO_TCP, TCP_REPAIR), 1);
	sk = libsoccr_pause(pair.here);
	CHECK(sk);
	SAME(libsoccr_save(sk, &data, sizeof(data)), sizeof(data));
	libsoccr_resume(sk);
	kit_talk(&pair);
}

static void a_mistake_with_one_handle_spares_the_others(void)
{
	struct libsoccr_sk_data data;
	struct pair first, second;
	struct libsoccr_sk *sk = kit_pause(&first), *other = kit_pause(&second);

	SAME(libsoccr_save(sk, &data, 3), -1);
	CHECK(libsoccr_last_error(sk));
	CHECK(!libsoccr_last_error(other));
	SAME(libsoccr_save(other, &data, sizeof(data)), sizeof(data));
	libsoccr_resume(sk);
	libsoccr_resume(other);
	kit_talk(&first);
	kit_talk(&second);
}

static const struct test tests[] = {
	TEST(a_handle_may_be_left_behind),
	TEST(one_socket_has_one_handle),
	TEST(two_threads_get_one_handle),
	TEST(a_handle_left_behind_has_no_claim),
	TEST(a_connection_that_lives_is_not_resumed_again),
	TEST(a_connection_is_not_restored_onto_another),
	TEST(a_socket_left_in_repair_mode_is_taken_over),
	TEST(a_mistake_with_one_handle_spares_the_others),
};

KIT_MAIN(tests)

/* What the structure tells behind its first 68 bytes: buffers and urgent data come back as they were; and callers with any
 * part of it. */
#include "kit.h"

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <stddef.h>

enum { FIRST_SIZE = 68 };

static int descriptors(void)
{
	DIR *directory = opendir("/proc/self/fd");
	int count = 0;

	while (readdir(directory))
		count++;
	closedir(directory);
	return count;
}

/* Moves a connection by a caller who knows so many bytes of the structure. */
static struct libsoccr_sk_data move(struct pair *pair, unsigned size)
{
	struct libsoccr_sk_data data;
	struct libsoccr_sk *sk;
	char *queue;
	int before;

	memset(&data, 0xff, sizeof(data));
	kit_lock(pair);
	sk = libsoccr_pause(pair->here);
	CHECK(sk);
	SAME(libsoccr_save(sk, &data, size), size);
	queue = libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, SOCCR_MEM_EXCL);
	libsoccr_release(sk);
	close(pair->here);
	sk = kit_fresh(pair);
	SAME(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, queue, SOCCR_MEM_EXCL), 0);
	before = descriptors();
	SAME(libsoccr_restore(sk, &data, size), 0);
	SAME(descriptors(), before);
	kit_unlock(pair);
	libsoccr_resume(sk);
	return data;
}

static void the_buffers_come_back(void)
{
	for (int locked = 0; locked < 2; locked++) {
		struct pair pair = kit_connect(IPV4);
		struct libsoccr_sk_data data;

		if (locked)
			kit_set_option(pair.here, SOL_SOCKET, SO_RCVBUF, 30000);
		kit_set_option(pair.here, IPPROTO_TCP, TCP_WINDOW_CLAMP, 20000);
		kit_send(pair.there, "unread", 6);
		kit_wait_unread(pair.here, 6);
		data = move(&pair, sizeof(data));
		CHECK(data.flags & SOCCR_FLAGS_BUFFERS);
		SAME(data.buf_lock, 2 * locked);
		SAME(kit_option(pair.here, SOL_SOCKET, SO_RCVBUF), data.rcvbuf);
		SAME(kit_option(pair.here, SOL_SOCKET, SO_SNDBUF), data.sndbuf);
		SAME(kit_option(pair.here, SOL_SOCKET, SO_BUF_LOCK), data.buf_lock);
		SAME(kit_option(pair.here, IPPROTO_TCP, TCP_WINDOW_CLAMP), 20000);
		kit_expect(pair.here, "unread", 6);
		kit_talk(&pair);
	}
}

/* Before Linux 6.9 nobody can read behind an urgent mark and leave the bytes there: then that is refused. */
static int reads_behind_marks(void)
{
	int socket_ = socket(AF_INET, SOCK_STREAM, 0), offset;
	socklen_t size = sizeof(offset);
	int reads = !getsockopt(socket_, SOL_SOCKET, SO_PEEK_OFF, &offset, &size);

	close(socket_);
	if (!reads)
		fprintf(stderr, "SKIPPED: urgent data: this kernel has no SO_PEEK_OFF for TCP\n");
	return reads;
}

/* "abc", an urgent 'X', "ghi". */
static struct pair urgent(void)
{
	struct pollfd exceptional = { .events = POLLPRI };
	struct pair pair = kit_connect(IPV4);

	exceptional.fd = pair.here;
	kit_send(pair.there, "abc", 3);
	SAME(send(pair.there, "X", 1, MSG_OOB), 1);
	kit_send(pair.there, "ghi", 3);
	SAME(poll(&exceptional, 1, 20000), 1);
	kit_wait_acknowledged(pair.there);
	return pair;
}

static void urgent_data_stays_urgent(void)
{
	for (int consumed = 0; consumed < 2 && reads_behind_marks(); consumed++) {
		struct pair pair = urgent();
		struct libsoccr_sk_data data;
		char byte = 0;

		if (consumed)
			SAME(recv(pair.here, &byte, 1, MSG_OOB), 1);
		data = move(&pair, sizeof(data));
		SAME(data.urgent, 3);
		SAME(!!(data.flags & SOCCR_FLAGS_URGENT_CONSUMED), consumed);
		kit_expect(pair.here, "abc", 3);
		SAME(recv(pair.here, &byte, 1, MSG_OOB), consumed ? -1 : 1);
		SAME(byte, 'X');
		kit_expect(pair.here, "ghi", 3);
		kit_talk(&pair);
	}
}

/* Nothing is lost, and nothing is read twice. */
static void urgent_data_becomes_ordinary_in_68_bytes(void)
{
	for (int consumed = 0; consumed < 2 && reads_behind_marks(); consumed++) {
		struct pair pair = urgent();
		char byte;

		if (consumed)
			SAME(recv(pair.here, &byte, 1, MSG_OOB), 1);
		SAME(move(&pair, FIRST_SIZE).inq_len, consumed ? 6 : 7);
		kit_expect(pair.here, consumed ? "abcghi" : "abcXghi", consumed ? 6 : 7);
		kit_talk(&pair);
	}
}

/* One pooled connection that was reset does not stop a dump; the application learns of it where it is restored. */
static void a_reset_that_nobody_has_read_is_carried(void)
{
	for (int i = 0; i < 8; i++) {
		struct pair pair = kit_connect(i & 1 ? IPV6 : IPV4);
		struct linger reset = { 1, 0 };
		struct libsoccr_sk_data data;
		int behind_fin = i & 2;
		char byte;

		kit_send(pair.there, "unread", 6);
		kit_wait_unread(pair.here, 6);
		if (behind_fin) {
			shutdown(pair.there, SHUT_WR);
			kit_wait_state(pair.here, TCP_CLOSE_WAIT);
		}
		SAME(setsockopt(pair.there, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)), 0);
		close(pair.there);
		kit_wait_state(pair.here, TCP_CLOSE);
		data = move(&pair, i & 4 ? FIRST_SIZE : sizeof(data));
		SAME(data.state, TCP_CLOSE);
		SAME(data.opt_mask >> 8, behind_fin ? 3 : 1);
		kit_expect(pair.here, "unread", 6);
		if (behind_fin) {
			kit_expect_end(pair.here);
		} else {
			SAME(recv(pair.here, &byte, 1, 0), -1);
			SAME(errno, ECONNRESET);
		}
		SAME(send(pair.here, &byte, 1, MSG_NOSIGNAL), -1);
		SAME(errno, EPIPE);
		close(pair.here);
	}
}

/* What contradicts itself is found before the socket is touched, and can be told once more. */
static void wrong_values_can_be_mended(void)
{
	struct pair pair = kit_connect(IPV4);
	struct saved saved;
	struct libsoccr_sk *sk;
	char byte;

	kit_send(pair.there, "unread", 6);
	kit_wait_unread(pair.here, 6);
	saved = kit_save(&pair);
	close(pair.here);
	sk = kit_fresh(&pair);
	SAME(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, saved.receive_queue, SOCCR_MEM_EXCL), 0);
	SAME(libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, saved.send_queue, SOCCR_MEM_EXCL), 0);
	for (int i = 0; i < 4; i++) {
		struct libsoccr_sk_data data = saved.data;
		union libsoccr_addr self;
		socklen_t length = sizeof(self);

		data.flags |= SOCCR_FLAGS_URGENT;
		data.urgent = i == 0 ? 6 : 5;
		if (i == 1)
			data.rto = UINT32_MAX;
		if (i == 2)
			data.buf_lock = 4;
		SAME(libsoccr_restore(sk, &data, sizeof(data)), i < 3 ? -1 : 0);
		if (i == 3)
			break;
		SAME(errno, EINVAL);
		SAME(getsockname(pair.here, &self.sa, &length), 0);
		SAME(self.v4.sin_port, 0);
	}
	kit_unlock(&pair);
	libsoccr_resume(sk);
	kit_expect(pair.here, "unrea", 5);
	SAME(recv(pair.here, &byte, 1, MSG_OOB), 1);
	SAME(byte, 'd');
	kit_talk(&pair);
}

static void every_age_of_the_structure_is_served(void)
{
	static const struct {
		unsigned size, flags;
	} ages[] = {
		{ FIRST_SIZE, 0 },
		{ offsetof(struct libsoccr_sk_data, snd_cwnd), 0 },
		{ offsetof(struct libsoccr_sk_data, sndbuf), SOCCR_FLAGS_PATH },
		{ offsetof(struct libsoccr_sk_data, window_clamp), SOCCR_FLAGS_PATH },
		{ offsetof(struct libsoccr_sk_data, urgent), SOCCR_FLAGS_PATH | SOCCR_FLAGS_BUFFERS },
		{ sizeof(struct libsoccr_sk_data), SOCCR_FLAGS_PATH | SOCCR_FLAGS_BUFFERS },
	};

	for (size_t i = 0; i < sizeof(ages) / sizeof(*ages); i++) {
		struct pair pair = kit_connect(IPV4);

		SAME(move(&pair, ages[i].size).flags, ages[i].flags | SOCCR_FLAGS_WINDOW);
		kit_talk(&pair);
	}
}

static const struct test tests[] = {
	TEST(the_buffers_come_back),
	TEST(urgent_data_stays_urgent),
	TEST(urgent_data_becomes_ordinary_in_68_bytes),
	TEST(a_reset_that_nobody_has_read_is_carried),
	TEST(wrong_values_can_be_mended),
	TEST(every_age_of_the_structure_is_served),
};

KIT_MAIN(tests)

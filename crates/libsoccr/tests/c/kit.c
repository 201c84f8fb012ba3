#include "kit.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <time.h>

static const int DEADLINE_SECONDS = 20;

int kit_main(int argc, char **argv, const struct test *tests, int count)
{
	for (int i = 0; i < count; i++) {
		if (argc == 1) {
			puts(tests[i].name);
		} else if (strcmp(argv[1], tests[i].name) == 0) {
			/* A test that hangs has failed. */
			alarm(120);
			tests[i].run();
			return 0;
		}
	}
	return argc == 1 ? 0 : 2;
}

void kit_fail(const char *file, int line, const char *what)
{
	const char *error = libsoccr_last_error(NULL);

	fprintf(stderr, "%s:%d: %s; errno: %s; last error: %s\n", file, line, what, strerror(errno),
		error ? error : "none");
	exit(1);
}

void kit_same(const char *file, int line, const char *what, long long left, long long right)
{
	if (left == right)
		return;
	fprintf(stderr, "%s:%d: %lld, %lld: ", file, line, left, right);
	kit_fail(file, line, what);
}

void kit_error_has(const struct libsoccr_sk *sk, const char *text)
{
	const char *error = libsoccr_last_error(sk);

	if (error && strstr(error, text))
		return;
	fprintf(stderr, "expected \"%s\" in \"%s\"\n", text, error ? error : "none");
	exit(1);
}

socklen_t kit_length(const union libsoccr_addr *address)
{
	return address->sa.sa_family == AF_INET ? sizeof(address->v4) : sizeof(address->v6);
}

union libsoccr_addr kit_address(const char *text, int port)
{
	union libsoccr_addr address;

	memset(&address, 0, sizeof(address));
	if (inet_pton(AF_INET, text, &address.v4.sin_addr) == 1) {
		address.v4.sin_family = AF_INET;
		address.v4.sin_port = htons(port);
	} else {
		SAME(inet_pton(AF_INET6, text, &address.v6.sin6_addr), 1);
		address.v6.sin6_family = AF_INET6;
		address.v6.sin6_port = htons(port);
	}
	return address;
}

int kit_socket(const union libsoccr_addr *address)
{
	int fd = socket(address->sa.sa_family, SOCK_STREAM, 0);

	CHECK(fd >= 0);
	return fd;
}

int kit_listen(union libsoccr_addr *address)
{
	socklen_t length = sizeof(*address);
	int fd = kit_socket(address);

	SAME(bind(fd, &address->sa, kit_length(address)), 0);
	SAME(listen(fd, 8), 0);
	SAME(getsockname(fd, &address->sa, &length), 0);
	return fd;
}

struct pair kit_connect_to(const char *text)
{
	struct pair pair;
	socklen_t length = sizeof(pair.self);
	int listener;

	pair.lock = NULL;
	pair.peer = kit_address(text, 0);
	listener = kit_listen(&pair.peer);
	pair.here = kit_socket(&pair.peer);
	SAME(connect(pair.here, &pair.peer.sa, kit_length(&pair.peer)), 0);
	pair.there = accept(listener, NULL, NULL);
	CHECK(pair.there >= 0);
	SAME(getsockname(pair.here, &pair.self.sa, &length), 0);
	close(listener);
	return pair;
}

struct pair kit_connect(enum family family)
{
	static const char *const addresses[] = { "127.0.0.1", "::1", "::ffff:127.0.0.1" };

	return kit_connect_to(addresses[family]);
}

static struct pair connecting(enum family family)
{
	struct pair pair;
	socklen_t length = sizeof(pair.self);

	pair.lock = NULL;
	pair.peer = kit_address(family == IPV4 ? "127.0.0.1" : family == IPV6 ? "::1" : "::ffff:127.0.0.1", 0);
	pair.there = kit_listen(&pair.peer);
	kit_deafen(pair.there);
	pair.here = socket(pair.peer.sa.sa_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
	CHECK(connect(pair.here, &pair.peer.sa, kit_length(&pair.peer)) == -1 && errno == EINPROGRESS);
	SAME(getsockname(pair.here, &pair.self.sa, &length), 0);
	return pair;
}

struct pair kit_pair(enum family family, int state)
{
	struct pair pair;

	if (state == TCP_SYN_SENT)
		return connecting(family);
	pair = kit_connect(family);
	switch (state) {
	case TCP_CLOSE_WAIT:
	case TCP_LAST_ACK:
	case TCP_CLOSE:
		shutdown(pair.there, SHUT_WR);
		kit_wait_state(pair.here, TCP_CLOSE_WAIT);
		kit_wait_state(pair.there, TCP_FIN_WAIT2);
		break;
	}
	switch (state) {
	case TCP_FIN_WAIT1:
	case TCP_CLOSING:
	case TCP_LAST_ACK:
		kit_deafen(pair.there);
		/* fall through */
	case TCP_FIN_WAIT2:
	case TCP_CLOSE:
		shutdown(pair.here, SHUT_WR);
		break;
	}
	if (state == TCP_CLOSING)
		shutdown(pair.there, SHUT_WR);
	kit_wait_state(pair.here, state);
	return pair;
}

void kit_deafen(int fd)
{
	struct sock_filter nothing = BPF_STMT(BPF_RET | BPF_K, 0);
	struct sock_fprog program = { 1, &nothing };

	SAME(setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program)), 0);
}

void kit_hear(int fd)
{
	kit_set_option(fd, SOL_SOCKET, SO_DETACH_FILTER, 0);
}

int kit_state(int fd)
{
	struct tcp_info info;
	socklen_t length = sizeof(info);

	SAME(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length), 0);
	return info.tcpi_state;
}

/* The end of a wait that begins now. */
static time_t deadline(void)
{
	return time(NULL) + DEADLINE_SECONDS;
}

/* Looks at a condition again and again; the pause between only spares the processor. */
static int later(time_t deadline)
{
	struct timespec pause = { 0, 1000000 };

	nanosleep(&pause, NULL);
	return time(NULL) <= deadline;
}

void kit_wait_state(int fd, int state)
{
	time_t end = deadline();

	while (kit_state(fd) != state)
		if (!later(end))
			SAME(kit_state(fd), state);
}

void kit_wait_acknowledged(int fd)
{
	time_t end = deadline();
	int bytes;

	do {
		SAME(ioctl(fd, SIOCOUTQ, &bytes), 0);
	} while (bytes && later(end));
	SAME(bytes, 0);
}

void kit_wait_unread(int fd, int expected)
{
	time_t end = deadline();
	int bytes;

	do {
		SAME(ioctl(fd, SIOCINQ, &bytes), 0);
	} while (bytes != expected && later(end));
	SAME(bytes, expected);
}

void kit_add_ipv6_address(const char *text)
{
	struct {
		struct in6_addr address;
		unsigned int prefix;
		int interface;
	} request = { .prefix = 128, .interface = if_nametoindex("lo") };
	union libsoccr_addr address = kit_address(text, 0);
	int fd = socket(AF_INET6, SOCK_DGRAM, 0);
	time_t end;
	int error;

	request.address = address.v6.sin6_addr;
	SAME(ioctl(fd, SIOCSIFADDR, &request), 0);
	/* It can be used a moment later. */
	end = deadline();
	do {
		error = bind(fd, &address.sa, sizeof(address.v6));
	} while (error && later(end));
	SAME(error, 0);
	close(fd);
}

int kit_option(int fd, int level, int name)
{
	int value = -1;
	socklen_t length = sizeof(value);

	SAME(getsockopt(fd, level, name, &value, &length), 0);
	return value;
}

void kit_set_option(int fd, int level, int name, int value)
{
	SAME(setsockopt(fd, level, name, &value, sizeof(value)), 0);
}

void kit_send(int fd, const void *bytes, size_t length)
{
	SAME(send(fd, bytes, length, MSG_NOSIGNAL), length);
}

void kit_expect(int fd, const void *bytes, size_t length)
{
	char *read = malloc(length);
	size_t done = 0;

	while (done < length) {
		ssize_t more = recv(fd, read + done, length - done, 0);

		CHECK(more > 0);
		done += more;
	}
	SAME(memcmp(read, bytes, length), 0);
	free(read);
}

void kit_expect_end(int fd)
{
	char byte;

	SAME(recv(fd, &byte, 1, 0), 0);
}

size_t kit_fill(int fd)
{
	char bytes[4096];
	size_t done = 0;
	ssize_t more;

	for (;;) {
		for (size_t i = 0; i < sizeof(bytes); i++)
			bytes[i] = (char)(done + i);
		more = send(fd, bytes, sizeof(bytes), MSG_DONTWAIT | MSG_NOSIGNAL);
		if (more < 0)
			break;
		done += more;
	}
	SAME(errno, EAGAIN);
	return done;
}

void kit_expect_filling(int fd, size_t length)
{
	char bytes[65536];
	size_t done = 0;

	while (done < length) {
		size_t rest = length - done;
		ssize_t more = recv(fd, bytes, rest < sizeof(bytes) ? rest : sizeof(bytes), 0);

		CHECK(more > 0);
		for (ssize_t i = 0; i < more; i++)
			SAME(bytes[i], (char)(done + i));
		done += more;
	}
}

void kit_lock(struct pair *pair)
{
	struct libsoccr_flow flow = { pair->self, pair->peer };

	pair->lock = libsoccr_lock(&flow, 1, 0);
	CHECK(pair->lock);
}

void kit_unlock(struct pair *pair)
{
	if (pair->lock)
		SAME(libsoccr_unlock(pair->lock), 0);
	pair->lock = NULL;
}

struct saved kit_save(struct pair *pair)
{
	kit_lock(pair);
	return kit_read(pair->here);
}

struct saved kit_read(int fd)
{
	struct libsoccr_sk *sk = libsoccr_pause(fd);
	struct saved saved;

	CHECK(sk);
	SAME(libsoccr_save(sk, &saved.data, sizeof(saved.data)), sizeof(saved.data));
	saved.receive_queue = libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, SOCCR_MEM_EXCL);
	saved.send_queue = libsoccr_get_queue_bytes(sk, TCP_SEND_QUEUE, SOCCR_MEM_EXCL);
	CHECK(saved.receive_queue && saved.send_queue);
	libsoccr_release(sk);
	return saved;
}

struct libsoccr_sk *kit_fresh(struct pair *pair)
{
	struct libsoccr_sk *sk;

	pair->here = kit_socket(&pair->self);
	sk = libsoccr_pause(pair->here);
	CHECK(sk);
	SAME(libsoccr_set_addr(sk, 1, &pair->self, 0), 0);
	SAME(libsoccr_set_addr(sk, 0, &pair->peer, 0), 0);
	return sk;
}

struct libsoccr_sk *kit_restore(struct pair *pair, struct saved *saved)
{
	struct libsoccr_sk *sk = kit_fresh(pair);

	SAME(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, saved->receive_queue, SOCCR_MEM_EXCL), 0);
	SAME(libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, saved->send_queue, SOCCR_MEM_EXCL), 0);
	SAME(libsoccr_restore(sk, &saved->data, sizeof(saved->data)), 0);
	kit_unlock(pair);
	return sk;
}

struct saved kit_move(struct pair *pair)
{
	struct saved saved = kit_save(pair);
	struct libsoccr_sk *sk;

	close(pair->here);
	sk = kit_restore(pair, &saved);
	SAME(kit_option(pair->here, IPPROTO_TCP, TCP_REPAIR), saved.data.state != TCP_SYN_SENT);
	libsoccr_resume(sk);
	SAME(kit_option(pair->here, IPPROTO_TCP, TCP_REPAIR), 0);
	return saved;
}

struct libsoccr_sk *kit_pause(struct pair *pair)
{
	struct libsoccr_sk *sk;

	*pair = kit_connect(IPV4);
	sk = libsoccr_pause(pair->here);
	CHECK(sk);
	return sk;
}

int kit_set_queue(struct libsoccr_sk *sk, int queue, char *bytes)
{
	return libsoccr_set_queue_bytes(sk, queue, bytes, 0);
}

void kit_talk(struct pair *pair)
{
	kit_send(pair->there, "ping", 4);
	kit_expect(pair->here, "ping", 4);
	kit_send(pair->here, "pong", 4);
	kit_expect(pair->there, "pong", 4);
}

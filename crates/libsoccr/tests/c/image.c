/* Whole connections as bytes: what the command does, from C. */
#include "kit.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

/* Locks a connection, writes it, and closes its socket. */
static void write_away(struct pair *pair, int image)
{
	struct libsoccr_sk *sk;

	kit_lock(pair);
	sk = libsoccr_pause(pair->here);
	CHECK(sk);
	SAME(libsoccr_write(sk, image), 0);
	libsoccr_release(sk);
	close(pair->here);
}

static struct libsoccr_sk *read_back(int image)
{
	struct libsoccr_sk *sk;

	SAME(lseek(image, 0, SEEK_SET), 0);
	sk = libsoccr_read(image);
	CHECK(sk);
	return sk;
}

static int descriptors(void)
{
	int count = 0;

	for (int fd = 0; fd < 4096; fd++)
		count += fcntl(fd, F_GETFD) >= 0;
	return count;
}

static void moves(enum family family)
{
	int image = memfd_create("image", MFD_CLOEXEC);
	struct pair pair = kit_connect(family);
	union libsoccr_addr *peer;
	struct libsoccr_sk *sk;
	int before = descriptors();

	kit_set_option(pair.here, IPPROTO_TCP, TCP_KEEPIDLE, 77);
	kit_set_option(pair.here, SOL_SOCKET, SO_REUSEADDR, 1);
	kit_send(pair.there, "unread", 6);
	kit_wait_unread(pair.here, 6);
	kit_deafen(pair.there);
	kit_send(pair.here, "unacknowledged", 14);
	write_away(&pair, image);

	sk = read_back(image);
	peer = libsoccr_get_addr(sk, 0, 0);
	SAME(peer->v4.sin_port, pair.peer.v4.sin_port);
	pair.here = libsoccr_open(sk);
	CHECK(pair.here >= 0);
	SAME(fcntl(pair.here, F_GETFD), FD_CLOEXEC);
	SAME(kit_option(pair.here, IPPROTO_TCP, TCP_REPAIR), 1);
	SAME(libsoccr_open(sk), -1);
	kit_unlock(&pair);
	libsoccr_resume(sk);
	/* A new socket in the place of the old one; nothing of what brings the congestion window back. */
	SAME(descriptors(), before);
	SAME(kit_option(pair.here, IPPROTO_TCP, TCP_REPAIR), 0);
	SAME(kit_option(pair.here, IPPROTO_TCP, TCP_KEEPIDLE), 77);
	SAME(kit_option(pair.here, SOL_SOCKET, SO_REUSEADDR), 1);
	kit_hear(pair.there);
	kit_expect(pair.here, "unread", 6);
	kit_expect(pair.there, "unacknowledged", 14);
	kit_talk(&pair);
}

static void a_connection_moves_in_an_image(void)
{
	moves(IPV4);
}

static void a_connection_moves_in_an_image_over_ipv6(void)
{
	moves(IPV6);
}

/* The kernel has forgotten the peer of a connection in CLOSE. */
static void ended(struct pair pair, int error)
{
	int image = memfd_create("image", MFD_CLOEXEC);
	struct libsoccr_sk *sk = libsoccr_pause(pair.here);
	char byte;

	CHECK(!libsoccr_get_addr(sk, 0, 0));
	kit_error_has(sk, "libsoccr_set_addr");
	SAME(libsoccr_write(sk, image), -1);
	kit_error_has(sk, "libsoccr_set_addr");
	SAME(errno, EOPNOTSUPP);
	SAME(libsoccr_set_addr(sk, 0, &pair.peer, 0), 0);
	SAME(libsoccr_write(sk, image), 0);
	libsoccr_release(sk);
	close(pair.here);

	sk = read_back(image);
	pair.here = libsoccr_open(sk);
	CHECK(pair.here >= 0);
	libsoccr_resume(sk);
	kit_wait_state(pair.here, TCP_CLOSE);
	kit_expect(pair.here, "unread", 6);
	SAME(recv(pair.here, &byte, 1, 0), error ? -1 : 0);
	if (error)
		SAME(errno, error);
}

static void a_connection_that_was_reset_moves_in_an_image(void)
{
	struct pair pair = kit_connect(IPV4);
	struct linger reset = { .l_onoff = 1 };

	kit_send(pair.there, "unread", 6);
	kit_wait_unread(pair.here, 6);
	SAME(setsockopt(pair.there, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)), 0);
	close(pair.there);
	kit_wait_state(pair.here, TCP_CLOSE);
	ended(pair, ECONNRESET);
}

static void a_connection_that_has_ended_moves_in_an_image(void)
{
	struct pair pair = kit_connect(IPV4);

	kit_send(pair.there, "unread", 6);
	shutdown(pair.there, SHUT_WR);
	kit_wait_state(pair.here, TCP_CLOSE_WAIT);
	shutdown(pair.here, SHUT_WR);
	kit_wait_state(pair.here, TCP_CLOSE);
	ended(pair, 0);
}

/* Connection tracking knows a connection by its addresses: they change with those of the socket. */
static void other_addresses_are_set_where_connections_are_tracked(void)
{
	static const char *const elsewhere[] = { "192.0.2.1", "127.0.0.2" };
	int image = memfd_create("image", MFD_CLOEXEC);
	union libsoccr_addr self, is;
	socklen_t length = sizeof(is);
	struct libsoccr_sk *sk;
	struct pair pair;

	if (system("nft --version >/dev/null 2>&1")) {
		fputs("SKIPPED: nft is not installed\n", stderr);
		return;
	}
	SAME(system("nft 'add table ip t; add chain ip t c { type filter hook input priority 0; };"
		    "add rule ip t c ct state established accept'"), 0);
	/* Our end has begun it: that is more than a host assumes. */
	pair = kit_connect(IPV4);
	kit_talk(&pair);
	write_away(&pair, image);
	kit_unlock(&pair);

	sk = read_back(image);
	/* The first is not configured here. */
	for (int i = 0; i < 2; i++) {
		self = kit_address(elsewhere[i], ntohs(pair.self.v4.sin_port));
		SAME(libsoccr_set_addr(sk, 1, &self, 0), 0);
		pair.here = libsoccr_open(sk);
		if (i == 0)
			kit_error_has(sk, "EADDRNOTAVAIL");
	}
	CHECK(pair.here >= 0);
	SAME(getsockname(pair.here, &is.sa, &length), 0);
	SAME(is.v4.sin_addr.s_addr, self.v4.sin_addr.s_addr);
	libsoccr_release(sk);
}

static void memory_of_what_is_read(void)
{
	int image = memfd_create("image", MFD_CLOEXEC);
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_sk_data data;
	struct libsoccr_sk *sk;

	kit_send(pair.there, "unread", 6);
	kit_wait_unread(pair.here, 6);
	write_away(&pair, image);
	sk = read_back(image);
	SAME(libsoccr_save(sk, &data, sizeof(data)), -1);
	kit_error_has(sk, "libsoccr_open");
	libsoccr_resume(sk);
	kit_error_has(NULL, "libsoccr_open");
	libsoccr_release(read_back(image));
	kit_unlock(&pair);
}

static void what_is_no_image_is_refused(void)
{
	int file = memfd_create("image", MFD_CLOEXEC);
	struct pair pair;
	int ends[2];

	CHECK(!libsoccr_read(-1));
	SAME(errno, EINVAL);
	CHECK(!libsoccr_read(4000));
	SAME(errno, EBADF);
	SAME(write(file, "something else altogether", 25), 25);
	SAME(lseek(file, 0, SEEK_SET), 0);
	CHECK(!libsoccr_read(file));
	SAME(errno, EBADMSG);
	SAME(libsoccr_last_kind(NULL), SOCCR_REFUSED);

	/* A connection that cannot be written goes on. */
	pair = kit_connect(IPV4);
	SAME(pipe(ends), 0);
	struct libsoccr_sk *sk = libsoccr_pause(pair.here);
	SAME(libsoccr_write(sk, ends[0]), -1);
	SAME(errno, EBADF);
	libsoccr_resume(sk);
	kit_talk(&pair);
}

/* Writes to a pipe that nobody reads: it is told, and neither ends the process nor is left for it. */
static void write_in_vain(struct libsoccr_sk *sk)
{
	sigset_t before, after, pending;
	int ends[2];

	SAME(pipe(ends), 0);
	close(ends[0]);
	SAME(pthread_sigmask(SIG_BLOCK, NULL, &before), 0);
	SAME(libsoccr_write(sk, ends[1]), -1);
	SAME(errno, EPIPE);
	SAME(libsoccr_last_kind(sk), SOCCR_SYSTEM);
	SAME(pthread_sigmask(SIG_BLOCK, NULL, &after), 0);
	for (int signal = 1; signal < NSIG; signal++)
		SAME(sigismember(&after, signal), sigismember(&before, signal));
	SAME(sigpending(&pending), 0);
	SAME(sigismember(&pending, SIGPIPE), 0);
	close(ends[1]);
}

static void a_pipe_without_a_reader_is_a_failure(void)
{
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_sk *sk = libsoccr_pause(pair.here);
	sigset_t pipe_signal, pending;

	write_in_vain(sk);
	signal(SIGPIPE, SIG_IGN);
	write_in_vain(sk);
	signal(SIGPIPE, SIG_DFL);

	/* The program blocks it; then it has got one that is not ours. */
	sigemptyset(&pipe_signal);
	sigaddset(&pipe_signal, SIGPIPE);
	SAME(pthread_sigmask(SIG_BLOCK, &pipe_signal, NULL), 0);
	write_in_vain(sk);
	raise(SIGPIPE);
	SAME(libsoccr_write(sk, memfd_create("image", MFD_CLOEXEC)), 0);
	SAME(sigpending(&pending), 0);
	SAME(sigismember(&pending, SIGPIPE), 1);

	libsoccr_resume(sk);
	kit_talk(&pair);
}

/* For other readers: the image goes into the file that IMAGE names. */
static void a_file_for_others(void)
{
	struct pair pair = kit_connect(IPV4);
	int file = open(getenv("IMAGE") ? getenv("IMAGE") : "/dev/null", O_WRONLY | O_CREAT | O_TRUNC, 0600);

	kit_send(pair.there, "unread", 6);
	kit_wait_unread(pair.here, 6);
	write_away(&pair, file);
	kit_unlock(&pair);
}

/* fcntl(2): the locks of a process end when it closes any descriptor of the file. */
static void the_locks_on_the_file_stay(void)
{
	char name[] = "/tmp/soccr-XXXXXX";
	int image = mkstemp(name), other = open(name, O_RDWR);
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	struct pair pair = kit_connect(IPV4);
	int status;

	unlink(name);
	CHECK(image >= 0 && other >= 0);
	SAME(fcntl(image, F_SETLK, &lock), 0);
	write_away(&pair, image);
	kit_unlock(&pair);
	libsoccr_release(read_back(image));
	if (fork() == 0) {
		struct flock wanted = { .l_type = F_WRLCK, .l_whence = SEEK_SET };

		fcntl(other, F_GETLK, &wanted);
		_exit(wanted.l_type == F_WRLCK ? 0 : 1);
	}
	CHECK(wait(&status) > 0);
	SAME(status, 0);
}

static void *read_image(void *image)
{
	libsoccr_release(libsoccr_read(*(int *)image));
	return NULL;
}

static int logged, cut_off;

/* Cancelled threads would end in here, as in most of stdio. */
static void log_line(unsigned int level, const char *format, ...)
{
	(void)level, (void)format;
	logged++;
	cut_off++;
	pthread_testcancel();
	cut_off--;
}

/* It waits in read(2), where cancelled threads end. */
static void a_cancelled_thread_ends_behind_the_call(void)
{
	int image = memfd_create("image", MFD_CLOEXEC), pipes[2];
	struct pair pair = kit_connect(IPV4);
	char bytes[4096];
	pthread_t reader;
	ssize_t length;

	write_away(&pair, image);
	kit_unlock(&pair);
	SAME(lseek(image, 0, SEEK_SET), 0);
	length = read(image, bytes, sizeof(bytes));
	SAME(pipe(pipes), 0);
	libsoccr_set_log(SOCCR_LOG_DBG, log_line);
	/* What comes second is no image, so that a failure is logged. */
	for (int damage = 0; damage < 2; damage++) {
		bytes[0] ^= damage;
		SAME(pthread_create(&reader, NULL, read_image, &pipes[0]), 0);
		SAME(pthread_cancel(reader), 0);
		SAME(write(pipes[1], bytes, length), length);
		SAME(pthread_join(reader, NULL), 0);
	}
	CHECK(logged > 0);
	SAME(cut_off, 0);
	libsoccr_set_log(0, NULL);
}

static const struct test tests[] = {
	TEST(a_connection_moves_in_an_image),
	TEST(a_connection_moves_in_an_image_over_ipv6),
	TEST(a_connection_that_was_reset_moves_in_an_image),
	TEST(a_connection_that_has_ended_moves_in_an_image),
	TEST(other_addresses_are_set_where_connections_are_tracked),
	TEST(memory_of_what_is_read),
	TEST(what_is_no_image_is_refused),
	TEST(a_pipe_without_a_reader_is_a_failure),
	TEST(a_file_for_others),
	TEST(the_locks_on_the_file_stay),
	TEST(a_cancelled_thread_ends_behind_the_call),
};

KIT_MAIN(tests)

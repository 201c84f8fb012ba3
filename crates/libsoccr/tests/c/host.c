/* A host that does what CRIU does: it dumps with the 68 bytes of the first structure, closes the socket before it asks
 * for the queues, and after a restore ends repair mode by itself. In every state, family and filling of the queues;
 * and after each call the process is what it was before. */
#include "kit.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>

/* The structure as it was at first: 17 numbers. */
enum { FIRST_SIZE = 68 };

/* Descriptors and what they are, signal mask. To be freed. */
static char *look(void)
{
	char *text = calloc(1, 1 << 16);
	DIR *directory = opendir("/proc/self/fd");
	struct dirent *entry;
	sigset_t mask;
	size_t end = 0;

	while ((entry = readdir(directory))) {
		char path[sizeof("/proc/self/fd/") + sizeof(entry->d_name)], target[256] = "";

		if (entry->d_name[0] == '.' || atoi(entry->d_name) == dirfd(directory))
			continue;
		snprintf(path, sizeof(path), "/proc/self/fd/%s", entry->d_name);
		CHECK(readlink(path, target, sizeof(target) - 1) > 0);
		end += sprintf(text + end, "%s %s\n", entry->d_name, target);
	}
	closedir(directory);
	SAME(sigprocmask(SIG_BLOCK, NULL, &mask), 0);
	for (int signal = 1; signal < 32; signal++)
		end += sprintf(text + end, "%d", sigismember(&mask, signal));
	return text;
}

static int entries(const char *path)
{
	DIR *directory = opendir(path);
	int count = -2;

	while (readdir(directory))
		count++;
	closedir(directory);
	return count;
}

static int descriptors(void)
{
	return entries("/proc/self/fd");
}

static const int UNTOUCHED = 4242;

static void looks_like(char *before, const char *call)
{
	int left = errno;
	char *after = look();

	if (strcmp(before, after)) {
		fprintf(stderr, "%s\nbefore:\n%s\nafter:\n%s\n", call, before, after);
		exit(1);
	}
	SAME(left, UNTOUCHED);
	/* One that has just ended may be listed for a moment. */
	while (entries("/proc/self/task") != 1)
		usleep(100);
	free(before);
	free(after);
}

/* A call that succeeds and leaves nothing behind, not even in errno. */
#define QUIET(call)                                                                                        \
	({                                                                                                 \
		char *before = look();                                                                     \
		errno = UNTOUCHED;                                                                         \
		__typeof__(call) result = (call);                                                          \
		looks_like(before, #call);                                                                 \
		result;                                                                                    \
	})
#define QUIETLY(call) QUIET((call, 0))

enum queues { EMPTY, UNREAD, UNACKNOWLEDGED, UNSENT, BOTH, KINDS };

static const char unread[] = "unread", unacknowledged[] = "unacknowledged";

static int has_unread(enum queues queues)
{
	return queues == UNREAD || queues == BOTH;
}

static int is_possible(int state, enum queues queues)
{
	if (state == TCP_SYN_SENT)
		return queues == EMPTY;
	if (state == TCP_FIN_WAIT2 || state == TCP_CLOSE)
		return queues == EMPTY || queues == UNREAD;
	return 1;
}

static int has_received_fin(int state)
{
	return state == TCP_CLOSE_WAIT || state == TCP_LAST_ACK || state == TCP_CLOSING || state == TCP_CLOSE;
}

static int has_sent_fin(int state)
{
	return state != TCP_ESTABLISHED && state != TCP_CLOSE_WAIT;
}

/* The peer must not acknowledge what `here` sends. */
static int is_deaf(int state, enum queues queues)
{
	return queues >= UNACKNOWLEDGED || state == TCP_SYN_SENT || state == TCP_FIN_WAIT1 ||
	       state == TCP_CLOSING || state == TCP_LAST_ACK;
}

/* A connection in a state, with something in its queues; and how many bytes `here` has written. */
static struct pair make(enum family family, int state, enum queues queues, size_t *written)
{
	struct pair pair;

	*written = 0;
	if (state == TCP_SYN_SENT)
		return kit_pair(family, state);
	pair = kit_connect(family);
	kit_set_option(pair.here, SOL_SOCKET, SO_SNDBUF, 200000);
	if (has_unread(queues)) {
		kit_send(pair.there, unread, sizeof(unread));
		kit_wait_unread(pair.here, sizeof(unread));
	}
	if (has_received_fin(state) && state != TCP_CLOSING) {
		shutdown(pair.there, SHUT_WR);
		kit_wait_state(pair.here, TCP_CLOSE_WAIT);
		kit_wait_state(pair.there, TCP_FIN_WAIT2);
	}
	if (is_deaf(state, queues))
		kit_deafen(pair.there);
	if (queues == UNACKNOWLEDGED) {
		kit_send(pair.here, unacknowledged, sizeof(unacknowledged));
		*written = sizeof(unacknowledged);
	} else if (queues > UNACKNOWLEDGED) {
		*written = kit_fill(pair.here);
	}
	if (has_sent_fin(state))
		shutdown(pair.here, SHUT_WR);
	if (state == TCP_CLOSING)
		shutdown(pair.there, SHUT_WR);
	kit_wait_state(pair.here, state);
	return pair;
}

static struct saved dump(struct pair *pair, unsigned size)
{
	struct libsoccr_sk *sk = QUIET(libsoccr_pause(pair->here));
	struct saved saved;

	memset(&saved, 0, sizeof(saved));
	SAME(QUIET(libsoccr_save(sk, &saved.data, size)), size);
	close(pair->here);
	if (saved.data.inq_len)
		saved.receive_queue = QUIET(libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, SOCCR_MEM_EXCL));
	if (saved.data.outq_len)
		saved.send_queue = QUIET(libsoccr_get_queue_bytes(sk, TCP_SEND_QUEUE, SOCCR_MEM_EXCL));
	QUIETLY(libsoccr_release(sk));
	return saved;
}

/* The host ends repair mode by itself, or leaves that to the library. */
static void restore(struct pair *pair, struct saved *saved, unsigned size, int by_itself)
{
	struct libsoccr_sk *sk;

	pair->here = kit_socket(&pair->self);
	sk = QUIET(libsoccr_pause(pair->here));
	SAME(QUIET(libsoccr_set_addr(sk, 1, &pair->self, 0)), 0);
	SAME(QUIET(libsoccr_set_addr(sk, 0, &pair->peer, 0)), 0);
	if (saved->data.inq_len)
		SAME(QUIET(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, saved->receive_queue, SOCCR_MEM_EXCL)), 0);
	if (saved->data.outq_len)
		SAME(QUIET(libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, saved->send_queue, SOCCR_MEM_EXCL)), 0);
	SAME(QUIET(libsoccr_restore(sk, &saved->data, size)), 0);
	kit_unlock(pair);
	if (by_itself) {
		QUIETLY(libsoccr_release(sk));
		kit_set_option(pair->here, IPPROTO_TCP, TCP_REPAIR, 0);
	} else {
		QUIETLY(libsoccr_resume(sk));
	}
}

/* What was on its way arrives, and the connection goes on as far as its state lets it. */
static void goes_on(struct pair *pair, int state, enum queues queues, size_t written)
{
	SAME(kit_state(pair->here), state);
	if (is_deaf(state, queues))
		kit_hear(pair->there);
	if (state == TCP_SYN_SENT) {
		int listener = pair->there;

		pair->there = accept(listener, NULL, NULL);
		CHECK(pair->there >= 0);
		close(listener);
		kit_talk(pair);
		return;
	}
	if (queues == UNACKNOWLEDGED)
		kit_expect(pair->there, unacknowledged, written);
	else
		kit_expect_filling(pair->there, written);
	if (has_unread(queues))
		kit_expect(pair->here, unread, sizeof(unread));
	if (has_received_fin(state)) {
		kit_expect_end(pair->here);
	} else {
		kit_send(pair->there, "more", 4);
		kit_expect(pair->here, "more", 4);
	}
	if (has_sent_fin(state)) {
		kit_expect_end(pair->there);
	} else {
		kit_send(pair->here, "answer", 6);
		kit_expect(pair->there, "answer", 6);
	}
}

/* CRIU knows the first structure, and ends repair mode by itself; others do so with all of it. */
static void moves(enum family family, int state)
{
	for (int kind = 0; kind < 4 * KINDS; kind++) {
		unsigned size = kind & 1 ? FIRST_SIZE : sizeof(struct libsoccr_sk_data);
		int by_itself = kind & 2;
		enum queues queues = kind / 4;
		struct pair pair;
		struct saved saved;
		size_t written;
		int before;

		if (!is_possible(state, queues))
			continue;
		pair = make(family, state, queues, &written);
		before = descriptors();
		kit_lock(&pair);
		saved = dump(&pair, size);
		SAME(saved.data.state, state);
		SAME(saved.data.inq_len, has_unread(queues) ? sizeof(unread) : 0);
		SAME(saved.data.outq_len, written);
		SAME(saved.data.unsq_len > 0, queues > UNACKNOWLEDGED);
		restore(&pair, &saved, size, by_itself);
		/* The socket is another one, and the lock has gone. */
		SAME(descriptors(), before);
		goes_on(&pair, state, queues, written);
		close(pair.here);
		close(pair.there);
	}
}

#define FAMILIES(STATE, name)                                                                              \
	static void name##_over_ipv4(void)                                                                 \
	{                                                                                                  \
		moves(IPV4, STATE);                                                                        \
	}                                                                                                  \
	static void name##_over_ipv6(void)                                                                 \
	{                                                                                                  \
		moves(IPV6, STATE);                                                                        \
	}                                                                                                  \
	static void name##_over_mapped_ipv4(void)                                                          \
	{                                                                                                  \
		moves(MAPPED, STATE);                                                                      \
	}

FAMILIES(TCP_ESTABLISHED, established)
FAMILIES(TCP_SYN_SENT, syn_sent)
FAMILIES(TCP_FIN_WAIT1, fin_wait1)
FAMILIES(TCP_FIN_WAIT2, fin_wait2)
FAMILIES(TCP_CLOSE_WAIT, close_wait)
FAMILIES(TCP_LAST_ACK, last_ack)
FAMILIES(TCP_CLOSING, closing)
FAMILIES(TCP_CLOSE, close)

/* How many descriptors in a range are closed on exec; behind 400, where this program has none, all of them. */
static int closed_on_exec(int first, int end)
{
	int count = 0;

	for (int fd = first; fd < end; fd++) {
		int flags = fcntl(fd, F_GETFD);

		count += flags == FD_CLOEXEC;
		CHECK(flags != 0 || fd < 400);
	}
	return count;
}

/* What a lock needs is above the numbers of its host, and does not reach a program that the host becomes. */
static void a_lock_keeps_out_of_the_way(void)
{
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_flow flow = { pair.self, pair.peer };

	for (unsigned flags = 0; flags <= SOCCR_LOCK_HOLD; flags++) {
		char *before = look();
		int low = closed_on_exec(0, 400);
		struct libsoccr_lock *lock = libsoccr_lock(&flow, 1, flags);

		CHECK(lock);
		SAME(closed_on_exec(0, 400), low);
		CHECK(closed_on_exec(400, 4096) > 0);
		errno = UNTOUCHED;
		SAME(libsoccr_unlock(lock), 0);
		looks_like(before, "libsoccr_unlock");
	}
}

static volatile sig_atomic_t taken;

static void take(int signal)
{
	taken = signal;
}

/* A signal that the host blocks while the lock has a thread waits for the host. */
static void a_lock_takes_no_signal(void)
{
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_flow flow = { pair.self, pair.peer };
	struct libsoccr_lock *lock;
	sigset_t set, before;

	signal(SIGUSR1, take);
	lock = libsoccr_lock(&flow, 1, SOCCR_LOCK_HOLD);
	CHECK(lock);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	SAME(sigprocmask(SIG_BLOCK, &set, &before), 0);
	SAME(sigismember(&before, SIGUSR1), 0);
	SAME(kill(getpid(), SIGUSR1), 0);
	/* Its thread would have taken the signal before it ended. */
	SAME(libsoccr_unlock(lock), 0);
	SAME(taken, 0);
	SAME(sigpending(&set), 0);
	SAME(sigismember(&set, SIGUSR1), 1);
	SAME(sigprocmask(SIG_SETMASK, &before, NULL), 0);
	SAME(taken, SIGUSR1);
}

/* The number may be another socket's by now, and that one is spared. */
static void a_descriptor_that_is_another_socket_is_spared(void)
{
	struct pair pair = kit_connect(IPV4), other = kit_connect(IPV4);
	struct libsoccr_sk_data data;
	struct libsoccr_sk *sk = libsoccr_pause(pair.here);

	SAME(libsoccr_save(sk, &data, FIRST_SIZE), FIRST_SIZE);
	SAME(dup2(other.here, pair.here), pair.here);
	kit_set_option(other.here, IPPROTO_TCP, TCP_REPAIR, 1);
	CHECK(!libsoccr_get_addr(sk, 1, 0));
	kit_error_has(sk, "closed");
	libsoccr_resume(sk);
	kit_error_has(NULL, "closed");
	SAME(kit_option(other.here, IPPROTO_TCP, TCP_REPAIR), 1);
}

/* A failure says why in errno too, and leaves as little behind. */
static void a_failure_leaves_its_errno(void)
{
	char *before = look();
	int fd;

	CHECK(!libsoccr_pause(4095));
	SAME(errno, EBADF);
	SAME(libsoccr_last_errno(NULL), EBADF);
	SAME(libsoccr_last_kind(NULL), SOCCR_SYSTEM);
	CHECK(!libsoccr_pause(-1));
	SAME(errno, EINVAL);
	SAME(libsoccr_last_kind(NULL), SOCCR_INVALID);
	errno = UNTOUCHED;
	looks_like(before, "failed calls");

	fd = kit_listen(&(union libsoccr_addr){ .v4.sin_family = AF_INET });
	before = look();
	CHECK(!libsoccr_pause(fd));
	SAME(errno, EOPNOTSUPP);
	SAME(libsoccr_last_kind(NULL), SOCCR_REFUSED);
	errno = UNTOUCHED;
	looks_like(before, "a refusal");
}

/* A handle is memory alone: a child has it as well. */
static void a_child_goes_on_with_what_its_parent_has_begun(void)
{
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_sk_data data;
	struct libsoccr_sk *sk;
	int status;

	kit_send(pair.there, unread, sizeof(unread));
	kit_wait_unread(pair.here, sizeof(unread));
	sk = libsoccr_pause(pair.here);
	SAME(libsoccr_save(sk, &data, FIRST_SIZE), FIRST_SIZE);
	if (fork() == 0) {
		SAME(memcmp(libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 0), unread, sizeof(unread)), 0);
		libsoccr_resume(sk);
		exit(0);
	}
	SAME(wait(&status) > 0 && status == 0, 1);
	libsoccr_release(sk);
	kit_expect(pair.here, unread, sizeof(unread));
	kit_talk(&pair);
}

static void fail_at_exit(void)
{
	errno = 0;
	CHECK(!libsoccr_pause(-1));
	SAME(errno, EINVAL);
	CHECK(!libsoccr_last_error(NULL));
	SAME(libsoccr_last_errno(NULL), 0);
}

/* glibc ends the variables of the thread before it calls the handlers. */
static void a_failure_while_the_process_exits_is_one(void)
{
	int status;

	if (fork() == 0) {
		CHECK(!libsoccr_pause(-1));
		kit_error_has(NULL, "descriptor");
		atexit(fail_at_exit);
		exit(7);
	}
	CHECK(wait(&status) > 0 && WIFEXITED(status));
	SAME(WEXITSTATUS(status), 7);
}

#define TESTS(name) TEST(name##_over_ipv4), TEST(name##_over_ipv6), TEST(name##_over_mapped_ipv4)

static const struct test tests[] = {
	TESTS(established),
	TESTS(syn_sent),
	TESTS(fin_wait1),
	TESTS(fin_wait2),
	TESTS(close_wait),
	TESTS(last_ack),
	TESTS(closing),
	TESTS(close),
	TEST(a_lock_keeps_out_of_the_way),
	TEST(a_lock_takes_no_signal),
	TEST(a_descriptor_that_is_another_socket_is_spared),
	TEST(a_failure_leaves_its_errno),
	TEST(a_failure_while_the_process_exits_is_one),
	TEST(a_child_goes_on_with_what_its_parent_has_begun),
};

KIT_MAIN(tests)

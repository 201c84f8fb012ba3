/* The border of the library: arguments, sizes, ownership of memory, errors and the log. */
#include "kit.h"

#include <malloc.h>
#include <pthread.h>
#include <stdarg.h>

/* The lines that were logged, one after the other. */
static char logged[65536];
static unsigned int levels;
static int lines;
static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;

static void log_line(unsigned int level, const char *format, ...)
{
	va_list arguments;
	size_t length;

	va_start(arguments, format);
	pthread_mutex_lock(&log_lock);
	length = strlen(logged);
	vsnprintf(logged + length, sizeof(logged) - length, format, arguments);
	levels |= 1u << level;
	lines++;
	pthread_mutex_unlock(&log_lock);
	va_end(arguments);
}

static void null_is_an_error_and_a_line(void)
{
	struct libsoccr_sk_data data;
	union libsoccr_addr address = kit_address("127.0.0.1", 1);
	struct pair pair;
	struct libsoccr_sk *sk = kit_pause(&pair);
	int expected = 0;

	libsoccr_set_log(SOCCR_LOG_ERR, log_line);
#define FAILS(call)                                                                                        \
	do {                                                                                               \
		CHECK(call);                                                                               \
		SAME(lines, ++expected);                                                                   \
		kit_error_has(NULL, "NULL");                                                               \
	} while (0)
	FAILS(libsoccr_save(NULL, &data, sizeof(data)) == -1);
	FAILS(libsoccr_save(sk, NULL, sizeof(data)) == -1);
	FAILS(libsoccr_get_queue_bytes(NULL, TCP_RECV_QUEUE, 0) == NULL);
	FAILS(libsoccr_get_addr(NULL, 1, 0) == NULL);
	FAILS(libsoccr_set_queue_bytes(NULL, TCP_RECV_QUEUE, logged, 0) == -1);
	FAILS(libsoccr_set_addr(NULL, 1, &address, 0) == -1);
	FAILS(libsoccr_set_addr(sk, 1, NULL, 0) == -1);
	FAILS(libsoccr_restore(NULL, &data, sizeof(data)) == -1);
	FAILS(libsoccr_restore(sk, NULL, sizeof(data)) == -1);
	FAILS((libsoccr_resume(NULL), 1));
	FAILS((libsoccr_release(NULL), 1));
#undef FAILS
	libsoccr_set_log(0, NULL);
	libsoccr_resume(sk);
	kit_talk(&pair);
}

static void nonsense_is_an_error(void)
{
	struct libsoccr_sk_data data;
	union libsoccr_addr address;
	struct pair pair;
	struct libsoccr_sk *sk = kit_pause(&pair);
	int pipes[2];

	CHECK(!libsoccr_pause(-1));
	CHECK(!libsoccr_pause(12345));
	SAME(pipe(pipes), 0);
	CHECK(!libsoccr_pause(pipes[0]));
	SAME(libsoccr_save(sk, &data, sizeof(data)), sizeof(data));
	for (int queue = -1; queue <= 3; queue++) {
		if (queue == TCP_RECV_QUEUE || queue == TCP_SEND_QUEUE)
			continue;
		CHECK(!libsoccr_get_queue_bytes(sk, queue, 0));
		SAME(libsoccr_set_queue_bytes(sk, queue, logged, 0), -1);
	}
	CHECK(!libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 2));
	CHECK(!libsoccr_get_addr(sk, 1, 2));
	SAME(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, logged, 2), -1);
	memset(&address, 0, sizeof(address));
	address.sa.sa_family = AF_UNIX;
	SAME(libsoccr_set_addr(sk, 1, &address, 0), -1);
	kit_error_has(sk, "address family");
	libsoccr_resume(sk);
	kit_talk(&pair);
}

static void a_queue_needs_a_save_first(void)
{
	struct pair pair;
	struct libsoccr_sk *sk = kit_pause(&pair);

	CHECK(!libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 0));
	kit_error_has(sk, "libsoccr_save");
	libsoccr_resume(sk);
}

static void data_may_be_larger_but_not_smaller(void)
{
	struct {
		struct libsoccr_sk_data data;
		unsigned char newer[32];
	} large;
	struct libsoccr_sk_data exact, *huge;
	struct pair pair;
	struct libsoccr_sk *sk = kit_pause(&pair);

	memset(&large, 0xff, sizeof(large));
	SAME(libsoccr_save(sk, &large.data, 67), -1);
	SAME(large.data.state, 0xffffffff);
	SAME(libsoccr_save(sk, &large.data, 0), -1);
	SAME(libsoccr_save(sk, &large.data, (unsigned)-1), -1);
	SAME(large.newer[31], 0xff);
	SAME(libsoccr_save(sk, &large.data, sizeof(large)), sizeof(large.data));
	for (size_t i = 0; i < sizeof(large.newer); i++)
		SAME(large.newer[i], 0);
	/* However large: the structure may grow, and nobody knows how far. */
	huge = malloc(1 << 20);
	CHECK(huge);
	SAME(libsoccr_save(sk, huge, 1 << 20), sizeof(*huge));
	free(huge);
	SAME(libsoccr_save(sk, &exact, sizeof(exact)), sizeof(exact));
	exact.timestamp = large.data.timestamp;
	SAME(memcmp(&exact, &large.data, sizeof(exact)), 0);
	libsoccr_release(sk);
	close(pair.here);

	sk = kit_fresh(&pair);
	SAME(libsoccr_restore(sk, &large.data, 67), -1);
	SAME(libsoccr_restore(sk, &large.data, sizeof(large)), 0);
	libsoccr_resume(sk);
	kit_talk(&pair);
}

/* For valgrind: who owns the memory of a get call. */
static void memory_that_is_got(void)
{
	struct libsoccr_sk_data data;
	struct libsoccr_sk *sk;
	struct pair pair = kit_connect(IPV4);
	char *lent, *kept, *again;
	union libsoccr_addr *address;

	kit_send(pair.there, "unread", 6);
	kit_wait_unread(pair.here, 6);
	sk = libsoccr_pause(pair.here);
	SAME(libsoccr_save(sk, &data, sizeof(data)), sizeof(data));
	lent = libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 0);
	CHECK(lent && lent == libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 0));
	/* The same memory, now the caller's; there is no other before the next save. */
	kept = libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, SOCCR_MEM_EXCL);
	CHECK(kept == lent);
	CHECK(!libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 0));
	kit_error_has(sk, "given away");
	SAME(libsoccr_save(sk, &data, sizeof(data)), sizeof(data));
	again = libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 0);
	CHECK(again && again != kept);
	/* What was lent stays readable after another save. */
	SAME(libsoccr_save(sk, &data, sizeof(data)), sizeof(data));
	CHECK(libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 0) != again);
	SAME(memcmp(again, "unread", 6), 0);
	SAME(memcmp(kept, "unread", 6), 0);
	free(kept);
	/* An empty queue is no failure. */
	CHECK(libsoccr_get_queue_bytes(sk, TCP_SEND_QUEUE, 0));
	free(libsoccr_get_queue_bytes(sk, TCP_SEND_QUEUE, SOCCR_MEM_EXCL));
	CHECK(libsoccr_get_addr(sk, 1, 0));
	address = libsoccr_get_addr(sk, 0, SOCCR_MEM_EXCL);
	libsoccr_resume(sk);
	SAME(address->sa.sa_family, AF_INET);
	free(address);
	kit_expect(pair.here, "unread", 6);
}

static char *on_the_heap(const char *text)
{
	return strcpy(malloc(strlen(text) + 1), text);
}

/* For valgrind: who owns the memory of a set call. */
static void memory_that_is_set(void)
{
	struct pair pair = kit_connect(IPV4);
	union libsoccr_addr *address = malloc(sizeof(*address));
	struct libsoccr_sk *sk;
	struct saved saved;
	char *same = on_the_heap("twice");
	char *mine = on_the_heap("mine");

	kit_send(pair.there, "unread", 6);
	kit_wait_unread(pair.here, 6);
	saved = kit_save(&pair);
	close(pair.here);
	sk = kit_fresh(&pair);
	*address = pair.self;
	SAME(libsoccr_set_addr(sk, 1, address, SOCCR_MEM_EXCL), 0);
	/* Given and given, lent after given, given after lent, taken back: each frees what was given before. */
	SAME(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, on_the_heap("first"), SOCCR_MEM_EXCL), 0);
	SAME(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, on_the_heap("second"), SOCCR_MEM_EXCL), 0);
	SAME(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, mine, 0), 0);
	SAME(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, same, SOCCR_MEM_EXCL), 0);
	SAME(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, same, SOCCR_MEM_EXCL), 0);
	SAME(strcmp(same, "twice"), 0);
	SAME(libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, on_the_heap("taken back"), SOCCR_MEM_EXCL), 0);
	SAME(libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, NULL, 0), 0);
	/* A call that fails takes nothing. */
	SAME(libsoccr_set_queue_bytes(sk, 7, mine, SOCCR_MEM_EXCL), -1);
	SAME(strcmp(mine, "mine"), 0);
	free(mine);
	/* Lent, so still ours after the restore. */
	SAME(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, saved.receive_queue, 0), 0);
	SAME(libsoccr_restore(sk, &saved.data, sizeof(saved.data)), 0);
	free(saved.receive_queue);
	free(saved.send_queue);
	kit_unlock(&pair);
	libsoccr_resume(sk);
	kit_expect(pair.here, "unread", 6);
	kit_talk(&pair);
}

/* For valgrind: handles end with what was given to them, restored or not. */
static void memory_of_handles_that_end_early(void)
{
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_sk_data data;
	struct libsoccr_sk *sk = libsoccr_pause(pair.here);

	SAME(libsoccr_save(sk, &data, sizeof(data)), sizeof(data));
	CHECK(libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 0));
	libsoccr_release(sk);
	close(pair.here);
	sk = kit_fresh(&pair);
	SAME(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, on_the_heap("never used"), SOCCR_MEM_EXCL), 0);
	SAME(libsoccr_restore(sk, &data, 1), -1);
	libsoccr_release(sk);
}

/* A host that asks again and again needs the memory of one answer. */
static void saves_do_not_pile_up(void)
{
	enum { MUCH = 1 << 20 };
	static const char bytes[MUCH];
	struct libsoccr_sk_data data;
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_sk *sk;
	size_t after = 0;

	kit_set_option(pair.here, SOL_SOCKET, SO_RCVBUF, 4 * MUCH);
	kit_send(pair.there, bytes, sizeof(bytes) / 4);
	kit_wait_unread(pair.here, sizeof(bytes) / 4);
	sk = libsoccr_pause(pair.here);
	for (int i = 0; i < 50; i++) {
		struct mallinfo2 memory;

		SAME(libsoccr_save(sk, &data, sizeof(data)), sizeof(data));
		memory = mallinfo2();
		if (i == 1)
			after = memory.uordblks + memory.hblkhd;
		if (i > 1)
			CHECK(memory.uordblks + memory.hblkhd < after + MUCH);
	}
	libsoccr_resume(sk);
}

static void fail_too(unsigned int level, const char *format, ...)
{
	(void)level;
	(void)format;
	if (!libsoccr_last_error(NULL) || !strstr(libsoccr_last_error(NULL), "data_size"))
		return;
	libsoccr_read(-1);
}

/* What the callback does is forgotten: errno and the text tell the same failure. */
static void the_last_error_is_that_of_the_last_call(void)
{
	struct libsoccr_sk_data data;
	struct pair pair;
	struct libsoccr_sk *sk = kit_pause(&pair);

	libsoccr_set_log(SOCCR_LOG_ERR, fail_too);
	SAME(libsoccr_save(sk, &data, 3), -1);
	libsoccr_set_log(0, NULL);
	kit_error_has(NULL, "data_size");
	libsoccr_resume(sk);
}

static void an_error_says_step_option_errno_and_remedy(void)
{
	struct pair pair = kit_connect(IPV4), elsewhere = pair;
	struct saved saved = kit_save(&pair);
	struct libsoccr_sk *sk;

	elsewhere.self.v4.sin_addr.s_addr = htonl(0xc0000201);
	sk = kit_fresh(&elsewhere);
	SAME(libsoccr_restore(sk, &saved.data, sizeof(saved.data)), -1);
	kit_error_has(sk, "restore: bind: EADDRNOTAVAIL");
	kit_error_has(sk, "address is not configured here");
	libsoccr_release(sk);
	kit_error_has(NULL, "EADDRNOTAVAIL");
}

static void the_log_is_variadic_and_has_levels(void)
{
	struct pair pair;
	struct libsoccr_sk *sk;

	libsoccr_set_log(SOCCR_LOG_ERR, log_line);
	CHECK(!libsoccr_pause(-1));
	SAME(levels, 1u << SOCCR_LOG_ERR);
	SAME(lines, 1);
	SAME(strcmp(logged, "Error (libsoccr): pause: -1 is no descriptor\n"), 0);
	libsoccr_resume(kit_pause(&pair));
	SAME(lines, 1);

	libsoccr_set_log(SOCCR_LOG_DBG, log_line);
	sk = libsoccr_pause(pair.here);
	CHECK(levels & 1u << SOCCR_LOG_DBG);
	/* Plain ASCII, whatever the library says to Rust. */
	CHECK(!libsoccr_pause(pair.here));
	for (const char *character = logged; *character; character++)
		CHECK(*character > 0);
	libsoccr_resume(sk);

	libsoccr_set_log(SOCCR_LOG_DBG, NULL);
	lines = 0;
	CHECK(!libsoccr_pause(-1));
	SAME(lines, 0);
}

static void *pause_and_fail(void *unused)
{
	(void)unused;
	for (int i = 0; i < 200; i++) {
		CHECK(!libsoccr_pause(-1));
		libsoccr_set_log(SOCCR_LOG_ERR, log_line);
	}
	return NULL;
}

static void the_log_may_be_used_by_all_threads(void)
{
	pthread_t threads[4];

	libsoccr_set_log(SOCCR_LOG_ERR, log_line);
	for (int i = 0; i < 4; i++)
		SAME(pthread_create(&threads[i], NULL, pause_and_fail, NULL), 0);
	for (int i = 0; i < 4; i++)
		SAME(pthread_join(threads[i], NULL), 0);
	SAME(lines, 4 * 200);
}

static struct libsoccr_sk *held;
static struct libsoccr_sk_data data_of_held;
static int nested;

static void log_and_call(unsigned int level, const char *format, ...)
{
	(void)format;
	if (level == SOCCR_LOG_ERR && !nested++) {
		/* It can ask for what it is told of. */
		kit_error_has(NULL, "is no descriptor");
		CHECK(!libsoccr_get_queue_bytes(held, 9, 0));
		kit_error_has(held, "neither TCP_RECV_QUEUE");
	} else if (level == SOCCR_LOG_DBG && held && !nested++) {
		/* It can use what is told of, and end it. */
		SAME(libsoccr_save(held, &data_of_held, sizeof(data_of_held)), sizeof(data_of_held));
		CHECK(libsoccr_get_queue_bytes(held, TCP_RECV_QUEUE, 0));
		libsoccr_resume(held);
	}
}

static void the_log_may_call_the_library(void)
{
	struct pair pair;

	held = kit_pause(&pair);
	libsoccr_set_log(SOCCR_LOG_ERR, log_and_call);
	CHECK(!libsoccr_pause(-1));
	SAME(nested, 2);
	nested = 0;
	libsoccr_set_log(SOCCR_LOG_DBG, log_and_call);
	SAME(libsoccr_save(held, &data_of_held, sizeof(data_of_held)), sizeof(data_of_held));
	libsoccr_set_log(0, NULL);
	kit_talk(&pair);
}

static void log_and_end(unsigned int level, const char *format, ...)
{
	struct libsoccr_sk *sk = held;

	(void)format;
	held = NULL;
	CHECK(sk && level == SOCCR_LOG_ERR);
	kit_error_has(sk, "neither TCP_RECV_QUEUE");
	libsoccr_resume(sk);
}

static void memory_of_a_handle_that_the_log_ends(void)
{
	struct pair pair;

	held = kit_pause(&pair);
	libsoccr_set_log(SOCCR_LOG_ERR, log_and_end);
	CHECK(!libsoccr_get_queue_bytes(held, 9, 0));
	CHECK(!held);
	libsoccr_set_log(0, NULL);
	kit_talk(&pair);
}

static void the_version_is_that_of_the_header(void)
{
	char text[32];

	SAME(strcmp(libsoccr_version(), LIBSOCCR_VERSION), 0);
	snprintf(text, sizeof(text), "%d.%d.%d", LIBSOCCR_VERSION_MAJOR, LIBSOCCR_VERSION_MINOR,
		 LIBSOCCR_VERSION_PATCH);
	SAME(strcmp(text, LIBSOCCR_VERSION), 0);
}

static const struct test tests[] = {
	TEST(null_is_an_error_and_a_line),
	TEST(nonsense_is_an_error),
	TEST(a_queue_needs_a_save_first),
	TEST(data_may_be_larger_but_not_smaller),
	TEST(memory_that_is_got),
	TEST(memory_that_is_set),
	TEST(memory_of_handles_that_end_early),
	TEST(saves_do_not_pile_up),
	TEST(the_last_error_is_that_of_the_last_call),
	TEST(an_error_says_step_option_errno_and_remedy),
	TEST(the_log_is_variadic_and_has_levels),
	TEST(the_log_may_be_used_by_all_threads),
	TEST(the_log_may_call_the_library),
	TEST(memory_of_a_handle_that_the_log_ends),
	TEST(the_version_is_that_of_the_header),
};

KIT_MAIN(tests)

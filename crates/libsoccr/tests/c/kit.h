/* A small kit for tests of the C library: programs of named tests, and connections in every state. */
#ifndef KIT_H
#define KIT_H

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "soccr.h"

/* Ends the test, which has failed. */
#define CHECK(holds)                                                                                       \
	do {                                                                                               \
		if (!(holds))                                                                              \
			kit_fail(__FILE__, __LINE__, #holds);                                              \
	} while (0)

/* Two numbers are the same; shown if not. */
#define SAME(left, right)                                                                                  \
	kit_same(__FILE__, __LINE__, #left " == " #right, (long long)(left), (long long)(right))

struct test {
	const char *name;
	void (*run)(void);
};

#define TEST(name) { #name, name }

/* Without arguments lists the names; with one runs that test. */
int kit_main(int argc, char **argv, const struct test *tests, int count);
#define KIT_MAIN(tests)                                                                                    \
	int main(int argc, char **argv)                                                                    \
	{                                                                                                  \
		return kit_main(argc, argv, tests, (int)(sizeof(tests) / sizeof(*tests)));                 \
	}

void kit_fail(const char *file, int line, const char *what) __attribute__((noreturn));
void kit_same(const char *file, int line, const char *what, long long left, long long right);

/* The error of a handle, or of this thread, names all of this. */
void kit_error_has(const struct libsoccr_sk *sk, const char *text);

/* A connection over lo: `here` is the end that is saved and restored, `there` its peer. */
struct pair {
	int here;
	int there;
	union libsoccr_addr self;
	union libsoccr_addr peer;
	/* While it is being moved. */
	struct libsoccr_lock *lock;
};

enum family { IPV4, IPV6, MAPPED };

socklen_t kit_length(const union libsoccr_addr *address);
/* The address `text` (numeric) and a port; a listener on it. */
union libsoccr_addr kit_address(const char *text, int port);
int kit_listen(union libsoccr_addr *address);

struct pair kit_connect(enum family family);
struct pair kit_connect_to(const char *text);
/* A pair whose `here` is in a state; `there` may be deaf, see kit_hear. */
struct pair kit_pair(enum family family, int state);
/* A fresh socket of the family of an address. */
int kit_socket(const union libsoccr_addr *address);

/* A deaf socket drops all that arrives, without an answer. */
void kit_deafen(int fd);
void kit_hear(int fd);

int kit_state(int fd);
void kit_wait_state(int fd, int state);
int kit_option(int fd, int level, int name);
void kit_set_option(int fd, int level, int name, int value);
/* Everything acknowledged. */
void kit_wait_acknowledged(int fd);
void kit_wait_unread(int fd, int bytes);
/* Gives lo one address more. */
void kit_add_ipv6_address(const char *text);

void kit_send(int fd, const void *bytes, size_t length);
/* Reads exactly these bytes. */
void kit_expect(int fd, const void *bytes, size_t length);
void kit_expect_end(int fd);
/* Writes without waiting until nothing more fits; returns how much did. Byte i is (char)i. */
size_t kit_fill(int fd);
/* Reads `length` bytes of what kit_fill has written. */
void kit_expect_filling(int fd, size_t length);
/* A connection without its addresses. */
struct saved {
	struct libsoccr_sk_data data;
	char *receive_queue;
	char *send_queue;
};

/* Keeps the network quiet around a connection. */
void kit_lock(struct pair *pair);
void kit_unlock(struct pair *pair);
/* Saves a connection, and leaves its socket in repair mode. */
struct saved kit_read(int fd);
/* Locks and saves it. */
struct saved kit_save(struct pair *pair);
/* Pauses pair->here, a fresh socket from now on, and sets its addresses. */
struct libsoccr_sk *kit_fresh(struct pair *pair);
/* Restores a connection onto pair->here, and unlocks it; the queues are given away. */
struct libsoccr_sk *kit_restore(struct pair *pair, struct saved *saved);
/* Moves the connection to another socket, and resumes it there. */
struct saved kit_move(struct pair *pair);

/* Connects a pair, and pauses pair->here. */
struct libsoccr_sk *kit_pause(struct pair *pair);
/* libsoccr_set_queue_bytes of the present interface, for a queue that stays the caller's. */
int kit_set_queue(struct libsoccr_sk *sk, int queue, char *bytes);

/* A message each way. */
void kit_talk(struct pair *pair);

#endif

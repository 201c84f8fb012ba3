/*
 * Measures a libsoccr.a, whoever made it, by the calls of the wiki: `make bench LIBSOCCR=/path/libsoccr.a`.
 *
 * Every line is the median of many connections over lo, in microseconds. Needs no privilege: everything happens in a
 * user and network namespace of its own. `save` and `restore` are about the 17 fields that every libsoccr knows, `restore+`
 * about all that this header has: how fast the connection is afterwards.
 */
#define _GNU_SOURCE
#include <linux/filter.h>
#include <net/if.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "soccr.h"

enum { ROUNDS = 301 };

static void need(int holds, const char *what)
{
	if (holds)
		return;
	perror(what);
	exit(1);
}

static double microseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1e6 + now.tv_nsec / 1e3;
}

static int compare(const void *left, const void *right)
{
	double difference = *(const double *)left - *(const double *)right;

	return (difference > 0) - (difference < 0);
}

static double median(double *values)
{
	qsort(values, ROUNDS, sizeof(*values), compare);
	return values[ROUNDS / 2];
}

static void enter_namespace(void)
{
	struct ifreq lo = { .ifr_name = "lo", .ifr_flags = IFF_UP };
	struct ifreq mtu = { .ifr_name = "lo", .ifr_mtu = 1500 };
	int fd;

	need(unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0, "unshare");
	fd = socket(AF_INET, SOCK_DGRAM, 0);
	need(ioctl(fd, SIOCSIFFLAGS, &lo) == 0, "lo");
	/* Segments as on a network: those of lo are longer than TCP_MAXSEG can tell. */
	need(ioctl(fd, SIOCSIFMTU, &mtu) == 0, "mtu");
	close(fd);
}

static void set_buffer(int fd, int name, int bytes)
{
	need(setsockopt(fd, SOL_SOCKET, name, &bytes, sizeof(bytes)) == 0, "buffer");
}

struct connection {
	int here;
	int there;
	union libsoccr_addr self;
	union libsoccr_addr peer;
};

/* The peer acknowledges nothing from here on. */
static void deafen(int fd)
{
	struct sock_filter nothing = BPF_STMT(BPF_RET | BPF_K, 0);
	struct sock_fprog program = { 1, &nothing };

	need(setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program)) == 0, "SO_ATTACH_FILTER");
}

static void send_all(int fd, const char *bytes, size_t length)
{
	for (size_t done = 0; done < length;) {
		ssize_t more = send(fd, bytes + done, length - done, 0);

		need(more > 0, "send");
		done += more;
	}
}

/*
 * `unread` bytes wait in the receive queue, `unacknowledged` ones in the send queue; with `finished` the peer has sent
 * its FIN.
 */
static struct connection connect_over_lo(int family, size_t unread, size_t unacknowledged, int finished)
{
	struct connection c;
	socklen_t length = sizeof(c.peer);
	int listener = socket(family, SOCK_STREAM, 0);
	char *bytes = calloc(1, unread + unacknowledged + 1);

	memset(&c, 0, sizeof(c));
	c.peer.sa.sa_family = family;
	if (family == AF_INET)
		c.peer.v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	else
		c.peer.v6.sin6_addr = in6addr_loopback;
	need(bind(listener, &c.peer.sa, family == AF_INET ? sizeof(c.peer.v4) : sizeof(c.peer.v6)) == 0, "bind");
	need(listen(listener, 1) == 0, "listen");
	need(getsockname(listener, &c.peer.sa, &length) == 0, "getsockname");
	c.here = socket(family, SOCK_STREAM, 0);
	if (unread)
		set_buffer(c.here, SO_RCVBUF, 2 * unread);
	need(connect(c.here, &c.peer.sa, length) == 0, "connect");
	c.there = accept(listener, NULL, NULL);
	length = sizeof(c.self);
	need(getsockname(c.here, &c.self.sa, &length) == 0, "getsockname");
	close(listener);
	send_all(c.there, bytes, unread);
	if (unacknowledged) {
		deafen(c.there);
		send_all(c.here, bytes, unacknowledged);
	}
	free(bytes);
	if (finished)
		shutdown(c.there, SHUT_WR);
	for (;;) {
		struct tcp_info info;
		int waiting;

		length = sizeof(info);
		need(getsockopt(c.here, IPPROTO_TCP, TCP_INFO, &info, &length) == 0, "TCP_INFO");
		need(ioctl(c.here, FIONREAD, &waiting) == 0, "FIONREAD");
		if ((size_t)waiting == unread && (!finished || info.tcpi_state == TCP_CLOSE_WAIT))
			return c;
	}
}

/* The first 17 fields. */
enum { PLAIN = 17 * sizeof(uint32_t) };
/* Without what this library adds to opt_mask: the bits of tcpi_options. */
enum { PLAIN_OPTIONS = 0xff };

/* Pauses, saves and closes a connection, and restores it, with so much of the data. */
static void move(struct connection *c, int family, unsigned int size, int restore_all, double *save_time, double *restore_time)
{
	struct libsoccr_sk_data data;
	struct libsoccr_sk *sk;
	char *inq = NULL, *outq = NULL;
	double started = microseconds();

	sk = libsoccr_pause(c->here);
	need(sk != NULL, "libsoccr_pause");
	memset(&data, 0, sizeof(data));
	need(libsoccr_save(sk, &data, size) > 0, "libsoccr_save");
	if (data.inq_len)
		inq = libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, SOCCR_MEM_EXCL);
	if (data.outq_len)
		outq = libsoccr_get_queue_bytes(sk, TCP_SEND_QUEUE, SOCCR_MEM_EXCL);
	*save_time = microseconds() - started;
	close(c->here);

	if (!restore_all)
		data.opt_mask &= PLAIN_OPTIONS;
	c->here = socket(family, SOCK_STREAM, 0);
	if (data.inq_len)
		set_buffer(c->here, SO_RCVBUF, 2 * data.inq_len);
	started = microseconds();
	sk = libsoccr_pause(c->here);
	need(sk != NULL, "libsoccr_pause");
	libsoccr_set_addr(sk, 1, &c->self, 0);
	libsoccr_set_addr(sk, 0, &c->peer, 0);
	if (inq)
		libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, inq, SOCCR_MEM_EXCL);
	if (outq)
		libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, outq, SOCCR_MEM_EXCL);
	need(libsoccr_restore(sk, &data, size) == 0, "libsoccr_restore");
	*restore_time = microseconds() - started;

}

static void measure(const char *name, int family, size_t unread, size_t unacknowledged, int finished)
{
	static double save[ROUNDS], restore[ROUNDS], restore_all[ROUNDS];

	for (int i = 0; i < 2 * ROUNDS; i++) {
		struct connection c = connect_over_lo(family, unread, unacknowledged, finished);
		int all = i % 2, off = 0;
		double ignored;

		if (all)
			move(&c, family, sizeof(struct libsoccr_sk_data), 1, &ignored, &restore_all[i / 2]);
		else
			move(&c, family, PLAIN, 0, &save[i / 2], &restore[i / 2]);
		need(setsockopt(c.here, IPPROTO_TCP, TCP_REPAIR, &off, sizeof(off)) == 0, "TCP_REPAIR");
		close(c.here);
		close(c.there);
	}
	printf("%-36s %10.1f %10.1f %10.1f\n", name, median(save), median(restore), median(restore_all));
}

int main(void)
{
	enter_namespace();
	printf("%-36s %10s %10s %10s\n", "microseconds", "save", "restore", "restore+");
	measure("established", AF_INET, 0, 0, 0);
	measure("established, IPv6", AF_INET6, 0, 0, 0);
	measure("established, 100 bytes unread", AF_INET, 100, 0, 0);
	measure("established, 64 KiB unread", AF_INET, 64 << 10, 0, 0);
	measure("established, 1 MiB unread", AF_INET, 1 << 20, 0, 0);
	measure("established, 64 KiB unacknowledged", AF_INET, 0, 64 << 10, 0);
	measure("close-wait", AF_INET, 0, 0, 1);
	measure("close-wait, IPv6", AF_INET6, 0, 0, 1);
	return 0;
}

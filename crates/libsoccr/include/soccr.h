/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * libsoccr: checkpoint and restore live TCP connections.
 *
 * Save:     pause, save, get_queue_bytes (and get_addr), then resume, or close the socket: silently while it is paused.
 * Restore:  pause a fresh socket, set_addr twice, set_queue_bytes for each queue that is not empty, restore, resume.
 *
 * No packet may reach the socket, nor leave it, from before the pause until the connection is resumed. All calls need
 * CAP_NET_ADMIN (and, for connections that are half closed, CAP_NET_RAW) in the user namespace of the socket's network.
 * A handle is used by one thread at a time. Its descriptor stays open while the connection is paused, saved, asked for
 * its addresses, restored or resumed. See soccr(7).
 *
 * Functions that return int give a negative number, and those that return a pointer NULL, when they fail; a line in the
 * log, libsoccr_last_error() and errno say why. A call that succeeds leaves errno as it was.
 *
 * The library is a guest: after each call the process has the descriptors, threads and signal masks that it had before.
 * Only a lock has some until libsoccr_unlock(): they are closed on exec, and numbered high where the limit allows.
 */
#ifndef LIBSOCCR_SOCCR_H
#define LIBSOCCR_SOCCR_H

#include <netinet/in.h>
#include <stdint.h>
#include <sys/socket.h>

/* TCP_RECV_QUEUE and TCP_SEND_QUEUE; linux/tcp.h has them too, and does not go together with netinet/tcp.h. */
#if !defined(_LINUX_TCP_H) && !defined(_UAPI_LINUX_TCP_H)
#include <netinet/tcp.h>
/* glibc leaves them out in its strict modes, musl in all. */
#if !(defined(__GLIBC__) && defined(__USE_MISC)) && !defined(TCP_RECV_QUEUE)
#define TCP_NO_QUEUE 0
#define TCP_RECV_QUEUE 1
#define TCP_SEND_QUEUE 2
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this header; libsoccr_version() tells that of the library. */
#define LIBSOCCR_VERSION_MAJOR 1
#define LIBSOCCR_VERSION_MINOR 0
#define LIBSOCCR_VERSION_PATCH 0
#define LIBSOCCR_VERSION "1.0.0"

/* Levels of the log. */
#define SOCCR_LOG_ERR 1
#define SOCCR_LOG_DBG 2

/* libsoccr_sk_data.flags: the five fields from snd_wl1 on are valid (0 is a valid value for any of them). */
#define SOCCR_FLAGS_WINDOW 0x1
/* The fields from srtt on are valid, those from sndbuf on, and urgent: only where data_size reaches behind them. */
#define SOCCR_FLAGS_PATH 0x2
#define SOCCR_FLAGS_BUFFERS 0x4
#define SOCCR_FLAGS_URGENT 0x8
/* The urgent byte has been read out of band. */
#define SOCCR_FLAGS_URGENT_CONSUMED 0x10
/* Our FIN is queued and was never sent. */
#define SOCCR_FLAGS_FIN_UNSENT 0x20

/* libsoccr_sk_data.opt_mask, behind the bits of the kernel: the smoothed round-trip time in units of 8 us, or 0. */
#define SOCCR_OPT_SRTT_SHIFT 9
/* Instead of that: reset by the peer, which the application has not been told; and whether a FIN had come before. */
#define SOCCR_OPT_RESET 0x100
#define SOCCR_OPT_RESET_BEHIND_FIN 0x200

/*
 * The memory belongs to the receiving side: with get calls to the caller, who calls free(); with set calls to the
 * library, which calls free(), so that it must come from malloc(). A set call that fails leaves it with the caller.
 */
#define SOCCR_MEM_EXCL 0x1

/* SO_MARK of the packets that a restore sends to this host itself; a firewall must let them pass through lo. */
#define SOCCR_MARK 0xC114

/* An opaque handle of a paused socket. */
struct libsoccr_sk;

/* A connection without its queues and addresses, to be kept and passed on as it is. It may only grow at its end. */
struct libsoccr_sk_data {
	uint32_t state;      /* TCP_ESTABLISHED and the others */
	uint32_t inq_len;    /* bytes received and not yet read */
	uint32_t inq_seq;    /* rcv_nxt; the peer's FIN, once received, counts one */
	uint32_t outq_len;   /* bytes written and not yet acknowledged; without a FIN of ours */
	uint32_t outq_seq;   /* write_seq; our FIN, once queued, counts one */
	uint32_t unsq_len;   /* bytes at the end of the send queue that were never sent; without a FIN */
	uint32_t opt_mask;   /* TCPI_OPT_*: what the two ends have negotiated; above, SOCCR_OPT_* */
	uint32_t mss_clamp;  /* largest segment that the peer accepts, in bytes */
	uint32_t snd_wscale; /* shift counts of the window fields, with TCPI_OPT_WSCALE */
	uint32_t rcv_wscale;
	uint32_t timestamp;  /* TCP_TIMESTAMP, opaque, with TCPI_OPT_TIMESTAMPS */

	uint32_t flags;      /* SOCCR_FLAGS_* */

	uint32_t snd_wl1;    /* struct tcp_repair_window, with SOCCR_FLAGS_WINDOW */
	uint32_t snd_wnd;
	uint32_t max_window;
	uint32_t rcv_wnd;
	uint32_t rcv_wup;

	/* The structure of the original ends here: 68 bytes. */

	uint32_t srtt;       /* with SOCCR_FLAGS_PATH, all as in struct tcp_info, times in microseconds; 0 is not known */
	uint32_t rttvar;
	uint32_t rto;
	uint32_t snd_mss;
	uint32_t snd_cwnd;
	uint32_t snd_ssthresh;
	uint32_t rcv_ssthresh;

	uint32_t sndbuf;     /* with SOCCR_FLAGS_BUFFERS: SO_SNDBUF, SO_RCVBUF, SO_BUF_LOCK, TCP_WINDOW_CLAMP, as read */
	uint32_t rcvbuf;
	uint32_t buf_lock;
	uint32_t window_clamp;

	uint32_t urgent;     /* with SOCCR_FLAGS_URGENT: where the urgent byte lies in the receive queue */
};

/* The address of a socket. */
union libsoccr_addr {
	struct sockaddr sa;
	struct sockaddr_in v4;
	struct sockaddr_in6 v6;
};

/* Lines up to this level go to fn, as fn(level, "%s", line), from any thread. NULL ends that. */
void libsoccr_set_log(unsigned int level, void (*fn)(unsigned int level, const char *fmt, ...));

/*
 * Pauses a socket: repair mode on. NULL for a socket that has a handle already, a listener, an MPTCP socket. A socket
 * that a dead process has left in repair mode is taken over.
 */
struct libsoccr_sk *libsoccr_pause(int fd);

/*
 * Resumes the connection, saved or restored, and frees the handle. A socket onto which a restore has failed stays in
 * repair mode: closing it is silent.
 */
void libsoccr_resume(struct libsoccr_sk *sk);

/* Frees the handle and leaves the socket as it is, in repair mode: TCP_REPAIR = 0 resumes it. */
void libsoccr_release(struct libsoccr_sk *sk);

/*
 * Fills in data, of data_size bytes: 68 or more. Zeroes what a larger structure has behind. Returns the size of what
 * has been filled in. Where there is no room for the urgent mark, its byte becomes an ordinary one. Nothing is consumed:
 * resume, and the connection goes on.
 */
int libsoccr_save(struct libsoccr_sk *sk, struct libsoccr_sk_data *data, unsigned data_size);

/*
 * The bytes of a queue, TCP_RECV_QUEUE or TCP_SEND_QUEUE, as the last save has read them: inq_len or outq_len of them,
 * not NULL if that is none. The socket may be closed by now. Without SOCCR_MEM_EXCL they are freed together with the
 * handle, and can be had again; with it once for each save.
 */
char *libsoccr_get_queue_bytes(struct libsoccr_sk *sk, int queue_id, unsigned flags);

/* The address of this end (self is not 0) or of the peer. */
union libsoccr_addr *libsoccr_get_addr(struct libsoccr_sk *sk, int self, unsigned flags);

/*
 * Restores a connection onto the paused socket, which must be fresh: binds and connects it, with the addresses and
 * queues that were set. When it returns 0, everything is in the kernel, in repair mode: memory lent by set calls is
 * not needed any more. When it fails, close the socket, which is silent. Data and queues are not changed.
 * A connection in SYN_SENT begins its handshake here, out of repair mode.
 */
int libsoccr_restore(struct libsoccr_sk *sk, struct libsoccr_sk_data *data, unsigned data_size);

/* The address of this end (self is not 0) or of the peer, for libsoccr_restore(). It is copied. */
int libsoccr_set_addr(struct libsoccr_sk *sk, int self, union libsoccr_addr *addr, unsigned flags);

#ifndef SOCCR_API_2016

/*
 * The bytes of a queue, for libsoccr_restore(), which knows from its data how many they are. Without SOCCR_MEM_EXCL
 * they must stay until then. Takes the place of what was set before; NULL takes it back.
 */
int libsoccr_set_queue_bytes(struct libsoccr_sk *sk, int queue_id, char *buf, unsigned flags);

#else

/*
 * The interface of 2016, in which the caller binds and connects the paused socket by itself:
 *
 *	libsoccr_pause, libsoccr_set_sk_data_unbound, bind, connect, then either
 *	libsoccr_set_sk_data_noq, libsoccr_set_queue_bytes twice, libsoccr_set_sk_data or
 *	libsoccr_set_sk_data, libsoccr_set_queue_bytes twice, and in the end libsoccr_resume.
 *
 * Queues without bytes may be left out. All return 0. To get a queue, any steal but 0 is SOCCR_MEM_EXCL.
 */
#define libsoccr_get_queue_bytes(sk, queue_id, steal) \
	libsoccr_get_queue_bytes((sk), (queue_id), (steal) ? SOCCR_MEM_EXCL : 0)
int libsoccr_get_sk_data(struct libsoccr_sk *sk, struct libsoccr_sk_data *data, unsigned data_size);
int libsoccr_set_sk_data_unbound(struct libsoccr_sk *sk, struct libsoccr_sk_data *data, unsigned data_size);
int libsoccr_set_sk_data_noq(struct libsoccr_sk *sk, struct libsoccr_sk_data *data, unsigned data_size);
int libsoccr_set_sk_data(struct libsoccr_sk *sk, struct libsoccr_sk_data *data, unsigned data_size);

/* Another function under the same name than in the present interface: so it has a symbol of its own. */
#define libsoccr_set_queue_bytes libsoccr_set_queue_bytes_2016
int libsoccr_set_queue_bytes(struct libsoccr_sk *sk, struct libsoccr_sk_data *data, unsigned data_size, int queue,
			     char *buf);

#endif

/*
 * Writes everything that there is of a paused connection to a file, pipe or memfd, its socket options included, in the
 * format of the command soccr: `soccr restore` and libsoccr_read() read it. Nothing is consumed, but for what the kernel
 * decrypts (kTLS): see libsoccr_write(3). libsoccr_set_addr() tells the peer of a connection in TCP_CLOSE before, which the
 * kernel has forgotten.
 */
int libsoccr_write(struct libsoccr_sk *sk, int fd);

/*
 * Reads a connection that libsoccr_write() or `soccr save` has written. libsoccr_get_addr() tells its addresses,
 * libsoccr_set_addr() changes them. An image can set any socket option: read those of whom you trust.
 */
struct libsoccr_sk *libsoccr_read(int fd);

/*
 * Restores a connection that was read onto a new socket, in the network of the calling thread, in repair mode:
 * libsoccr_resume() ends that. Returns its descriptor, which is the caller's, and closed on exec. When it fails, it can be
 * tried again.
 */
int libsoccr_open(struct libsoccr_sk *sk);

/*
 * The last failure of a handle: step, option, errno and remedy on one line. Without a handle (NULL): the last failure
 * on this thread, such as of libsoccr_pause(). NULL if there is none. Valid until the next call.
 */
const char *libsoccr_last_error(const struct libsoccr_sk *sk);

/*
 * Its errno, as the call has left it: EINVAL if SOCCR_INVALID; EOPNOTSUPP if SOCCR_REFUSED, but EBADMSG for an image that
 * cannot be read; ENOTRECOVERABLE, which is SOCCR_SYSTEM, for a defect of the library. 0 if there is no failure.
 */
int libsoccr_last_errno(const struct libsoccr_sk *sk);

/* Kinds of failures. */
#define SOCCR_INVALID 1 /* arguments, or values that contradict each other: the caller's mistake */
#define SOCCR_REFUSED 2 /* it cannot be done with this connection, or did not come out as it should */
#define SOCCR_SYSTEM 3  /* a system call has failed, or memory is short */

/* Its kind. 0 if there is no failure. */
int libsoccr_last_kind(const struct libsoccr_sk *sk);

/* A connection, by its two addresses. */
struct libsoccr_flow {
	union libsoccr_addr self;
	union libsoccr_addr peer;
};

/* What arrives meanwhile is delivered by libsoccr_unlock(), instead of being dropped: a thread collects it, which takes
 * no signals. */
#define SOCCR_LOCK_HOLD 0x1

/*
 * A lock, which ends at the latest when all processes have ended that have its descriptors. A child has them from fork()
 * until it calls execve(): lock behind the fork, or have the child close them, or else it keeps the connections locked.
 */
struct libsoccr_lock;

/*
 * Keeps the network of the calling thread quiet around connections, in both directions: lock, pause, save, close,
 * restore, unlock, resume. Without SOCCR_LOCK_HOLD packets are dropped, and sent again when a timer of the peer runs out.
 */
struct libsoccr_lock *libsoccr_lock(const struct libsoccr_flow *flows, unsigned count, unsigned flags);

/*
 * Unlocks the connections, closes what the lock has open, and frees it, whether it returns 0 or -1. The kernel takes
 * some 20 ms to remove the table; the connections are unlocked before.
 */
int libsoccr_unlock(struct libsoccr_lock *lock);

/* The version of the library, such as "1.0.0". */
const char *libsoccr_version(void);

#ifdef __cplusplus
}
#endif

#endif

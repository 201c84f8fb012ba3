/* The binary interface, which old programs rely on; and the smallest program that links. */
#include <stddef.h>
#include <stdio.h>

#include "soccr.h"

#define FIELD(number, name)                                                                                \
	_Static_assert(offsetof(struct libsoccr_sk_data, name) == 4 * (number) &&                          \
			       sizeof(((struct libsoccr_sk_data *)0)->name) == 4,                         \
		       #name)

FIELD(0, state);
FIELD(1, inq_len);
FIELD(2, inq_seq);
FIELD(3, outq_len);
FIELD(4, outq_seq);
FIELD(5, unsq_len);
FIELD(6, opt_mask);
FIELD(7, mss_clamp);
FIELD(8, snd_wscale);
FIELD(9, rcv_wscale);
FIELD(10, timestamp);
FIELD(11, flags);
FIELD(12, snd_wl1);
FIELD(13, snd_wnd);
FIELD(14, max_window);
FIELD(15, rcv_wnd);
FIELD(16, rcv_wup);
FIELD(17, srtt);
FIELD(18, rttvar);
FIELD(19, rto);
FIELD(20, snd_mss);
FIELD(21, snd_cwnd);
FIELD(22, snd_ssthresh);
FIELD(23, rcv_ssthresh);
FIELD(24, sndbuf);
FIELD(25, rcvbuf);
FIELD(26, buf_lock);
FIELD(27, window_clamp);
FIELD(28, urgent);
_Static_assert(sizeof(struct libsoccr_sk_data) >= 116, "it only grows");
_Static_assert(sizeof(union libsoccr_addr) == sizeof(struct sockaddr_in6), "the largest member");
_Static_assert(sizeof(struct libsoccr_flow) == 2 * sizeof(union libsoccr_addr), "no gap");
_Static_assert(SOCCR_FLAGS_WINDOW == 1 && SOCCR_MEM_EXCL == 1, "flags");
_Static_assert(SOCCR_LOG_ERR == 1 && SOCCR_LOG_DBG == 2 && SOCCR_MARK == 0xC114, "numbers");

int main(void)
{
	puts(libsoccr_pause(-1) ? "paused" : libsoccr_last_error(NULL));
	return 0;
}

/* Nothing but the header, and the constants it promises. */
#include "soccr.h"

#ifdef SOCCR_API_2016
typedef int (*set_queue)(struct libsoccr_sk *, struct libsoccr_sk_data *, unsigned, int, char *);
#else
typedef int (*set_queue)(struct libsoccr_sk *, int, char *, unsigned);
#endif

int main(void)
{
	set_queue set = libsoccr_set_queue_bytes;

	return set != 0 && TCP_RECV_QUEUE == 1 && TCP_SEND_QUEUE == 2 ? 0 : 1;
}

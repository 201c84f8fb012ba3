/* Sockets on which the kernel encrypts and decrypts (kTLS). */
#include "kit.h"

#include <errno.h>
#include <linux/tls.h>
#include <sys/mman.h>

#ifndef TCP_ULP
#define TCP_ULP 31
#endif
#ifndef SOL_TLS
#define SOL_TLS 282
#endif

/* Gives both directions of both ends the same keys, as no handshake would. False where the kernel has no TLS. */
static int encrypt(struct pair *pair)
{
	struct tls12_crypto_info_aes_gcm_128 keys = { .info = { TLS_1_2_VERSION, TLS_CIPHER_AES_GCM_128 } };
	int ends[] = { pair->here, pair->there };

	memcpy(keys.key, "sixteen key bytes", sizeof(keys.key));
	for (int i = 0; i < 2; i++) {
		if (setsockopt(ends[i], IPPROTO_TCP, TCP_ULP, "tls", 3)) {
			fprintf(stderr, "SKIPPED: the kernel has no TLS (modprobe tls): %s\n", strerror(errno));
			return 0;
		}
		SAME(setsockopt(ends[i], SOL_TLS, TLS_TX, &keys, sizeof(keys)), 0);
		SAME(setsockopt(ends[i], SOL_TLS, TLS_RX, &keys, sizeof(keys)), 0);
	}
	return 1;
}

static void what_has_no_room_for_the_keys_refuses_them(void)
{
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_sk_data data;
	struct libsoccr_sk *sk;

	if (!encrypt(&pair))
		return;
	kit_send(pair.there, "unread", 6);
	kit_wait_unread(pair.here, 6 + 29);
	kit_lock(&pair);
	sk = libsoccr_pause(pair.here);
	CHECK(sk);
	SAME(libsoccr_save(sk, &data, sizeof(data)), -1);
	SAME(libsoccr_last_kind(sk), SOCCR_REFUSED);
	kit_error_has(sk, "kTLS");
	kit_error_has(sk, "libsoccr_write");
	libsoccr_resume(sk);
	kit_unlock(&pair);
	kit_expect(pair.here, "unread", 6);
	kit_talk(&pair);
}

static void an_image_carries_keys_and_what_is_unread(void)
{
	int image = memfd_create("image", MFD_CLOEXEC);
	struct pair pair = kit_connect(IPV4);
	struct libsoccr_sk *sk;

	if (!encrypt(&pair))
		return;
	kit_talk(&pair);
	kit_send(pair.there, "unread", 6);
	kit_wait_unread(pair.here, 6 + 29);
	kit_lock(&pair);
	sk = libsoccr_pause(pair.here);
	CHECK(sk);
	SAME(libsoccr_write(sk, image), 0);
	libsoccr_release(sk);
	close(pair.here);

	SAME(lseek(image, 0, SEEK_SET), 0);
	sk = libsoccr_read(image);
	CHECK(sk);
	pair.here = libsoccr_open(sk);
	CHECK(pair.here >= 0);
	kit_unlock(&pair);
	libsoccr_resume(sk);
	kit_expect(pair.here, "unread", 6);
	kit_talk(&pair);
}

static const struct test tests[] = {
	TEST(what_has_no_room_for_the_keys_refuses_them),
	TEST(an_image_carries_keys_and_what_is_unread),
};

KIT_MAIN(tests)

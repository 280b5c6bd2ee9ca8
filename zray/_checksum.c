/* CRC-32C: by the processor's instruction where there is one, else by tables. See _checksum.h.
 *
 * The instruction takes 8 bytes in 3 cycles but may be begun in each: three streams side by side are three times as fast. So a block of three
 * equal lanes is summed lane by lane (while the next block is fetched from memory), and the sums are joined: appending n bytes to a message multiplies its sum (a polynomial over GF(2),
 * bit-reversed) by x^(8n) modulo the polynomial, and sums of parts then add up (see Mark Adler's notes on crc32_combine).
 */
#include "_checksum.h"

#include <string.h>

enum { LANE = 4096, BLOCK = 3 * LANE };
static const uint32_t POLYNOMIAL = 0x82f63b78u; /* bit-reversed */

static uint32_t tables[8][256];
static uint32_t past_lane[4][256]; /* a sum times x^(8 * LANE), by the bytes of the sum */

static uint32_t times(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        if (a & bit) product ^= b;
        b = b & 1 ? (b >> 1) ^ POLYNOMIAL : b >> 1;
    }
    return product;
}

void zc_setup(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >> 1) ^ POLYNOMIAL : crc >> 1;
        tables[0][i] = crc;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int k = 1; k < 8; k++) tables[k][i] = (tables[k - 1][i] >> 8) ^ tables[0][tables[k - 1][i] & 0xff];
    uint32_t power = 1u << 30; /* x^1 */
    for (uint32_t n = 1; n < 8u * LANE; n *= 2) power = times(power, power);
    for (uint32_t i = 0; i < 256; i++)
        for (int k = 0; k < 4; k++) past_lane[k][i] = times(i << (8 * k), power);
}

uint32_t zc_crc32c_tables(uint32_t crc, const void *data, size_t size) {
    const uint8_t *at = data;
    crc = ~crc;
    for (; size >= 8; size -= 8, at += 8) {
        uint32_t low = crc ^ ((uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24);
        crc = tables[7][low & 0xff] ^ tables[6][low >> 8 & 0xff] ^ tables[5][low >> 16 & 0xff] ^ tables[4][low >> 24] ^ tables[3][at[4]] ^
              tables[2][at[5]] ^ tables[1][at[6]] ^ tables[0][at[7]];
    }
    for (; size; size--, at++) crc = (crc >> 8) ^ tables[0][(crc ^ *at) & 0xff];
    return ~crc;
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <nmmintrin.h>

static int has_instruction(void) { return __builtin_cpu_supports("sse4.2"); }
#define WITH_INSTRUCTION __attribute__((target("sse4.2")))
#define STEP8(crc, word) _mm_crc32_u64(crc, word)
#define STEP1(crc, byte) _mm_crc32_u8((uint32_t)(crc), byte)
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>

static int has_instruction(void) { return 1; }
#define WITH_INSTRUCTION
#define STEP8(crc, word) __crc32cd((uint32_t)(crc), word)
#define STEP1(crc, byte) __crc32cb((uint32_t)(crc), byte)
#endif

#ifdef WITH_INSTRUCTION
static inline uint64_t word_at(const uint8_t *at) {
    uint64_t word;
    memcpy(&word, at, 8);
    return word;
}

static inline uint32_t move_past_lane(uint32_t crc) {
    return past_lane[0][crc & 0xff] ^ past_lane[1][crc >> 8 & 0xff] ^ past_lane[2][crc >> 16 & 0xff] ^ past_lane[3][crc >> 24];
}

WITH_INSTRUCTION static uint32_t by_instruction(uint32_t before, const uint8_t *at, size_t size) {
    uint64_t crc = ~before;
    for (; size >= BLOCK; size -= BLOCK, at += BLOCK) {
        uint64_t second = 0, third = 0;
        for (size_t line = 0; line < LANE; line += 64) {
            for (const uint8_t *ahead = at + BLOCK + line; ahead < at + 2 * BLOCK; ahead += LANE) __builtin_prefetch(ahead);
            for (size_t i = line; i < line + 64; i += 8) {
                crc = STEP8(crc, word_at(at + i));
                second = STEP8(second, word_at(at + LANE + i));
                third = STEP8(third, word_at(at + 2 * LANE + i));
            }
        }
        crc = move_past_lane(move_past_lane((uint32_t)crc) ^ (uint32_t)second) ^ (uint32_t)third;
    }
    for (; size >= 8; size -= 8, at += 8) crc = STEP8(crc, word_at(at));
    for (; size; size--, at++) crc = STEP1(crc, *at);
    return ~(uint32_t)crc;
}
#endif

uint32_t zc_crc32c(uint32_t crc, const void *data, size_t size) {
#ifdef WITH_INSTRUCTION
    if (has_instruction()) return by_instruction(crc, data, size);
#endif
    return zc_crc32c_tables(crc, data, size);
}

/* A piece is copied into memory that nobody will read soon, and that is larger than the caches: stores that pass them by save reading the target. */
#ifdef __SSE2__
#include <emmintrin.h>

enum { LINE = 64 };

static void copy_past_caches(uint8_t *to, const uint8_t *from, size_t size) {
    size_t head = -(uintptr_t)to % LINE;
    if (head > size) head = size;
    memcpy(to, from, head);
    size_t at = head;
    for (; size - at >= LINE; at += LINE) {
        __m128i a = _mm_loadu_si128((const __m128i *)(from + at)), b = _mm_loadu_si128((const __m128i *)(from + at) + 1);
        __m128i c = _mm_loadu_si128((const __m128i *)(from + at) + 2), d = _mm_loadu_si128((const __m128i *)(from + at) + 3);
        _mm_stream_si128((__m128i *)(to + at), a);
        _mm_stream_si128((__m128i *)(to + at) + 1, b);
        _mm_stream_si128((__m128i *)(to + at) + 2, c);
        _mm_stream_si128((__m128i *)(to + at) + 3, d);
    }
    memcpy(to + at, from + at, size - at);
}

static void copies_are_there(void) { _mm_sfence(); }
#else
static void copy_past_caches(uint8_t *to, const uint8_t *from, size_t size) { memcpy(to, from, size); }
static void copies_are_there(void) {}
#endif

uint32_t zc_copy_crc32c(void *to, const void *from, size_t size) {
    uint32_t crc = 0;
    for (size_t at = 0, piece; at < size; at += piece) { /* a block at a time: it is copied while it is in the innermost cache */
        piece = size - at < BLOCK ? size - at : BLOCK;
        crc = zc_crc32c(crc, (const uint8_t *)from + at, piece);
        copy_past_caches((uint8_t *)to + at, (const uint8_t *)from + at, piece);
    }
    copies_are_there();
    return crc;
}

/* CRC-32C (Castagnoli, polynomial 0x1EDC6F41; RFC 3720, section 12.1) of pieces of values, alone or while they are copied.
 *
 * Covers the sum that guards a value's way through memories and disks. Does not cover who compares it (zray/broker/pull.py), or attackers:
 * connections between nodes are authenticated by CURVE.
 */
#ifndef ZRAY_CHECKSUM_H
#define ZRAY_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

/* Build the tables. Once, before any other call. */
void zc_setup(void);
/* Return the sum of what went before (crc; 0: nothing did) and `size` bytes more. */
uint32_t zc_crc32c(uint32_t crc, const void *data, size_t size);
/* memcpy, past the caches, and return the sum of what was copied. */
uint32_t zc_copy_crc32c(void *to, const void *from, size_t size);
/* The same sum without the processor's instruction for it, for tests. */
uint32_t zc_crc32c_tables(uint32_t crc, const void *data, size_t size);

#endif

// CRC-32 with zlib's polynomial, bits reflected; a state is the checksum with its bits flipped.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace moekit {

constexpr uint32_t CRC_POLYNOMIAL = 0xedb88320;

// Eight bytes a step, by tables.
uint32_t crc32_by_table(uint32_t state, const uint8_t* data, size_t size);
#if defined(__x86_64__)
// 64 bytes a step, by carry-less multiplication.
uint32_t crc32_folded(uint32_t state, const uint8_t* data, size_t size);
// 256 bytes a step, on processors that have it.
uint32_t crc32_folded_wide(uint32_t state, const uint8_t* data, size_t size);
#endif

}  // namespace moekit

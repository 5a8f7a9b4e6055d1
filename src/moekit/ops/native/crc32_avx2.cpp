// CRC-32 by folding 64 bytes a step.
#if defined(__x86_64__)
#include "crc32_folding.h"

namespace moekit {
namespace {

constexpr int LANES = 4;
constexpr int BYTES = 16;

inline __m128i load(const uint8_t* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
}

}  // namespace

uint32_t crc32_folded(uint32_t state, const uint8_t* data, size_t size) {
    if (size < LANES * BYTES) return crc32_by_table(state, data, size);
    __m128i lanes[LANES];
    for (int i = 0; i < LANES; ++i) lanes[i] = load(data + i * BYTES);
    lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(state)));
    data += LANES * BYTES;
    size -= LANES * BYTES;
    const __m128i far = powers<LANES * BYTES * 8>();
    for (; size >= LANES * BYTES; data += LANES * BYTES, size -= LANES * BYTES)
        for (int i = 0; i < LANES; ++i) lanes[i] = fold(lanes[i], far, load(data + i * BYTES));
    return crc32_by_table(state_of_lanes(lanes, LANES), data, size);
}

}  // namespace moekit
#endif

// CRC-32 by folding (Gopal et al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ):
// 16 bytes times x**n mod P may be added to the 16 bytes that come n bits later.
#if defined(__x86_64__)
#include <immintrin.h>

#include "crc32.h"

namespace moekit {
namespace {

// x**power mod P, reflected and shifted as the product of reflected numbers needs it.
constexpr int64_t power_of_x(int power) {
    uint32_t value = 0x80000000;
    for (int i = 0; i < power; ++i) value = (value >> 1) ^ (value & 1 ? CRC_POLYNOMIAL : 0);
    return static_cast<int64_t>(value) << 1;
}

constexpr int LANES = 4;
constexpr int BYTES = 16;

inline __m128i load(const uint8_t* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
}

// What `lane` is worth so many bits further on, plus what stands there.
inline __m128i fold(__m128i lane, __m128i powers, __m128i there) {
    const __m128i low = _mm_clmulepi64_si128(lane, powers, 0x00);
    const __m128i high = _mm_clmulepi64_si128(lane, powers, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), there);
}

template <int BITS>
inline __m128i powers() {
    return _mm_set_epi64x(power_of_x(BITS - 32), power_of_x(BITS + 32));
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
    const __m128i near = powers<BYTES * 8>();
    __m128i lane = lanes[0];
    for (int i = 1; i < LANES; ++i) lane = fold(lane, near, lanes[i]);
    // What is left of all bytes so far is 16 bytes with the same remainder.
    uint8_t rest[BYTES];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), lane);
    return crc32_by_table(crc32_by_table(0, rest, BYTES), data, size);
}

}  // namespace moekit
#endif

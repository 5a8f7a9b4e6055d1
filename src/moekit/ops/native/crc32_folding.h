// What folding needs: 16 bytes times x**n mod P may be added to the 16 bytes that come n bits later
// (Gopal et al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ).
#pragma once
#include <immintrin.h>

#include "crc32.h"

namespace moekit {

// x**power mod P, reflected and shifted as the product of reflected numbers needs it.
constexpr int64_t power_of_x(int power) {
    uint32_t value = 0x80000000;
    for (int i = 0; i < power; ++i) value = (value >> 1) ^ (value & 1 ? CRC_POLYNOMIAL : 0);
    return static_cast<int64_t>(value) << 1;
}

// The factors that carry the two halves of 16 bytes BITS bits further.
template <int BITS>
inline __m128i powers() {
    return _mm_set_epi64x(power_of_x(BITS - 32), power_of_x(BITS + 32));
}

// What `lane` is worth so many bits further on, plus what stands there.
inline __m128i fold(__m128i lane, __m128i powers, __m128i there) {
    const __m128i low = _mm_clmulepi64_si128(lane, powers, 0x00);
    const __m128i high = _mm_clmulepi64_si128(lane, powers, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), there);
}

// `count` lanes of 16 bytes, one after the other, as one state: 16 bytes have the same remainder
// as all bytes so far.
inline uint32_t state_of_lanes(const __m128i* lanes, int count) {
    const __m128i near = powers<128>();
    __m128i lane = lanes[0];
    for (int i = 1; i < count; ++i) lane = fold(lane, near, lanes[i]);
    uint8_t rest[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), lane);
    return crc32_by_table(0, rest, sizeof rest);
}

}  // namespace moekit

// CRC-32 by folding 256 bytes a step, where the processor multiplies four pairs at once.
#if defined(__x86_64__)
#include "crc32_folding.h"

namespace moekit {
namespace {

constexpr int LANES = 4;
constexpr int BYTES = 64;
// Memory is asked for this far ahead.
constexpr size_t AHEAD = 4096;

inline __m512i load(const uint8_t* at) { return _mm512_loadu_si512(at); }

inline __m512i fold_wide(__m512i lane, __m512i powers, __m512i there) {
    const __m512i low = _mm512_clmulepi64_epi128(lane, powers, 0x00);
    const __m512i high = _mm512_clmulepi64_epi128(lane, powers, 0x11);
    return _mm512_ternarylogic_epi64(low, high, there, 0x96);
}

}  // namespace

uint32_t crc32_folded_wide(uint32_t state, const uint8_t* data, size_t size) {
    static const bool wide = __builtin_cpu_supports("vpclmulqdq");
    if (!wide || size < LANES * BYTES) return crc32_folded(state, data, size);
    __m512i lanes[LANES];
    for (int i = 0; i < LANES; ++i) lanes[i] = load(data + i * BYTES);
    const __m512i first = _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state)));
    lanes[0] = _mm512_xor_si512(lanes[0], first);
    data += LANES * BYTES;
    size -= LANES * BYTES;
    const __m512i far = _mm512_broadcast_i32x4(powers<LANES * BYTES * 8>());
    for (; size >= LANES * BYTES; data += LANES * BYTES, size -= LANES * BYTES) {
        for (int i = 0; i < LANES; ++i) {
            _mm_prefetch(reinterpret_cast<const char*>(data + i * BYTES + AHEAD), _MM_HINT_T0);
            lanes[i] = fold_wide(lanes[i], far, load(data + i * BYTES));
        }
    }
    __m128i narrow[LANES * 4];
    for (int i = 0; i < LANES; ++i)
        _mm512_storeu_si512(reinterpret_cast<void*>(narrow + 4 * i), lanes[i]);
    return crc32_folded(state_of_lanes(narrow, LANES * 4), data, size);
}

}  // namespace moekit
#endif

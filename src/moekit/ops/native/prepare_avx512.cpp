// Preparing activations with AVX-512: what `prepare_groups` in input.h does, 32 columns at a time.
#if defined(__x86_64__)
#include <immintrin.h>

#include "avx512.h"
#include "input.h"

namespace moekit {
namespace {

constexpr int COLUMNS = 32;  // of a vector of bfloat16
constexpr int PAIRS = 16;

// Which of a group's pairs, in the order that `split` leaves them in, comes first, second, ... for a
// field of this width.
void order_of_pairs(int group, int width, int32_t* order) {
    const int bytes = group * width / 8, lanes = 8 / width;
    for (int q = 0; q < bytes; q += 4)
        for (int half = 0; half < 2; ++half)
            for (int lane = 0; lane < lanes; ++lane)
                *order++ = (lane * bytes + q) / 2 + half;
}

inline __m512i rounded(const float* x) {
    return reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + COLUMNS / 2), _mm512_loadu_ps(x)));
}

// Of four neighbours the first and the third, then the second and the fourth.
inline __m512i split(__m512i columns) {
    const __m128i four = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    return _mm512_shuffle_epi8(columns, _mm512_broadcast_i32x4(four));
}

}  // namespace

void prepare_groups_avx512(const Format& format, const float* x, int n, int t, uint8_t* block) {
    const Block at(format, n);
    const Streams& streams = at.streams;
    const int group = format.group, pairs = group / 2;
    float* sums = reinterpret_cast<float*>(block + at.sums()) + t;
    int32_t order[MAX_STREAMS][MAX_GROUP / 2];
    for (int s = 0; s < streams.count; ++s)
        if (streams.width[s] != TRITS) order_of_pairs(group, streams.width[s], order[s]);
    const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
    const __m512i tokens = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32(n));
    alignas(64) int32_t now[MAX_GROUP / 2];
    alignas(64) uint16_t unsplit[MAX_GROUP];
    for (int g = 0; g < at.groups; ++g, x += group) {
        __m512 sum = _mm512_setzero_ps();
        for (int c = 0; c < group; c += COLUMNS) {
            const __m512i columns = rounded(x + c);
            sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(columns), ones);
            _mm512_store_si512(unsplit + c, columns);
            _mm512_store_si512(now + c / 2, split(columns));
        }
        sums[int64_t{g} * n] = _mm512_reduce_add_ps(sum);
        for (int s = 0; s < streams.count; ++s) {
            if (streams.width[s] == TRITS) {
                place_columns(at, s, g, unsplit, t, block);
                continue;
            }
            int32_t* out = reinterpret_cast<int32_t*>(block + at.pairs(s, g)) + t;
            for (int p = 0; p < pairs; p += PAIRS, out += PAIRS * n) {
                const __m512i from = _mm512_loadu_si512(order[s] + p);
                const __m512i taken = _mm512_i32gather_epi32(from, now, sizeof(int32_t));
                if (n == 1)
                    _mm512_storeu_si512(out, taken);
                else
                    _mm512_i32scatter_epi32(out, tokens, taken, sizeof(int32_t));
            }
        }
    }
}

void prepare_row_avx512(int columns, const float* x, uint16_t* row) {
    int c = 0;
    for (; c + COLUMNS <= columns; c += COLUMNS) _mm512_storeu_si512(row + c, rounded(x + c));
    if (c == columns) return;
    // The rest, and zeros up to a whole vector.
    float last[COLUMNS] = {};
    for (int i = 0; c + i < columns; ++i) last[i] = x[c + i];
    _mm512_storeu_si512(row + c, rounded(last));
}

}  // namespace moekit
#endif

// Bit fields times activations: codes become bfloat16 by a table of 32 entries in one register, and
// pairs of them are multiplied by pairs of activations.
//
// The sum of a group is a chain of its own for every row and token, in the order in which codes lie
// in memory, so a token's result is the same in a block of any size.
#if defined(__x86_64__)
#include <immintrin.h>

#include "avx512.h"

namespace moekit {
namespace {

// How far ahead of its use a line of codes is asked for.
constexpr int PREFETCH_BYTES = 8192;
constexpr int LINE = 64;
constexpr int STRIP = 16;
constexpr int STRIPS = TILE_ROWS / STRIP;

// Strips that are worked on at a time: as many as the registers have room for, since one sum has to
// wait for the one before it.
constexpr int strips_for(int tokens) { return tokens <= 3 ? 4 : tokens <= 6 ? 2 : 1; }

template <int TOKENS, int COUNT>
struct Sums {
    __m512 at[COUNT][TOKENS];
};

#define INLINE inline __attribute__((always_inline))

// Adds a field of a group: `dwords` lines of codes a strip, and the pairs of activations in their
// order.
template <int WIDTH, int TOKENS, int COUNT>
INLINE void add_field(Sums<TOKENS, COUNT>& sums, const uint8_t* codes, const uint32_t* pairs,
                      int dwords, int shift, __m512i table) {
    constexpr int STEPS = 16 / WIDTH;
    for (int q = 0; q < dwords; ++q, codes += STRIPS * LINE, pairs += STEPS * TOKENS) {
        __m512i line[COUNT];
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) {
            const uint8_t* at = codes + i * LINE;
            _mm_prefetch(reinterpret_cast<const char*>(at + PREFETCH_BYTES), _MM_HINT_T0);
            line[i] = _mm512_loadu_si512(at);
            if (WIDTH == 8) line[i] = _mm512_srl_epi16(line[i], _mm_cvtsi32_si128(shift));
        }
#pragma GCC unroll 16
        for (int s = 0; s < STEPS; ++s) {
            __m512bh weights[COUNT];
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; ++i) {
                const __m512i now = s == 0 ? line[i] : _mm512_srli_epi16(line[i], s * WIDTH);
                weights[i] = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(now, table));
            }
#pragma GCC unroll 12
            for (int t = 0; t < TOKENS; ++t) {
                const __m512bh pair = reinterpret_cast<__m512bh>(
                    _mm512_set1_epi32(static_cast<int>(pairs[s * TOKENS + t])));
#pragma GCC unroll 4
                for (int i = 0; i < COUNT; ++i)
                    sums.at[i][t] = _mm512_dpbf16_ps(sums.at[i][t], weights[i], pair);
            }
        }
    }
}

// Four bytes of codes of 16 rows, or the `left` that there are, from a strip of a tile on.
INLINE __m512i load_codes(const uint8_t* at, int left, int strip) {
    if (left >= 4) return _mm512_loadu_si512(at + strip * LINE);
    const uint8_t* last = at + (left & 2) * TILE_ROWS + strip * STRIP;
    const __m512i one = _mm512_cvtepu8_epi32(
        left & 1 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(last)) : _mm_setzero_si128());
    if (left == 1) return one;
    const __m512i two = _mm512_cvtepu16_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + strip * STRIP * 2)));
    return _mm512_or_si512(two, _mm512_slli_epi32(one, 16));
}

// The same for codes in base three. The table repeats with a period of three, so it takes what is
// left of a digit's number when higher digits are still in it, up to 31.
template <int TOKENS, int COUNT>
INLINE void add_trits(Sums<TOKENS, COUNT>& sums, const uint8_t* codes, const uint32_t* pairs,
                      int bytes, int strip, __m512i table) {
    // 2**16 divided by the powers of three, rounded up: right for all bytes.
    const __m512i thirds[4] = {_mm512_set1_epi16(21846), _mm512_set1_epi16(7282),
                               _mm512_set1_epi16(2428), _mm512_set1_epi16(810)};
    const __m512i three = _mm512_set1_epi16(3);
    for (int byte = 0; byte < bytes; byte += 4, codes += STRIPS * LINE) {
        __m512i words[COUNT];
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) {
            _mm_prefetch(reinterpret_cast<const char*>(codes + i * LINE + PREFETCH_BYTES),
                         _MM_HINT_T0);
            words[i] = load_codes(codes, bytes - byte, strip + i);
        }
        for (int half = 0; half < 2; ++half) {
            __m512i rest[COUNT], now[COUNT];
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; ++i)
                now[i] = rest[i] = half ? _mm512_srli_epi16(words[i], 8)
                                        : _mm512_and_si512(words[i], _mm512_set1_epi16(255));
#pragma GCC unroll 5
            for (int place = 0; place < 5; ++place, pairs += TOKENS) {
                __m512bh weights[COUNT];
#pragma GCC unroll 4
                for (int i = 0; i < COUNT; ++i) {
                    __m512i digit = now[i];
                    if (place < 4) now[i] = _mm512_mulhi_epu16(rest[i], thirds[place]);
                    if (place < 2)
                        digit = _mm512_sub_epi16(digit, _mm512_mullo_epi16(now[i], three));
                    weights[i] =
                        reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(digit, table));
                }
#pragma GCC unroll 12
                for (int t = 0; t < TOKENS; ++t) {
                    const __m512bh pair =
                        reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pairs[t])));
#pragma GCC unroll 4
                    for (int i = 0; i < COUNT; ++i)
                        sums.at[i][t] = _mm512_dpbf16_ps(sums.at[i][t], weights[i], pair);
                }
            }
        }
    }
}

template <int TOKENS, int COUNT>
INLINE void clear(Sums<TOKENS, COUNT>& sums) {
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 12
        for (int t = 0; t < TOKENS; ++t) sums.at[i][t] = _mm512_setzero_ps();
}

// COUNT strips of a tile, from `strip` on, times a block of tokens.
template <int TOKENS, int COUNT>
void multiply_strips(const Format& format, const uint8_t* base, int64_t tile, int strip,
                     const uint8_t* x, float* y, int64_t y_stride, int rows) {
    const Block block(format, TOKENS);
    const int groups = block.groups;
    const float* group_sums = reinterpret_cast<const float*>(x + block.sums());
    int stream_of[MAX_FIELDS];
    for (int f = 0; f < format.num_fields; ++f)
        stream_of[f] = block.streams.find(format.fields[f].width);
    Sums<TOKENS, COUNT> totals;
    clear(totals);
    for (int g = 0; g < groups; ++g) {
        const int64_t at = tile * groups + g, row_at = at * TILE_ROWS + strip * STRIP;
        for (int f = 0; f < format.num_fields;) {
            const int64_t scale_at = format.fields[f].scale, zero_at = format.fields[f].zero;
            Sums<TOKENS, COUNT> sums;
            clear(sums);
            do {
                const Field& field = format.fields[f];
                const uint8_t* tile_codes =
                    base + field.codes + (at * field.stride + field.first) * TILE_ROWS;
                const uint8_t* codes = tile_codes + strip * LINE;
                const uint32_t* pairs =
                    reinterpret_cast<const uint32_t*>(x + block.pairs(stream_of[f], g));
                const int bytes = code_bytes(format.group, field.width), dwords = bytes / 4;
                const __m512i table = _mm512_loadu_si512(field.lut);
                switch (field.width) {
                    case TRITS:
                        add_trits(sums, tile_codes, pairs, bytes, strip, table);
                        break;
                    case 1:
                        add_field<1>(sums, codes, pairs, dwords, 0, table);
                        break;
                    case 2:
                        add_field<2>(sums, codes, pairs, dwords, 0, table);
                        break;
                    case 4:
                        add_field<4>(sums, codes, pairs, dwords, 0, table);
                        break;
                    default:
                        add_field<8>(sums, codes, pairs, dwords, field.shift, table);
                }
                ++f;
            } while (f < format.num_fields && format.fields[f].scale == scale_at);
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; ++i) {
                if (zero_at >= 0) {
                    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(
                        base + zero_at + row_at + i * STRIP));
                    const __m512 zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
#pragma GCC unroll 12
                    for (int t = 0; t < TOKENS; ++t)
                        sums.at[i][t] = _mm512_fnmadd_ps(
                            zero, _mm512_set1_ps(group_sums[int64_t{g} * TOKENS + t]),
                            sums.at[i][t]);
                }
                const uint8_t* halves = base + scale_at + (row_at + i * STRIP) * 2;
                const __m512 scale = _mm512_cvtph_ps(
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
#pragma GCC unroll 12
                for (int t = 0; t < TOKENS; ++t)
                    totals.at[i][t] = _mm512_fmadd_ps(scale, sums.at[i][t], totals.at[i][t]);
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) {
        const int left = rows - i * STRIP;
        const __mmask16 mask =
            left >= STRIP ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1 << left) - 1);
#pragma GCC unroll 12
        for (int t = 0; t < TOKENS; ++t)
            _mm512_mask_storeu_ps(y + t * y_stride + i * STRIP, mask, totals.at[i][t]);
    }
}

template <int TOKENS>
void multiply_block(const Format& format, const uint8_t* base, Rows rows, const uint8_t* x,
                    float* y, int64_t y_stride) {
    constexpr int COUNT = strips_for(TOKENS);
    for (int r = 0; r < rows.count; r += COUNT * STRIP) {
        const int row = rows.first + r;
        multiply_strips<TOKENS, COUNT>(format, base, row / TILE_ROWS, row % TILE_ROWS / STRIP, x,
                                       y + r, y_stride, rows.count - r);
    }
}

using Multiply = void (*)(const Format&, const uint8_t*, Rows, const uint8_t*, float*, int64_t);

constexpr Multiply by_tokens[GROUP_TOKENS] = {
    multiply_block<1>, multiply_block<2>,  multiply_block<3>,  multiply_block<4>,
    multiply_block<5>, multiply_block<6>,  multiply_block<7>,  multiply_block<8>,
    multiply_block<9>, multiply_block<10>, multiply_block<11>, multiply_block<12>,
};

}  // namespace

void multiply_groups_avx512(const Format& format, const uint8_t* base, Rows rows,
                            const uint8_t* x, int n, float* y, int64_t y_stride) {
    by_tokens[n - 1](format, base, rows, x, y, y_stride);
}

}  // namespace moekit
#endif

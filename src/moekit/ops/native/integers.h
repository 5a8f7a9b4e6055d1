// Bit fields times activations in integers of 16 bits (`prepare_integers.h`), for processors without
// products of bfloat16.
//
// The sum of a group is an integer and exact, so a token's result is the same in a block of any size.
#pragma once

#include <immintrin.h>

#include "floats.h"
#include "kernels.h"

namespace moekit {
namespace {

constexpr int STRIP = 8;
constexpr int STRIPS = TILE_ROWS / STRIP;
constexpr int PREFETCH_BYTES = 8192;
constexpr int LINE = 64;

// Tokens and strips that are worked on at a time, as many as the registers have room for.
constexpr int MOST_TOKENS = 6;
constexpr int strips_for(int tokens) { return tokens <= 2 ? 4 : 2; }

// The compiler would gather the products of many steps before it adds them, and run out of registers.
inline __attribute__((always_inline)) void add_to(__m256i& sum, __m256i products) {
    sum = _mm256_add_epi32(sum, products);
    __asm__("" : "+x"(sum));
}

template <int TOKENS, int COUNT>
struct Sums {
    __m256i at[COUNT][TOKENS];

    // Adds the products of pairs of codes of each row and the pairs of all tokens.
    inline __attribute__((always_inline)) void add(const __m256i* codes, const uint32_t* pairs) {
#pragma GCC unroll 6
        for (int t = 0; t < TOKENS; ++t) {
            const __m256i pair = _mm256_set1_epi32(static_cast<int>(pairs[t]));
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; ++i)
#ifdef __AVXVNNI__
                at[i][t] = _mm256_dpwssd_avx_epi32(at[i][t], codes[i], pair);
#else
                add_to(at[i][t], _mm256_madd_epi16(codes[i], pair));
#endif
        }
    }
};

#define INLINE inline __attribute__((always_inline))

// The codes of a field: of a group and tile, from a strip on.
struct Codes {
    const uint8_t* of_tile;
    int bytes, row;

    // Four bytes of each row of strip i, from the one at `byte` on.
    INLINE __m256i load(int byte, int i) const {
        const uint8_t* at = of_tile + int64_t{byte} * TILE_ROWS;
        const int first = row + i * STRIP, left = bytes - byte;
        if (left >= 4)
            return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + first * 4));
        const uint8_t* last = at + (left & 2) * TILE_ROWS + first;
        const __m256i one = _mm256_cvtepu8_epi32(
            left & 1 ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(last))
                     : _mm_setzero_si128());
        if (left == 1) return one;
        const __m256i two = _mm256_cvtepu16_epi32(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + first * 2)));
        return _mm256_or_si256(two, _mm256_slli_epi32(one, 16));
    }
    // Asks for what will be needed soon.
    INLINE void prefetch(int byte, int i) const {
        const uint8_t* at = of_tile + int64_t{byte} * TILE_ROWS + (row + i * STRIP) * 4;
        if (i % (LINE / (STRIP * 4)) == 0)
            _mm_prefetch(reinterpret_cast<const char*>(at + PREFETCH_BYTES), _MM_HINT_T0);
    }
};

template <int WIDTH, int TOKENS, int COUNT>
INLINE void add_field(Sums<TOKENS, COUNT>& sums, const Codes& codes, const uint32_t* pairs, int n) {
    const __m256i mask = _mm256_set1_epi16((1 << WIDTH) - 1);
    for (int byte = 0; byte < codes.bytes; byte += 4) {
        __m256i words[COUNT];
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) {
            codes.prefetch(byte, i);
            words[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
                codes.of_tile + int64_t{byte} * TILE_ROWS + (codes.row + i * STRIP) * 4));
        }
#pragma GCC unroll 16
        for (int shift = 0; shift < 16; shift += WIDTH, pairs += n) {
            __m256i now[COUNT];
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; ++i) {
                now[i] = shift == 0 ? words[i] : _mm256_srli_epi16(words[i], shift);
                if (shift + WIDTH < 16) now[i] = _mm256_and_si256(now[i], mask);
            }
            sums.add(now, pairs);
        }
    }
}

// Codes in base three; with `only` from 0 to 2 those that are equal to it count as -1, others as 0.
template <int TOKENS, int COUNT>
INLINE void add_trits(Sums<TOKENS, COUNT>& sums, const Codes& codes, const uint32_t* pairs, int n,
                      int only) {
    // 2**16 divided by the powers of three, rounded up: right for all bytes.
    const __m256i thirds[4] = {_mm256_set1_epi16(21846), _mm256_set1_epi16(7282),
                               _mm256_set1_epi16(2428), _mm256_set1_epi16(810)};
    const __m256i wanted = _mm256_set1_epi16(static_cast<int16_t>(only));
    for (int byte = 0; byte < codes.bytes; byte += 4) {
        __m256i words[COUNT];
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) {
            codes.prefetch(byte, i);
            words[i] = codes.load(byte, i);
        }
        for (int half = 0; half < 2; ++half) {
            __m256i rest[COUNT];
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; ++i)
                rest[i] = half ? _mm256_srli_epi16(words[i], 8)
                               : _mm256_and_si256(words[i], _mm256_set1_epi16(255));
            __m256i quotient[COUNT];
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; ++i) quotient[i] = rest[i];
#pragma GCC unroll 5
            for (int place = 0; place < 5; ++place, pairs += n) {
                __m256i digits[COUNT];
#pragma GCC unroll 4
                for (int i = 0; i < COUNT; ++i) {
                    digits[i] = quotient[i];
                    if (place < 4) {
                        quotient[i] = _mm256_mulhi_epu16(rest[i], thirds[place]);
                        const __m256i twice = _mm256_add_epi16(quotient[i], quotient[i]);
                        digits[i] = _mm256_sub_epi16(
                            digits[i], _mm256_add_epi16(twice, quotient[i]));
                    }
                    if (only >= 0) digits[i] = _mm256_cmpeq_epi16(digits[i], wanted);
                }
                sums.add(digits, pairs);
            }
        }
    }
}

// What the values of a field's codes are: start + step * code, or step * (code == only ? -1 : 0).
struct Line {
    float start = 0, step = 0;
    int only = -1;

    Line() = default;
    explicit Line(const Field& field) : start(from_bfloat16(field.lut[0])) {
        step = from_bfloat16(field.lut[1]) - start;
        if (field.width != TRITS || from_bfloat16(field.lut[2]) == start + 2 * step) return;
        only = start != 0 ? 0 : step != 0 ? 1 : 2;
        step = -from_bfloat16(field.lut[only]);
        start = 0;
    }
};

// Adds a group of COUNT strips from `row` of a tile on to totals [COUNT, TOKENS] of vectors, `place`
// counts groups of tiles.
template <int TOKENS, int COUNT>
INLINE void add_group(const Format& format, const Line* lines, const uint8_t* base, int64_t place,
                      int row, const Block& block, const uint8_t* x, int g, int t, float* totals) {
    const int n = block.n;
    const float* sum = reinterpret_cast<const float*>(x + block.sums()) + int64_t{g} * n + t;
    const float* unit = reinterpret_cast<const float*>(x + block.units()) + int64_t{g} * n + t;
    for (int f = 0; f < format.num_fields;) {
        const int64_t scale_at = format.fields[f].scale, zero_at = format.fields[f].zero;
        __m256 values[COUNT][TOKENS];
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) {
            __m256 offset = _mm256_setzero_ps();
            if (zero_at >= 0) {
                const uint8_t* zeros = base + zero_at + place * TILE_ROWS + row + i * STRIP;
                offset = _mm256_sub_ps(
                    offset, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(
                                _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros)))));
            }
#pragma GCC unroll 6
            for (int t2 = 0; t2 < TOKENS; ++t2)
                values[i][t2] = _mm256_mul_ps(offset, _mm256_set1_ps(sum[t2]));
        }
        do {
            const Field& field = format.fields[f];
            const Line& line = lines[f];
            Sums<TOKENS, COUNT> part;
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 6
                for (int t2 = 0; t2 < TOKENS; ++t2) part.at[i][t2] = _mm256_setzero_si256();
            const Codes codes{
                base + field.codes + (place * field.stride + field.first) * TILE_ROWS,
                code_bytes(format.group, field.width), row};
            const int stream = block.streams.find(field.width);
            const uint32_t* pairs =
                reinterpret_cast<const uint32_t*>(x + block.pairs(stream, g)) + t;
            float start = line.start;
            switch (field.width) {
                case 1:
                    add_field<1>(part, codes, pairs, n);
                    break;
                case 2:
                    add_field<2>(part, codes, pairs, n);
                    break;
                case 4:
                    add_field<4>(part, codes, pairs, n);
                    break;
                case TRITS:
                    add_trits(part, codes, pairs, n, line.only);
                    break;
                default:
                    // Both halves of a byte at once: the next field is the upper one.
                    add_field<8>(part, codes, pairs, n);
                    start += lines[++f].start;
            }
#pragma GCC unroll 6
            for (int t2 = 0; t2 < TOKENS; ++t2) {
                const __m256 constant = _mm256_set1_ps(start * sum[t2]);
#pragma GCC unroll 4
                for (int i = 0; i < COUNT; ++i)
                    values[i][t2] = _mm256_add_ps(
                        values[i][t2],
                        _mm256_fmadd_ps(_mm256_set1_ps(line.step),
                                        _mm256_cvtepi32_ps(part.at[i][t2]), constant));
            }
            ++f;
        } while (f < format.num_fields && format.fields[f].scale == scale_at);
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) {
            const uint8_t* halves = base + scale_at + (place * TILE_ROWS + row + i * STRIP) * 2;
            const __m256 scale =
                _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
#pragma GCC unroll 6
            for (int t2 = 0; t2 < TOKENS; ++t2) {
                float* total = totals + (i * TOKENS + t2) * STRIP;
                const __m256 worth = _mm256_mul_ps(scale, _mm256_set1_ps(unit[t2]));
                _mm256_store_ps(total,
                                _mm256_fmadd_ps(worth, values[i][t2], _mm256_load_ps(total)));
            }
        }
    }
}

// A tile from its first row on, times tokens t, ..., t + TOKENS - 1 of a block.
template <int TOKENS>
void multiply_tile(const Format& format, const Line* lines, const uint8_t* base, int64_t tile,
                   int rows, const Block& block, const uint8_t* x, int t, float* y,
                   int64_t y_stride) {
    constexpr int COUNT = strips_for(TOKENS);
    alignas(32) float totals[STRIPS][TOKENS][STRIP] = {};
    for (int g = 0; g < block.groups; ++g)
        for (int i = 0; i * STRIP < rows; i += COUNT)
            add_group<TOKENS, COUNT>(format, lines, base, tile * block.groups + g, i * STRIP, block,
                                     x, g, t, totals[i][0]);
    for (int r = 0; r < rows; ++r)
        for (int t2 = 0; t2 < TOKENS; ++t2)
            y[(t + t2) * y_stride + r] = totals[r / STRIP][t2][r % STRIP];
}

using MultiplyTile = void (*)(const Format&, const Line*, const uint8_t*, int64_t, int,
                              const Block&, const uint8_t*, int, float*, int64_t);
constexpr MultiplyTile by_tokens[MOST_TOKENS] = {multiply_tile<1>, multiply_tile<2>,
                                                 multiply_tile<3>, multiply_tile<4>,
                                                 multiply_tile<5>, multiply_tile<6>};

// Rows begin with a tile.
inline void multiply_integers(const Format& format, const uint8_t* base, Rows rows,
                              const uint8_t* x, int n, float* y, int64_t y_stride) {
    const Block block(format, n);
    Line lines[MAX_FIELDS];
    for (int f = 0; f < format.num_fields; ++f) lines[f] = Line(format.fields[f]);
    const int parts = (n + MOST_TOKENS - 1) / MOST_TOKENS, most = (n + parts - 1) / parts;
    for (int r = 0; r < rows.count; r += TILE_ROWS) {
        const int left = rows.count - r, count = left < TILE_ROWS ? left : TILE_ROWS;
        for (int t = 0; t < n; t += most) {
            const int tokens = n - t < most ? n - t : most;
            by_tokens[tokens - 1](format, lines, base, (rows.first + r) / TILE_ROWS, count, block,
                                  x, t, y + r, y_stride);
        }
    }
}

}  // namespace
}  // namespace moekit

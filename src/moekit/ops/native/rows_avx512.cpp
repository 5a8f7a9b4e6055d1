// Row-major matrices times activations: lanes along the columns, several rows and tokens at once,
// added across the lanes at the end.
//
// Every row and token has one vector of sums, so a result is the same in a block of any size.
#if defined(__x86_64__)
#include <immintrin.h>

#include "avx512.h"

namespace moekit {
namespace {

constexpr int ROWS = 8;
constexpr int PREFETCH_BYTES = 1024;

// How each kind is read and multiplied: STEP columns a vector of weights.
struct BFloat16 {
    using Weight = uint16_t;
    using Activation = uint16_t;
    using Vector = __m512bh;
    static constexpr int STEP = 32;
    static Vector weights(const Weight* at) {
        return reinterpret_cast<Vector>(_mm512_loadu_si512(at));
    }
    static Vector weights(const Weight* at, uint32_t mask) {
        return reinterpret_cast<Vector>(_mm512_maskz_loadu_epi16(mask, at));
    }
    static Vector activations(const Activation* at) { return weights(at); }
    static __m512 add(__m512 sum, Vector w, Vector x) { return _mm512_dpbf16_ps(sum, w, x); }
};

struct Float16 {
    using Weight = uint16_t;
    using Activation = float;
    using Vector = __m512;
    static constexpr int STEP = 16;
    static Vector weights(const Weight* at) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    }
    static Vector weights(const Weight* at, uint32_t mask) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), at));
    }
    static Vector activations(const Activation* at) { return _mm512_loadu_ps(at); }
    static __m512 add(__m512 sum, Vector w, Vector x) { return _mm512_fmadd_ps(w, x, sum); }
};

struct Float32 {
    using Weight = float;
    using Activation = float;
    using Vector = __m512;
    static constexpr int STEP = 16;
    static Vector weights(const Weight* at) { return _mm512_loadu_ps(at); }
    static Vector weights(const Weight* at, uint32_t mask) {
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), at);
    }
    static Vector activations(const Activation* at) { return _mm512_loadu_ps(at); }
    static __m512 add(__m512 sum, Vector w, Vector x) { return _mm512_fmadd_ps(w, x, sum); }
};

// Rows of `columns` weights one after the other times tokens of `x_stride` prepared columns.
template <class Kind, int COUNT, int TOKENS>
void multiply_rows(const typename Kind::Weight* w, int columns, const typename Kind::Activation* x,
                   int64_t x_stride, float* y, int64_t y_stride) {
    __m512 sums[COUNT][TOKENS];
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 3
        for (int t = 0; t < TOKENS; ++t) sums[r][t] = _mm512_setzero_ps();
    const int whole = columns / Kind::STEP * Kind::STEP;
    for (int c = 0; c < whole; c += Kind::STEP) {
        typename Kind::Vector tokens[TOKENS];
#pragma GCC unroll 3
        for (int t = 0; t < TOKENS; ++t) tokens[t] = Kind::activations(x + t * x_stride + c);
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; ++r) {
            const typename Kind::Weight* at = w + int64_t{r} * columns + c;
            _mm_prefetch(reinterpret_cast<const char*>(at) + PREFETCH_BYTES, _MM_HINT_T0);
            const typename Kind::Vector weights = Kind::weights(at);
#pragma GCC unroll 3
            for (int t = 0; t < TOKENS; ++t)
                sums[r][t] = Kind::add(sums[r][t], weights, tokens[t]);
        }
    }
    if (whole < columns) {
        const uint32_t mask = (1u << (columns - whole)) - 1;
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; ++r) {
            const typename Kind::Vector weights =
                Kind::weights(w + int64_t{r} * columns + whole, mask);
#pragma GCC unroll 3
            for (int t = 0; t < TOKENS; ++t)
                sums[r][t] =
                    Kind::add(sums[r][t], weights, Kind::activations(x + t * x_stride + whole));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 3
        for (int t = 0; t < TOKENS; ++t) y[t * y_stride + r] = _mm512_reduce_add_ps(sums[r][t]);
}

template <class Kind, int TOKENS>
void multiply_block(const Format& format, const uint8_t* base, Rows rows, const uint8_t* x,
                    float* y, int64_t y_stride) {
    const auto* tokens = reinterpret_cast<const typename Kind::Activation*>(x);
    const int64_t stride = padded_columns(format), columns = format.cols;
    const auto* w = reinterpret_cast<const typename Kind::Weight*>(base + format.data) +
                    rows.first * columns;
    int r = 0;
    for (; r + ROWS <= rows.count; r += ROWS)
        multiply_rows<Kind, ROWS, TOKENS>(w + r * columns, format.cols, tokens, stride, y + r,
                                          y_stride);
    for (; r < rows.count; ++r)
        multiply_rows<Kind, 1, TOKENS>(w + r * columns, format.cols, tokens, stride, y + r,
                                       y_stride);
}

template <class Kind>
void by_tokens(const Format& format, const uint8_t* base, Rows rows, const uint8_t* x, int n,
               float* y, int64_t y_stride) {
    static_assert(ROW_TOKENS == 3, "one case for each number of tokens");
    switch (n) {
        case 1:
            return multiply_block<Kind, 1>(format, base, rows, x, y, y_stride);
        case 2:
            return multiply_block<Kind, 2>(format, base, rows, x, y, y_stride);
        default:
            return multiply_block<Kind, 3>(format, base, rows, x, y, y_stride);
    }
}

}  // namespace

void multiply_rows_avx512(const Format& format, const uint8_t* base, Rows rows, const uint8_t* x,
                          int n, float* y, int64_t y_stride) {
    switch (format.kind) {
        case KIND_BF16:
            return by_tokens<BFloat16>(format, base, rows, x, n, y, y_stride);
        case KIND_F16:
            return by_tokens<Float16>(format, base, rows, x, n, y, y_stride);
        default:
            return by_tokens<Float32>(format, base, rows, x, n, y, y_stride);
    }
}

}  // namespace moekit
#endif

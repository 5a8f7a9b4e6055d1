// Row-major matrices times activations: lanes along the columns, several rows and tokens at once,
// added across the lanes at the end.
//
// An instruction set gives a type for each kind: `Weight` and `Activation` in memory, STEP columns a
// vector, ROWS to work on at once, what a `Vector` and a `Sum` are, and `load`, `load_some`, `add` and
// `total` of them. Every row and token has one vector of sums, so a result is the same in a block of
// any size.
#pragma once

#include "kernels.h"

namespace moekit {
namespace {

// Rows of `columns` weights one after the other times tokens of `x_stride` prepared columns.
template <class Kind, int COUNT, int TOKENS>
void multiply_some_rows(const typename Kind::Weight* w, int columns,
                        const typename Kind::Activation* x, int64_t x_stride, float* y,
                        int64_t y_stride) {
    constexpr int PREFETCH_BYTES = 1024;
    typename Kind::Sum sums[COUNT][TOKENS];
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 3
        for (int t = 0; t < TOKENS; ++t) sums[r][t] = Kind::zero();
    const int whole = columns / Kind::STEP * Kind::STEP;
    for (int c = 0; c < whole; c += Kind::STEP) {
        typename Kind::Vector tokens[TOKENS];
#pragma GCC unroll 3
        for (int t = 0; t < TOKENS; ++t) tokens[t] = Kind::load(x + t * x_stride + c);
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; ++r) {
            const typename Kind::Weight* at = w + int64_t{r} * columns + c;
            __builtin_prefetch(reinterpret_cast<const char*>(at) + PREFETCH_BYTES);
            const typename Kind::Vector weights = Kind::load(at);
#pragma GCC unroll 3
            for (int t = 0; t < TOKENS; ++t)
                sums[r][t] = Kind::add(sums[r][t], weights, tokens[t]);
        }
    }
    if (whole < columns) {
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; ++r) {
            const typename Kind::Vector weights =
                Kind::load_some(w + int64_t{r} * columns + whole, columns - whole);
#pragma GCC unroll 3
            for (int t = 0; t < TOKENS; ++t)
                sums[r][t] =
                    Kind::add(sums[r][t], weights, Kind::load(x + t * x_stride + whole));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < COUNT; ++r)
#pragma GCC unroll 3
        for (int t = 0; t < TOKENS; ++t) y[t * y_stride + r] = Kind::total(sums[r][t]);
}

template <class Kind, int TOKENS>
void multiply_block(const Format& format, const uint8_t* base, Rows rows, const uint8_t* x,
                    float* y, int64_t y_stride) {
    const auto* tokens = reinterpret_cast<const typename Kind::Activation*>(x);
    const int64_t stride = padded_columns(format), columns = format.cols;
    const auto* w = reinterpret_cast<const typename Kind::Weight*>(base + format.data) +
                    rows.first * columns;
    int r = 0;
    for (; r + Kind::ROWS <= rows.count; r += Kind::ROWS)
        multiply_some_rows<Kind, Kind::ROWS, TOKENS>(w + r * columns, format.cols, tokens, stride,
                                                     y + r, y_stride);
    for (; r < rows.count; ++r)
        multiply_some_rows<Kind, 1, TOKENS>(w + r * columns, format.cols, tokens, stride, y + r,
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

template <class BFloat16, class Float16, class Float32>
void multiply_kinds(const Format& format, const uint8_t* base, Rows rows, const uint8_t* x, int n,
                    float* y, int64_t y_stride) {
    switch (format.kind) {
        case KIND_BF16:
            return by_tokens<BFloat16>(format, base, rows, x, n, y, y_stride);
        case KIND_F16:
            return by_tokens<Float16>(format, base, rows, x, n, y, y_stride);
        default:
            return by_tokens<Float32>(format, base, rows, x, n, y, y_stride);
    }
}

}  // namespace
}  // namespace moekit

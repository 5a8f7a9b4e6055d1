// What the kernels of every instruction set share: the loop over blocks of tokens, and sums of rows.
#pragma once

#include "activation.h"
#include "input.h"

namespace moekit {
namespace {

// These rows times a block of n prepared tokens.
using MultiplyBlock = void(const Format&, const uint8_t* base, Rows, const uint8_t* x, int n,
                           float* y, int64_t y_stride);

// Rows stay in the cache while block after block of tokens goes by.
template <MultiplyBlock GROUPS, MultiplyBlock ROWS>
void multiply_blocks(const Format& format, const uint8_t* base, Rows rows, const Input& input,
                     Tokens tokens, float* y, int64_t y_stride) {
    const int64_t bytes = token_bytes(format);
    for (int t = 0; t < tokens.count; t += input.block) {
        const int left = tokens.count - t, n = left < input.block ? left : input.block;
        const uint8_t* x = input.data + (tokens.first + t) * bytes;
        (format.kind == KIND_GROUPS ? GROUPS : ROWS)(format, base, rows, x, n, y + t * y_stride,
                                                     y_stride);
    }
}

inline void add_scaled(int n, float weight, const float* from, float* to) {
    for (int i = 0; i < n; ++i) to[i] += weight * from[i];
}

}  // namespace
}  // namespace moekit

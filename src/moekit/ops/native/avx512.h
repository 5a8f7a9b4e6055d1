// The parts of the AVX-512 kernels. `x` of a product is a block of n prepared tokens.
#pragma once

#include "kernels.h"

namespace moekit {

void multiply_groups_avx512(const Format&, const uint8_t* base, Rows, const uint8_t* x, int n,
                            float* y, int64_t y_stride);
void multiply_rows_avx512(const Format&, const uint8_t* base, Rows, const uint8_t* x, int n,
                          float* y, int64_t y_stride);

// Token t of a block of n; a row of bfloat16.
void prepare_groups_avx512(const Format&, const float* x, int n, int t, uint8_t* block);
void prepare_row_avx512(int columns, const float* x, uint16_t* row);

}  // namespace moekit

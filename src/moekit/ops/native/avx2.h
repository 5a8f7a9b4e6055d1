// The parts of the AVX2 kernels. `x` of a product is a block of n prepared tokens.
#pragma once

#include "kernels.h"

namespace moekit {

void multiply_groups_avx2(const Format&, const uint8_t* base, Rows, const uint8_t* x, int n,
                          float* y, int64_t y_stride);
void multiply_rows_avx2(const Format&, const uint8_t* base, Rows, const uint8_t* x, int n, float* y,
                        int64_t y_stride);

}  // namespace moekit

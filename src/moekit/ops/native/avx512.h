// The parts of the AVX-512 kernels. `x` is a block of n prepared tokens.
#pragma once

#include "kernels.h"

namespace moekit {

void multiply_groups_avx512(const Format&, const uint8_t* base, Rows, const uint8_t* x, int n,
                            float* y, int64_t y_stride);
void multiply_rows_avx512(const Format&, const uint8_t* base, Rows, const uint8_t* x, int n,
                          float* y, int64_t y_stride);

}  // namespace moekit

// Bit fields times activations with AVX2.
#if defined(__x86_64__)
#include "avx2.h"
#include "integers.h"

namespace moekit {

void multiply_groups_avx2(const Format& format, const uint8_t* base, Rows rows, const uint8_t* x,
                          int n, float* y, int64_t y_stride) {
    multiply_integers(format, base, rows, x, n, y, y_stride);
}

}  // namespace moekit
#endif

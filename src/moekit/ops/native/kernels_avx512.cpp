// The kernels for AVX-512 with BF16.
#if defined(__x86_64__)
#include "portable.h"

namespace moekit {
const Kernels avx512_kernels = {"avx512", prepare, multiply, activate, add_scaled};
}
#endif

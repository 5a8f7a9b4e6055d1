// The same kernels, vectorised by the compiler for AVX2 and FMA.
#if defined(__x86_64__)
#include "crc32.h"
#include "portable.h"

namespace moekit {
const Kernels avx2_kernels = {
    "avx2",
    prepare_blocks<prepare_groups, prepare_row>,
    multiply_blocks<multiply_groups, multiply_rows>,
    activate,
    add_scaled,
    crc32_folded,
};
}
#endif

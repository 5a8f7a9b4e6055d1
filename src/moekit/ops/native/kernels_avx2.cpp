// The kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include "avx2.h"
#include "blocks.h"
#include "crc32.h"
#include "prepare_integers.h"

namespace moekit {
const Kernels avx2_kernels = {
    "avx2",
    prepare_blocks<prepare_integers, prepare_row>,
    multiply_blocks<multiply_groups_avx2, multiply_rows_avx2>,
    activate,
    add_scaled,
    crc32_folded,
};
}
#endif

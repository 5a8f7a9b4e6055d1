// The kernels for AVX-512 with BF16.
#if defined(__x86_64__)
#include "avx512.h"
#include "blocks.h"
#include "crc32.h"

namespace moekit {
const Kernels avx512_kernels = {
    "avx512",
    prepare_blocks<prepare_groups_avx512, prepare_row_avx512>,
    multiply_blocks<multiply_groups_avx512, multiply_rows_avx512>,
    activate,
    add_scaled,
    crc32_folded_wide,
};
}
#endif

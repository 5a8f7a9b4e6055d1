// The kernels for any processor.
#include "crc32.h"
#include "portable.h"

namespace moekit {
const Kernels plain_kernels = {
    "plain",
    prepare_blocks<prepare_groups, prepare_row>,
    multiply_blocks<multiply_groups, multiply_rows>,
    activate,
    add_scaled,
    crc32_by_table,
};
}

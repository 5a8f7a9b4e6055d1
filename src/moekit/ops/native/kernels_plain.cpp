// The kernels for any processor.
#include "portable.h"

namespace moekit {
const Kernels plain_kernels = {"plain", prepare, multiply_blocks<multiply_groups, multiply_rows>, activate,
                               add_scaled};
}

// The kernels for any processor.
#include "portable.h"

namespace moekit {
const Kernels plain_kernels = {"plain", prepare, multiply, activate, add_scaled};
}

// Which kernels this machine runs.
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

namespace moekit {
namespace {

struct Choice {
    const Kernels* kernels;
    bool supported;
};

bool has_avx2() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c") && __builtin_cpu_supports("pclmul");
#else
    return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

// The fastest first.
const Choice choices[] = {
#if defined(__x86_64__)
    {&avx512_kernels, has_avx512()},
    {&avx2_kernels, has_avx2()},
#endif
    {&plain_kernels, true},
};

const Kernels& choose() {
    const char* forced = getenv("MOEKIT_ISA");
    for (const Choice& choice : choices) {
        const bool wanted = forced == nullptr || strcmp(forced, choice.kernels->isa) == 0;
        if (choice.supported && wanted) return *choice.kernels;
    }
    return plain_kernels;
}

const Kernels& chosen = choose();

}  // namespace

const Kernels& kernels() { return chosen; }

}  // namespace moekit

extern "C" {

const char* native_isa(void) { return moekit::kernels().isa; }

int32_t native_supports(const char* isa) {
    for (const moekit::Choice& choice : moekit::choices)
        if (strcmp(isa, choice.kernels->isa) == 0) return choice.supported;
    return 0;
}

}  // extern "C"

// The weighted sum of a token's experts, in a fixed order.
#include <string.h>

#include "kernels.h"
#include "pool.h"

using namespace moekit;

extern "C" void combine(Pool* pool, const float* out_pairs, const int32_t* pair_of,
                        const float* weights, int32_t T, int32_t K, int32_t D, float* out,
                        int32_t accumulate) {
    // Below this the threads would take longer to wake than to add.
    constexpr int64_t ENOUGH = 65536;
    Items items;
    items.count = T;
    auto work = [&](int) {
        for (int t; items.take(t);) {
            float* to = out + int64_t{t} * D;
            if (!accumulate) memset(to, 0, sizeof(float) * D);
            for (int k = 0; k < K; ++k) {
                const int32_t pair = pair_of[int64_t{t} * K + k];
                if (pair < 0) continue;
                const float weight = weights[int64_t{t} * K + k];
                const float* from = out_pairs + int64_t{pair} * D;
                kernels().add_scaled(D, weight, from, to);
            }
        }
    };
    if (int64_t{T} * K * D < ENOUGH)
        work(0);
    else
        run(pool, work);
}

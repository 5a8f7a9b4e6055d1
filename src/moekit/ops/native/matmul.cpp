// Matrices times activations, shared out over the threads of a pool by rows.
#include "kernels.h"
#include "pool.h"
#include "shares.h"

using namespace moekit;

extern "C" {

void matmuls(Pool* pool, const MatmulJob* jobs, int32_t count, const float* x, int64_t x_stride,
             int32_t T) {
    if (count <= 0 || T <= 0) return;
    Inputs inputs(pool, Scratch::INPUT, count, [&](int j) {
        const bool own = jobs[j].x != nullptr;
        const Source source{own ? jobs[j].x : x, own ? jobs[j].x_stride : x_stride, nullptr};
        const bool shared = !own && j > 0 && jobs[j - 1].x == nullptr &&
                            alike(*jobs[j - 1].format, *jobs[j].format);
        return Inputs::Wanted{jobs[j].format, source, T, shared};
    });
    RowShares shares(pool, count, [&](int j) { return jobs[j].format; });
    auto work = [&](int thread) {
        inputs.prepare(pool);
        shares.each(thread, [&](int j, Rows rows) {
            const MatmulJob& job = jobs[j];
            kernels().multiply(*job.format, static_cast<const uint8_t*>(job.base), rows, inputs[j],
                               Tokens{0, T}, job.y + rows.first, job.y_stride);
        });
    };
    run(pool, work);
}

void matmul(Pool* pool, const Format* format, const void* base, const float* x, int32_t T,
            float* y) {
    const MatmulJob job{format, base, y, format->rows, nullptr, 0};
    matmuls(pool, &job, 1, x, format->cols, T);
}

}  // extern "C"

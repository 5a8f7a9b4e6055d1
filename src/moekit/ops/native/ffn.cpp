// Experts: gate and up, the activation, and down, for the pairs of many experts at once.
#include <string.h>

#include "floats.h"
#include "kernels.h"
#include "pool.h"
#include "shares.h"

using namespace moekit;

namespace {

// What a thread keeps of gate and up at a time stays in its cache.
constexpr int MIDDLE_FLOATS = 16384;

inline float bias_at(const ExpertFormat& expert, const uint8_t* base, int64_t offset, int row) {
    const uint8_t* bias = base + offset;
    if (expert.bias_kind == KIND_F32) {
        float value;
        memcpy(&value, bias + int64_t{4} * row, sizeof value);
        return value;
    }
    uint16_t half;
    memcpy(&half, bias + int64_t{2} * row, sizeof half);
    return expert.bias_kind == KIND_BF16 ? from_bfloat16(half) : from_float16(half);
}

// Adds the bias of these rows to every token; without a bias nothing happens.
void add_bias(const ExpertFormat& expert, const uint8_t* base, int64_t offset, Rows rows,
              int tokens, float* y, int64_t y_stride) {
    if (offset < 0) return;
    for (int r = 0; r < rows.count; ++r) {
        const float bias = bias_at(expert, base, offset, rows.first + r);
        for (int t = 0; t < tokens; ++t) y[t * y_stride + r] += bias;
    }
}

// The input of the down projection, for these rows of gate and up; middle [tokens, F].
void gate_and_up(const FfnJob& job, Rows rows, const Input& input, float* middle) {
    const ExpertFormat& expert = *job.format;
    const uint8_t* base = static_cast<const uint8_t*>(job.base);
    const int width = expert.up.rows;
    thread_local float gate[MIDDLE_FLOATS], up[MIDDLE_FLOATS];
    const int most = std::max(1, MIDDLE_FLOATS / rows.count / input.block) * input.block;
    for (int t = 0; t < job.count; t += most) {
        const Tokens tokens{t, std::min(most, job.count - t)};
        const int64_t stride = rows.count;
        kernels().multiply(expert.up, base, rows, input, tokens, up, stride);
        add_bias(expert, base, expert.up_bias, rows, tokens.count, up, stride);
        if (expert.has_gate) {
            kernels().multiply(expert.gate, base, rows, input, tokens, gate, stride);
            add_bias(expert, base, expert.gate_bias, rows, tokens.count, gate, stride);
        }
        kernels().activate(expert, tokens.count * rows.count, expert.has_gate ? gate : nullptr, up);
        for (int i = 0; i < tokens.count; ++i)
            memcpy(middle + int64_t{t + i} * width + rows.first, up + i * stride,
                   sizeof(float) * rows.count);
    }
}

}  // namespace

extern "C" void ffn(Pool* pool, const FfnJob* jobs, int32_t count, const int32_t* token_of_pair,
                    const float* hidden, int32_t D, float* out_pairs) {
    if (count <= 0) return;
    Inputs inputs(pool, Scratch::INPUT, count, [&](int j) {
        const FfnJob& job = jobs[j];
        const int32_t* tokens = token_of_pair + job.first;
        // When decoding, all experts of a token read the same activations.
        const bool shared = j > 0 && job.count == 1 && jobs[j - 1].count == 1 &&
                            tokens[0] == token_of_pair[jobs[j - 1].first] &&
                            alike(jobs[j - 1].format->up, job.format->up);
        return Inputs::Wanted{&job.format->up, {hidden, D, tokens}, job.count, shared};
    });
    std::vector<int64_t> starts(count);
    int64_t floats = 0;
    for (int j = 0; j < count; ++j) {
        starts[j] = floats;
        floats += int64_t{jobs[j].count} * jobs[j].format->up.rows;
    }
    float* middle =
        static_cast<float*>(scratch(pool, Scratch::MIDDLE, sizeof(float) * static_cast<size_t>(floats)));
    Inputs middles(pool, Scratch::MIDDLE_INPUT, count, [&](int j) {
        const ExpertFormat& expert = *jobs[j].format;
        const Source source{middle + starts[j], expert.up.rows, nullptr};
        return Inputs::Wanted{&expert.down, source, jobs[j].count, false};
    });
    RowShares first(pool, count, [&](int j) { return &jobs[j].format->up; });
    RowShares second(pool, count, [&](int j) { return &jobs[j].format->down; });
    auto work = [&](int thread) {
        inputs.prepare(pool);
        first.each(thread, [&](int j, Rows rows) {
            gate_and_up(jobs[j], rows, inputs[j], middle + starts[j]);
        });
        first.wait(pool);
        middles.prepare(pool);
        second.each(thread, [&](int j, Rows rows) {
            const FfnJob& job = jobs[j];
            const ExpertFormat& expert = *job.format;
            const uint8_t* base = static_cast<const uint8_t*>(job.base);
            float* out = out_pairs + int64_t{job.first} * D + rows.first;
            kernels().multiply(expert.down, base, rows, middles[j], Tokens{0, job.count}, out, D);
            add_bias(expert, base, expert.down_bias, rows, job.count, out, D);
        });
    };
    run(pool, work);
}

// What a decoder keeps between calls. Included by the files that implement it.
#pragma once
#include <algorithm>
#include <chrono>
#include <vector>

#include "decoder.h"
#include "norm.h"
#include "pool.h"

namespace moekit {

enum Stage { EMBED, PROJECT, ATTEND, OUTPUT, ROUTE, EXPERTS, COMBINE, LOGITS, STAGES };

// Adds the time until it goes out of scope.
class Clock {
public:
    explicit Clock(double& seconds) : seconds_(seconds) {}
    ~Clock() {
        auto spent = std::chrono::steady_clock::now() - start_;
        seconds_ += std::chrono::duration<double>(spent).count();
    }

private:
    double& seconds_;
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

inline void add_bias(float* to, const float* bias, int n) {
    if (bias)
        for (int i = 0; i < n; i++) to[i] += bias[i];
}

// Queries, keys and values of a row, one after the other; with latents only queries.
inline int64_t projected_width(const DecoderModel& m) {
    int64_t keys = m.kv_latent ? 0 : (int64_t)m.kv_heads * (m.head_dim + m.value_dim);
    return (int64_t)m.heads * m.head_dim + keys;
}

// The latents of a row: those of the queries, those of keys and values, and the rotated key.
inline int64_t latent_width(const DecoderModel& m) {
    return m.kv_latent ? m.q_latent + m.kv_latent + 2 * m.rotary_half : 0;
}

// The queries of a row as they are compared with latents.
inline int64_t absorbed_width(const DecoderModel& m) {
    return m.kv_latent ? (int64_t)m.heads * query_width(decoder_kv(&m)) : 0;
}

// Where everything lies in the one block of memory that a decoder holds.
struct Layout {
    int64_t x, normed, projected, latents, absorbed, attended, logits, ids, weights, all_weights;
    int64_t pair_of, token_of, outputs, size = 0;
    int32_t top_k = 0, experts = 0;

    explicit Layout(const DecoderModel& m) {
        bool shared = false;
        for (int l = 0; l < m.layers; l++) {
            top_k = std::max(top_k, m.layer[l].moe < 0 ? 0 : m.layer[l].router.rule.top_k);
            experts = std::max(experts, m.layer[l].moe < 0 ? 0 : m.layer[l].router.rule.experts);
            shared |= m.layer[l].shared_format != nullptr;
        }
        int64_t T = m.max_rows, pairs = T * (top_k + shared);
        x = place(T * m.width);
        normed = place(T * m.width);
        projected = place(T * projected_width(m));
        latents = place(T * latent_width(m));
        absorbed = place(T * absorbed_width(m));
        attended = place(T * m.heads * m.value_dim);
        logits = place(T * experts);
        ids = place(T * top_k);
        weights = place(T * top_k);
        all_weights = place(pairs);
        pair_of = place(pairs);
        token_of = place(pairs);
        outputs = place(std::max<int64_t>(pairs, T) * m.width);
    }

private:
    int64_t place(int64_t numbers) {
        int64_t at = size;
        size += (numbers * 4 + 63) / 64 * 64;
        return at;
    }
};

}  // namespace moekit

struct Decoder {
    DecoderModel model;
    std::vector<DecoderLayer> layers;
    moekit::Layout at;
    Pool* pool;
    moekit::Buffer memory;
    KvShape kv;
    double seconds[moekit::STAGES] = {};

    std::vector<Row> rows;
    std::vector<int32_t> first_pair;  // [experts + 1] of the layer at hand
    std::vector<FfnJob> jobs;
    std::vector<MatmulJob> head_jobs;
    int32_t K = 0;  // outputs a row has in the layer at hand, shared included
    bool shared_is_due = false;

    float *x, *normed, *projected, *latents, *absorbed, *attended, *logits, *weights;
    float *all_weights, *outputs;
    int32_t *ids, *pair_of, *token_of;

    Decoder(const DecoderModel& m, Pool* p)
        : model(m), layers(m.layer, m.layer + m.layers), at(m), pool(p), kv(decoder_kv(&m)) {
        model.layer = layers.data();
        char* base = static_cast<char*>(memory.take(at.size));
        auto floats = [base](int64_t offset) { return reinterpret_cast<float*>(base + offset); };
        auto ints = [base](int64_t offset) { return reinterpret_cast<int32_t*>(base + offset); };
        x = floats(at.x), normed = floats(at.normed), projected = floats(at.projected);
        latents = floats(at.latents), absorbed = floats(at.absorbed);
        attended = floats(at.attended), logits = floats(at.logits), weights = floats(at.weights);
        all_weights = floats(at.all_weights), outputs = floats(at.outputs);
        ids = ints(at.ids), pair_of = ints(at.pair_of), token_of = ints(at.token_of);
        rows.reserve(m.max_rows);
        first_pair.resize(at.experts + 1);
        jobs.reserve(at.experts + 1);
    }

    int32_t T() const { return static_cast<int32_t>(rows.size()); }

    // Work on single rows: by all threads where there are enough of them to pay for waking those.
    template <class Work>
    void each_row(Work&& work) {
        constexpr int FEW = 4;
        int32_t count = T();
        if (count <= FEW) {
            for (int32_t t = 0; t < count; t++) work(t);
            return;
        }
        moekit::Items items;
        items.count = count;
        auto on_thread = [&](int32_t) {
            for (int t; items.take(t);) work(t);
        };
        moekit::run(pool, on_thread);
    }

    void normalise(const float* weight) {
        int32_t D = model.width;
        each_row([&](int64_t t) {
            if (weight)
                moekit::rms_norm(x + t * D, weight, model.eps, D, normed + t * D);
            else
                std::copy_n(x + t * D, D, normed + t * D);
        });
    }

    // x += what a half layer made, after a norm where the family has one there.
    void add(const float* made, const float* norm, const float* bias) {
        int32_t D = model.width;
        each_row([&](int64_t t) {
            float* values = const_cast<float*>(made) + t * D;
            if (bias)
                for (int i = 0; i < D; i++) values[i] += bias[i];
            if (norm) moekit::rms_norm(values, norm, model.eps, D, values);
            for (int i = 0; i < D; i++) x[t * D + i] += values[i] * model.residual_scale;
        });
    }

    void begin(const Row* given, int32_t count);
    void project(const DecoderLayer& layer, int index);
    void project_latents(const DecoderLayer& layer);
    void absorb(const DecoderLayer& layer, int index);
    void attend_by_latents(const DecoderLayer& layer, const moekit::Attention& how, int index);
    void prepare(const DecoderLayer& layer, int index, int64_t t);
    void attend(int index);
    void route(const DecoderLayer& layer);
    void choose(const DecoderLayer& layer);
    void dense(const DecoderLayer& layer);
    void experts(int index, const int32_t* which, const uint64_t* addresses, int32_t count,
                 const ExpertFormat* const* formats);
    void experts_in_memory(int index, const uint64_t* addresses);
    void combine_pairs(int index);
    void finish(const int32_t* which, int32_t count, float* out);
};

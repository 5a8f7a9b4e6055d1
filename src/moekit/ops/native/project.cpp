// From hidden states to queries, keys and values.
#include <algorithm>

#include "decoder_state.h"

using namespace moekit;

void Decoder::project(const DecoderLayer& layer, int index) {
    Clock clock(seconds[PROJECT]);
    normalise(layer.before_attention);
    if (model.kv_latent) {
        project_latents(layer);
        absorb(layer, index);
    } else {
        int64_t q = (int64_t)model.heads * model.head_dim;
        int64_t k = (int64_t)model.kv_heads * model.head_dim, stride = projected_width(model);
        MatmulJob jobs[] = {{layer.q.format, layer.q.data, projected, stride, nullptr, 0},
                            {layer.k.format, layer.k.data, projected + q, stride, nullptr, 0},
                            {layer.v.format, layer.v.data, projected + q + k, stride, nullptr, 0}};
        matmuls(pool, jobs, 3, normed, model.width, T());
        each_row([&](int64_t t) { prepare(layer, index, t); });
    }
}

// Bias, clipping, norms and rotation of one row, and its keys and values into the cache.
void Decoder::prepare(const DecoderLayer& layer, int index, int64_t t) {
    int32_t dim = model.head_dim, q = model.heads * dim, k = model.kv_heads * dim;
    int32_t v = model.kv_heads * model.value_dim;
    float *queries = projected + t * projected_width(model), *keys = queries + q;
    float* values = keys + k;
    const Row& row = rows[t];
    auto norm = [&](float* to, const float* weight, int n) {
        int step = model.norm_is_wide ? n : dim;
        if (weight)
            for (int i = 0; i < n; i += step) rms_norm(to + i, weight, model.eps, step, to + i);
    };
    auto turn = [&](float* to, int n) {
        if (!layer.cos) return;
        int64_t angle = (int64_t)row.position * model.rotary_half;
        for (int i = 0; i < n; i += dim)
            rotate(to + i, layer.cos + angle, layer.sin + angle, model.rotary_half,
                   model.rotary_in_pairs);
    };
    add_bias(queries, layer.q.bias, q);
    add_bias(keys, layer.k.bias, k);
    add_bias(values, layer.v.bias, v);
    if (model.norm_after_rotation) {
        turn(queries, q + k);
        norm(queries, layer.q_norm, q), norm(keys, layer.k_norm, k);
    } else {
        norm(queries, layer.q_norm, q), norm(keys, layer.k_norm, k);
        if (model.clip_qkv > 0)
            for (int i = 0; i < q + k + v; i++)
                queries[i] = std::clamp(queries[i], -model.clip_qkv, model.clip_qkv);
        turn(queries, q + k);
    }
    kv_append(kv, index, row, keys, values);
}

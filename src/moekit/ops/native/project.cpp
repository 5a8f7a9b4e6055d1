// From hidden states to queries, keys and values.
#include <algorithm>

#include "decoder_state.h"

using namespace moekit;

namespace {

void add_bias(float* to, const float* bias, int n) {
    if (bias)
        for (int i = 0; i < n; i++) to[i] += bias[i];
}

}  // namespace

void Decoder::project(const DecoderLayer& layer, int index) {
    Clock clock(seconds[PROJECT]);
    normalise(layer.before_attention);
    if (model.kv_latent) {
        project_latents(layer);
    } else {
        int64_t q = (int64_t)model.heads * model.head_dim;
        int64_t k = (int64_t)model.kv_heads * model.head_dim, stride = projected_width(model);
        MatmulJob jobs[] = {{layer.q.format, layer.q.data, projected, stride},
                            {layer.k.format, layer.k.data, projected + q, stride},
                            {layer.v.format, layer.v.data, projected + q + k, stride}};
        matmuls(pool, jobs, 3, normed, model.width, T());
    }
    each_row([&](int64_t t) { prepare(layer, index, t); });
}

// Latent attention (MLA): queries and keys come from vectors that are narrower than all heads.
void Decoder::project_latents(const DecoderLayer& layer) {
    int64_t stride = latent_width(model), queries = projected_width(model);
    float* kv_latents = latents + model.q_latent;
    MatmulJob jobs[] = {{layer.kv_a.format, layer.kv_a.data, kv_latents, stride},
                        {layer.q_a.format, layer.q_a.data, latents, stride}};
    if (!model.q_latent) jobs[1] = {layer.q.format, layer.q.data, projected, queries};
    matmuls(pool, jobs, 2, normed, model.width, T());
    each_row([&](int64_t t) {
        float *q = latents + t * stride, *kv = kv_latents + t * stride;
        add_bias(kv, layer.kv_a.bias, model.kv_latent + 2 * model.rotary_half);
        rms_norm(kv, layer.kv_a_norm, model.latent_eps, model.kv_latent, kv);
        if (!model.q_latent) return;
        add_bias(q, layer.q_a.bias, model.q_latent);
        rms_norm(q, layer.q_a_norm, model.latent_eps, model.q_latent, q);
    });
    if (model.q_latent) {
        MatmulJob job{layer.q.format, layer.q.data, projected, queries};
        matmuls(pool, &job, 1, latents, stride, T());
    }
    MatmulJob job{layer.k.format, layer.k.data, expanded, expanded_width(model)};
    matmuls(pool, &job, 1, kv_latents, stride, T());
    each_row([&](int64_t t) { expand(t); });
}

// Keys and values of every head: their own coordinates, and the rotated ones that all share.
void Decoder::expand(int64_t t) {
    int32_t dim = model.head_dim, rotated = 2 * model.rotary_half, own = dim - rotated;
    const float* made = expanded + t * expanded_width(model);
    const float* shared = latents + t * latent_width(model) + model.q_latent + model.kv_latent;
    float* keys = projected + t * projected_width(model) + (int64_t)model.heads * dim;
    float* values = keys + (int64_t)model.heads * dim;
    for (int h = 0; h < model.heads; h++, made += own + model.value_dim) {
        std::copy_n(made, own, keys + h * dim);
        std::copy_n(shared, rotated, keys + h * dim + own);
        std::copy_n(made + own, model.value_dim, values + h * model.value_dim);
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
        int start = model.kv_latent ? dim - 2 * model.rotary_half : 0;
        for (int i = start; i < n; i += dim)
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

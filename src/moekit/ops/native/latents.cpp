// Latent attention (MLA): queries, keys and values come from vectors that are narrower than all heads,
// and those of keys and values are what is kept. Instead of expanding every latent of the past to
// keys and values of all heads, the matrix that would do it is applied to the new queries, and that
// of the values to what attention gives.
#include <algorithm>

#include "decoder_state.h"

using namespace moekit;

void Decoder::project_latents(const DecoderLayer& layer) {
    int64_t stride = latent_width(model), queries = projected_width(model);
    float* kv_latents = latents + model.q_latent;
    MatmulJob jobs[] = {{layer.kv_a.format, layer.kv_a.data, kv_latents, stride, nullptr, 0},
                        {layer.q_a.format, layer.q_a.data, latents, stride}};
    if (!model.q_latent) jobs[1] = {layer.q.format, layer.q.data, projected, queries, nullptr, 0};
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
        MatmulJob job{layer.q.format, layer.q.data, projected, queries, nullptr, 0};
        matmuls(pool, &job, 1, latents, stride, T());
    }
}

// Rotates, keeps the latents of these rows, and turns queries into those of latents.
void Decoder::absorb(const DecoderLayer& layer, int index) {
    int32_t heads = model.heads, dim = model.head_dim, rotated = kv.head_dim, own = dim - rotated;
    int64_t queries = projected_width(model), width = query_width(kv);
    each_row([&](int64_t t) {
        float *q = projected + t * queries, *row = absorbed + t * heads * width;
        float* latent = latents + t * latent_width(model) + model.q_latent;
        float* key = latent + model.kv_latent;
        int64_t angle = (int64_t)rows[t].position * model.rotary_half;
        auto turn = [&](float* to) {
            if (layer.cos)
                rotate(to, layer.cos + angle, layer.sin + angle, model.rotary_half,
                       model.rotary_in_pairs);
        };
        add_bias(q, layer.q.bias, heads * dim);
        turn(key);
        kv_append(kv, index, rows[t], key, latent);
        int64_t start = whole_vectors(model.kv_latent);
        for (int h = 0; h < heads; h++, q += dim, row += width) {
            turn(q + own);
            std::fill(row + model.kv_latent, row + width, 0.0f);
            std::copy_n(q + own, rotated, row + start);
        }
    });
    head_jobs.clear();
    for (int h = 0; h < heads; h++)
        head_jobs.push_back({layer.k_heads[h].format, layer.k_heads[h].data, absorbed + h * width,
                             heads * width, projected + (int64_t)h * dim, queries});
    matmuls(pool, head_jobs.data(), heads, nullptr, 0, T());
}

void Decoder::attend_by_latents(const DecoderLayer& layer, const Attention& how, int index) {
    int32_t heads = model.heads;
    int64_t width = query_width(kv), stride = heads * width, out = (int64_t)heads * model.value_dim;
    attention(pool, how, index, rows.data(), T(), absorbed, stride, absorbed);
    head_jobs.clear();
    for (int h = 0; h < heads; h++)
        head_jobs.push_back({layer.v_heads[h].format, layer.v_heads[h].data,
                             attended + (int64_t)h * model.value_dim, out, absorbed + h * width,
                             stride});
    matmuls(pool, head_jobs.data(), heads, nullptr, 0, T());
}

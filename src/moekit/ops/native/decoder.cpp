#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "decoder_state.h"
#include "floats.h"

using namespace moekit;

void Decoder::begin(const Row* given, int32_t count) {
    Clock clock(seconds[EMBED]);
    rows.assign(given, given + count);
    int32_t D = model.width;
    each_row([&](int64_t t) {
        float* to = x + t * D;
        int64_t at = (int64_t)rows[t].token * D;
        if (model.embedding_is_bf16) {
            auto from = static_cast<const uint16_t*>(model.embedding) + at;
            for (int i = 0; i < D; i++) to[i] = from_bfloat16(from[i]) * model.embedding_scale;
        } else {
            auto from = static_cast<const float*>(model.embedding) + at;
            for (int i = 0; i < D; i++) to[i] = from[i] * model.embedding_scale;
        }
    });
}

void Decoder::attend(int index) {
    const DecoderLayer& layer = layers[index];
    project(layer, index);
    {
        Clock clock(seconds[ATTEND]);
        Attention how{kv, model.heads, layer.window, model.attention_scale, layer.sinks};
        if (kv.is_latent)
            attend_by_latents(layer, how, index);
        else
            attention(pool, how, index, rows.data(), T(), projected, projected_width(model),
                      attended);
    }
    {
        Clock clock(seconds[OUTPUT]);
        matmul(pool, layer.o.format, layer.o.data, attended, T(), outputs);
        add(outputs, layer.after_attention, layer.o.bias);
        normalise(layer.before_mlp);
    }
    if (layer.moe >= 0)
        route(layer);
    else
        dense(layer);
}

void Decoder::route(const DecoderLayer& layer) {
    {
        Clock clock(seconds[ROUTE]);
        router_logits(pool, layer.router, normed, T(), logits);
    }
    choose(layer);
}

// The choice of experts, and the pairs of row and expert, those of an expert one after the other.
void Decoder::choose(const DecoderLayer& layer) {
    Clock clock(seconds[ROUTE]);
    const RouterRule& rule = layer.router.rule;
    router_choose(pool, layer.router, logits, T(), ids, weights);
    shared_is_due = layer.shared_format != nullptr;
    K = rule.top_k + shared_is_due;
    int32_t count = T() * rule.top_k;
    // A norm comes before the scaling of what is added to the residual stream.
    float scale = layer.after_mlp ? 1.0f : model.residual_scale;
    std::fill(first_pair.begin(), first_pair.end(), 0);
    for (int32_t i = 0; i < count; i++) first_pair[ids[i] + 1]++;
    for (int32_t e = 0; e < rule.experts; e++) first_pair[e + 1] += first_pair[e];
    for (int32_t t = 0; t < T(); t++) {
        for (int32_t k = 0; k < rule.top_k; k++) {
            int32_t pair = first_pair[ids[t * rule.top_k + k]]++;
            token_of[pair] = t;
            pair_of[t * K + k] = pair;
            all_weights[t * K + k] = weights[t * rule.top_k + k] * scale;
        }
        if (!shared_is_due) continue;
        float weight = scale;
        if (layer.shared_gate) {
            float logit = dot(normed + (int64_t)t * model.width, layer.shared_gate, model.width);
            weight /= 1.0f + std::exp(-logit);
        }
        token_of[count + t] = t;
        pair_of[t * K + rule.top_k] = count + t;
        all_weights[t * K + rule.top_k] = weight;
    }
    // Counting moved every start to the end of its expert, which is the start of the next.
    std::copy_backward(first_pair.begin(), first_pair.begin() + rule.experts,
                       first_pair.begin() + rule.experts + 1);
    first_pair[0] = 0;
}

void Decoder::dense(const DecoderLayer& layer) {
    Clock clock(seconds[EXPERTS]);
    for (int32_t t = 0; t < T(); t++) token_of[t] = t;
    FfnJob job{layer.shared_format, layer.shared, 0, T()};
    ffn(pool, &job, 1, token_of, normed, model.width, outputs);
    add(outputs, layer.after_mlp, nullptr);
}

void Decoder::experts(int index, const int32_t* which, const uint64_t* addresses, int32_t count,
                      const ExpertFormat* const* formats) {
    Clock clock(seconds[EXPERTS]);
    const DecoderLayer& layer = layers[index];
    jobs.clear();
    for (int32_t i = 0; i < count; i++) {
        int32_t e = which[i], pairs = first_pair[e + 1] - first_pair[e];
        const void* base = reinterpret_cast<const void*>(addresses[i]);
        const ExpertFormat* format = formats ? formats[e] : layer.expert_formats[e];
        if (pairs) jobs.push_back({format, base, first_pair[e], pairs});
    }
    if (shared_is_due)
        jobs.push_back({layer.shared_format, layer.shared, T() * layer.router.rule.top_k, T()});
    shared_is_due = false;
    if (!jobs.empty())
        ffn(pool, jobs.data(), static_cast<int32_t>(jobs.size()), token_of, normed, model.width,
            outputs);
}

void Decoder::experts_in_memory(int index, const uint64_t* addresses) {
    std::vector<int32_t> used;
    std::vector<uint64_t> where;
    for (int32_t e = 0; e < layers[index].router.rule.experts; e++)
        if (first_pair[e] < first_pair[e + 1]) {
            used.push_back(e);
            where.push_back(addresses[e]);
        }
    int32_t count = static_cast<int32_t>(used.size());
    experts(index, used.data(), where.data(), count, nullptr);
}

void Decoder::combine_pairs(int index) {
    Clock clock(seconds[COMBINE]);
    const DecoderLayer& layer = layers[index];
    bool directly = layer.after_mlp == nullptr;
    float* to = directly ? x : normed;
    combine(pool, outputs, pair_of, all_weights, T(), K, model.width, to, directly);
    if (!directly) add(normed, layer.after_mlp, nullptr);
}

void Decoder::finish(const int32_t* which, int32_t count, float* out) {
    Clock clock(seconds[LOGITS]);
    int32_t D = model.width, vocab = model.vocab;
    for (int64_t i = 0; i < count; i++)
        rms_norm(x + which[i] * (int64_t)D, model.final_norm, model.eps, D, normed + i * D);
    matmul(pool, model.head.format, model.head.data, normed, count, out);
    if (!model.head.bias && model.logit_scale == 1.0f) return;
    for (int64_t i = 0; i < count; i++)
        for (int32_t v = 0; v < vocab; v++) {
            float bias = model.head.bias ? model.head.bias[v] : 0.0f;
            out[i * vocab + v] = (out[i * vocab + v] + bias) * model.logit_scale;
        }
}

Decoder* decoder_new(const DecoderModel* model, Pool* pool) { return new Decoder(*model, pool); }

void decoder_free(Decoder* decoder) { delete decoder; }

int64_t decoder_scratch(const DecoderModel* model) { return Layout(*model).size; }

KvShape decoder_kv(const DecoderModel* m) {
    if (m->kv_latent) return {m->layers, 1, 2 * m->rotary_half, m->kv_latent, m->kv_is_bf16, 1};
    return {m->layers, m->kv_heads, m->head_dim, m->value_dim, m->kv_is_bf16, 0};
}

void decoder_rotation(Decoder* d, int32_t layer, const float* cos, const float* sin) {
    d->layers[layer].cos = cos;
    d->layers[layer].sin = sin;
}

void decoder_begin(Decoder* d, const Row* rows, int32_t T) { d->begin(rows, T); }

void decoder_attend(Decoder* d, int32_t layer) { d->attend(layer); }

const int32_t* decoder_ids(const Decoder* d) { return d->ids; }

const float* decoder_weights(const Decoder* d) { return d->weights; }

const float* decoder_hidden(const Decoder* d) { return d->normed; }

float* decoder_scores(Decoder* d) { return d->logits; }

void decoder_choose(Decoder* d, int32_t layer) { d->choose(d->layers[layer]); }

void decoder_experts(Decoder* d, int32_t layer, const int32_t* experts, const uint64_t* addresses,
                     int32_t count, const ExpertFormat* const* formats) {
    d->experts(layer, experts, addresses, count, formats);
}

void decoder_combine(Decoder* d, int32_t layer) { d->combine_pairs(layer); }

void decoder_logits(Decoder* d, const int32_t* rows, int32_t count, float* logits) {
    d->finish(rows, count, logits);
}

void decoder_step(Decoder* d, const Row* rows, int32_t T, const uint64_t* addresses,
                  const int32_t* logit_rows, int32_t count, float* logits) {
    d->begin(rows, T);
    for (int32_t l = 0; l < d->model.layers; l++) {
        d->attend(l);
        if (d->layers[l].moe < 0) continue;
        d->experts_in_memory(l, addresses + (int64_t)d->layers[l].moe * d->at.experts);
        d->combine_pairs(l);
    }
    if (count) d->finish(logit_rows, count, logits);
}

void decoder_router_logits(Decoder* d, int32_t layer, const float* hidden, int32_t T,
                           float* logits) {
    router_logits(d->pool, d->layers[layer].router, hidden, T, logits);
}

const double* decoder_seconds(const Decoder* d) { return d->seconds; }

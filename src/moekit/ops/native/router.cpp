#include "router.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "lanes.h"
#include "pool.h"

namespace moekit {

namespace {

constexpr int MAX_EXPERTS = 1024;
constexpr int MAX_GROUPS = 64;
constexpr int TOKENS = 4, ROWS = 4;  // of a tile of the product
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// logits of N tokens for M experts; each is summed in the same order whatever N and M are.
template <int N, int M, class Element>
INLINE void product(const float* hidden, const Element* weight, const float* bias, int width,
                    float* logits, int experts) {
    Lanes total[N][M] = {};
    for (int i = 0; i < width; i += LANES) {
        Lanes w[M];
        for (int m = 0; m < M; m++) w[m] = load(weight + (int64_t)m * width + i);
        for (int n = 0; n < N; n++) {
            Lanes x = load(hidden + (int64_t)n * width + i);
            for (int m = 0; m < M; m++) total[n][m] += x * w[m];
        }
    }
    for (int n = 0; n < N; n++)
        for (int m = 0; m < M; m++)
            logits[(int64_t)n * experts + m] = sum(total[n][m]) + (bias ? bias[m] : 0.0f);
}

template <class Element>
INLINE void block(const Router& router, const float* hidden, int tokens, int expert, int experts,
                  float* logits) {
    int width = router.width, all = router.rule.experts;
    const Element* weight = (const Element*)router.weight + (int64_t)expert * width;
    const float* bias = router.bias ? router.bias + expert : nullptr;
    logits += expert;
    int t = 0;
    for (; t + TOKENS <= tokens && experts == ROWS; t += TOKENS)
        product<TOKENS, ROWS>(hidden + (int64_t)t * width, weight, bias, width,
                              logits + (int64_t)t * all, all);
    for (; t < tokens; t++) {
        const float* row = hidden + (int64_t)t * width;
        float* to = logits + (int64_t)t * all;
        if (experts == ROWS)
            product<1, ROWS>(row, weight, bias, width, to, all);
        else
            for (int m = 0; m < experts; m++)
                product<1, 1>(row, weight + (int64_t)m * width, bias ? bias + m : nullptr, width,
                              to + m, all);
    }
}

EVERY_ISA void block_float(const Router& router, const float* hidden, int tokens, int expert,
                           int experts, float* logits) {
    block<float>(router, hidden, tokens, expert, experts, logits);
}

EVERY_ISA void block_bf16(const Router& router, const float* hidden, int tokens, int expert,
                          int experts, float* logits) {
    block<uint16_t>(router, hidden, tokens, expert, experts, logits);
}

// scores [experts] from logits; both have room up to a multiple of LANES.
EVERY_ISA void score(const RouterRule& rule, const float* logits, float* scores) {
    int experts = rule.experts, padded = (experts + LANES - 1) / LANES * LANES;
    for (int e = 0; e < experts; e++) {
        float logit = logits[e] * rule.logit_scale;
        if (rule.logit_cap > 0) logit = std::tanh(logit / rule.logit_cap) * rule.logit_cap;
        scores[e] = logit;
    }
    if (rule.score == SIGMOID) {
        for (int e = 0; e < experts; e++) scores[e] = 1.0f / (1.0f + std::exp(-scores[e]));
        return;
    }
    float top = *std::max_element(scores, scores + experts);
    std::fill(scores + experts, scores + padded, -1e30f);
    Lanes total = {};
    for (int e = 0; e < padded; e += LANES) {
        Lanes weight = exponential(load(scores + e) - top);
        store(scores + e, weight);
        total += weight;
    }
    float all = sum(total);
    for (int e = 0; e < experts; e++) scores[e] /= all;
}

// The index of the largest of n values; the first of equals.
int best(const float* values, int n) {
    int found = 0;
    for (int i = 1; i < n; i++)
        if (values[i] > values[found]) found = i;
    return found;
}

// Experts outside the best groups lose their chance.
void limit_groups(const RouterRule& rule, float* choice) {
    int size = rule.experts / rule.groups;
    float ranks[MAX_GROUPS];
    for (int g = 0; g < rule.groups; g++) {
        float first = LOWEST, second = LOWEST;
        for (int e = g * size; e < (g + 1) * size; e++) {
            if (choice[e] > first) {
                second = first;
                first = choice[e];
            } else {
                second = std::max(second, choice[e]);
            }
        }
        ranks[g] = rule.group_sums_two ? first + second : first;
    }
    bool kept[MAX_GROUPS] = {};
    for (int k = 0; k < rule.topk_groups; k++) {
        int g = best(ranks, rule.groups);
        kept[g] = true;
        ranks[g] = LOWEST;
    }
    for (int g = 0; g < rule.groups; g++)
        if (!kept[g]) std::fill(choice + g * size, choice + (g + 1) * size, LOWEST);
}

void choose(const Router& router, const float* logits, int32_t* ids, float* weights) {
    const RouterRule& rule = router.rule;
    alignas(64) float scores[MAX_EXPERTS + LANES], choice[MAX_EXPERTS + LANES];
    score(rule, logits, scores);
    for (int e = 0; e < rule.experts; e++) {
        float base = rule.bias_on_logits ? logits[e] : scores[e];
        choice[e] = router.correction ? base + router.correction[e] : base;
    }
    if (rule.groups > 1) limit_groups(rule, choice);
    float total = 0;
    for (int k = 0; k < rule.top_k; k++) {
        ids[k] = best(choice, rule.experts);
        choice[ids[k]] = LOWEST;
        weights[k] = scores[ids[k]];
        total += weights[k];
    }
    float factor = rule.scaling;
    if (rule.normalize) factor /= std::max(total, rule.smallest_sum);
    for (int k = 0; k < rule.top_k; k++) weights[k] *= factor;
}

}  // namespace

void router_logits(Pool* pool, const Router& router, const float* hidden, int T, float* logits) {
    int tiles = (router.rule.experts + ROWS - 1) / ROWS;
    auto compute = router.is_bf16 ? block_bf16 : block_float;
    Items items;
    items.count = tiles;
    auto on_thread = [&](int32_t) {
        for (int tile; items.take(tile);) {
            int first = tile * ROWS, count = std::min(ROWS, router.rule.experts - first);
            compute(router, hidden, T, first, count, logits);
        }
    };
    run(pool, on_thread);
}

void router_choose(Pool* pool, const Router& router, const float* logits, int T, int32_t* ids,
                   float* weights) {
    const RouterRule& rule = router.rule;
    Items items;
    items.count = T;
    auto on_thread = [&](int32_t) {
        for (int t; items.take(t);)
            choose(router, logits + (int64_t)t * rule.experts, ids + t * rule.top_k,
                   weights + t * rule.top_k);
    };
    if (T == 1)
        on_thread(0);  // less work than waking the others
    else
        run(pool, on_thread);
}

}  // namespace moekit

// The router: logits in fp32, and the choice of experts by the rule of the family.
#pragma once
#include "native.h"

namespace moekit {

enum Score : int32_t { SOFTMAX = 0, SIGMOID = 1 };

struct RouterRule {
    int32_t experts, top_k, score, normalize;
    int32_t groups, topk_groups;  // 1 and 1: no groups
    int32_t group_sums_two;       // a group counts as its two best scores, else as its best
    int32_t bias_on_logits;       // the correction bias is added to logits, else to scores
    float scaling, logit_scale, logit_cap, smallest_sum;
};

struct Router {
    RouterRule rule;
    int32_t width, is_bf16;
    const void* weight;      // [experts, width]
    const float* bias;       // [experts] or null: part of the logits
    const float* correction; // [experts] or null: counts for the choice only
};

// logits [T, experts] of hidden states [T, width], neither of them rounded.
void router_logits(Pool* pool, const Router& router, const float* hidden, int T, float* logits);

// ids and weights [T, top_k] of logits [T, experts], best first; of equal scores the lower id wins.
void router_choose(Pool* pool, const Router& router, const float* logits, int T, int32_t* ids,
                   float* weights);

}  // namespace moekit

// Attention by tiles: some queries against a block of keys at a time, with a running softmax.
#pragma once
#include <algorithm>

#include "attention.h"
#include "floats.h"
#include "lanes.h"

namespace moekit {

struct Query {
    const float* values;
    float* out;
    int position, first;  // the last and the first position that it sees
    int head;
};

// Queries of heads whose keys and values are latents, all of them those of one row of the cache.
void attend_latents(const Attention& how, const Row& row, int layer, const Query* queries,
                    int count);
void append_latents(const KvShape& shape, int layer, const Row& row, const float* rotated,
                    const float* latents);

namespace {

constexpr int TILE = 4;          // queries whose scores are computed together
constexpr int MAX_QUERIES = 16;  // queries that share a pass over the keys
constexpr float NOTHING = -1e30f;  // below every score, yet finite: differences stay numbers

constexpr int TWO = 2 * LANES;
static_assert(TWO == 32, "whole_vectors");

INLINE void set(float* p, int at, float value) { p[at] = value; }

INLINE void set(uint16_t* p, int at, float value) {
    p[at / TWO * TWO + at % LANES * 2 + at / LANES % 2] = to_bfloat16(value);
}

// out[n] = out[n] * keep[n] + the values of `count` keys by their weights, `width` numbers each.
template <int N, int MOST, class Element>
INLINE void value_tile(float (*weights)[KEY_BLOCK], const float* keep, const Element* values,
                       int64_t stride, int64_t width, int count, float (*out)[MOST]) {
    for (int64_t start = 0; start < width; start += 2 * TWO) {
        bool both = start + TWO < width;
        Lanes total[N][4] = {};
        for (int j = 0; j < count; j++) {
            const Element* value = values + j * stride + start;
            Lanes v[4] = {};
            load_two(value, v[0], v[1]);
            if (both) load_two(value + TWO, v[2], v[3]);
            for (int n = 0; n < N; n++)
                for (int part = 0; part < 4; part++) total[n][part] += weights[n][j] * v[part];
        }
        for (int n = 0; n < N; n++)
            for (int part = 0; part < (both ? 4 : 2); part++) {
                float* at = out[n] + start + part * LANES;
                store(at, load(at) * keep[n] + total[n][part]);
            }
    }
}

struct Softmax {
    float highest[MAX_QUERIES], total[MAX_QUERIES];
};

// Turns scores of a block into weights, and says by what to multiply what was summed before.
INLINE float soften(float* scores, const Query& query, int base, float& highest, float& total) {
    if (base + KEY_BLOCK - 1 > query.position || base < query.first)
        for (int j = 0; j < KEY_BLOCK; j++)
            if (base + j > query.position || base + j < query.first) scores[j] = NOTHING;
    Lanes top = load(scores);
    for (int j = LANES; j < KEY_BLOCK; j += LANES) top = larger(top, load(scores + j));
    float before = highest;
    highest = std::max(before, largest(top));
    if (highest == NOTHING) {  // none of the keys so far is seen
        std::fill(scores, scores + KEY_BLOCK, 0.0f);
        return 1.0f;
    }
    Lanes added = {};
    for (int j = 0; j < KEY_BLOCK; j += LANES) {
        Lanes weight = exponential(load(scores + j) - highest);
        store(scores + j, weight);
        added += weight;
    }
    float keep = exponential(all(before - highest))[0];
    total = total * keep + sum(added);
    return keep;
}

// A `Head` has the keys and values of a sequence: `score` of N queries against a block of keys of
// which `count` are wanted, `values` from a position on, `stride` apart, and `width` of them.
template <int N, int MOST, class Head>
INLINE void attend_tile(const Attention& how, const Head& head, const Query* queries, int base,
                        Softmax& softmax, int at, float (*out)[MOST]) {
    alignas(64) float scores[N][KEY_BLOCK];
    const float* vectors[N];
    float keep[N];
    int last = -1;
    for (int n = 0; n < N; n++) {
        vectors[n] = queries[n].values;
        last = std::max(last, queries[n].position);
    }
    int count = std::min(KEY_BLOCK, last - base + 1);
    head.template score<N>(vectors, base, count, how.scale, scores);
    for (int n = 0; n < N; n++)
        keep[n] = soften(scores[n], queries[n], base, softmax.highest[at + n],
                         softmax.total[at + n]);
    value_tile<N, MOST>(scores, keep, head.values(base), head.stride(), head.width(), count,
                        out + at);
}

// MOST is the room for the values of a query.
template <int MOST, class Head>
INLINE void attend_queries(const Attention& how, const Head& head, const Query* queries,
                           int count) {
    alignas(64) float out[MAX_QUERIES][MOST];
    Softmax softmax;
    int dim = how.kv.value_dim, last = 0, first = INT32_MAX;
    for (int n = 0; n < count; n++) {
        std::fill(out[n], out[n] + head.width(), 0.0f);
        softmax.highest[n] = how.sinks ? how.sinks[queries[n].head] : NOTHING;
        softmax.total[n] = how.sinks ? 1.0f : 0.0f;
        last = std::max(last, queries[n].position);
        first = std::min(first, queries[n].first);
    }
    for (int base = first / KEY_BLOCK * KEY_BLOCK; base <= last; base += KEY_BLOCK) {
        int n = 0;
        for (; n + TILE <= count; n += TILE)
            attend_tile<TILE, MOST>(how, head, queries + n, base, softmax, n, out);
        for (; n < count; n++)
            attend_tile<1, MOST>(how, head, queries + n, base, softmax, n, out);
    }
    for (int n = 0; n < count; n++)
        for (int i = 0; i < dim; i++) queries[n].out[i] = out[n][i] / softmax.total[n];
}

}  // namespace
}  // namespace moekit

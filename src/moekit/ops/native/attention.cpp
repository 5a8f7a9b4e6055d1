#include "attention.h"

#include <algorithm>
#include <vector>

#include "floats.h"
#include "lanes.h"
#include "pool.h"

namespace moekit {

namespace {

constexpr int TILE = 4;          // queries whose scores are computed together
constexpr int MAX_QUERIES = 16;  // queries that share a pass over the keys
constexpr float NOTHING = -1e30f;  // below every score, yet finite: differences stay numbers

constexpr int TWO = 2 * LANES;

int64_t value_stride(const KvShape& shape) { return (shape.value_dim + TWO - 1) / TWO * TWO; }

template <class Element>
struct Head {
    Element *keys, *values;

    Head(const KvShape& shape, const Row& row, int layer, int head) {
        int64_t size = row.capacity * (shape.head_dim + value_stride(shape));
        keys = (Element*)row.kv + ((int64_t)layer * shape.kv_heads + head) * size;
        values = keys + row.capacity * shape.head_dim;
    }
};

INLINE void set(float* p, int at, float value) { p[at] = value; }

INLINE void set(uint16_t* p, int at, float value) {
    p[at / TWO * TWO + at % LANES * 2 + at / LANES % 2] = to_bfloat16(value);
}

template <class Element>
void append(const KvShape& shape, int layer, const Row& row, const float* keys,
            const float* values) {
    int dim = shape.head_dim, value_dim = shape.value_dim;
    int64_t position = row.position;
    for (int h = 0; h < shape.kv_heads; h++) {
        Head<Element> head(shape, row, layer, h);
        Element* key = head.keys + position / LANES * LANES * dim;
        Element* value = head.values + position * value_stride(shape);
        int lane = position % LANES;
        for (int i = 0; i < dim; i++) set(key, i * LANES + lane, keys[h * dim + i]);
        for (int i = 0; i < value_dim; i++) set(value, i, values[h * value_dim + i]);
    }
}

// Scores of N queries against KEY_BLOCK keys.
template <int N, class Element>
INLINE void score_tile(const float* const* queries, const Element* keys, int dim, float scale,
                       float (*scores)[KEY_BLOCK]) {
    constexpr int PARTS = KEY_BLOCK / LANES;
    Lanes total[N][PARTS] = {};
    for (int i = 0; i < dim; i += 2) {
        Lanes first[N], second[N];
        for (int n = 0; n < N; n++) {
            first[n] = all(queries[n][i]);
            second[n] = all(queries[n][i + 1]);
        }
        for (int part = 0; part < PARTS; part++) {
            Lanes key[2];
            load_two(keys + ((int64_t)part * dim + i) * LANES, key[0], key[1]);
            for (int n = 0; n < N; n++) {
                total[n][part] += first[n] * key[0];
                total[n][part] += second[n] * key[1];
            }
        }
    }
    for (int n = 0; n < N; n++)
        for (int part = 0; part < PARTS; part++)
            store(scores[n] + part * LANES, total[n][part] * scale);
}

// out[n] = out[n] * keep[n] + the values of `count` keys by their weights.
template <int N, class Element>
INLINE void value_tile(float (*weights)[KEY_BLOCK], const float* keep, const Element* values,
                       int64_t stride, int count, float (*out)[MAX_HEAD_DIM]) {
    for (int64_t start = 0; start < stride; start += 2 * TWO) {
        bool both = start + TWO < stride;
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

struct Query {
    const float* values;
    float* out;
    int position, first;  // the last and the first position that it sees
    int head;
};

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

template <int N, class Element>
INLINE void attend_tile(const Attention& how, const Head<Element>& head, const Query* queries,
                        int base, Softmax& softmax, int at, float (*out)[MAX_HEAD_DIM]) {
    alignas(64) float scores[N][KEY_BLOCK];
    const float* vectors[N];
    float keep[N];
    int dim = how.kv.head_dim, last = -1;
    for (int n = 0; n < N; n++) {
        vectors[n] = queries[n].values;
        last = std::max(last, queries[n].position);
    }
    score_tile<N>(vectors, head.keys + (int64_t)base * dim, dim, how.scale, scores);
    for (int n = 0; n < N; n++)
        keep[n] = soften(scores[n], queries[n], base, softmax.highest[at + n],
                         softmax.total[at + n]);
    int64_t stride = value_stride(how.kv);
    value_tile<N>(scores, keep, head.values + base * stride, stride,
                  std::min(KEY_BLOCK, last - base + 1), out + at);
}

template <class Element>
INLINE void attend_queries(const Attention& how, const Head<Element>& head, const Query* queries,
                           int count) {
    alignas(64) float out[MAX_QUERIES][MAX_HEAD_DIM];
    Softmax softmax;
    int dim = how.kv.value_dim, stride = (int)value_stride(how.kv), last = 0, first = INT32_MAX;
    for (int n = 0; n < count; n++) {
        std::fill(out[n], out[n] + stride, 0.0f);
        softmax.highest[n] = how.sinks ? how.sinks[queries[n].head] : NOTHING;
        softmax.total[n] = how.sinks ? 1.0f : 0.0f;
        last = std::max(last, queries[n].position);
        first = std::min(first, queries[n].first);
    }
    for (int base = first / KEY_BLOCK * KEY_BLOCK; base <= last; base += KEY_BLOCK) {
        int n = 0;
        for (; n + TILE <= count; n += TILE)
            attend_tile<TILE>(how, head, queries + n, base, softmax, n, out);
        for (; n < count; n++) attend_tile<1>(how, head, queries + n, base, softmax, n, out);
    }
    for (int n = 0; n < count; n++)
        for (int i = 0; i < dim; i++) queries[n].out[i] = out[n][i] / softmax.total[n];
}

EVERY_ISA void attend_float(const Attention& how, const Row& row, int layer, int kv_head,
                            const Query* queries, int count) {
    attend_queries(how, Head<float>(how.kv, row, layer, kv_head), queries, count);
}

EVERY_ISA void attend_bf16(const Attention& how, const Row& row, int layer, int kv_head,
                           const Query* queries, int count) {
    attend_queries(how, Head<uint16_t>(how.kv, row, layer, kv_head), queries, count);
}

// Rows first..first+rows-1 are neighbours in one sequence and share the passes over its keys.
struct Piece {
    int first, rows, kv_head, head, heads;
};

struct Work {
    const Attention& how;
    int layer;
    const Row* rows;
    const float* queries;
    int64_t stride;
    float* out;
};

void attend_piece(const Work& work, const Piece& piece) {
    const Attention& how = work.how;
    int dim = how.kv.head_dim, count = 0;
    Query queries[MAX_QUERIES];
    for (int r = piece.first; r < piece.first + piece.rows; r++)
        for (int h = piece.head; h < piece.head + piece.heads; h++) {
            int position = work.rows[r].position;
            int first = how.window ? std::max(0, position - how.window + 1) : 0;
            queries[count++] = {work.queries + r * work.stride + (int64_t)h * dim,
                                work.out + ((int64_t)r * how.heads + h) * how.kv.value_dim,
                                position, first, h};
        }
    auto attend = how.kv.is_bf16 ? attend_bf16 : attend_float;
    attend(how, work.rows[piece.first], work.layer, piece.kv_head, queries, count);
}

std::vector<Piece> cut(const Attention& how, const Row* rows, int T) {
    std::vector<Piece> pieces;
    int group = how.heads / how.kv.kv_heads, heads = std::min(group, MAX_QUERIES);
    int most = std::max(1, MAX_QUERIES / heads);
    for (int start = 0, end; start < T; start = end) {
        end = start + 1;
        while (end < T && end - start < most && rows[end].kv == rows[start].kv &&
               rows[end].position == rows[end - 1].position + 1)
            end++;
        for (int k = 0; k < how.kv.kv_heads; k++)
            for (int h = 0; h < group; h += heads)
                pieces.push_back(
                    {start, end - start, k, k * group + h, std::min(heads, group - h)});
    }
    return pieces;
}

}  // namespace

void kv_append(const KvShape& shape, int layer, const Row& row, const float* keys,
               const float* values) {
    if (shape.is_bf16)
        append<uint16_t>(shape, layer, row, keys, values);
    else
        append<float>(shape, layer, row, keys, values);
}

void attention(Pool* pool, const Attention& how, int layer, const Row* rows, int T,
               const float* queries, int64_t stride, float* out) {
    std::vector<Piece> pieces = cut(how, rows, T);
    Work work{how, layer, rows, queries, stride, out};
    Items items;
    items.count = static_cast<int>(pieces.size());
    auto on_thread = [&](int32_t) {
        for (int i; items.take(i);) attend_piece(work, pieces[i]);
    };
    run(pool, on_thread);
}

}  // namespace moekit

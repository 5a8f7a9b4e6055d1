#include "attention.h"

#include <algorithm>
#include <vector>

#include "attention_tiles.h"
#include "pool.h"

namespace moekit {

namespace {

int64_t value_stride(const KvShape& shape) { return whole_vectors(shape.value_dim); }

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

template <class Element>
struct Head {
    Element *keys, *all_values;
    int dim;
    int64_t value_step;

    Head(const KvShape& shape, const Row& row, int layer, int head)
        : dim(shape.head_dim), value_step(value_stride(shape)) {
        int64_t size = row.capacity * (dim + value_step);
        keys = (Element*)row.kv + ((int64_t)layer * shape.kv_heads + head) * size;
        all_values = keys + row.capacity * dim;
    }

    template <int N>
    INLINE_HERE void score(const float* const* queries, int base, int, float scale,
                      float (*scores)[KEY_BLOCK]) const {
        score_tile<N>(queries, keys + (int64_t)base * dim, dim, scale, scores);
    }
    const Element* values(int position) const { return all_values + position * value_step; }
    int64_t stride() const { return value_step; }
    int64_t width() const { return value_step; }
};

template <class Element>
void append(const KvShape& shape, int layer, const Row& row, const float* keys,
            const float* values) {
    int dim = shape.head_dim, value_dim = shape.value_dim;
    int64_t position = row.position;
    for (int h = 0; h < shape.kv_heads; h++) {
        Head<Element> head(shape, row, layer, h);
        Element* key = head.keys + position / LANES * LANES * dim;
        Element* value = head.all_values + position * head.value_step;
        int lane = position % LANES;
        for (int i = 0; i < dim; i++) set(key, i * LANES + lane, keys[h * dim + i]);
        for (int i = 0; i < value_dim; i++) set(value, i, values[h * value_dim + i]);
    }
}

EVERY_ISA void attend_float(const Attention& how, const Row& row, int layer, int kv_head,
                            const Query* queries, int count) {
    attend_queries<MAX_HEAD_DIM>(how, Head<float>(how.kv, row, layer, kv_head), queries, count);
}

EVERY_ISA void attend_bf16(const Attention& how, const Row& row, int layer, int kv_head,
                           const Query* queries, int count) {
    attend_queries<MAX_HEAD_DIM>(how, Head<uint16_t>(how.kv, row, layer, kv_head), queries, count);
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
    int64_t out_stride, out_step;  // of rows and of heads
};

void attend_piece(const Work& work, const Piece& piece) {
    const Attention& how = work.how;
    int step = query_width(how.kv), count = 0;
    Query queries[MAX_QUERIES];
    for (int r = piece.first; r < piece.first + piece.rows; r++)
        for (int h = piece.head; h < piece.head + piece.heads; h++) {
            int position = work.rows[r].position;
            int first = how.window ? std::max(0, position - how.window + 1) : 0;
            queries[count++] = {work.queries + r * work.stride + (int64_t)h * step,
                                work.out + r * work.out_stride + (int64_t)h * work.out_step,
                                position, first, h};
        }
    if (how.kv.is_latent)
        return attend_latents(how, work.rows[piece.first], work.layer, queries, count);
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

int query_width(const KvShape& shape) {
    if (!shape.is_latent) return shape.head_dim;
    return (int)(whole_vectors(shape.value_dim) + whole_vectors(shape.head_dim));
}

void kv_append(const KvShape& shape, int layer, const Row& row, const float* keys,
               const float* values) {
    if (shape.is_latent)
        append_latents(shape, layer, row, keys, values);
    else if (shape.is_bf16)
        append<uint16_t>(shape, layer, row, keys, values);
    else
        append<float>(shape, layer, row, keys, values);
}

void attention(Pool* pool, const Attention& how, int layer, const Row* rows, int T,
               const float* queries, int64_t stride, float* out) {
    std::vector<Piece> pieces = cut(how, rows, T);
    int64_t step = how.kv.is_latent ? query_width(how.kv) : how.kv.value_dim;
    Work work{how, layer, rows, queries, stride, out, how.heads * step, step};
    Items items;
    items.count = static_cast<int>(pieces.size());
    auto on_thread = [&](int32_t) {
        for (int i; items.take(i);) attend_piece(work, pieces[i]);
    };
    run(pool, on_thread);
}

}  // namespace moekit

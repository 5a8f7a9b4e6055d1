// Causal attention of grouped query heads over a cache of keys and values.
#pragma once
#include "native.h"

namespace moekit {

// One token of a step: where its sequence keeps keys and values, and its place in it.
struct Row {
    void* kv;          // see KvShape
    int64_t capacity;  // positions that fit, a multiple of KEY_BLOCK
    int32_t position, token;
};

constexpr int KEY_BLOCK = 64;
constexpr int MAX_HEAD_DIM = 256;
constexpr int MAX_LATENT = 512;

// A sequence's memory is, for each layer and key head, the keys and then the values. Keys lie in
// blocks of 16 positions, [capacity / 16, head_dim, 16], so that a vector holds one coordinate of
// 16 keys and scores need no sums across lanes; values are [capacity, value_dim rounded up to 32].
// In bf16 every two vectors of 16 numbers are stored as pairs, see `load_two`.
//
// With latents there is one key head: value_dim numbers of a latent, which is key and value, and
// head_dim of a rotated key, [capacity, each rounded up to 32].
struct KvShape {
    int32_t layers, kv_heads, head_dim, value_dim, is_bf16, is_latent;
};

// A row of latents begins its parts at whole vectors of the kernels.
inline int64_t whole_vectors(int64_t numbers) { return (numbers + 31) / 32 * 32; }

// Numbers from one head's query to the next: head_dim, with latents those of a row of the cache.
int query_width(const KvShape& shape);

struct Attention {
    KvShape kv;
    int32_t heads, window;  // window: how many positions are seen, its own included; 0 for all
    float scale;
    const float* sinks;  // [heads] or null: scores of a key whose value is zero
};

// Stores keys [kv_heads * head_dim] and values [kv_heads * value_dim] of one row and layer.
void kv_append(const KvShape& shape, int layer, const Row& row, const float* keys,
               const float* values);

// out [T, heads * value_dim] of queries [T, heads * query_width] with rows `stride` apart. A row sees
// what `kv_append` has stored of its sequence up to its own position. The result for a row does not
// depend on the other rows or on the number of threads. With latents out is [T, heads * query_width],
// of each head the first value_dim, and may be where the queries are.
void attention(Pool* pool, const Attention& how, int layer, const Row* rows, int T,
               const float* queries, int64_t stride, float* out);

}  // namespace moekit

// Latent attention (MLA): a key is a latent and a rotated part that all heads share, and the latent is
// the value as well. A row of the cache holds both, each filled up to whole vectors.
#include "attention_tiles.h"

namespace moekit {
namespace {

template <class Element>
struct Latents {
    Element* rows;
    int64_t row_width, latent;

    Latents(const KvShape& shape, const Row& row, int layer)
        : row_width(query_width(shape)), latent(whole_vectors(shape.value_dim)) {
        rows = (Element*)row.kv + layer * row.capacity * row_width;
    }

    template <int N>
    INLINE_HERE void score(const float* const* queries, int base, int count, float scale,
                           float (*scores)[KEY_BLOCK]) const {
        for (int j = 0; j < count; j++) {
            const Element* key = values(base + j);
            Lanes total[N][2] = {};
            for (int64_t i = 0; i < row_width; i += TWO) {
                Lanes first, second;
                load_two(key + i, first, second);
                for (int n = 0; n < N; n++) {
                    total[n][0] += load(queries[n] + i) * first;
                    total[n][1] += load(queries[n] + i + LANES) * second;
                }
            }
            for (int n = 0; n < N; n++) scores[n][j] = sum(total[n][0] + total[n][1]) * scale;
        }
    }
    const Element* values(int position) const { return rows + position * row_width; }
    int64_t stride() const { return row_width; }
    int64_t width() const { return latent; }
};

EVERY_ISA void attend_float(const Attention& how, const Row& row, int layer, const Query* queries,
                            int count) {
    attend_queries<MAX_LATENT>(how, Latents<float>(how.kv, row, layer), queries, count);
}

EVERY_ISA void attend_bf16(const Attention& how, const Row& row, int layer, const Query* queries,
                           int count) {
    attend_queries<MAX_LATENT>(how, Latents<uint16_t>(how.kv, row, layer), queries, count);
}

template <class Element>
void append(const KvShape& shape, int layer, const Row& row, const float* rotated,
            const float* latents) {
    Latents<Element> cache(shape, row, layer);
    Element* to = cache.rows + row.position * cache.row_width;
    for (int i = 0; i < shape.value_dim; i++) set(to, i, latents[i]);
    for (int i = 0; i < shape.head_dim; i++) set(to + cache.latent, i, rotated[i]);
}

}  // namespace

void attend_latents(const Attention& how, const Row& row, int layer, const Query* queries,
                    int count) {
    (how.kv.is_bf16 ? attend_bf16 : attend_float)(how, row, layer, queries, count);
}

void append_latents(const KvShape& shape, int layer, const Row& row, const float* rotated,
                    const float* latents) {
    (shape.is_bf16 ? append<uint16_t> : append<float>)(shape, layer, row, rotated, latents);
}

}  // namespace moekit

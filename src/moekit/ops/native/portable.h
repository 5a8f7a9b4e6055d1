// The kernels in plain C++, for any instruction set that the file including this is compiled for.
#pragma once

#include "blocks.h"

namespace moekit {
namespace {

// Rows that are worked on together.
constexpr int STRIP = 16;

// Four bytes of codes of each row of a strip, from the one at `byte` on, in the lowest bits of words;
// `codes` are those of a group and tile, `bytes` a row.
inline void load_codes(const uint8_t* codes, int byte, int bytes, int strip, uint32_t* words) {
    const uint8_t* at = codes + int64_t{byte} * TILE_ROWS;
    const int left = bytes - byte;
    if (left >= 4) {
        memcpy(words, at + strip * 4, sizeof *words * STRIP);
        return;
    }
    const uint8_t* last = at + (left & 2) * TILE_ROWS;
    for (int r = 0; r < STRIP; ++r) {
        const uint8_t* two = at + (strip + r) * 2;
        words[r] = left & 2 ? two[0] | static_cast<uint32_t>(two[1]) << 8 : 0;
        if (left & 1) words[r] |= static_cast<uint32_t>(last[strip + r]) << 8 * (left - 1);
    }
}

// What one code of each row is worth: its number, which lies on a line with its value, but of codes
// in base three the value itself. `low` are those of a byte of the words, `high` those two after it.
template <bool IS_TRITS>
inline void read_codes(const Field& field, const float* of_trit, const uint32_t* words, int half,
                       int place, uint32_t power, float* low, float* high) {
    const uint32_t mask = field.width == 8 ? 15 : (1u << field.width) - 1;
    const int shift = half + (IS_TRITS ? 0 : place * field.width + field.shift);
    for (int r = 0; r < STRIP; ++r) {
        const uint32_t a = words[r] >> shift, b = words[r] >> (shift + 16);
        if (IS_TRITS) {
            low[r] = of_trit[(a & 0xff) / power % 3];
            high[r] = of_trit[(b & 0xff) / power % 3];
        } else {
            low[r] = static_cast<float>(static_cast<int32_t>(a & mask));
            high[r] = static_cast<float>(static_cast<int32_t>(b & mask));
        }
    }
}

// Adds one field's part of a group to the totals [n, 16] of a strip. The offset of the line that
// values lie on goes to the sum of the activations.
template <bool IS_TRITS>
inline void field_of_group(const Field& field, int group, const uint8_t* codes, int strip,
                           const uint32_t* pairs, const float* sums, int n, const float* scale,
                           const uint8_t* zero, float (*totals)[STRIP]) {
    const float values[3] = {from_bfloat16(field.lut[0]), from_bfloat16(field.lut[1]),
                             from_bfloat16(field.lut[2])};
    const float start = IS_TRITS ? 0.0f : values[0], step = IS_TRITS ? 1.0f : values[1] - start;
    const int bytes = code_bytes(group, field.width), places = codes_in_byte(field.width);
    float part[GROUP_TOKENS][STRIP] = {};
    for (int byte = 0; byte < bytes; byte += 4) {
        uint32_t words[STRIP];
        load_codes(codes, byte, bytes, strip, words);
        for (int half = 0; half < 16; half += 8) {
            uint32_t power = 1;
            for (int place = 0; place < places; ++place, power *= 3, pairs += n) {
                float low[STRIP], high[STRIP];
                read_codes<IS_TRITS>(field, values, words, half, place, power, low, high);
                for (int t = 0; t < n; ++t) {
                    const float a = from_bfloat16(static_cast<uint16_t>(pairs[t]));
                    const float b = from_bfloat16(static_cast<uint16_t>(pairs[t] >> 16));
                    for (int r = 0; r < STRIP; ++r) part[t][r] += low[r] * a + high[r] * b;
                }
            }
        }
    }
    for (int t = 0; t < n; ++t)
        for (int r = 0; r < STRIP; ++r) {
            const float offset = start - (zero == nullptr ? 0.0f : static_cast<float>(zero[r]));
            totals[t][r] += scale[r] * (part[t][r] * step + offset * sums[t]);
        }
}

inline void multiply_groups(const Format& format, const uint8_t* base, Rows rows,
                            const uint8_t* x, int n, float* y, int64_t y_stride) {
    const Block block(format, n);
    const float* sums = reinterpret_cast<const float*>(x + block.sums());
    for (int r = 0; r < rows.count; r += STRIP) {
        const int64_t tile = (rows.first + r) / TILE_ROWS;
        const int strip = (rows.first + r) % TILE_ROWS;
        float totals[GROUP_TOKENS][STRIP] = {};
        for (int g = 0; g < block.groups; ++g) {
            const int64_t at = tile * block.groups + g;
            for (int f = 0; f < format.num_fields; ++f) {
                const Field& field = format.fields[f];
                uint16_t halves[STRIP];
                memcpy(halves, base + field.scale + (at * TILE_ROWS + strip) * 2, sizeof halves);
                float scale[STRIP];
                for (int i = 0; i < STRIP; ++i) scale[i] = from_float16(halves[i]);
                const uint8_t* codes =
                    base + field.codes + (at * field.stride + field.first) * TILE_ROWS;
                const uint8_t* pairs = x + block.pairs(block.streams.find(field.width), g);
                const uint8_t* zero =
                    field.zero < 0 ? nullptr : base + field.zero + at * TILE_ROWS + strip;
                const auto add =
                    field.width == TRITS ? field_of_group<true> : field_of_group<false>;
                add(field, format.group, codes, strip, reinterpret_cast<const uint32_t*>(pairs),
                    sums + int64_t{g} * n, n, scale, zero, totals);
            }
        }
        const int left = rows.count - r;
        for (int t = 0; t < n; ++t)
            for (int i = 0; i < (left < STRIP ? left : STRIP); ++i)
                y[t * y_stride + r + i] = totals[t][i];
    }
}

constexpr int LANES = 32;

// Sums in lanes that the compiler keeps in vectors; `read` turns an element into a float.
template <class Weight, class Activation, class ReadWeight, class ReadActivation>
inline float dot(const Weight* w, const Activation* x, int columns, ReadWeight read_weight,
                 ReadActivation read_activation) {
    float lanes[LANES] = {};
    int c = 0;
    for (; c + LANES <= columns; c += LANES)
        for (int i = 0; i < LANES; ++i)
            lanes[i] += read_weight(w[c + i]) * read_activation(x[c + i]);
    for (int i = 0; c + i < columns; ++i)
        lanes[i] += read_weight(w[c + i]) * read_activation(x[c + i]);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

inline void multiply_rows(const Format& format, const uint8_t* base, Rows rows, const uint8_t* x,
                          int n, float* y, int64_t y_stride) {
    const int64_t size = format.kind == KIND_F32 ? 4 : 2, bytes = token_bytes(format);
    const auto same = [](float v) { return v; };
    for (int r = 0; r < rows.count; ++r) {
        const uint8_t* w = base + format.data + (rows.first + r) * size * format.cols;
        for (int t = 0; t < n; ++t) {
            float& out = y[t * y_stride + r];
            const uint8_t* token = x + t * bytes;
            const float* values = reinterpret_cast<const float*>(token);
            if (format.kind == KIND_F32)
                out = dot(reinterpret_cast<const float*>(w), values, format.cols, same, same);
            else if (format.kind == KIND_F16)
                out = dot(reinterpret_cast<const uint16_t*>(w), values, format.cols, from_float16,
                          same);
            else
                out = dot(reinterpret_cast<const uint16_t*>(w),
                          reinterpret_cast<const uint16_t*>(token), format.cols, from_bfloat16,
                          from_bfloat16);
        }
    }
}

}  // namespace
}  // namespace moekit

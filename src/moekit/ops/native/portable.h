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
    const int width = bytes - byte < 4 ? bytes - byte : 4;
    const uint8_t* at = codes + int64_t{byte} * TILE_ROWS;
    for (int r = 0; r < STRIP; ++r) words[r] = 0;
    for (int done = 0, step = width; done < width; done += step, at += step * TILE_ROWS) {
        step = width - done == 3 ? 2 : width - done;
        for (int r = 0; r < STRIP; ++r)
            for (int i = 0; i < step; ++i)
                words[r] |= static_cast<uint32_t>(at[(strip + r) * step + i]) << 8 * (done + i);
    }
}

// Adds one field's part of a group to the totals [n, 16] of a strip. Values of codes lie on a line,
// so codes are multiplied as they are and the line's offset goes to the sum of the activations; only
// those in base three are looked up.
inline void field_of_group(const Field& field, int group, const uint8_t* codes, int strip,
                           const uint32_t* pairs, const float* sums, int n, const float* scale,
                           const uint8_t* zero, float (*totals)[STRIP]) {
    const bool trits = field.width == TRITS;
    const float least = from_bfloat16(field.lut[0]), next = from_bfloat16(field.lut[1]);
    const float start = trits ? 0.0f : least, step = trits ? 1.0f : next - least;
    const float of_trit[3] = {least, next, from_bfloat16(field.lut[2])};
    const uint32_t mask = field.width == 8 ? 15 : (1u << field.width) - 1;
    const int bytes = code_bytes(group, field.width), places = codes_in_byte(field.width);
    const auto value = [&](uint32_t byte, int place, uint32_t power) {
        if (trits) return of_trit[byte / power % 3];
        const uint32_t code = byte >> (place * field.width + field.shift) & mask;
        return static_cast<float>(static_cast<int32_t>(code));
    };
    float part[GROUP_TOKENS][STRIP] = {};
    for (int byte = 0; byte < bytes; byte += 4) {
        uint32_t words[STRIP];
        load_codes(codes, byte, bytes, strip, words);
        for (int half = 0; half < 16; half += 8) {
            uint32_t power = 1;
            for (int place = 0; place < places; ++place, power *= 3, pairs += n) {
                float low[STRIP], high[STRIP];
                for (int r = 0; r < STRIP; ++r) {
                    low[r] = value(words[r] >> half & 0xff, place, power);
                    high[r] = value(words[r] >> (half + 16) & 0xff, place, power);
                }
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
                field_of_group(field, format.group, codes, strip,
                               reinterpret_cast<const uint32_t*>(pairs), sums + int64_t{g} * n, n,
                               scale,
                               field.zero < 0 ? nullptr : base + field.zero + at * TILE_ROWS + strip,
                               totals);
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

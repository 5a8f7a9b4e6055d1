// Preparing activations: rounding them to bfloat16 and putting them into the order of the codes.
//
// Included by one file of each instruction set, whose flags the compiler vectorises it with.
#pragma once

#include <string.h>

#include "floats.h"
#include "kernels.h"

namespace moekit {
namespace {

// Puts a group's columns, 16 bits each, into the streams of token t of a block. The codes of a field
// come as dwords of 4 bytes: a pair are the columns at one place in byte j and in byte j + 2, first
// all places of j, then those of the byte after it.
inline void place_columns(const Block& at, int stream, int g, const uint16_t* columns, int t,
                          uint8_t* block) {
    const int group = at.streams.group, width = at.streams.width[stream];
    const int bytes = code_bytes(group, width), codes = codes_in_byte(width);
    uint32_t* out = reinterpret_cast<uint32_t*>(block + at.pairs(stream, g)) + t;
    if (width != TRITS) {
        for (int q = 0; q < bytes; q += 4, out += 2 * codes * at.n)
            for (int lane = 0; lane < codes; ++lane) {
                const uint16_t* from = columns + lane * bytes + q;
                out[lane * at.n] = from[0] | static_cast<uint32_t>(from[2]) << 16;
                out[(codes + lane) * at.n] = from[1] | static_cast<uint32_t>(from[3]) << 16;
            }
        return;
    }
    const auto column = [&](int byte, int lane) -> uint32_t {
        const int from = byte + lane * bytes;
        return byte < bytes && from < group ? columns[from] : 0;
    };
    for (int q = 0; q < bytes; q += 4)
        for (int j = q; j < q + 2; ++j)
            for (int lane = 0; lane < codes; ++lane, out += at.n)
                *out = column(j, lane) | column(j + 2, lane) << 16;
}

// One token of a block for GROUPS.
inline void prepare_groups(const Format& format, const float* x, int n, int t, uint8_t* block) {
    const Block at(format, n);
    float* sums = reinterpret_cast<float*>(block + at.sums()) + t;
    uint16_t rounded[MAX_GROUP];
    for (int g = 0; g < at.groups; ++g, x += format.group) {
        float sum = 0;
        for (int i = 0; i < format.group; ++i) rounded[i] = to_bfloat16(x[i]);
        for (int i = 0; i < format.group; ++i) sum += from_bfloat16(rounded[i]);
        sums[int64_t{g} * n] = sum;
        for (int s = 0; s < at.streams.count; ++s) place_columns(at, s, g, rounded, t, block);
    }
}

inline void prepare_row(int columns, const float* x, uint16_t* row) {
    for (int i = 0; i < columns; ++i) row[i] = to_bfloat16(x[i]);
    for (int i = columns; i % ROW_PADDING != 0; ++i) row[i] = 0;
}

inline void copy_row(int columns, const float* x, float* row) {
    memcpy(row, x, sizeof(float) * columns);
    for (int i = columns; i % ROW_PADDING != 0; ++i) row[i] = 0;
}

using PrepareGroups = void(const Format&, const float* x, int n, int t, uint8_t* block);
using PrepareRow = void(int columns, const float* x, uint16_t* row);

template <PrepareGroups GROUPS, PrepareRow ROW>
void prepare_blocks(const Format& format, const Source& source, int block, Tokens tokens,
                    uint8_t* data) {
    const int64_t bytes = token_bytes(format);
    const int stop = tokens.first + tokens.count;
    for (int first = tokens.first; first < stop; first += block) {
        const int n = stop - first < block ? stop - first : block;
        for (int t = 0; t < n; ++t) {
            const float* x = source.row(first + t);
            uint8_t* row = data + (first + t) * bytes;
            if (format.kind == KIND_GROUPS)
                GROUPS(format, x, n, t, data + first * bytes);
            else if (format.kind == KIND_BF16)
                ROW(format.cols, x, reinterpret_cast<uint16_t*>(row));
            else
                copy_row(format.cols, x, reinterpret_cast<float*>(row));
        }
    }
}

}  // namespace
}  // namespace moekit

// Preparing activations: rounding them to bfloat16 and putting them into the order of the codes.
//
// Included by one file of each instruction set, whose flags the compiler vectorises it with.
#pragma once

#include <string.h>

#include "floats.h"
#include "kernels.h"

namespace moekit {
namespace {

// One token of a block for GROUPS. The codes of a field come as dwords of 4 bytes; a shift by s
// leaves in the low bits of each half the codes of byte 4 q + s / 8 and of the byte two after it.
inline void prepare_groups(const Format& format, const float* x, int n, int t, uint8_t* block) {
    const Streams streams(format);
    const int group = format.group, groups = format.cols / group;
    const int64_t stream_bytes = int64_t{2} * format.cols * n;
    float* sums = reinterpret_cast<float*>(block + streams.count * stream_bytes) + t;
    uint16_t rounded[128];
    for (int g = 0; g < groups; ++g, x += group) {
        float sum = 0;
        for (int i = 0; i < group; ++i) rounded[i] = to_bfloat16(x[i]);
        for (int i = 0; i < group; ++i) sum += from_bfloat16(rounded[i]);
        sums[int64_t{g} * n] = sum;
        for (int s = 0; s < streams.count; ++s) {
            const int width = streams.width[s], bytes = group * width / 8, lanes = 8 / width;
            uint32_t* out = reinterpret_cast<uint32_t*>(block + s * stream_bytes) +
                            int64_t{g} * (group / 2) * n + t;
            for (int q = 0; q < bytes; q += 4, out += 2 * lanes * n) {
                for (int lane = 0; lane < lanes; ++lane) {
                    const uint16_t* at = rounded + lane * bytes + q;
                    out[lane * n] = at[0] | static_cast<uint32_t>(at[2]) << 16;
                    out[(lanes + lane) * n] = at[1] | static_cast<uint32_t>(at[3]) << 16;
                }
            }
        }
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

// Encoding matrices as symmetric integers in groups, straight into tiles: `ops.codecs.groups` in C++.
#include <math.h>
#include <string.h>

#include <algorithm>
#include <atomic>

#include "floats.h"
#include "lanes.h"
#include "pool.h"

#pragma GCC visibility push(default)
extern "C" {

// Encodes weights [rows, cols] of a row-major kind into codes of 4 or 8 bits and float16 scales.
// Returns 0, or what cannot be encoded: 1 for a weight that is no finite number, 2 for a scale that
// is beyond float16.
int32_t encode_groups(Pool* pool, int32_t kind, const void* weights, int32_t rows, int32_t cols,
                      int32_t group, int32_t bits, void* codes, void* scales);
}
#pragma GCC visibility pop

using namespace moekit;

namespace {

constexpr int MAX_GROUP = 128;
constexpr int WORD = 4;
constexpr float LARGEST_HALF = 65504.0f, SMALLEST_NORMAL_HALF = 0x1p-14f;

struct Matrix {
    const void* weights;
    int32_t kind, rows, cols, group, bits;
    uint8_t* codes;
    uint16_t* scales;
};

// The smallest float16 that is not below a value from 0 to LARGEST_HALF.
inline uint16_t to_float16_up(float value) {
    if (value < SMALLEST_NORMAL_HALF) return static_cast<uint16_t>(ceilf(value * 0x1p24f));
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits - (112u << 23) + 0x1fff) >> 13);
}

INLINE void widen(const Matrix& matrix, int64_t at, float* out) {
    for (int i = 0; i < matrix.group; i++) {
        if (matrix.kind == KIND_F32)
            out[i] = static_cast<const float*>(matrix.weights)[at + i];
        else if (matrix.kind == KIND_BF16)
            out[i] = from_bfloat16(static_cast<const uint16_t*>(matrix.weights)[at + i]);
        else
            out[i] = from_float16(static_cast<const uint16_t*>(matrix.weights)[at + i]);
    }
}

// One group of one row; `codes` takes WORD bytes every WORD * TILE_ROWS.
INLINE int encode_group(const Matrix& matrix, const float* values, uint8_t* codes,
                        uint16_t* scale_out) {
    const int middle = 1 << (matrix.bits - 1), top = 2 * middle - 1, group = matrix.group;
    float largest = 0, total = 0;
    for (int i = 0; i < group; i++) {
        largest = std::max(largest, fabsf(values[i]));
        total += values[i] * 0.0f;  // a NaN if any of them is NaN or infinite
    }
    if (total != 0.0f || total != total) return 1;
    const float exact = largest / static_cast<float>(middle - 1);
    if (exact > LARGEST_HALF) return 2;
    *scale_out = to_float16_up(exact);
    const float scale = from_float16(*scale_out), divisor = scale == 0 ? 1.0f : scale;
    uint8_t levels[MAX_GROUP];
    for (int i = 0; i < group; i++) {
        const float level = nearbyintf(values[i] / divisor + static_cast<float>(middle));
        levels[i] = static_cast<uint8_t>(std::clamp(level, 0.0f, static_cast<float>(top)));
    }
    const int bytes = group * matrix.bits / 8;
    for (int j = 0; j < bytes; j++) {
        const uint8_t code = matrix.bits == 8 ? levels[j] : levels[j] | levels[j + bytes] << 4;
        codes[j / WORD * WORD * TILE_ROWS + j % WORD] = code;
    }
    return 0;
}

EVERY_ISA int encode_tile(const Matrix& matrix, int tile) {
    const int groups = matrix.cols / matrix.group, bytes = matrix.group * matrix.bits / 8;
    const int last = std::min(matrix.rows, (tile + 1) * TILE_ROWS);
    int wrong = 0;
    for (int row = tile * TILE_ROWS; row < last; row++)
        for (int g = 0; g < groups; g++) {
            float values[MAX_GROUP];
            widen(matrix, static_cast<int64_t>(row) * matrix.cols + g * matrix.group, values);
            const int64_t block = (static_cast<int64_t>(tile) * groups + g) * TILE_ROWS;
            const int lane = row % TILE_ROWS;
            wrong = std::max(wrong, encode_group(matrix, values,
                                                 matrix.codes + block * bytes + lane * WORD,
                                                 matrix.scales + block + lane));
        }
    return wrong;
}

}  // namespace

int32_t encode_groups(Pool* pool, int32_t kind, const void* weights, int32_t rows, int32_t cols,
                      int32_t group, int32_t bits, void* codes, void* scales) {
    const Matrix matrix{weights, kind, rows, cols, group, bits, static_cast<uint8_t*>(codes),
                        static_cast<uint16_t*>(scales)};
    std::atomic<int> wrong{0};
    Items items;
    items.count = (rows + TILE_ROWS - 1) / TILE_ROWS;
    auto on_thread = [&](int32_t) {
        for (int tile; items.take(tile);) {
            const int found = encode_tile(matrix, tile);
            if (found) wrong = found;
        }
    };
    run(pool, on_thread);
    return wrong;
}

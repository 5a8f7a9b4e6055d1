// What each instruction set implements, and how activations lie in memory for it.
//
// Activations are prepared once per matrix and then read by all of its rows. Tokens are shared out
// over blocks. For GROUPS a block of n tokens holds a stream for each distinct field width: pairs of
// 16-bit numbers in the order in which the codes are taken from memory (`prepare_groups` in input.h),
// [groups, pairs, n]. Then come the sums of each group and what one is worth in it, both float32
// [groups, n]. Pairs are bfloat16, where one is worth one, or integers (`integers.h`). For the row-major kinds each token is a row, bfloat16 or float32, padded
// with zeros to a whole vector.
#pragma once

#include "native.h"

namespace moekit {

constexpr int GROUP_TOKENS = 12;  // tokens of a block that registers have room for
constexpr int ROW_TOKENS = 3;
constexpr int ROW_PADDING = 32;
constexpr int MAX_STREAMS = 4;
constexpr int MAX_GROUP = 128;

struct Input {
    const uint8_t* data;
    int count;  // tokens
    int block;  // tokens of a block; the last one may have fewer
};

struct Rows {
    int first, count;
};

struct Tokens {
    int first, count;  // first is that of a block
};

// Where the activations come from: token t is row index[t] of x, or row t without an index.
struct Source {
    const float* x;
    int64_t stride;
    const int32_t* index;

    const float* row(int t) const {
        return x + stride * static_cast<int64_t>(index == nullptr ? t : index[t]);
    }
};

struct Kernels {
    const char* isa;
    // Writes the blocks of these tokens into `data`.
    void (*prepare)(const Format&, const Source&, int block, Tokens, uint8_t* data);
    // y[t * y_stride + r] for these rows and tokens; t counts from tokens.first, r from rows.first.
    void (*multiply)(const Format&, const uint8_t* base, Rows, const Input&, Tokens, float* y,
                     int64_t y_stride);
    // Turns up [n] into the input of the down projection. gate may be null.
    void (*activate)(const ExpertFormat&, int n, const float* gate, float* up);
    // to[i] += weight * from[i].
    void (*add_scaled)(int n, float weight, const float* from, float* to);
    // The checksum's next state (`crc32.h`).
    uint32_t (*crc32)(uint32_t state, const uint8_t* data, size_t size);
};

extern const Kernels plain_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif
const Kernels& kernels();

inline int codes_in_byte(int width) { return width == TRITS ? 5 : 8 / width; }

// Bytes of a row and group that the codes of a field take.
inline int code_bytes(int group, int width) {
    const int codes = codes_in_byte(width);
    return (group + codes - 1) / codes;
}

// Columns of a group for which a stream of this width has room; those of five in a byte are filled up
// with zeros to whole dwords of codes.
inline int stream_columns(int group, int width) {
    return (code_bytes(group, width) + 3) / 4 * 4 * codes_in_byte(width);
}

// The distinct field widths of a format, in the order of its fields.
struct Streams {
    int count = 0, group, columns = 0;  // columns of a group in all streams
    int width[MAX_STREAMS] = {}, first[MAX_STREAMS] = {};  // first: columns of the streams before

    explicit Streams(const Format& format) : group(format.group) {
        for (int f = 0; f < format.num_fields; ++f) {
            const int now = format.fields[f].width;
            if (find(now) < count) continue;
            width[count] = now;
            first[count++] = columns;
            columns += stream_columns(group, now);
        }
    }
    int find(int wanted) const {
        int at = 0;
        while (at < count && width[at] != wanted) ++at;
        return at;
    }
};

// Where the parts of a block of n tokens begin, in bytes.
struct Block {
    Streams streams;
    int groups, n;

    Block(const Format& format, int tokens)
        : streams(format), groups(format.cols / format.group), n(tokens) {}

    int64_t pairs(int stream, int group) const {
        const int columns = stream_columns(streams.group, streams.width[stream]);
        return int64_t{2} * n * (int64_t{groups} * streams.first[stream] + group * columns);
    }
    int64_t sums() const { return int64_t{2} * n * groups * streams.columns; }
    int64_t units() const { return sums() + int64_t{4} * n * groups; }
    int64_t size() const { return units() + int64_t{4} * n * groups; }
};

inline int blocks_of(const Format& format, int count) {
    const int most = format.kind == KIND_GROUPS ? GROUP_TOKENS : ROW_TOKENS;
    return (count + most - 1) / most;
}

// Tokens of a block, so that all blocks are about as large.
inline int block_of(const Format& format, int count) {
    const int blocks = blocks_of(format, count);
    return blocks == 0 ? 1 : (count + blocks - 1) / blocks;
}

inline int padded_columns(const Format& format) {
    return (format.cols + ROW_PADDING - 1) / ROW_PADDING * ROW_PADDING;
}

// Bytes of one prepared token.
inline int64_t token_bytes(const Format& format) {
    switch (format.kind) {
        case KIND_GROUPS:
            return Block(format, 1).size();
        case KIND_BF16:
            return int64_t{2} * padded_columns(format);
        default:
            return int64_t{4} * padded_columns(format);
    }
}

}  // namespace moekit

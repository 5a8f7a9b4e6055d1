// Dividing a call over threads: preparing the activations block by block, then rows in chunks.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace moekit {

// Whether activations prepared for one matrix serve the other.
inline bool alike(const Format& a, const Format& b) {
    if (a.kind != b.kind || a.cols != b.cols) return false;
    if (a.kind != KIND_GROUPS) return true;
    const Streams x(a), y(b);
    return a.group == b.group && x.count == y.count &&
           std::equal(x.width, x.width + x.count, y.width);
}

// The prepared activations of some jobs.
class Inputs {
public:
    struct Wanted {
        const Format* format;
        Source source;
        int tokens;
        bool as_before;  // the same as those of the job before
    };

    template <class Describe>
    Inputs(Pool* pool, Scratch where, int jobs, Describe describe) {
        int64_t size = 0;
        inputs_.reserve(jobs);
        offsets_.reserve(jobs);
        for (int j = 0; j < jobs; ++j) {
            const Wanted wanted = describe(j);
            if (wanted.as_before) {
                inputs_.push_back(inputs_.back());
                offsets_.push_back(offsets_.back());
                continue;
            }
            const int block = block_of(*wanted.format, wanted.tokens);
            for (int t = 0; t < wanted.tokens; t += block)
                pieces_.push_back({wanted.format, wanted.source, j,
                                   Tokens{t, std::min(block, wanted.tokens - t)}});
            inputs_.push_back({nullptr, wanted.tokens, block});
            offsets_.push_back(size);
            size += (wanted.tokens * token_bytes(*wanted.format) + 63) / 64 * 64;
        }
        uint8_t* data = static_cast<uint8_t*>(scratch(pool, where, static_cast<size_t>(size)));
        for (int j = 0; j < jobs; ++j) inputs_[j].data = data + offsets_[j];
        items_.count = static_cast<int>(pieces_.size());
    }

    // To be called by every thread that takes part; all is prepared when it returns.
    void prepare(Pool* pool) {
        items_.each([&](int item) {
            const Piece& piece = pieces_[item];
            const Input& input = inputs_[piece.job];
            kernels().prepare(*piece.format, piece.source, input.block, piece.tokens,
                              const_cast<uint8_t*>(input.data));
        });
        items_.wait(pool);
    }

    const Input& operator[](int job) const { return inputs_[job]; }

private:
    struct Piece {
        const Format* format;
        Source source;
        int job;
        Tokens tokens;
    };
    std::vector<Input> inputs_;
    std::vector<int64_t> offsets_;
    std::vector<Piece> pieces_;
    Items items_;
};

// Bytes of a row, for GROUPS those of 8 bits a column.
inline int64_t row_bytes(const Format& format) {
    const int64_t size = format.kind == KIND_GROUPS ? 1 : format.kind == KIND_F32 ? 4 : 2;
    return size * format.cols;
}

// The rows of all jobs in chunks, which threads take one after the other.
class RowShares {
public:
    template <class FormatOf>
    RowShares(Pool* pool, int jobs, FormatOf format_of)
        : chunks_(cut(pool, jobs, format_of)),
          ranges_(pool_threads(pool), static_cast<int>(chunks_.size())) {}

    // Calls work(job, rows) for the chunks that this thread takes.
    template <class Work>
    void each(int thread, Work work) {
        ranges_.each(thread, [&](int item) { work(chunks_[item].job, chunks_[item].rows); });
    }

    // Returns when the work on all chunks is done, on whichever threads.
    void wait(Pool* pool) { ranges_.wait(pool); }

private:
    static constexpr int CHUNKS_A_THREAD = 16;
    static constexpr int STEP = TILE_ROWS;
    // A chunk is read again for each block of tokens, from the second-level cache.
    static constexpr int64_t CHUNK_BYTES = 1 << 18;
    struct Chunk {
        int job;
        Rows rows;
    };

    template <class FormatOf>
    static std::vector<Chunk> cut(Pool* pool, int jobs, FormatOf format_of) {
        std::vector<Chunk> chunks;
        int64_t total = 0;
        for (int j = 0; j < jobs; ++j) total += format_of(j)->rows;
        const int64_t share = total / (CHUNKS_A_THREAD * int64_t{pool_threads(pool)});
        for (int j = 0; j < jobs; ++j) {
            const Format& format = *format_of(j);
            const int64_t most = std::min(share, CHUNK_BYTES / row_bytes(format)) / STEP * STEP;
            const int chunk = static_cast<int>(std::max<int64_t>(most, STEP));
            for (int first = 0; first < format.rows; first += chunk)
                chunks.push_back({j, {first, std::min(chunk, format.rows - first)}});
        }
        return chunks;
    }

    std::vector<Chunk> chunks_;
    Ranges ranges_;
};

}  // namespace moekit

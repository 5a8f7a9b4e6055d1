// Reading memory and nothing else: the bound that kernels which stream weights are measured against.
#include <string.h>

#include "pool.h"

using namespace moekit;

namespace {

constexpr size_t PIECE = size_t{1} << 20;
constexpr size_t LINE = 64;
// Reads come faster when lines are asked for this far ahead, as the kernels do.
constexpr size_t AHEAD = 8192;

// Eight independent sums, which the compiler keeps in vectors.
uint64_t read_piece(const uint8_t* data, size_t size) {
    uint64_t lanes[8] = {};
    for (size_t at = 0; at + LINE <= size; at += LINE) {
        uint64_t line[8];
        __builtin_prefetch(data + at + AHEAD);
        memcpy(line, data + at, LINE);
        for (int i = 0; i < 8; ++i) lanes[i] ^= line[i];
    }
    uint64_t sum = 0;
    for (uint64_t lane : lanes) sum ^= lane;
    return sum;
}

}  // namespace

extern "C" uint64_t read_memory(Pool* pool, const void* data, size_t size) {
    std::atomic<uint64_t> sum{0};
    Items items;
    items.count = static_cast<int>((size + PIECE - 1) / PIECE);
    auto work = [&](int) {
        for (int item; items.take(item);) {
            const size_t start = PIECE * static_cast<size_t>(item), left = size - start;
            sum ^= read_piece(static_cast<const uint8_t*>(data) + start, left < PIECE ? left : PIECE);
        }
    };
    run(pool, work);
    return sum;
}

// CRC-32 by table, eight bytes a step, and the choice between this and the folded one.
#include "crc32.h"

#include <array>

#include "kernels.h"

namespace moekit {
namespace {

using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables make_tables() {
    Tables tables{};
    for (uint32_t i = 0; i < 256; ++i) {
        uint32_t state = i;
        for (int bit = 0; bit < 8; ++bit)
            state = (state >> 1) ^ (state & 1 ? CRC_POLYNOMIAL : 0);
        tables[0][i] = state;
    }
    for (uint32_t i = 0; i < 256; ++i)
        for (int t = 1; t < 8; ++t)
            tables[t][i] = (tables[t - 1][i] >> 8) ^ tables[0][tables[t - 1][i] & 255];
    return tables;
}

constexpr Tables TABLES = make_tables();

}  // namespace

uint32_t crc32_by_table(uint32_t state, const uint8_t* data, size_t size) {
    for (; size >= 8; data += 8, size -= 8) {
        uint32_t next = 0;
        for (int i = 0; i < 4; ++i) next ^= TABLES[7 - i][data[i] ^ ((state >> (8 * i)) & 255)];
        for (int i = 4; i < 8; ++i) next ^= TABLES[7 - i][data[i]];
        state = next;
    }
    for (; size > 0; ++data, --size) state = (state >> 8) ^ TABLES[0][(state ^ *data) & 255];
    return state;
}

}  // namespace moekit

extern "C" uint32_t crc32_fast(uint32_t crc, const void* data, size_t size) {
    return ~moekit::kernels().crc32(~crc, static_cast<const uint8_t*>(data), size);
}

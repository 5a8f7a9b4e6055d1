// Preparing activations as integers of 16 bits (`integers.h`).
//
// Group by group they are rounded to multiples of the power of two that gives the largest of them 15
// bits, so by at most 2**-15 of the largest; bfloat16, with its 8 bits, is wrong by more in all but
// those that are hundreds of times smaller than the largest.
#pragma once

#include "input.h"

namespace moekit {
namespace {

// Of the largest activation of a group, without its sign.
constexpr int INTEGER_BITS = 15;

// One token of a block.
inline void prepare_integers(const Format& format, const float* x, int n, int t, uint8_t* block) {
    constexpr int NOT_FINITE = 255, BIAS = 127;
    constexpr int SMALLEST = INTEGER_BITS;  // the exponent of what one is worth is not below 1
    const Block at(format, n);
    const int group = format.group;
    float* sums = reinterpret_cast<float*>(block + at.sums()) + t;
    float* units = reinterpret_cast<float*>(block + at.units()) + t;
    uint16_t columns[MAX_GROUP];
    for (int g = 0; g < at.groups; ++g, x += group, sums += n, units += n) {
        uint32_t largest = 0;
        for (int i = 0; i < group; ++i) {
            uint32_t size;
            memcpy(&size, x + i, sizeof size);
            size &= 0x7fffffff;
            largest = size > largest ? size : largest;
        }
        // One that would be rounded up to the next power of two counts as that.
        const int found = static_cast<int>((largest + (1u << (23 - INTEGER_BITS))) >> 23);
        const int exponent = found < SMALLEST ? SMALLEST : found;
        const uint32_t unit = static_cast<uint32_t>(exponent - INTEGER_BITS + 1) << 23;
        const uint32_t inverse = static_cast<uint32_t>(2 * BIAS + INTEGER_BITS - 1 - exponent) << 23;
        // Adding 1.5 * 2**23 rounds to an integer, which the lowest bits then hold.
        constexpr float ROUND = 12582912.0f;
        float factor;
        memcpy(&factor, &inverse, sizeof factor);
        int32_t sum = 0;
        for (int i = 0; i < group; ++i) {
            const float value = x[i] * factor + ROUND;
            uint32_t bits;
            memcpy(&bits, &value, sizeof bits);
            columns[i] = static_cast<uint16_t>(bits);
            sum += static_cast<int16_t>(bits);
        }
        *sums = static_cast<float>(sum);
        // With a NaN or an infinity among them the group's result is a NaN.
        const uint32_t nan = 0x7fc00000;
        memcpy(units, found == NOT_FINITE ? &nan : &unit, sizeof unit);
        for (int s = 0; s < at.streams.count; ++s) place_columns(at, s, g, columns, t, block);
    }
}

}  // namespace
}  // namespace moekit

// The 16-bit floating-point types.
#pragma once

#include <stdint.h>
#include <string.h>

namespace moekit {
namespace {

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
    // A NaN stays one, whatever its low bits are.
    const uint32_t quiet = bits | 0x400000;
    return static_cast<uint16_t>(((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded) >> 16);
}

inline float from_bfloat16(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

inline float from_float16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t shifted = static_cast<uint32_t>(half & 0x7fff) << 13;
    float value;
    // The exponent is rebased by a multiplication, which is right for subnormal numbers as well.
    memcpy(&value, &shifted, sizeof value);
    value *= 0x1p112f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits |= sign | ((half & 0x7c00) == 0x7c00 ? 0x7f800000 : 0);
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace
}  // namespace moekit

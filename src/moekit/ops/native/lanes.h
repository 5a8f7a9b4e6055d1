// Sixteen floats at a time, in the compiler's own vectors: one source for every instruction set.
#pragma once
#include <stdint.h>
#include <string.h>

// Functions with this mark are compiled once for each instruction set and chosen when loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_ISA
#endif
#define INLINE_HERE inline __attribute__((always_inline))
#define INLINE static INLINE_HERE

#ifdef __GNUC__
// Nothing here is called across files, so it does not matter how such a vector would be passed.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace moekit {
namespace {

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef uint32_t WordLanes __attribute__((vector_size(64)));
typedef uint16_t HalfLanes __attribute__((vector_size(32)));

constexpr int LANES = 16;

INLINE Lanes load(const float* p) {
    Lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}

// bf16 values are the upper halves of floats.
INLINE Lanes load(const uint16_t* p) {
    HalfLanes h;
    memcpy(&h, p, sizeof h);
    WordLanes w = __builtin_convertvector(h, WordLanes) << 16;
    return (Lanes)w;
}

// Two vectors from 2 * LANES numbers. Of bf16, which are the upper halves of floats, number 2 i
// belongs to the first and 2 i + 1 to the second, so that no lane has to move.
INLINE void load_two(const float* p, Lanes& first, Lanes& second) {
    first = load(p);
    second = load(p + LANES);
}

INLINE void load_two(const uint16_t* p, Lanes& first, Lanes& second) {
    WordLanes words;
    memcpy(&words, p, sizeof words);
    first = (Lanes)(words << 16);
    second = (Lanes)(words & 0xffff0000u);
}

INLINE void store(float* p, Lanes v) { memcpy(p, &v, sizeof v); }

INLINE Lanes all(float value) { return Lanes{} + value; }

INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

// The lanes of v by a constant order; the two compilers have the same thing under two names.
#ifdef __clang__
#define REORDER(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define REORDER(v, ...) __builtin_shuffle(v, IntLanes{__VA_ARGS__})
#endif
#define TURN_8(v) REORDER(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#define TURN_4(v) REORDER(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
#define TURN_2(v) REORDER(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define TURN_1(v) REORDER(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)

// Always added in the same order, so a sum does not depend on where it is computed.
INLINE float sum(Lanes v) {
    v += TURN_8(v);
    v += TURN_4(v);
    v += TURN_2(v);
    v += TURN_1(v);
    return v[0];
}

INLINE float largest(Lanes v) {
    v = larger(v, TURN_8(v));
    v = larger(v, TURN_4(v));
    v = larger(v, TURN_2(v));
    v = larger(v, TURN_1(v));
    return v[0];
}

// e^x to about one unit in the last place; exactly 0 below -87, where masked scores lie.
INLINE Lanes exponential(Lanes x) {
    const float log2e = 1.44269504088896341f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    const float shifter = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer
    IntLanes none = x < -87.0f;
    x = x < -87.0f ? all(-87.0f) : x > 88.0f ? all(88.0f) : x;
    Lanes shifted = x * log2e + shifter;
    Lanes n = shifted - shifter;
    Lanes r = x - n * ln2_high;
    r = r - n * ln2_low;
    Lanes p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    IntLanes exponent = (__builtin_convertvector(n, IntLanes) + 127) << 23;
    Lanes result = p * (Lanes)exponent;
    return none ? all(0.0f) : result;
}

}  // namespace
}  // namespace moekit

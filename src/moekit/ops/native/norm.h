// What happens to a row before attention: normalisation, and rotary position.
#pragma once
#include <cstdint>

namespace moekit {

// out [n] = x / sqrt(mean(x^2) + eps) * weight; out may be x.
void rms_norm(const float* x, const float* weight, float eps, int n, float* out);

// Rotates the first 2 * half coordinates of x by angles given as cos [half] and sin [half].
// Coordinate i turns with i + half, or, `in_pairs`, 2i with 2i + 1.
void rotate(float* x, const float* cos, const float* sin, int half, bool in_pairs);

// The sum of x * y over n coordinates.
float dot(const float* x, const float* y, int n);

}  // namespace moekit

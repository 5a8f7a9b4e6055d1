// The activation functions of experts, written so that the compiler vectorises them.
#pragma once

#include <math.h>
#include <string.h>

#include "native.h"

namespace moekit {
namespace {

// e**x within 2 units in the last place: 2**n times a polynomial of the rest.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    constexpr float ROUND = 12582912.0f;  // adding 1.5 * 2**23 rounds to an integer
    const float n = (x * 1.44269504f + ROUND) - ROUND;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

inline float gelu_tanh(float x) {
    return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
}

template <class Function>
inline void apply(int n, const float* gate, float* up, Function function) {
    if (gate == nullptr)
        for (int i = 0; i < n; ++i) up[i] = function(up[i]);
    else
        for (int i = 0; i < n; ++i) up[i] = function(gate[i]) * up[i];
}

inline void activate(const ExpertFormat& expert, int n, const float* gate, float* up) {
    const float alpha = expert.alpha, limit = expert.limit;
    switch (expert.activation) {
        case ACT_SILU:
            apply(n, gate, up, [](float v) { return v * sigmoid(v); });
            break;
        case ACT_GELU:
            apply(n, gate, up, [](float v) { return 0.5f * v * (1.0f + erff(v * 0.70710678f)); });
            break;
        case ACT_GELU_TANH:
            apply(n, gate, up, [](float v) { return gelu_tanh(v); });
            break;
        case ACT_RELU:
            apply(n, gate, up, [](float v) { return v > 0 ? v : 0; });
            break;
        case ACT_RELU2:
            apply(n, gate, up, [](float v) { return v > 0 ? v * v : 0; });
            break;
        case ACT_QUICK_GELU:
            apply(n, gate, up, [](float v) { return v * sigmoid(1.702f * v); });
            break;
        case ACT_CLAMPED_SWIGLU:
            for (int i = 0; i < n; ++i) {
                const float g = gate[i] < limit ? gate[i] : limit;
                const float u = up[i] < -limit ? -limit : up[i] > limit ? limit : up[i];
                up[i] = (u + 1.0f) * g * sigmoid(alpha * g);
            }
            break;
        default:
            apply(n, gate, up, [](float v) { return v; });
    }
}

}  // namespace
}  // namespace moekit

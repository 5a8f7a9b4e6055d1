#include "norm.h"

#include <cmath>

#include "lanes.h"

namespace moekit {

EVERY_ISA void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
    Lanes squares = {};
    int whole = n / LANES * LANES;
    for (int i = 0; i < whole; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (int i = whole; i < n; i++) total += x[i] * x[i];
    float factor = 1.0f / std::sqrt(total / (float)n + eps);
    for (int i = 0; i < whole; i += LANES) store(out + i, load(x + i) * factor * load(weight + i));
    for (int i = whole; i < n; i++) out[i] = x[i] * factor * weight[i];
}

EVERY_ISA void rotate(float* x, const float* cos, const float* sin, int half, bool in_pairs) {
    if (in_pairs) {
        for (int i = 0; i < half; i++) {
            float a = x[2 * i], b = x[2 * i + 1];
            x[2 * i] = a * cos[i] - b * sin[i];
            x[2 * i + 1] = b * cos[i] + a * sin[i];
        }
        return;
    }
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

EVERY_ISA float dot(const float* x, const float* y, int n) {
    Lanes products = {};
    int whole = n / LANES * LANES;
    for (int i = 0; i < whole; i += LANES) products += load(x + i) * load(y + i);
    float total = sum(products);
    for (int i = whole; i < n; i++) total += x[i] * y[i];
    return total;
}

}  // namespace moekit

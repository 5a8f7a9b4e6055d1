// Row-major matrices with AVX-512: how the kinds of `rows.h` are read and multiplied.
#if defined(__x86_64__)
#include <immintrin.h>

#include "avx512.h"
#include "rows.h"

namespace moekit {
namespace {

struct Sums {
    using Sum = __m512;
    static constexpr int ROWS = 8;
    static Sum zero() { return _mm512_setzero_ps(); }
    static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

// Products of floats, whatever weights are read from.
struct Floats : Sums {
    using Activation = float;
    using Vector = __m512;
    static constexpr int STEP = 16;
    static Vector load(const float* at) { return _mm512_loadu_ps(at); }
    static Sum add(Sum sum, Vector w, Vector x) { return _mm512_fmadd_ps(w, x, sum); }
    static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
};

struct BFloat16 : Sums {
    using Weight = uint16_t;
    using Activation = uint16_t;
    using Vector = __m512bh;
    static constexpr int STEP = 32;
    static Vector load(const uint16_t* at) {
        return reinterpret_cast<Vector>(_mm512_loadu_si512(at));
    }
    static Vector load_some(const Weight* at, int count) {
        return reinterpret_cast<Vector>(_mm512_maskz_loadu_epi16((1u << count) - 1, at));
    }
    static Sum add(Sum sum, Vector w, Vector x) { return _mm512_dpbf16_ps(sum, w, x); }
};

struct Float16 : Floats {
    using Weight = uint16_t;
    using Floats::load;
    static Vector load(const Weight* at) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    }
    static Vector load_some(const Weight* at, int count) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), at));
    }
};

struct Float32 : Floats {
    using Weight = float;
    static Vector load_some(const Weight* at, int count) {
        return _mm512_maskz_loadu_ps(first(count), at);
    }
};

}  // namespace

void multiply_rows_avx512(const Format& format, const uint8_t* base, Rows rows, const uint8_t* x,
                          int n, float* y, int64_t y_stride) {
    multiply_kinds<BFloat16, Float16, Float32>(format, base, rows, x, n, y, y_stride);
}

}  // namespace moekit
#endif

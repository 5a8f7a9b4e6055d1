// Row-major matrices with AVX2, FMA and F16C: how the kinds of `rows.h` are read and multiplied.
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "avx2.h"
#include "rows.h"

namespace moekit {
namespace {

struct Sums {
    using Sum = __m256;
    static constexpr int ROWS = 4;
    static Sum zero() { return _mm256_setzero_ps(); }
    static float total(Sum sum) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
    // `count` weights of a kind, and zeros up to a whole vector.
    template <class Kind>
    static auto some(const typename Kind::Weight* at, int count) {
        typename Kind::Weight whole[Kind::STEP] = {};
        memcpy(whole, at, sizeof *at * static_cast<size_t>(count));
        return Kind::load(whole);
    }
};

struct Float32 : Sums {
    using Weight = float;
    using Activation = float;
    using Vector = __m256;
    static constexpr int STEP = 8;
    static Vector load(const float* at) { return _mm256_loadu_ps(at); }
    static Vector load_some(const float* at, int count) { return some<Float32>(at, count); }
    static Sum add(Sum sum, Vector w, Vector x) { return _mm256_fmadd_ps(w, x, sum); }
};

struct Float16 : Sums {
    using Weight = uint16_t;
    using Activation = float;
    using Vector = __m256;
    static constexpr int STEP = 8;
    static Vector load(const float* at) { return _mm256_loadu_ps(at); }
    static Vector load(const uint16_t* at) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    }
    static Vector load_some(const uint16_t* at, int count) { return some<Float16>(at, count); }
    static Sum add(Sum sum, Vector w, Vector x) { return _mm256_fmadd_ps(w, x, sum); }
};

// bfloat16 is the upper half of a float: of two neighbours one is masked and one is shifted.
struct BFloat16 : Sums {
    using Weight = uint16_t;
    using Activation = uint16_t;
    struct Vector {
        __m256 even, odd;
    };
    static constexpr int STEP = 16;
    static Vector load(const uint16_t* at) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
                _mm256_castsi256_ps(_mm256_and_si256(both, upper))};
    }
    static Vector load_some(const uint16_t* at, int count) { return some<BFloat16>(at, count); }
    static Sum add(Sum sum, Vector w, Vector x) {
        return _mm256_fmadd_ps(w.odd, x.odd, _mm256_fmadd_ps(w.even, x.even, sum));
    }
};

}  // namespace

void multiply_rows_avx2(const Format& format, const uint8_t* base, Rows rows, const uint8_t* x,
                        int n, float* y, int64_t y_stride) {
    multiply_kinds<BFloat16, Float16, Float32>(format, base, rows, x, n, y, y_stride);
}

}  // namespace moekit
#endif

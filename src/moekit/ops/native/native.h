// The C interface of moekit's CPU kernels: matrices in any codec times activations.
//
// Shapes: T tokens, D width, F expert width, K experts a token, P (token, expert) pairs.
// All activations and results are float32, row-major. A pool serves one call at a time.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

// How a matrix is stored. F32, BF16 and F16 are row-major; GROUPS are bit fields in tiles of
// TILE_ROWS rows, rows padded to whole tiles: codes [tile, group, stride / 4, 64, 4] bytes, a rest
// of stride % 4 bytes as [64, 2] and [64, 1], scales float16 and zeros uint8 [tile, group, 64].
enum { KIND_F32 = 0, KIND_BF16 = 1, KIND_F16 = 2, KIND_GROUPS = 3 };
enum { TILE_ROWS = 64, MAX_FIELDS = 8, TRITS = 5 };

// One bit field: adds scale * (lut[code] - zero) to each weight of its group. Byte j of the B bytes
// that a field of `width` bits has in a group holds the codes of columns j, j + B, ... lowest bits
// first. Fields one after the other with the same scale are summed before they are scaled.
typedef struct {
    int64_t codes, scale, zero;  // bytes from the base; zero is -1 where there is none
    int32_t stride, first;       // bytes of codes a row and group; where this field begins in them
    int32_t width, shift;        // bits a column: 1, 2, 4 or 8; of 8 this is the nibble at `shift`;
                                 // TRITS: five columns a byte, in base three
    uint16_t lut[32];            // value of a code as bfloat16, repeated to 32 entries
} Field;

typedef struct {
    int32_t kind, rows, cols, group, num_fields, pad;
    int64_t data;  // bytes from the base, for the row-major kinds
    Field fields[MAX_FIELDS];
} Format;

enum {
    ACT_SILU = 0,
    ACT_GELU = 1,
    ACT_GELU_TANH = 2,
    ACT_RELU = 3,
    ACT_RELU2 = 4,
    ACT_CLAMPED_SWIGLU = 5,  // (clamp(up) + 1) * gate * sigmoid(alpha * gate), gate <= limit
    ACT_QUICK_GELU = 6,
    ACT_IDENTITY = 7
};

// An expert: down(act(gate x) * up x), or down(act(up x)) without a gate. Gate and up have the same
// codec. Biases are vectors of the row-major kind `bias_kind` at these offsets, -1 for none.
typedef struct {
    Format gate, up, down;
    int32_t has_gate, activation;
    float alpha, limit;
    int64_t gate_bias, up_bias, down_bias;
    int32_t bias_kind, pad;
} ExpertFormat;

typedef struct Pool Pool;

// A pool of `threads` threads, of which the caller of each function is one.
Pool* pool_new(int32_t threads);
void pool_free(Pool*);
int32_t pool_threads(const Pool*);
// Runs work(context, thread, threads) on the calling thread and on those threads of the pool that
// come before it returns there; returns when all have. So `work` has to share out what there is to
// do as threads ask for it, and to bear being called again when nothing is left. Inside of it none of
// the functions below may be called with this pool.
void pool_run(Pool*, void (*work)(void* context, int32_t thread, int32_t threads), void* context);

// y[t * y_stride + r] = sum over columns of W[r, c] * x[t * x_stride + c], for T tokens. Strides
// count floats. x is rounded to bfloat16 except for KIND_F32 and KIND_F16, and, with AVX2, for GROUPS,
// where it is rounded to 16-bit integers in groups (`prepare_integers.h`); sums are float32. A token's
// result does not depend on the other tokens, nor on the number of threads.
typedef struct {
    const Format* format;
    const void* base;
    float* y;
    int64_t y_stride;
    const float* x;    // of this job alone; null for the x of the call
    int64_t x_stride;
} MatmulJob;

void matmul(Pool*, const Format*, const void* base, const float* x, int32_t T, float* y);
// Several matrices times the same x, or each times its own, as one piece of work for the pool.
void matmuls(Pool*, const MatmulJob*, int32_t jobs, const float* x, int64_t x_stride, int32_t T);

// The pairs first, ..., first + count - 1 go through this expert.
typedef struct {
    const ExpertFormat* format;
    const void* base;
    int32_t first, count;
} FfnJob;

// out[p, D] = expert of pair p applied to hidden[token_of_pair[p], D], not weighted. However pairs
// are shared out over jobs and calls, the result is the same to the bit.
void ffn(Pool*, const FfnJob*, int32_t jobs, const int32_t* token_of_pair, const float* hidden,
         int32_t D, float* out_pairs);

// out[t] = sum over k = 0, ..., K - 1, in this order, of weights[t, k] * out_pairs[pair_of[t, k]];
// a pair of -1 adds nothing; `accumulate` adds to what out holds.
void combine(Pool*, const float* out_pairs, const int32_t* pair_of, const float* weights, int32_t T,
             int32_t K, int32_t D, float* out, int32_t accumulate);

// CRC-32 as zlib computes it, continuing from `crc` (0 to begin).
uint32_t crc32_fast(uint32_t crc, const void* data, size_t size);

// Reads every whole line of 64 bytes on all threads; returns their words combined by exclusive or.
uint64_t read_memory(Pool*, const void* data, size_t size);

// The instruction set in use: "avx512", "avx2" or "plain". MOEKIT_ISA forces one that the machine
// has; native_supports says whether it does.
const char* native_isa(void);
int32_t native_supports(const char* isa);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif

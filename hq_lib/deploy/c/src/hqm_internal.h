/* The container's words, and what the runtime's files share. Offsets are in bytes from the start of the file. */
#ifndef HQM_INTERNAL_H
#define HQM_INTERNAL_H

#include <float.h>
#include <string.h>

#include "hqm.h"

#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
#error "float32 must be evaluated in float32: on 32-bit x86 compile with -msse2 -mfpmath=sse"
#endif

#ifdef HQM_PORTABLE
enum { TILE = 8 }; /* for the stack of a small device */
#else
enum { TILE = 128 }; /* output places computed together */
#endif
enum { BLOCK = 16 /* output channels of one weight block */, SLACK = 64 };
enum { MAX_ELEMENTS = 1 << 28, MAX_SIZE = 65536, MAX_ARENA = 1 << 30 };

enum header_word {
    H_MAGIC, H_VERSION, H_SIZE, H_CRC, H_FIXED, H_N_TENSORS, H_N_OPS, H_TENSORS, H_OPS, H_ARENA, H_META = 11,
    H_META_SIZE, H_OUTPUT, H_WORDS = 16
};
enum tensor_word {
    T_RANK, T_SHAPE, T_DTYPE = 9, T_BITS, T_QMIN, T_QMAX, T_ZERO, T_N_SCALES, T_SCALES, T_ARENA, T_NAME, T_NAME_SIZE,
    T_WORDS = 20
};
enum op_word {
    O_KIND, O_N_INPUTS, O_INPUTS, O_WEIGHT = 4, O_WEIGHT_BITS /* 4, 8, 16; 5, 9: 2 q + 1 of 4, 8 */, O_DEPTHWISE,
    O_BIAS, O_MULTIPLIER, O_MULTIPLIER_FIXED, O_SHIFT, O_MULTIPLIER_2, O_FIXED_2, O_C_OUT, O_C_GROUP, O_GROUPS, O_KERNEL, O_STRIDE = 18, O_PADDING = 20,
    O_DILATION = 24, O_WEIGHT_SHIFT = 26, O_PADDED /* where the padded input lies in the arena */, O_START = 8,
    O_STEP = 16, O_AXES = 16, O_BEFORE = 16, O_TABLE = 16, O_OFFSET = 16, O_WORDS = 32
};
enum op_kind { QUANTIZE, CONV, LINEAR, ADD, MAX_POOL, AVG_POOL, CONCAT, RESHAPE, TRANSPOSE, SLICE, PAD, CLIP, TABLE, MUL, N_KINDS };

/* One tensor. Rank 3 lies as (H, W, C) in the arena, every other rank in row-major order. */
typedef struct {
    uint32_t rank, shape[HQM_MAX_RANK], n, size; /* size: bytes of one element */
    size_t stride[HQM_MAX_RANK];                 /* elements, per axis of (C, H, W) */
    hqm_dtype dtype;
    int32_t qmin, qmax, zero;
    const float *scale;
    uint32_t n_scales;
    uint8_t *data; /* NULL without an arena */
} tensor;

/* What a window over the (padded) input is. */
typedef struct {
    uint32_t channels, height, width, out_height, out_width;
    uint32_t kernel[2], stride[2], padding[4], dilation[2];
} window;

/* Accumulators of up to TILE places by BLOCK channels: acc[p][o] = start[o] + (sum w x << shift), modulo 2^32. Place p's
 * window starts at x + at[p] (elements) and is n_rows * n_columns runs of n4 * 4 elements.
 * w, 8 bits: [run][n4][BLOCK][4]; 16 bits: [run][n4][2][BLOCK][2], in the order 0 2, 1 3 of the four; depthwise:
 * [run][w_step]. 4 bits: w + 8 in nibbles, the first half of each 4 * BLOCK (depthwise: BLOCK) weights in the low ones. */
typedef struct {
    const void *x, *w;
    const uint32_t *at;
    const int32_t *start;
    size_t row_step, column_step, w_step;
    uint32_t n_rows, n_columns, n4, n_places, n_out, shift;
    uint32_t n_safe; /* 4 bits: so many products of pairs surely fit into 16 bits */
} product;
typedef void product_kernel(const product *p, int32_t acc[TILE][BLOCK]);

/* How accumulators become integers of the output. residual may be NULL. */
typedef struct {
    const float *multiplier, *multiplier_2;
    const int32_t *fixed, *fixed_2;
    const uint8_t *shift;
    uint32_t is_fixed, is_shared; /* is_shared: one multiplier for all channels */
    int32_t low, high, zero, residual_zero; /* low, high: of q - zero */
    hqm_dtype residual_dtype;
} rescale;

/* n <= BLOCK channels from `first` on of n_places places, which lie `step` elements apart in out (uint8) and residual
 * (uint8 or int32, as r says; or NULL). */
typedef void rescale_kernel(int32_t acc[TILE][BLOCK], uint32_t n_places, const rescale *r, uint32_t first, uint32_t n,
                            const void *residual, uint8_t *out, size_t step);

/* One layer with all that its parts read. */
typedef struct {
    const window *v;
    const tensor *x, *residual, *y;
    const uint8_t *data; /* of x, padded but for depthwise_rows */
    const uint8_t *w;
    const int32_t *start;
    product_kernel *kernel;
    rescale r;
    uint32_t groups, per_group, c_group, depthwise, bits;
    uint32_t odd;  /* 1: weights are 2 q + 1 of the q of `bits` that are stored; p.shift doubles them already */
    int has_bytes; /* outputs are uint8, from int32 vectors by multipliers below 1 or shifts of 32 bits and more */
    product p;     /* without its places */
} layer;
void put_places(const layer *l, int32_t (*acc)[BLOCK], uint32_t n_places, uint32_t first, uint32_t n, size_t place);

/* Part `part` of `n_parts` of some work; parts run at the same time where threads were asked for. */
typedef void part_work(const void *context, uint32_t part, uint32_t n_parts);
void in_parts(part_work *work, const void *context);

enum { WIDEST = 512 }; /* input channels of a layer in tiles */

/* Vector forms of the frequent cases, or NULL: then the portable code runs. */
typedef struct {
    const char *name;
    product_kernel *dense[3];              /* uint8 inputs; weights of 4, 8, 16 bits */
    rescale_kernel *rescale_u8, *fixed_u8;   /* "float32" and "fixed" */
    /* n elements, float32 Add of uint8 */
    void (*add_u8)(const uint8_t *a, const uint8_t *b, uint32_t n, const float m[2], float offset, int32_t qmin,
                   int32_t qmax, uint8_t *out);
    /* as many of n elements of a "fixed" Add of uint8 as it serves, whose number it returns */
    uint32_t (*fixed_add_u8)(const uint8_t *a, int32_t a_zero, const uint8_t *b, uint32_t n, const rescale *r,
                             uint8_t *out);
    part_work *depthwise_rows; /* a depthwise layer of uint8, read without padding, of windows that `joins` takes */
    int (*joins)(const window *v);
    part_work *tiles; /* a layer of uint8, ungrouped 3x3 windows of stride 1, in tiles of 2x2 outputs */
    int (*serves_tiles)(const layer *l);
    /* every output of the places from `place` on that p names, for the kernel rows from `row` on; or 0, nothing done */
    int (*whole_tile)(const layer *l, product p, size_t place, uint32_t row);
} kernels;

const kernels *hqm_kernels(void);

static inline const uint32_t *words_at(const hqm_model *m, uint32_t offset) {
    return (const uint32_t *)(const void *)(m->bytes + offset);
}
static inline const uint32_t *header_of(const hqm_model *m) { return words_at(m, 0); }
static inline const uint32_t *op_at(const hqm_model *m, uint32_t i) {
    return words_at(m, header_of(m)[H_OPS]) + (size_t)i * O_WORDS;
}
static inline uint32_t input_of(const hqm_model *m, const uint32_t *op, uint32_t i) {
    return words_at(m, op[O_INPUTS])[i];
}
static inline const float *floats_at(const hqm_model *m, uint32_t offset) {
    return (const float *)(const void *)(m->bytes + offset);
}
static inline const int32_t *ints_at(const hqm_model *m, uint32_t offset) {
    return (const int32_t *)(const void *)(m->bytes + offset);
}
static inline float float_of(uint32_t word) {
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}
static inline uint32_t at_most(uint32_t a, uint32_t b) { return a < b ? a : b; }
/* What a layer may read of x: its integers, and the zero point that padding holds, which may lie beyond them. */
static inline uint32_t largest_input(const tensor *x) { return (uint32_t)(x->qmax > x->zero ? x->qmax : x->zero); }
/* floor(x / 2^s), without relying on what >> does to negative numbers */
static inline int64_t shift_right(int64_t x, uint32_t s) { return x >= 0 ? x >> s : ~(~x >> s); }
/* x within [low, high]; NaN gives low */
static inline float clamp_float(float x, float low, float high) { return x > low ? (x < high ? x : high) : low; }
/* rint(x) of |x| < 2^22 in the default rounding mode: adding 1.5 * 2^23 leaves no bit behind the point */
static inline int32_t round_half_even(float x) { return (int32_t)((x + 12582912.0f) - 12582912.0f); }
static inline int64_t clamp_int(int64_t x, int64_t low, int64_t high) { return x < low ? low : (x > high ? high : x); }
/* clamp(rint(fma(q_a, m_a, fma(q_b, m_b, offset)))): float64 holds each product and sum exactly (proved at export). */
static inline int32_t added(int64_t a, int64_t b, const float m[2], float offset, int32_t qmin, int32_t qmax) {
    float inner = (float)((double)b * (double)m[1] + (double)offset);
    float sum = (float)((double)a * (double)m[0] + (double)inner);
    return round_half_even(clamp_float(sum, (float)qmin, (float)qmax));
}

tensor tensor_at(const hqm_model *m, uint32_t i, void *arena);
window window_of(const uint32_t *op, const tensor *x, const tensor *y);
void run_layer(const hqm_model *m, const uint32_t *op, const tensor *x, const tensor *residual, const tensor *y,
               void *arena);
void run_add(const hqm_model *m, const uint32_t *op, const tensor *a, const tensor *b, const tensor *y);
void run_max_pool(const uint32_t *op, const tensor *x, const tensor *y);
void run_avg_pool(const hqm_model *m, const uint32_t *op, const tensor *x, const tensor *y);
void run_concat(const hqm_model *m, const uint32_t *op, const tensor *y, void *arena);
void run_move(const uint32_t *op, const tensor *x, const tensor *y);
void run_lookup(const hqm_model *m, const uint32_t *op, const tensor *x, const tensor *y);
void run_mul(const hqm_model *m, const uint32_t *op, const tensor *a, const tensor *b, const tensor *y);
rescale rescale_of(const hqm_model *m, const uint32_t *op, const tensor *y);
int64_t rescaled(const rescale *r, uint32_t channel, int64_t acc, int64_t residual);
rescale_kernel rescale_each;
void rescale_tile(int32_t acc[TILE][BLOCK], uint32_t n_places, const rescale *r, uint32_t first, uint32_t n,
                  const void *residual, const tensor *y, size_t at, size_t step);
void rescale_row(int32_t acc[TILE][BLOCK], uint32_t n, const rescale *r, const void *residual, const tensor *y,
                 size_t at);
int64_t load_int(const void *data, hqm_dtype dtype, size_t i);
void store_int(void *data, hqm_dtype dtype, size_t i, int64_t value);

#endif

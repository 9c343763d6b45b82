/* Converted reading of a crossbar layer in one pass: patches, exact integer sums, noise, rounding, clipping, counting;
   and, for layers that are one product, the passes before and after it.

       code = clip(rint(sum * factor + shift + (z * sqrt(sum x^2)) * spread), low, high);   total += code * step_factor
       y[n] = sum_q coefficient[q][n] * total[q][n]

   Sums are exact in 32 bits, everything behind them is one IEEE operation after another (no contraction), so that any
   other code which keeps this order gets the same bits. Two ways to the sums: products of pairs, and, for steps of one
   bit, tables that hold the sum of every subset of four rows. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are read as little-endian: torch reads crossbars on this processor"
#endif

#define LANES 16  /* columns at a time */
#define PIXELS 32 /* rows of the product at a time */
#define WIDE 8    /* numbers of a vector; compilers split it where the processor's are shorter */

typedef int32_t ints __attribute__((vector_size(4 * WIDE)));
typedef float floats __attribute__((vector_size(4 * WIDE)));

typedef struct {
    int64_t channels, height, width;         /* of a padded image */
    int64_t kernel_y, kernel_x, stride_y, stride_x, dilation_y, dilation_x, out_y, out_x;
    int64_t n_tiles, n_steps, n_columns, n_outputs;
    int64_t one_bit;                         /* whether tables are used */
    float low, high;
} hqx_shape;

typedef struct {
    int64_t start, n_rows;                   /* of the matrix */
    const void *cells;                       /* int16 pairs [block][pair][lane][2], or int32 tables [block][four][16][lane];
                                                rows are padded to sixteens */
    const float *factor, *shift, *spread;    /* padded to whole blocks; the last two may be NULL */
} hqx_tile;

typedef struct {
    int64_t shift, mask;                     /* digit = (x >> shift) & mask; mask 0: x itself */
    float factor;
} hqx_step;

typedef struct {
    const hqx_shape *s;
    const int16_t *x;
    int16_t *rows;                           /* [PIXELS][width of a row] */
    uint16_t *at;                            /* [step][PIXELS][four], LANES times which of its rows have a one */
    float *power, *total;                    /* [step][PIXELS]; [PIXELS][padded columns] */
} work;

#define PICK(mask, a, b) ((floats)(((ints)(a) & (mask)) | ((ints)(b) & ~(mask)))) /* lanes of a under the mask, else of b */
#define LOAD(v, from) memcpy(&(v), from, sizeof(v))

#define NAME(function) function##_plain
#include "read_rows.h"
#undef NAME

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define WITH_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define NAME(function) function##_avx2
#include "read_rows.h"
#undef NAME
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

/* Saturated conversions of n_rows rows of the product from row first on, whose outputs go to y [n_rows][n_outputs]; -1
   without memory. x is [image][channel][height][width]; normals, if any, are [step][tile] arrays [n_rows][n_columns].
   At most 64 steps. */
int64_t hqx_read(const hqx_shape *shape, const int16_t *x, int64_t first, int64_t n_rows, const hqx_tile *tiles,
                 const hqx_step *steps, const float *const *normals, const double *coefficient, double *y) {
    int64_t width = 0;
    for (int64_t t = 0; t < shape->n_tiles; t++)
        if (tiles[t].n_rows > width) width = tiles[t].n_rows;
    width = (width + 15) / 16 * 16;
    const size_t padded = (size_t)(shape->n_columns + LANES - 1) / LANES * LANES;
    const size_t rows = 2 * PIXELS * (size_t)width * sizeof(int16_t), at = PIXELS * (size_t)(shape->n_steps * width / 4) * 2;
    char *room = malloc(PIXELS * (padded + (size_t)shape->n_steps) * sizeof(float) + rows + at);
    if (!room) return -1;
    float *total = (float *)(void *)room, *power = total + PIXELS * padded;
    int16_t *gathered = (int16_t *)(void *)(power + PIXELS * shape->n_steps);
    const work k = {shape, x, gathered, (uint16_t *)(gathered + 2 * PIXELS * width), power, total};
    int64_t n_saturated;
#if defined(WITH_AVX2)
    if (__builtin_cpu_supports("avx2"))
        n_saturated = read_all_avx2(&k, first, n_rows, tiles, steps, normals, coefficient, y);
    else
#endif
        n_saturated = read_all_plain(&k, first, n_rows, tiles, steps, normals, coefficient, y);
    free(room);
    return n_saturated;
}

/* One step of n_lanes xorshift64 generators (13, 7, 17), each giving four normals: a + b, a - b, c + d, c - d of points of
   a table of 4,096, picked by 12 bits each. */
void hqx_normals(uint64_t *state, int64_t n_lanes, const float *points, float *out) {
    for (int64_t i = 0; i < n_lanes; i++, out += 4) {
        uint64_t v = state[i];
        v ^= v << 13;
        v ^= v >> 7;
        v ^= v << 17;
        state[i] = v;
        const float a = points[v >> 16 & 4095], b = points[v >> 28 & 4095], c = points[v >> 40 & 4095], d = points[v >> 52];
        out[0] = a + b, out[1] = a - b, out[2] = c + d, out[3] = c - d;
    }
}

/* out[image][place][channel] = x[image][channel][place]. */
void hqx_channels_last(const uint8_t *x, int64_t n_images, int64_t channels, int64_t places, float *out) {
#if defined(WITH_AVX2)
    if (__builtin_cpu_supports("avx2")) {
        channels_last_avx2(x, n_images, channels, places, out);
        return;
    }
#endif
    channels_last_plain(x, n_images, channels, places, out);
}

/* out = rint(raw) for n numbers; 1 if all are finite. */
int hqx_round(const float *raw, int64_t n, double *out) {
#if defined(WITH_AVX2)
    if (__builtin_cpu_supports("avx2")) return round_avx2(raw, n, out);
#endif
    return round_plain(raw, n, out);
}

/* Convolution and linear layers: padded copy, products tile by tile, requantization.
 *
 * The input lies as (H, W, C), so a window of a dense convolution is one run of k_w C elements per kernel row, read in
 * place: nothing is unfolded. Grouped and dilated windows are one run of C / groups elements per kernel place. Weights
 * are stored in that order, each run filled up with zeros to a multiple of 4: what a run reads behind its end counts 0.
 * Zero points are in the bias (bias - z sum w, modulo 2^32), and padding holds z.
 */
#include "hqm_internal.h"

#define DENSE(NAME, X, W)                                                                                             \
    static void NAME(const product *p, int32_t acc[TILE][BLOCK]) {                                                    \
        for (uint32_t place = 0; place < p->n_places; place++) {                                                      \
            const X *x0 = (const X *)p->x + place * p->x_step;                                                        \
            const W *w = p->w;                                                                                        \
            uint32_t sum[BLOCK] = {0};                                                                                \
            for (uint32_t o = 0; o < p->n_out; o++) sum[o] = (uint32_t)p->start[o];                                   \
            for (uint32_t i = 0; i < p->n_rows; i++)                                                                  \
                for (uint32_t j = 0; j < p->n_columns; j++) {                                                         \
                    const X *x = x0 + i * p->row_step + j * p->column_step;                                           \
                    for (uint32_t k = 0; k < p->n4; k++, x += 4, w += 4 * BLOCK)                                      \
                        for (uint32_t o = 0; o < BLOCK; o++)                                                          \
                            sum[o] += (uint32_t)(x[0] * w[4 * o]) + (uint32_t)(x[1] * w[4 * o + 1]) +                 \
                                      (uint32_t)(x[2] * w[4 * o + 2]) + (uint32_t)(x[3] * w[4 * o + 3]);              \
                }                                                                                                     \
            for (uint32_t o = 0; o < BLOCK; o++) acc[place][o] = (int32_t)sum[o];                                     \
        }                                                                                                             \
    }

#define DEPTHWISE(NAME, X, W)                                                                                         \
    static void NAME(const product *p, int32_t acc[TILE][BLOCK]) {                                                    \
        for (uint32_t place = 0; place < p->n_places; place++) {                                                      \
            const X *x0 = (const X *)p->x + place * p->x_step;                                                        \
            const W *w = p->w;                                                                                        \
            for (uint32_t o = 0; o < p->n_out; o++) {                                                                 \
                uint32_t sum = (uint32_t)p->start[o];                                                                 \
                for (uint32_t i = 0; i < p->n_rows; i++)                                                              \
                    for (uint32_t j = 0; j < p->n_columns; j++)                                                       \
                        sum += (uint32_t)(x0[i * p->row_step + j * p->column_step + o] *                              \
                                          w[(i * p->n_columns + j) * p->w_step + o]);                                 \
                acc[place][o] = (int32_t)sum;                                                                         \
            }                                                                                                         \
        }                                                                                                             \
    }

DENSE(dense_8_8, uint8_t, int8_t)
DENSE(dense_16_8, uint16_t, int8_t)
DENSE(dense_8_16, uint8_t, int16_t)
DENSE(dense_16_16, uint16_t, int16_t)
DEPTHWISE(depthwise_8_8, uint8_t, int8_t)
DEPTHWISE(depthwise_16_8, uint16_t, int8_t)
DEPTHWISE(depthwise_8_16, uint8_t, int16_t)
DEPTHWISE(depthwise_16_16, uint16_t, int16_t)

static product_kernel *kernel_of(int depthwise, uint32_t x_size, uint32_t w_size) {
    static product_kernel *const portable[2][2][2] = {
        {{dense_8_8, dense_8_16}, {dense_16_8, dense_16_16}},
        {{depthwise_8_8, depthwise_8_16}, {depthwise_16_8, depthwise_16_16}}};
    product_kernel *fast = depthwise ? hqm_kernels()->depthwise : hqm_kernels()->dense;
    return fast && x_size == 1 && w_size == 1 ? fast : portable[depthwise][x_size - 1][w_size - 1];
}

/* Fills n elements of x's size with the zero point. */
static void fill(uint8_t *to, size_t n, const tensor *x) {
    if (x->size == 1) memset(to, x->zero, n);
    else
        for (size_t i = 0; i < n; i++) ((uint16_t *)(void *)to)[i] = (uint16_t)x->zero;
}

/* Copies x into scratch with its padding; rows are then (W + left + right) C long. */
static const uint8_t *pad_input(const window *v, const tensor *x, uint8_t *scratch) {
    size_t row = (size_t)v->width * v->channels, left = (size_t)v->padding[1] * v->channels;
    size_t right = (size_t)v->padding[3] * v->channels, full = left + row + right, s = x->size;
    fill(scratch, v->padding[0] * full, x);
    for (uint32_t y = 0; y < v->height; y++) {
        uint8_t *to = scratch + (v->padding[0] + y) * full * s;
        fill(to, left, x);
        memcpy(to + left * s, x->data + y * row * s, row * s);
        fill(to + (left + row) * s, right, x);
    }
    fill(scratch + (v->padding[0] + v->height) * full * s, v->padding[2] * full, x);
    return scratch;
}

typedef struct {
    const tensor *residual, *y;
    rescale r;
    uint32_t c_out;
    rescale_kernel *quick; /* the vector form of requantization, where it applies */
} sink;

/* Writes n channels from `first` of the places from `place` on. */
static void write_tile(const sink *s, int32_t acc[TILE][BLOCK], size_t place, uint32_t n_places, uint32_t first,
                       uint32_t n) {
    for (uint32_t p = 0; p < n_places; p++) {
        size_t at = (place + p) * s->c_out + first;
        if (s->quick) {
            const uint8_t *other = s->residual ? s->residual->data + at : NULL;
            s->quick(acc[p], &s->r, first, n, other, s->y->data + at);
            continue;
        }
        if (!s->r.multiplier) {
            memcpy(s->y->data + at * 4, acc[p], n * sizeof **acc);
            continue;
        }
        for (uint32_t o = 0; o < n; o++) {
            int64_t other = s->residual ? load_int(s->residual->data, s->residual->dtype, at + o) - s->residual->zero : 0;
            store_int(s->y->data, s->y->dtype, at + o, rescaled(&s->r, first + o, acc[p][o], other));
        }
    }
}

/* All places of n_out channels from `first` on. */
static void run_block(const window *v, product p, const uint8_t *x, uint32_t x_size, product_kernel *kernel,
                      const sink *s, uint32_t first) {
    int32_t acc[TILE][BLOCK];
    size_t line = ((size_t)v->width + v->padding[1] + v->padding[3]) * v->channels * v->stride[0];
    for (uint32_t row = 0; row < v->out_height; row++)
        for (uint32_t column = 0; column < v->out_width; column += TILE) {
            p.n_places = at_most(TILE, v->out_width - column);
            p.x = x + (row * line + column * p.x_step) * x_size;
            kernel(&p, acc);
            write_tile(s, acc, (size_t)row * v->out_width + column, p.n_places, first, p.n_out);
        }
}

static product product_of(const window *v, const uint32_t *op) {
    product p;
    memset(&p, 0, sizeof p);
    int joined = !op[O_DEPTHWISE] && op[O_GROUPS] == 1 && v->dilation[1] == 1; /* a kernel row is one run */
    p.x_step = (size_t)v->stride[1] * v->channels;
    p.row_step = ((size_t)v->width + v->padding[1] + v->padding[3]) * v->channels * v->dilation[0];
    p.column_step = (size_t)v->dilation[1] * v->channels;
    p.n_rows = v->kernel[0], p.n_columns = joined ? 1 : v->kernel[1];
    p.n4 = (op[O_C_GROUP] * (joined ? v->kernel[1] : 1) + 3) / 4;
    p.w_step = ((size_t)op[O_C_OUT] + BLOCK - 1) / BLOCK * BLOCK;
    return p;
}

/* A 1x1 convolution of stride 1 without padding: one long row of places. */
static void flatten(window *v) {
    const uint32_t *s = v->stride, *k = v->kernel, *q = v->padding;
    if (s[0] != 1 || s[1] != 1 || k[0] != 1 || k[1] != 1 || q[0] | q[1] | q[2] | q[3]) return;
    v->width = v->out_width = v->width * v->height;
    v->height = v->out_height = 1;
}

void run_layer(const hqm_model *m, const uint32_t *op, const tensor *x, const tensor *residual, const tensor *y,
               void *scratch) {
    window v = window_of(op, x, y);
    const uint32_t *q = v.padding, size = op[O_WEIGHT_BYTES], depthwise = op[O_DEPTHWISE];
    const uint8_t *data = q[0] | q[1] | q[2] | q[3] ? pad_input(&v, x, scratch) : x->data;
    flatten(&v);
    product p = product_of(&v, op);
    sink s = {residual, y, rescale_of(m, op, y), op[O_C_OUT], NULL};
    if (residual) s.r.residual_dtype = residual->dtype, s.r.residual_zero = residual->zero;
    if (s.r.multiplier && y->size == 1 && (!residual || residual->size == 1))
        s.quick = s.r.is_fixed ? hqm_kernels()->fixed_u8 : hqm_kernels()->rescale_u8;
    product_kernel *kernel = kernel_of((int)depthwise, x->size, size);
    uint32_t groups = depthwise ? 1 : op[O_GROUPS], per_group = op[O_C_OUT] / groups;
    size_t block_bytes = (depthwise ? BLOCK : (size_t)p.n_rows * p.n_columns * p.n4 * 4 * BLOCK) * size;
    const uint8_t *w = m->bytes + op[O_WEIGHT];
    for (uint32_t g = 0; g < groups; g++)
        for (uint32_t b = 0; b < per_group; b += BLOCK, w += block_bytes) {
            uint32_t first = g * per_group + b;
            const uint8_t *from = data + (size_t)(depthwise ? b : g * op[O_C_GROUP]) * x->size;
            p.w = w, p.start = ints_at(m, op[O_BIAS]) + first, p.n_out = at_most(BLOCK, per_group - b);
            run_block(&v, p, from, x->size, kernel, &s, first);
        }
}

/* Convolution and linear layers: padded copy (where kernels need one), products tile by tile, requantization.
 *
 * The input lies as (H, W, C), so a window of a dense convolution is one run of k_w C elements per kernel row, read in
 * place: nothing is unfolded. Grouped and dilated windows are one run of C / groups elements per kernel place. Weights
 * are stored in that order, each run filled up with zeros to a multiple of 4: what a run reads behind its end counts 0.
 * Zero points are in the bias (bias - z sum w, modulo 2^32), and padding holds z.
 */
#include "hqm_internal.h"

/* Weight k (0..3) of output channel o in a quadruple of inputs. */
static inline int32_t w4(const void *w, uint32_t o, uint32_t k) {
    const uint32_t i = 4 * (o % (BLOCK / 2)) + k, byte = ((const uint8_t *)w)[i];
    return (int32_t)(o < BLOCK / 2 ? byte & 15 : byte >> 4) - 8;
}
static inline int32_t w8(const void *w, uint32_t o, uint32_t k) { return ((const int8_t *)w)[4 * o + k]; }
static inline int32_t w16(const void *w, uint32_t o, uint32_t k) {
    return ((const int16_t *)w)[(k % 2) * 2 * BLOCK + 2 * o + k / 2];
}
/* Weight of channel o of a depthwise block. */
static inline int32_t v4(const void *w, uint32_t o) {
    const uint32_t byte = ((const uint8_t *)w)[o % (BLOCK / 2)];
    return (int32_t)(o < BLOCK / 2 ? byte & 15 : byte >> 4) - 8;
}
static inline int32_t v8(const void *w, uint32_t o) { return ((const int8_t *)w)[o]; }
static inline int32_t v16(const void *w, uint32_t o) { return ((const int16_t *)w)[o]; }

static inline int32_t sum_of(int32_t start, uint32_t sum, uint32_t shift) {
    return (int32_t)((uint32_t)start + (sum << shift));
}

/* X: type of the inputs, B: bits of the weights */
#define PORTABLE(X, B)                                                                                                \
    static void dense_##X##_##B(const product *p, int32_t acc[TILE][BLOCK]) {                                         \
        for (uint32_t place = 0; place < p->n_places; place++) {                                                      \
            const uint8_t *w = p->w;                                                                                  \
            uint32_t sum[BLOCK] = {0};                                                                                \
            for (uint32_t i = 0; i < p->n_rows; i++)                                                                  \
                for (uint32_t j = 0; j < p->n_columns; j++) {                                                         \
                    const X *x = (const X *)p->x + p->at[place] + i * p->row_step + j * p->column_step;               \
                    for (uint32_t k = 0; k < p->n4; k++, x += 4, w += 4 * BLOCK * B / 8)                              \
                        for (uint32_t o = 0; o < BLOCK; o++)                                                          \
                            sum[o] += (uint32_t)(x[0] * w##B(w, o, 0)) + (uint32_t)(x[1] * w##B(w, o, 1)) +           \
                                      (uint32_t)(x[2] * w##B(w, o, 2)) + (uint32_t)(x[3] * w##B(w, o, 3));            \
                }                                                                                                     \
            for (uint32_t o = 0; o < p->n_out; o++) acc[place][o] = sum_of(p->start[o], sum[o], p->shift);            \
        }                                                                                                             \
    }                                                                                                                 \
    static void depthwise_##X##_##B(const product *p, int32_t acc[TILE][BLOCK]) {                                     \
        for (uint32_t place = 0; place < p->n_places; place++) {                                                      \
            const uint8_t *w = p->w;                                                                                  \
            uint32_t sum[BLOCK] = {0};                                                                                \
            for (uint32_t i = 0; i < p->n_rows; i++)                                                                  \
                for (uint32_t j = 0; j < p->n_columns; j++, w += p->w_step * B / 8) {                                 \
                    const X *x = (const X *)p->x + p->at[place] + i * p->row_step + j * p->column_step;               \
                    for (uint32_t o = 0; o < p->n_out; o++) sum[o] += (uint32_t)(x[o] * v##B(w, o));                  \
                }                                                                                                     \
            for (uint32_t o = 0; o < p->n_out; o++) acc[place][o] = sum_of(p->start[o], sum[o], p->shift);            \
        }                                                                                                             \
    }
PORTABLE(uint8_t, 4)
PORTABLE(uint8_t, 8)
PORTABLE(uint8_t, 16)
PORTABLE(uint16_t, 4)
PORTABLE(uint16_t, 8)
PORTABLE(uint16_t, 16)

static product_kernel *kernel_of(uint32_t depthwise, uint32_t x_size, uint32_t bits) {
    static product_kernel *const portable[2][2][3] = {
        {{dense_uint8_t_4, dense_uint8_t_8, dense_uint8_t_16}, {dense_uint16_t_4, dense_uint16_t_8, dense_uint16_t_16}},
        {{depthwise_uint8_t_4, depthwise_uint8_t_8, depthwise_uint8_t_16},
         {depthwise_uint16_t_4, depthwise_uint16_t_8, depthwise_uint16_t_16}}};
    const kernels *fast = hqm_kernels();
    product_kernel *found = x_size > 1 || depthwise ? NULL : fast->dense[bits / 8];
    return found ? found : portable[depthwise][x_size - 1][bits / 8];
}

/* Fills n elements of x's size with the zero point. */
static void fill(uint8_t *to, size_t n, const tensor *x) {
    if (x->size == 1) memset(to, x->zero, n);
    else
        for (size_t i = 0; i < n; i++) ((uint16_t *)(void *)to)[i] = (uint16_t)x->zero;
}

/* Copies x to `to` with its padding; rows are then (W + left + right) C long. `to` may be x's own place: the last row
 * moves first, and each farther than the one before it. */
static const uint8_t *pad_input(const window *v, const tensor *x, uint8_t *to) {
    size_t row = (size_t)v->width * v->channels, left = (size_t)v->padding[1] * v->channels;
    size_t right = (size_t)v->padding[3] * v->channels, full = left + row + right, s = x->size;
    fill(to + (v->padding[0] + v->height) * full * s, v->padding[2] * full, x);
    for (uint32_t y = v->height; y-- > 0;) {
        uint8_t *line = to + (v->padding[0] + y) * full * s;
        memmove(line + left * s, x->data + y * row * s, row * s);
        fill(line, left, x);
        fill(line + (left + row) * s, right, x);
    }
    fill(to, v->padding[0] * full, x);
    return to;
}

static product product_of(const window *v, const uint32_t *op, const tensor *x) {
    product p;
    memset(&p, 0, sizeof p);
    int joined = !op[O_DEPTHWISE] && op[O_GROUPS] == 1 && v->dilation[1] == 1; /* a kernel row is one run */
    p.row_step = ((size_t)v->width + v->padding[1] + v->padding[3]) * v->channels * v->dilation[0];
    p.column_step = (size_t)v->dilation[1] * v->channels;
    p.n_rows = v->kernel[0], p.n_columns = joined ? 1 : v->kernel[1];
    p.n4 = (op[O_C_GROUP] * (joined ? v->kernel[1] : 1) + 3) / 4;
    p.w_step = ((size_t)op[O_C_OUT] + BLOCK - 1) / BLOCK * BLOCK;
    p.shift = op[O_WEIGHT_SHIFT] + op[O_WEIGHT_BITS] % 2;
    p.n_safe = largest_input(x) ? INT16_MAX / 16 / at_most(largest_input(x), 255) : INT16_MAX;
    return p;
}

/* A 1x1 convolution of stride 1 without padding: one long row of places. */
static void flatten(window *v) {
    const uint32_t *s = v->stride, *k = v->kernel, *q = v->padding;
    if (s[0] != 1 || s[1] != 1 || k[0] != 1 || k[1] != 1 || q[0] | q[1] | q[2] | q[3]) return;
    v->width = v->out_width = v->width * v->height;
    v->height = v->out_height = 1;
}

/* Kernel rows of output row `row` that do not lie in padding alone: *first <= i < return value. All of them unless
 * padding holds 0, which adds nothing. */
static uint32_t rows_inside(const window *v, const tensor *x, uint32_t row, uint32_t *first) {
    uint32_t top = row * v->stride[0], d = v->dilation[0], n = v->kernel[0];
    *first = 0;
    if (x->zero) return n;
    while (*first + 1 < n && top + *first * d < v->padding[0]) ++*first;
    while (n > *first + 1 && top + (n - 1) * d >= v->padding[0] + v->height) n--;
    return n;
}

enum { WORTH = 1 << 24 }; /* products that make up for waking threads */

/* Integers of the output, n channels from `first` on of the places from `place` on, from their accumulators. */
void put_places(const layer *l, int32_t (*acc)[BLOCK], uint32_t n_places, uint32_t first, uint32_t n, size_t place) {
    const void *residual = l->residual ? l->residual->data : NULL;
    const size_t c_out = (size_t)l->groups * l->per_group;
    if (l->r.multiplier) rescale_tile(acc, n_places, &l->r, first, n, residual, l->y, place * c_out + first, c_out);
    else
        for (uint32_t k = 0; k < n_places; k++)
            memcpy(l->y->data + ((place + k) * c_out + first) * 4, acc[k], n * sizeof **acc);
}

/* What weights of 2 q + 1 have beyond 2 q: the sums of the places' inputs. */
static void input_sums(const layer *l, const product *p, int32_t sum[TILE]) {
    for (uint32_t place = 0; place < p->n_places; place++) {
        uint32_t all = 0;
        for (uint32_t i = 0; i < p->n_rows; i++)
            for (uint32_t j = 0; j < p->n_columns; j++) {
                const size_t from = p->at[place] + i * p->row_step + j * p->column_step;
                for (size_t k = from; k < from + 4 * p->n4; k++)
                    all += l->x->size == 1 ? ((const uint8_t *)p->x)[k] : ((const uint16_t *)p->x)[k];
            }
        sum[place] = (int32_t)(all << (p->shift - 1));
    }
}

/* Every output channel of the places from `place` on that p names, for the kernel rows from `row` on. */
static void run_tile(const layer *l, product p, size_t place, uint32_t row) {
    if (hqm_kernels()->whole_tile && hqm_kernels()->whole_tile(l, p, place, row)) return;
    int32_t acc[TILE][BLOCK], sum[TILE];
    const size_t run = (l->depthwise ? p.w_step : (size_t)p.n4 * 4 * BLOCK) * p.n_columns * l->bits / 8;
    const size_t block = l->depthwise ? BLOCK * l->bits / 8 : run * l->v->kernel[0];
    const uint8_t *w = l->w + row * run;
    for (uint32_t g = 0; g < l->groups; g++)
        for (uint32_t b = 0; b < l->per_group; b += BLOCK, w += block) {
            const uint32_t first = g * l->per_group + b, channel = l->depthwise ? b : g * l->c_group;
            p.x = l->data + (row * p.row_step + channel) * l->x->size;
            p.w = w, p.start = l->start + first, p.n_out = at_most(BLOCK, l->per_group - b);
            if (l->odd && !b) input_sums(l, &p, sum);
            l->kernel(&p, acc);
            for (uint32_t k = 0; l->odd && k < p.n_places; k++)
                for (uint32_t o = 0; o < p.n_out; o++) acc[k][o] = (int32_t)((uint32_t)acc[k][o] + (uint32_t)sum[k]);
            put_places(l, acc, p.n_places, first, p.n_out, place);
        }
}

/* The tiles of one part of the places: up to TILE places, row after row, that read the same kernel rows. */
static void run_places(const void *context, uint32_t part, uint32_t n_parts) {
    const layer *l = context;
    const window *v = l->v;
    const size_t line = ((size_t)v->width + v->padding[1] + v->padding[3]) * v->channels * v->stride[0];
    const uint64_t n = (uint64_t)v->out_height * v->out_width;
    const uint32_t from = (uint32_t)(n * part / n_parts), to = (uint32_t)(n * (part + 1) / n_parts);
    const uint32_t x_step = v->stride[1] * v->channels;
    product p = l->p;
    uint32_t at[TILE], first = 0, end = 0, row = from / v->out_width, column = from % v->out_width;
    p.at = at, p.n_places = 0;
    for (uint32_t place = from, n; place < to; place += n, column += n) {
        if (column == v->out_width) column = 0, row++;
        uint32_t first_here, end_here = rows_inside(v, l->x, row, &first_here);
        if (p.n_places == TILE || (p.n_places && (first != first_here || end != end_here))) {
            p.n_rows = end - first;
            run_tile(l, p, place - p.n_places, first);
            p.n_places = 0;
        }
        first = first_here, end = end_here;
        n = at_most(at_most(TILE - p.n_places, v->out_width - column), to - place);
        for (uint32_t k = 0; k < n; k++) at[p.n_places + k] = (uint32_t)(row * line) + (column + k) * x_step;
        p.n_places += n;
    }
    p.n_rows = end - first;
    if (p.n_places) run_tile(l, p, to - p.n_places, first);
}

/* Whether windows go in tiles of 2x2 (hqm_winograd.h); fewer than four make no use of its vectors. */
static int goes_in_tiles(const layer *l) {
    const window *v = l->v;
    static const uint32_t ones[2] = {1, 1}, threes[2] = {3, 3};
    if (!hqm_kernels()->tiles || l->x->size > 1 || l->depthwise || l->groups > 1) return 0;
    if (memcmp(v->kernel, threes, 8) || memcmp(v->stride, ones, 8) || memcmp(v->dilation, ones, 8)) return 0;
    return v->channels % 4 == 0 && v->channels <= WIDEST && v->out_height > 2 && v->out_width > 2 &&
           hqm_kernels()->serves_tiles(l);
}

/* Whether sums become bytes in vectors that saturate: no product by a multiplier below 1 is too large for int32. */
static int has_bytes(const layer *l) {
    const uint32_t n = l->groups * l->per_group, one = 0x3f800000; /* 1.0f: floats >= 0 are ordered as their bits are */
    uint32_t largest = 0, least = 32;
    if (!l->r.multiplier || l->residual || l->y->size > 1) return 0;
    for (uint32_t o = 0; o < n && !l->r.is_fixed; o++) {
        uint32_t bits;
        memcpy(&bits, l->r.multiplier + o, sizeof bits);
        largest = largest > bits ? largest : bits;
    }
    for (uint32_t o = 0; o < n && l->r.is_fixed; o++) least = at_most(least, l->r.shift[o]);
    return largest < one && least >= 32;
}

void run_layer(const hqm_model *m, const uint32_t *op, const tensor *x, const tensor *residual, const tensor *y,
               void *arena) {
    window v = window_of(op, x, y);
    const uint32_t *q = v.padding;
    layer l;
    memset(&l, 0, sizeof l);
    l.v = &v, l.x = x, l.residual = residual, l.y = y, l.r = rescale_of(m, op, y);
    l.depthwise = op[O_DEPTHWISE];
    const int by_rows = l.depthwise && x->size == 1 && hqm_kernels()->joins && hqm_kernels()->joins(&v);
    l.data = (q[0] | q[1] | q[2] | q[3]) && !by_rows ? pad_input(&v, x, (uint8_t *)arena + op[O_PADDED]) : x->data;
    if (residual) l.r.residual_dtype = residual->dtype, l.r.residual_zero = residual->zero;
    flatten(&v);
    l.w = m->bytes + op[O_WEIGHT], l.start = ints_at(m, op[O_BIAS]);
    l.odd = op[O_WEIGHT_BITS] % 2, l.bits = op[O_WEIGHT_BITS] - l.odd;
    l.c_group = op[O_C_GROUP];
    l.groups = l.depthwise ? 1 : op[O_GROUPS], l.per_group = op[O_C_OUT] / l.groups;
    l.kernel = kernel_of(l.depthwise, x->size, l.bits);
    l.p = product_of(&v, op, x);
    l.has_bytes = has_bytes(&l);
    part_work *work = by_rows ? hqm_kernels()->depthwise_rows : goes_in_tiles(&l) ? hqm_kernels()->tiles : run_places;
    if ((double)y->n * op[O_C_GROUP] * v.kernel[0] * v.kernel[1] >= WORTH) in_parts(work, &l);
    else work(&l, 0, 1);
}

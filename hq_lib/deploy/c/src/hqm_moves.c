/* Pools, and operations that move or clip integers. */
#include "hqm_internal.h"

/* Window rows (axis 0) or columns (axis 1) of output place `at` that lie inside: *first <= k < return value. */
static uint32_t inside(const window *v, int axis, uint32_t at, uint32_t *first) {
    int64_t n = axis ? v->width : v->height, d = v->dilation[axis];
    int64_t start = (int64_t)at * v->stride[axis] - v->padding[axis];
    int64_t low = start < 0 ? (-start + d - 1) / d : 0, high = start < n ? (n - start + d - 1) / d : 0;
    *first = (uint32_t)low;
    return (uint32_t)(high < v->kernel[axis] ? high : v->kernel[axis]);
}

/* y[c] = max(y[c], x[c]) and sum[c] += x[c] - zero: channels lie side by side, so that these become vectors. */
#define CHANNELS(T)                                                                                                   \
    static void max_##T(T *restrict y, const T *restrict x, size_t n) {                                               \
        for (size_t c = 0; c < n; c++) y[c] = x[c] > y[c] ? x[c] : y[c];                                              \
    }                                                                                                                 \
    static void sum_##T(uint32_t *restrict sum, const T *restrict x, size_t n, uint32_t zero) {                       \
        for (size_t c = 0; c < n; c++) sum[c] += x[c] - zero;                                                         \
    }
CHANNELS(uint8_t)
CHANNELS(uint16_t)

/* Takes n channels from the tap at element `from` of x into to: y (MAX_POOL), or sums. */
static void take(const tensor *x, size_t from, size_t n, int is_max, void *to) {
    const uint8_t *data = x->data + from * x->size;
    if (is_max && x->size == 1) max_uint8_t(to, data, n);
    else if (is_max) max_uint16_t(to, (const uint16_t *)(const void *)data, n);
    else if (x->size == 1) sum_uint8_t(to, data, n, (uint32_t)x->zero);
    else sum_uint16_t(to, (const uint16_t *)(const void *)data, n, (uint32_t)x->zero);
}

/* Takes n channels from channel c on of every tap inside the window of one output place; padded taps do not count. */
static void pool(const window *v, const tensor *x, uint32_t row, uint32_t column, size_t c, size_t n, int is_max,
                 void *to) {
    uint32_t i0, j0, i1 = inside(v, 0, row, &i0), j1 = inside(v, 1, column, &j0);
    for (uint32_t i = i0; i < i1; i++)
        for (uint32_t j = j0; j < j1; j++) {
            size_t h = (size_t)row * v->stride[0] + (size_t)i * v->dilation[0] - v->padding[0];
            size_t w = (size_t)column * v->stride[1] + (size_t)j * v->dilation[1] - v->padding[1];
            take(x, (h * v->width + w) * v->channels + c, n, is_max, to);
        }
}

void run_max_pool(const uint32_t *op, const tensor *x, const tensor *y) {
    window v = window_of(op, x, y);
    uint8_t *to = y->data;
    memset(to, 0, (size_t)y->n * y->size);
    for (uint32_t row = 0; row < v.out_height; row++)
        for (uint32_t column = 0; column < v.out_width; column++, to += (size_t)v.channels * y->size)
            pool(&v, x, row, column, 0, v.channels, 1, to);
}

/* Writes n sums as y's elements from `at` on. */
static void write_sums(int32_t acc[TILE][BLOCK], uint32_t n, const rescale *r, const tensor *y, size_t at) {
    if (r->multiplier) rescale_row(acc, n, r, NULL, y, at);
    else
        for (uint32_t o = 0; o < n; o++)
            store_int(y->data, y->dtype, at + o, (int64_t)acc[o / BLOCK][o % BLOCK] + y->zero);
}

/* Sums of as many places as fit (or of as many channels) are written together. */
void run_avg_pool(const hqm_model *m, const uint32_t *op, const tensor *x, const tensor *y) {
    window v = window_of(op, x, y);
    rescale r = rescale_of(m, op, y);
    int32_t acc[TILE][BLOCK];
    size_t at = 0;
    uint32_t n = 0, step;
    r.is_shared = 1;
    for (uint32_t row = 0; row < v.out_height; row++)
        for (uint32_t column = 0; column < v.out_width; column++)
            for (uint32_t c = 0; c < v.channels; c += step) {
                step = at_most(TILE * BLOCK, v.channels - c);
                if (n + step > TILE * BLOCK) write_sums(acc, n, &r, y, at), at += n, n = 0;
                memset(acc[0] + n, 0, step * sizeof **acc);
                pool(&v, x, row, column, c, step, 0, acc[0] + n);
                n += step;
            }
    write_sums(acc, n, &r, y, at);
}

/* n elements of `size` bytes, each so many steps (in elements) from the one before. */
static void move_run(uint8_t *to, size_t to_step, const uint8_t *from, size_t from_step, size_t n, uint32_t size) {
    if (to_step == 1 && from_step == 1) memmove(to, from, n * size);
    else if (size == 1)
        for (size_t i = 0; i < n; i++) to[i * to_step] = from[i * from_step];
    else
        for (size_t i = 0; i < n; i++) memmove(to + i * to_step * size, from + i * from_step * size, size);
}

/* Copies shape[0] x ... elements between two places of the arena, each with its own steps (in elements): in the order of
 * the destination, and axes that follow each other in both places as one. */
static void copy(uint8_t *to, const size_t *to_step, const uint8_t *from, const size_t *from_step,
                 const uint32_t *shape, uint32_t rank, uint32_t size) {
    struct { size_t to, from, n, at; } axes[HQM_MAX_RANK], *last = axes;
    uint32_t n = 0;
    axes[0].to = axes[0].from = axes[0].n = 1;
    for (uint32_t k = 0; k < rank; k++) {
        if (shape[k] == 1) continue;
        uint32_t i = n++;
        for (; i && axes[i - 1].to < to_step[k]; i--) axes[i] = axes[i - 1];
        axes[i].to = to_step[k], axes[i].from = from_step[k], axes[i].n = shape[k], axes[i].at = 0;
    }
    for (uint32_t k = 1; k < n; k++) {
        const int follows = last->to == axes[k].to * axes[k].n && last->from == axes[k].from * axes[k].n;
        const size_t times = follows ? last->n : 1;
        if (!follows) last++;
        *last = axes[k], last->n *= times;
    }
    for (size_t a = 0, b = 0;;) {
        move_run(to + a * size, last->to, from + b * size, last->from, last->n, size);
        uint32_t k = (uint32_t)(last - axes);
        for (; k > 0; k--) {
            a += axes[k - 1].to, b += axes[k - 1].from;
            if (++axes[k - 1].at < axes[k - 1].n) break;
            a -= axes[k - 1].to * axes[k - 1].n, b -= axes[k - 1].from * axes[k - 1].n, axes[k - 1].at = 0;
        }
        if (!k) return;
    }
}

void run_concat(const hqm_model *m, const uint32_t *op, const tensor *y, void *arena) {
    size_t offset = 0, axis = op[O_AXES];
    for (uint32_t k = 0; k < op[O_N_INPUTS]; k++) {
        tensor x = tensor_at(m, input_of(m, op, k), arena);
        copy(y->data + offset * y->stride[axis] * y->size, y->stride, x.data, x.stride, x.shape, x.rank, x.size);
        offset += x.shape[axis];
    }
}

/* Place in the arena of element i in the record's order. */
static size_t place_of(const tensor *t, uint32_t i) {
    if (t->rank != 3) return i;
    uint32_t plane = t->n / t->shape[0];
    return (size_t)(i % plane) * t->shape[0] + i / plane;
}

static int is_flat(const tensor *t) { return t->rank != 3 || t->shape[0] == 1 || t->n == t->shape[0]; }

/* Steps (in elements) of the axes of a tensor in row-major order. */
static void row_major(const tensor *t, size_t *step) {
    size_t n = 1;
    for (uint32_t k = t->rank; k-- > 0; n *= t->shape[k]) step[k] = n;
}

static void reshape(const tensor *x, const tensor *y) {
    size_t step[HQM_MAX_RANK];
    if (is_flat(x) && is_flat(y)) memmove(y->data, x->data, (size_t)x->n * x->size);
    else if (is_flat(y)) row_major(x, step), copy(y->data, step, x->data, x->stride, x->shape, x->rank, x->size);
    else if (is_flat(x)) row_major(y, step), copy(y->data, y->stride, x->data, step, y->shape, y->rank, x->size);
    else
        for (uint32_t i = 0; i < x->n; i++)
            memmove(y->data + place_of(y, i) * y->size, x->data + place_of(x, i) * x->size, x->size);
}

void run_move(const uint32_t *op, const tensor *x, const tensor *y) {
    size_t step[HQM_MAX_RANK], offset = 0;
    switch (op[O_KIND]) {
    case RESHAPE: reshape(x, y); return;
    case TRANSPOSE:
        for (uint32_t a = 0; a < x->rank; a++) step[a] = x->stride[op[O_AXES + a]];
        copy(y->data, y->stride, x->data, step, y->shape, y->rank, x->size);
        return;
    case SLICE:
        for (uint32_t a = 0; a < x->rank; a++) {
            offset += op[O_START + a] * x->stride[a];
            step[a] = op[O_STEP + a] * x->stride[a];
        }
        copy(y->data, y->stride, x->data + offset * x->size, step, y->shape, y->rank, x->size);
        return;
    case PAD:
        for (uint32_t i = 0; i < y->n; i++) store_int(y->data, y->dtype, i, x->zero);
        for (uint32_t a = 0; a < x->rank; a++) offset += op[O_BEFORE + a] * y->stride[a];
        copy(y->data + offset * y->size, y->stride, x->data, x->stride, x->shape, x->rank, x->size);
        return;
    default: /* CLIP */
        for (uint32_t i = 0; i < y->n; i++)
            store_int(y->data, y->dtype, i, clamp_int(load_int(x->data, x->dtype, i), y->qmin, y->qmax));
    }
}

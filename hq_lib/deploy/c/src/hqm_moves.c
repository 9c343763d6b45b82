/* Pools, and operations that move or clip integers. */
#include "hqm_internal.h"

#ifdef HQM_PORTABLE
enum { VECTOR = 1 };
#else
enum { VECTOR = 16 }; /* channels that a pool joins together; what it reads behind the last one is in SLACK */
#endif
enum { ROOM = TILE * BLOCK }; /* results of a pool that are written together */

/* Places side by side whose windows lie alike, and the taps that lie inside: x is the first one of the first place.
 * Steps are in bytes. */
typedef struct {
    const uint8_t *x;
    uint32_t n_places, n_rows, n_columns;
    size_t place_step, row_step, column_step;
} taps;

/* Window rows (axis 0) or columns (axis 1) of output place `at` that lie inside: *first <= k < return value. */
static uint32_t inside(const window *v, int axis, uint32_t at, uint32_t *first) {
    const int32_t n = (int32_t)(axis ? v->width : v->height), d = (int32_t)v->dilation[axis];
    const int32_t start = (int32_t)(at * v->stride[axis]) - (int32_t)v->padding[axis];
    const uint32_t k = v->kernel[axis];
    *first = start < 0 ? (uint32_t)((-start + d - 1) / d) : 0;
    if (start + (int32_t)(k - 1) * d < n) return k;
    return start < n ? (uint32_t)((n - start + d - 1) / d) : 0;
}

/* The places from (row, column) on whose windows lie inside from left to right, or that one place. */
static taps taps_at(const window *v, const tensor *x, uint32_t row, uint32_t column) {
    uint32_t i, j, i1 = inside(v, 0, row, &i), j1 = inside(v, 1, column, &j), n = v->kernel[1];
    const size_t place = (size_t)v->channels * x->size, line = place * v->width;
    taps t = {x->data, 1, 0, 0, v->stride[1] * place, v->dilation[0] * line, v->dilation[1] * place};
    if (i < i1 && j < j1) {
        t.n_rows = i1 - i, t.n_columns = j1 - j;
        t.x += ((size_t)row * v->stride[0] + (size_t)i * v->dilation[0] - v->padding[0]) * line;
        t.x += ((size_t)column * v->stride[1] + (size_t)j * v->dilation[1] - v->padding[1]) * place;
    }
    if (j1 - j == n) {
        const uint32_t last = (v->width - 1 + v->padding[1] - (n - 1) * v->dilation[1]) / v->stride[1];
        t.n_places = at_most(last + 1, v->out_width) - column;
    }
    return t;
}

/* Joins n channels of four taps, with goes_on also what is in `to` already. Channels lie side by side, so that these
 * loops become vectors. */
typedef void join_4(void *restrict to, const void *restrict t0, const void *restrict t1, const void *restrict t2,
                    const void *restrict t3, uint32_t n, int goes_on);
/* X: type of the inputs, F: of four joined, Y: of all */
#define JOIN_4(NAME, X, F, Y, JOIN)                                                                                    \
    static void NAME(void *restrict to, const void *restrict t0, const void *restrict t1, const void *restrict t2,     \
                     const void *restrict t3, uint32_t n, int goes_on) {                                               \
        const X *a = t0, *b = t1, *c = t2, *d = t3;                                                                    \
        Y *all = to;                                                                                                   \
        for (uint32_t k = 0; k < n; k++) {                                                                             \
            const F ab = (F)JOIN(a[k], b[k]), cd = (F)JOIN(c[k], d[k]), abcd = (F)JOIN(ab, cd);                        \
            const Y before = goes_on ? all[k] : 0;                                                                     \
            all[k] = (Y)JOIN(before, abcd);                                                                            \
        }                                                                                                              \
    }
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define SUM(a, b) ((a) + (b))
JOIN_4(max_8, uint8_t, uint8_t, uint8_t, LARGER)
JOIN_4(max_16, uint16_t, uint16_t, uint16_t, LARGER)
JOIN_4(sum_8, uint8_t, uint16_t, uint32_t, SUM)
JOIN_4(sum_16, uint16_t, uint32_t, uint32_t, SUM)

/* n <= ROOM channels of every place, place after place, into `to`, which has room for so many elements of `size` bytes.
 * Vectors are whole: what they hold behind the last channel, the next place writes over. */
static void pool(const taps *t, join_4 *join, uint32_t n, uint8_t *to, size_t size, uint32_t room) {
    static const uint16_t zeros[ROOM]; /* where there are fewer than four taps */
    const uint8_t *none = (const uint8_t *)zeros;
    const uint32_t wide = (n + VECTOR - 1) / VECTOR * VECTOR;
    for (size_t place = 0; place < t->n_places; place++, to += n * size, room -= n) {
        const uint8_t *row = t->x + place * t->place_step;
        const uint32_t m = at_most(wide, room);
        if (!t->n_rows) join(to, none, none, none, none, m, 0);
        for (uint32_t i = 0; i < t->n_rows; i += 2, row += 2 * t->row_step)
            for (uint32_t j = 0; j < t->n_columns; j += 2) {
                const uint8_t *a = row + j * t->column_step, *b = none, *c = none, *d = none;
                if (j + 1 < t->n_columns) b = a + t->column_step;
                if (i + 1 < t->n_rows) c = a + t->row_step, d = b == none ? none : c + t->column_step;
                join(to, a, b, c, d, m, i || j);
            }
    }
}

/* Writes n of them as y's elements from `at` on: sums with r, else the largest ones. */
static void write_pool(int32_t all[TILE][BLOCK], uint32_t n, const rescale *r, const tensor *y, size_t at) {
    if (!r) memcpy(y->data + at * y->size, all, n * y->size);
    else if (r->multiplier) rescale_row(all, n, r, NULL, y, at);
    else
        for (uint32_t o = 0; o < n; o++)
            store_int(y->data, y->dtype, at + o, (int64_t)all[o / BLOCK][o % BLOCK] + y->zero);
}

/* Sums (with r) or the largest of as many places as fit, or of as many channels, together; padded taps do not count. */
static void run_pool(const uint32_t *op, const tensor *x, const tensor *y, const rescale *r) {
    const window v = window_of(op, x, y);
    join_4 *join = x->size == 1 ? (r ? sum_8 : max_8) : (r ? sum_16 : max_16);
    const size_t size = r ? 4 : x->size;
    int32_t all[TILE][BLOCK], *sums = all[0];
    uint32_t done = 0;
    size_t at = 0;
    taps t;
    for (uint32_t row = 0; row < v.out_height; row++)
        for (uint32_t column = 0; column < v.out_width; column += t.n_places) {
            t = taps_at(&v, x, row, column);
            t.n_places = at_most(t.n_places, v.channels < ROOM ? ROOM / v.channels : 1);
            const uint32_t zero = r ? (uint32_t)x->zero * t.n_rows * t.n_columns : 0;
            for (uint32_t c = 0, n, more; c < v.channels; c += n, t.x += n * x->size, done += more) {
                n = at_most(ROOM, v.channels - c), more = n * t.n_places;
                if (done + more > ROOM) write_pool(all, done, r, y, at), at += done, done = 0;
                pool(&t, join, n, (uint8_t *)all + done * size, size, ROOM - done);
                for (uint32_t o = done; zero && o < done + more; o++) sums[o] = (int32_t)((uint32_t)sums[o] - zero);
            }
        }
    write_pool(all, done, r, y, at);
}

void run_max_pool(const uint32_t *op, const tensor *x, const tensor *y) { run_pool(op, x, y, NULL); }

void run_avg_pool(const hqm_model *m, const uint32_t *op, const tensor *x, const tensor *y) {
    rescale r = rescale_of(m, op, y);
    r.is_shared = 1;
    run_pool(op, x, y, &r);
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

static void clip_bytes(uint8_t *q, uint32_t n, uint8_t low, uint8_t high) {
    for (uint32_t i = 0; i < n; i++) {
        const uint8_t raised = q[i] > low ? q[i] : low;
        q[i] = raised < high ? raised : high;
    }
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
        if (y->size == 1) memset(y->data, x->zero, y->n);
        else
            for (uint32_t i = 0; i < y->n; i++) store_int(y->data, y->dtype, i, x->zero);
        for (uint32_t a = 0; a < x->rank; a++) offset += op[O_BEFORE + a] * y->stride[a];
        copy(y->data + offset * y->size, y->stride, x->data, x->stride, x->shape, x->rank, x->size);
        return;
    default: /* CLIP */
        memmove(y->data, x->data, (size_t)y->n * y->size);
        if (y->size == 1) clip_bytes(y->data, y->n, (uint8_t)y->qmin, (uint8_t)y->qmax);
        else
            for (uint32_t i = 0; i < y->n; i++)
                store_int(y->data, y->dtype, i, clamp_int(load_int(y->data, y->dtype, i), y->qmin, y->qmax));
    }
}

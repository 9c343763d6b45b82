/* Functions of one element by table, and products of two tensors. */
#include "hqm_internal.h"

void run_lookup(const hqm_model *m, const uint32_t *op, const tensor *x, const tensor *y) {
    const uint16_t *table = (const uint16_t *)(const void *)(m->bytes + op[O_TABLE]);
    if (x->size == 1 && y->size == 1) {
        uint8_t narrow[256], *to = y->data; /* in the fastest memory there is */
        const uint8_t *from = x->data;
        for (uint32_t q = 0; q < 256; q++) narrow[q] = (uint8_t)table[q];
        for (uint32_t i = 0, n = y->n; i < n; i++) to[i] = narrow[from[i]];
        return;
    }
    for (uint32_t i = 0; i < y->n; i++) store_int(y->data, y->dtype, i, table[load_int(x->data, x->dtype, i)]);
}

/* q[i] = a[at + i] b[other + step i], centred, step 0 or 1; modulo 2^32: the export proved that no product leaves int32. */
static void multiply(uint32_t *q, const tensor *a, size_t at, const tensor *b, size_t other, size_t step, uint32_t n) {
    const uint32_t za = (uint32_t)a->zero, zb = (uint32_t)b->zero;
    const uint8_t *pa = a->data + at, *pb = b->data + other;
    if (a->size > 1 || b->size > 1)
        for (uint32_t i = 0; i < n; i++)
            q[i] = ((uint32_t)load_int(a->data, a->dtype, at + i) - za) *
                   ((uint32_t)load_int(b->data, b->dtype, other + step * i) - zb);
    else if (step == 1)
        for (uint32_t i = 0; i < n; i++) q[i] = (pa[i] - za) * (pb[i] - zb);
    else
        for (uint32_t i = 0; i < n; i++) q[i] = (pa[i] - za) * (pb[0] - zb);
}

void run_mul(const hqm_model *m, const uint32_t *op, const tensor *a, const tensor *b, const tensor *y) {
    rescale r = rescale_of(m, op, y);
    int32_t acc[TILE][BLOCK];
    uint32_t shape[HQM_MAX_RANK], at[HQM_MAX_RANK] = {0}, last = y->rank - 1;
    size_t step[HQM_MAX_RANK], other = 0;
    r.is_shared = 1;
    for (uint32_t k = 0; k < y->rank; k++) {     /* over the axes in the order of memory; an axis of length 1 stays */
        uint32_t axis = y->rank == 3 ? (k + 1) % 3 : k; /* (H, W, C) */
        shape[k] = y->shape[axis], step[k] = b->shape[axis] == y->shape[axis] ? b->stride[axis] : 0;
    }
    for (uint32_t i = 0, n; i < y->n; i += n) {
        n = at_most(TILE * BLOCK, y->n - i);
        for (uint32_t done = 0, some; done < n; done += some) {
            some = at_most(n - done, shape[last] - at[last]);
            multiply((uint32_t *)acc[0] + done, a, i + done, b, other, step[last], some);
            other += some * step[last], at[last] += some;
            for (uint32_t k = last; at[k] == shape[k]; other += step[k], at[k]++) { /* the next place */
                other -= step[k] * shape[k], at[k] = 0;
                if (k-- == 0) break;
            }
        }
        rescale_row(acc, n, &r, NULL, y, i);
    }
}

/* Functions of one element by table, and products of two tensors. */
#include "hqm_internal.h"

void run_lookup(const hqm_model *m, const uint32_t *op, const tensor *x, const tensor *y) {
    const uint16_t *table = (const uint16_t *)(const void *)(m->bytes + op[O_TABLE]);
    if (x->size == 1 && y->size == 1) {
        uint8_t narrow[256]; /* in the fastest memory there is */
        for (uint32_t q = 0; q < 256; q++) narrow[q] = (uint8_t)table[q];
        for (uint32_t i = 0; i < y->n; i++) y->data[i] = narrow[x->data[i]];
        return;
    }
    for (uint32_t i = 0; i < y->n; i++) store_int(y->data, y->dtype, i, table[load_int(x->data, x->dtype, i)]);
}

void run_mul(const hqm_model *m, const uint32_t *op, const tensor *a, const tensor *b, const tensor *y) {
    rescale r = rescale_of(m, op, y);
    uint32_t shape[HQM_MAX_RANK], at[HQM_MAX_RANK] = {0};
    size_t step[HQM_MAX_RANK], other = 0;
    for (uint32_t k = 0; k < y->rank; k++) {     /* over the axes in the order of memory; an axis of length 1 stays */
        uint32_t axis = y->rank == 3 ? (k + 1) % 3 : k; /* (H, W, C) */
        shape[k] = y->shape[axis], step[k] = b->shape[axis] == y->shape[axis] ? b->stride[axis] : 0;
    }
    for (uint32_t i = 0; i < y->n; i++) {
        /* modulo 2^32: the export proved that no product of integers within their ranges leaves int32 */
        uint32_t p = (uint32_t)(load_int(a->data, a->dtype, i) - a->zero);
        p *= (uint32_t)(load_int(b->data, b->dtype, other) - b->zero);
        store_int(y->data, y->dtype, i, rescaled(&r, 0, (int32_t)p, 0));
        for (uint32_t k = y->rank; k-- > 0; at[k] = 0) { /* the next place */
            other += step[k];
            if (++at[k] < shape[k]) break;
            other -= step[k] * shape[k];
        }
    }
}

/* Integers of any width in memory, and how an accumulator becomes one. */
#include "hqm_internal.h"

int64_t load_int(const void *data, hqm_dtype dtype, size_t i) {
    if (dtype == HQM_UINT8) return ((const uint8_t *)data)[i];
    return dtype == HQM_UINT16 ? ((const uint16_t *)data)[i] : ((const int32_t *)data)[i];
}

void store_int(void *data, hqm_dtype dtype, size_t i, int64_t value) {
    if (dtype == HQM_UINT8) ((uint8_t *)data)[i] = (uint8_t)value;
    else if (dtype == HQM_UINT16) ((uint16_t *)data)[i] = (uint16_t)value;
    else ((int32_t *)data)[i] = (int32_t)value;
}

rescale rescale_of(const hqm_model *m, const uint32_t *op, const tensor *y) {
    rescale r;
    memset(&r, 0, sizeof r);
    r.is_fixed = header_of(m)[H_FIXED];
    r.low = (int32_t)((int64_t)y->qmin - y->zero), r.high = (int32_t)((int64_t)y->qmax - y->zero), r.zero = y->zero;
    if (!op[O_MULTIPLIER]) return r;
    r.multiplier = floats_at(m, op[O_MULTIPLIER]), r.fixed = ints_at(m, op[O_MULTIPLIER_FIXED]);
    r.shift = m->bytes + op[O_SHIFT];
    if (op[O_MULTIPLIER_2]) r.multiplier_2 = floats_at(m, op[O_MULTIPLIER_2]), r.fixed_2 = ints_at(m, op[O_FIXED_2]);
    return r;
}

/* The integer of an accumulator and (0 without multiplier_2) a centred residual, in channel c. */
int64_t rescaled(const rescale *r, uint32_t c, int64_t acc, int64_t residual) {
    if (r->is_shared) c = 0;
    if (r->is_fixed) {
        int64_t total = acc * r->fixed[c];
        if (r->multiplier_2) total += residual * r->fixed_2[c];
        total += (int64_t)1 << (r->shift[c] - 1);
        return clamp_int(shift_right(total, r->shift[c]), r->low, r->high) + r->zero;
    }
    float y = (float)acc * r->multiplier[c];
    if (r->multiplier_2) {
        float other = (float)residual * r->multiplier_2[c];
        y = y + other;
    }
    return round_half_even(clamp_float(y, (float)r->low, (float)r->high)) + r->zero;
}

/* A rescale_kernel of any shifts, one integer after the other. */
void rescale_each(int32_t acc[TILE][BLOCK], uint32_t n_places, const rescale *r, uint32_t first, uint32_t n,
                  const void *residual, uint8_t *out, size_t step) {
    for (size_t p = 0, at = 0; p < n_places; p++, at += step)
        for (uint32_t o = 0; o < n; o++) {
            int64_t other = residual ? load_int(residual, r->residual_dtype, at + o) - r->residual_zero : 0;
            out[at + o] = (uint8_t)rescaled(r, first + o, acc[p][o], other);
        }
}

/* n channels from `first` on of n_places places: y's element at + p * step + o, in vectors where that applies. */
void rescale_tile(int32_t acc[TILE][BLOCK], uint32_t n_places, const rescale *r, uint32_t first, uint32_t n,
                  const void *residual, const tensor *y, size_t at, size_t step) {
    rescale_kernel *quick = r->is_fixed ? hqm_kernels()->fixed_u8 : hqm_kernels()->rescale_u8;
    if (quick && y->size == 1 && (!residual || r->residual_dtype != HQM_UINT16)) {
        const size_t size = residual && r->residual_dtype == HQM_INT32 ? 4 : 1;
        quick(acc, n_places, r, first, n, residual ? (const uint8_t *)residual + at * size : NULL, y->data + at, step);
        return;
    }
    for (uint32_t p = 0; p < n_places; p++, at += step)
        for (uint32_t o = 0; o < n; o++) {
            int64_t other = residual ? load_int(residual, r->residual_dtype, at + o) - r->residual_zero : 0;
            store_int(y->data, y->dtype, at + o, rescaled(r, first + o, acc[p][o], other));
        }
}

/* n <= TILE * BLOCK elements side by side, from y's element at on, with one multiplier. */
void rescale_row(int32_t acc[TILE][BLOCK], uint32_t n, const rescale *r, const void *residual, const tensor *y,
                 size_t at) {
    const uint32_t whole = n / BLOCK, rest = n % BLOCK;
    if (whole) rescale_tile(acc, whole, r, 0, BLOCK, residual, y, at, BLOCK);
    if (rest) rescale_tile(acc + whole, 1, r, 0, rest, residual, y, at + (size_t)whole * BLOCK, BLOCK);
}

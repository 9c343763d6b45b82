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
    r.out_dtype = y->dtype;
    if (!op[O_MULTIPLIER]) return r;
    r.multiplier = floats_at(m, op[O_MULTIPLIER]), r.fixed = ints_at(m, op[O_MULTIPLIER_FIXED]);
    r.shift = m->bytes + op[O_SHIFT];
    if (op[O_MULTIPLIER_2]) r.multiplier_2 = floats_at(m, op[O_MULTIPLIER_2]), r.fixed_2 = ints_at(m, op[O_FIXED_2]);
    return r;
}

/* The integer of an accumulator and (0 without multiplier_2) a centred residual, in channel c. */
int64_t rescaled(const rescale *r, uint32_t c, int64_t acc, int64_t residual) {
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

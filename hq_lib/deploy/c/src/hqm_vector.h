/* Requantization and addition in float32 vectors, written once for every vector unit. The file that includes this says
 *
 *     LANES, V(name), ISA                  lanes of 32 bits; the name of a function; its attributes
 *     vi, vf                               vectors of int32 and float32
 *     load_i load_f set_i set_f wide       from memory, one value, LANES uint8 from memory as int32
 *     to_f to_i                            conversions (to_i rounds half to even)
 *     narrow                               BLOCK int32 in 0..255, as an array of vectors, to memory as uint8
 *     add_i sub_i mul_f add_f fma_f        fma_f(a, b, c) = a * b + c, one rounding
 *     clamp_f                              within [low, high], NaN gives low
 */

/* size: bytes of one element of the residual, 0 without one */
ISA INLINE void V(rescale_sized)(int32_t acc[TILE][BLOCK], uint32_t n_places, const rescale *r, uint32_t first,
                                 uint32_t n, const uint8_t *residual, uint8_t *out, size_t step, const int size) {
    float m[BLOCK], m2[BLOCK];
    uint8_t whole[BLOCK];
    multipliers(r->multiplier, r, first, n, m);
    multipliers(r->multiplier_2, r, first, n, m2);
    const vf low = set_f((float)r->low), high = set_f((float)r->high);
    const vi zero = set_i(r->zero), other_zero = set_i(r->residual_zero);
    for (uint32_t p = 0; p < n_places; p++, out += step) {
        uint8_t *to = n == BLOCK ? out : whole;
        vi all[BLOCK / LANES];
        for (int o = 0; o < BLOCK; o += LANES) {
            vf y = mul_f(to_f(load_i(acc[p] + o)), load_f(m + o));
            if (size) {
                const uint8_t *from = residual + (p * step + (size_t)o) * (size_t)size;
                const vi q = size == 1 ? wide(from) : load_i((const int32_t *)(const void *)from);
                y = add_f(y, mul_f(to_f(sub_i(q, other_zero)), load_f(m2 + o)));
            }
            all[o / LANES] = add_i(to_i(clamp_f(y, low, high)), zero);
        }
        narrow(to, all);
        if (n == BLOCK / 2) memcpy(out, whole, BLOCK / 2);
        else if (n < BLOCK) memcpy(out, whole, n);
    }
}

ISA static void V(rescale_u8)(int32_t acc[TILE][BLOCK], uint32_t n_places, const rescale *r, uint32_t first, uint32_t n,
                              const void *residual, uint8_t *out, size_t step) {
    if (!residual) V(rescale_sized)(acc, n_places, r, first, n, NULL, out, step, 0);
    else if (r->residual_dtype == HQM_UINT8) V(rescale_sized)(acc, n_places, r, first, n, residual, out, step, 1);
    else V(rescale_sized)(acc, n_places, r, first, n, residual, out, step, 4);
}

ISA static void V(add_u8)(const uint8_t *a, const uint8_t *b, uint32_t n, const float m[2], float offset, int32_t qmin,
                          int32_t qmax, uint8_t *out) {
    const vf ma = set_f(m[0]), mb = set_f(m[1]), start = set_f(offset), low = set_f((float)qmin);
    const vf high = set_f((float)qmax);
    uint32_t i = 0;
    for (; i + BLOCK <= n; i += BLOCK) {
        vi all[BLOCK / LANES];
        for (int o = 0; o < BLOCK; o += LANES) {
            const vf inner = fma_f(to_f(wide(b + i + o)), mb, start);
            all[o / LANES] = to_i(clamp_f(fma_f(to_f(wide(a + i + o)), ma, inner), low, high));
        }
        narrow(out + i, all);
    }
    for (; i < n; i++) out[i] = (uint8_t)added(a[i], b[i], m, offset, qmin, qmax);
}

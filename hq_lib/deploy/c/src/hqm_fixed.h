/* The "fixed" requantizer in vectors of LANES channels. The file that includes this says what hqm_x86.h wants, and
 *
 *     mul_even(a, b) add_64(a, b)   products of the even int32 in 64 bits; sums of 64 bits
 *     high_half(v)                  the odd int32 of v in the places of the even ones
 *     high_halves(a, b)             even int32: the high halves of a's 64 bits, odd ones: of b's
 *     shifted_down(v, n)            each int32 of v down by that of n
 *     min_i max_i                   of int32
 */

/* What LANES channels need: sums of the even and of the odd ones in 64 bits, of which the high halves are shifted once
 * more. What rounds is added to the high halves, or with shifts of 32 (`is_low`) to all 64 bits. A sum that needs a
 * smaller shift is of small integers, moved up before (`up`). */
typedef struct {
    int32_t multiplier[2][LANES], multiplier_2[2][LANES]; /* [1]: the odd channels' in the low halves */
    int64_t low[2][LANES / 2];
    int32_t half[LANES], shift[LANES], up, is_low;
} fixed_lanes;

/* The least shift that fixed_of serves: an Add's integers have 17 bits, an accumulator all of 32. */
static inline uint32_t least_shift(const rescale *r, int is_sum) { return r->is_shared && is_sum ? 18 : 32; }

static inline void fixed_lanes_of(fixed_lanes f[PARTS], const rescale *r, uint32_t first, uint32_t n, int is_sum) {
    for (uint32_t o = 0; o < BLOCK; o++) {
        const uint32_t c = r->is_shared ? 0 : first + at_most(o, n - 1), j = o % LANES;
        fixed_lanes *to = f + o / LANES;
        if (!j) to->is_low = 0;
        to->up = r->shift[c] < 32 ? 32 - r->shift[c] : 0;
        for (uint32_t odd = 0; odd <= j % 2; odd++) {
            to->multiplier[odd][j - odd] = r->fixed[c];
            to->multiplier_2[odd][j - odd] = is_sum ? r->fixed_2[c] : 0;
        }
        to->shift[j] = r->shift[c] + to->up - 32;
        to->half[j] = to->shift[j] ? 1 << (to->shift[j] - 1) : 0;
        to->low[j % 2][j / 2] = to->shift[j] ? 0 : (int64_t)1 << 31;
        to->is_low |= !to->shift[j];
    }
}

/* The requantized integers of acc (and, with is_sum, of other), before zero point and clamp. */
ISA INLINE vi fixed_of(const fixed_lanes *f, vi acc, vi other, const int is_sum) {
    vi sum[2];
    if (is_sum) acc = shifted(acc, f->up), other = shifted(other, f->up);
    for (int odd = 0; odd < 2; odd++) {
        sum[odd] = mul_even(odd ? high_half(acc) : acc, at(f->multiplier[odd]));
        if (is_sum) sum[odd] = add_64(sum[odd], mul_even(odd ? high_half(other) : other, at(f->multiplier_2[odd])));
        if (f->is_low) sum[odd] = add_64(sum[odd], at(f->low[odd]));
    }
    return shifted_down(add_i(high_halves(sum[0], sum[1]), at(f->half)), at(f->shift));
}

/* size: bytes of one element of the residual, 0 without one; whole: 0..255 are all integers that there are */
ISA INLINE void fixed_sized(int32_t acc[TILE][BLOCK], uint32_t n_places, const rescale *r, const fixed_lanes f[PARTS],
                            uint32_t n, const uint8_t *residual, uint8_t *out, size_t step, const int size,
                            const int whole) {
    const vi low = set_i(r->low), high = set_i(r->high), zero = set_i(r->zero), minus = set_i(r->residual_zero);
    uint8_t all[BLOCK];
    for (uint32_t p = 0; p < n_places; p++, out += step) {
        vi q[PARTS];
        for (size_t h = 0; h < PARTS; h++) {
            vi other = zero_i();
            if (size) {
                const uint8_t *from = residual + (p * step + LANES * h) * (size_t)size;
                other = sub_i(size == 1 ? wide(from) : at(from), minus);
            }
            q[h] = fixed_of(f + h, at(acc[p] + LANES * h), other, size != 0);
            if (!whole || LANES == BLOCK) q[h] = min_i(max_i(q[h], low), high); /* narrow saturates with 8 lanes */
            q[h] = add_i(q[h], zero);
        }
        narrow(n == BLOCK ? out : all, q);
        if (n < BLOCK) memcpy(out, all, n);
    }
}

ISA static void fixed_u8(int32_t acc[TILE][BLOCK], uint32_t n_places, const rescale *r, uint32_t first, uint32_t n,
                         const void *residual, uint8_t *out, size_t step) {
    const int whole = r->low == -r->zero && r->high == 255 - r->zero, is_byte = r->residual_dtype == HQM_UINT8;
    fixed_lanes f[PARTS];
    for (uint32_t o = 0; o < n; o++)
        if (r->shift[r->is_shared ? 0 : first + o] < least_shift(r, residual != NULL)) {
            rescale_each(acc, n_places, r, first, n, residual, out, step);
            return;
        }
    fixed_lanes_of(f, r, first, n, residual != NULL);
    if (!residual && whole) fixed_sized(acc, n_places, r, f, n, NULL, out, step, 0, 1);
    else if (!residual) fixed_sized(acc, n_places, r, f, n, NULL, out, step, 0, 0);
    else if (is_byte) fixed_sized(acc, n_places, r, f, n, residual, out, step, 1, 0);
    else fixed_sized(acc, n_places, r, f, n, residual, out, step, 4, 0);
}

/* Returns how many of n elements of a "fixed" Add it has written, a multiple of BLOCK. */
ISA static uint32_t fixed_add_u8(const uint8_t *a, int32_t a_zero, const uint8_t *b, uint32_t n, const rescale *r,
                                 uint8_t *out) {
    const vi low = set_i(r->low), high = set_i(r->high), zero = set_i(r->zero);
    fixed_lanes f[PARTS];
    uint32_t i = 0;
    if (r->shift[0] < least_shift(r, 1)) return 0;
    fixed_lanes_of(f, r, 0, 1, 1);
    for (; i + BLOCK <= n; i += BLOCK) {
        vi q[PARTS];
        for (uint32_t h = 0; h < BLOCK; h += LANES) {
            const vi x = sub_i(wide(a + i + h), set_i(a_zero)), y = sub_i(wide(b + i + h), set_i(r->residual_zero));
            q[h / LANES] = add_i(min_i(max_i(fixed_of(f, x, y, 1), low), high), zero);
        }
        narrow(out + i, q);
    }
    return i;
}

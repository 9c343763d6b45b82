/* Sums of products, and their requantization to bytes, written once for the vector units of x86-64. The including file says
 *
 *     ISA vi add_i set_i at put    as in hqm_vector.h; a vector of LANES int32 from memory and to it
 *     zero_i shifted               a vector of zeros; shifted(v, n): each int32 n bits to the left
 *     MANY SOME                    places computed together, at most and where fewer are left
 *     unpacked(from, bits, w)      w[2][BLOCK / LANES]: the 64 weights of four inputs, as multiply wants them
 *     multiply(sum, x, w, bits)    adds their products with four inputs, which are in every int32 of x
 *     mul_f to_f to_i load_f       as in hqm_vector.h
 *     packed(v, zero, has_zero)    4 * LANES int32, with zero added, as bytes in their order; saturates at 0 and 255
 *     set_b(x) set_w(x)            x in every byte, in every 16 bits
 *     within(b, low, high)         bytes within [low, high]
 *     below_one(m)                 whether every float32 is
 */
enum { PARTS = BLOCK / LANES, WIDE = 4 * LANES /* bytes of a vector */ };
#include "hqm_fixed.h"

/* Requantization without a residual, in vectors of bytes: what lies outside saturates on its way to a byte, at the bounds
 * of a byte and then at its own. */
typedef struct {
    vi zero, low, high;
    int has_zero, is_narrow; /* whether it changes anything to add zero; to clamp bytes */
} byte_rule;

/* What LANES channels are multiplied by: m, or (not NULL) what "fixed" needs. */
typedef struct {
    vf m;
    const fixed_lanes *fixed;
} factor;

ISA INLINE byte_rule byte_rule_of(const rescale *r) {
    const int32_t low = r->zero + r->low, high = r->zero + r->high;
    byte_rule b = {set_w(r->zero), set_b(low), set_b(high), r->zero != 0, low > 0 || high < 255};
    return b;
}

ISA INLINE vi bytes_of(const vi sum[4], const factor f[4], const byte_rule *b) {
    vi q[4];
    if (f[0].fixed)
        for (int k = 0; k < 4; k++) q[k] = fixed_of(f[k].fixed, sum[k], sum[k], 0);
    else
        for (int k = 0; k < 4; k++) q[k] = to_i(mul_f(to_f(sum[k]), f[k].m));
    const vi bytes = packed(q, b->zero, b->has_zero);
    return b->is_narrow ? within(bytes, b->low, b->high) : bytes;
}

/* rescale_u8 of whole blocks without a residual, several places at once. */
ISA static void together_u8(int32_t acc[TILE][BLOCK], uint32_t n_places, const rescale *r, uint32_t first, uint32_t n,
                            const void *residual, uint8_t *out, size_t step) {
    enum { PLACES = WIDE / BLOCK };
    float each[BLOCK];
    uint8_t all[WIDE];
    uint32_t p = 0;
    factor f[4];
    int serves = !residual && n == BLOCK;
    multipliers(r->multiplier, r, first, n, each);
    for (int k = 0; k < 4; k++) f[k].m = load_f(each + k % PARTS * LANES), f[k].fixed = NULL, serves &= below_one(f[k].m);
    const byte_rule b = byte_rule_of(r);
    for (; serves && p + PLACES <= n_places; p += PLACES) {
        const vi sum[4] = {at(acc[p]), at(acc[p] + LANES), at(acc[p] + 2 * LANES), at(acc[p] + 3 * LANES)};
        put(all, bytes_of(sum, f, &b));
        for (uint32_t k = 0; k < PLACES; k++, out += step) memcpy(out, all + k * BLOCK, BLOCK);
    }
    if (p < n_places) V(rescale_u8)(acc + p, n_places - p, r, first, n, residual, out, step);
}

ISA INLINE void put_sums(int32_t *acc, const int32_t *start, const vi sum[PARTS], uint32_t shift) {
    for (int h = 0; h < PARTS; h++) put(acc + LANES * h, add_i(at(start + LANES * h), shifted(sum[h], shift)));
}

ISA INLINE void dense_n(const product *p, const uint32_t *place, const int32_t *start, int32_t (*acc)[BLOCK],
                        const int n, const int bits) {
    vi sum[MANY][PARTS], w[2][PARTS];
    const uint8_t *weights = p->w;
    for (int q = 0; q < n; q++)
        for (int h = 0; h < PARTS; h++) sum[q][h] = zero_i();
    for (uint32_t i = 0; i < p->n_rows; i++)
        for (uint32_t j = 0; j < p->n_columns; j++) {
            const uint8_t *x = (const uint8_t *)p->x + i * p->row_step + j * p->column_step;
            for (uint32_t k = 0; k < p->n4; k++, x += 4, weights += 8 * bits) {
                unpacked(weights, bits, w);
                for (int q = 0; q < n; q++) {
                    int32_t four;
                    memcpy(&four, x + place[q], 4);
                    multiply(sum[q], set_i(four), w, bits);
                }
            }
        }
    for (int q = 0; q < n; q++) put_sums(acc[q], start, sum[q], p->shift);
}

ISA INLINE void dense(const product *p, int32_t acc[TILE][BLOCK], const int bits) {
    int32_t start[BLOCK];
    uint32_t q = 0;
    starts(p, start);
    for (; q + MANY <= p->n_places; q += MANY) dense_n(p, p->at + q, start, acc + q, MANY, bits);
    for (; q + SOME <= p->n_places; q += SOME) dense_n(p, p->at + q, start, acc + q, SOME, bits);
    for (; q < p->n_places; q++) dense_n(p, p->at + q, start, acc + q, 1, bits);
}
ISA static void dense_8(const product *p, int32_t acc[TILE][BLOCK]) { dense(p, acc, 8); }
ISA static void dense_16(const product *p, int32_t acc[TILE][BLOCK]) { dense(p, acc, 16); }

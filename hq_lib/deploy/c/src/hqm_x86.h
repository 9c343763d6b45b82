/* Sums of products, written once for the vector units of x86-64. The file that includes this says
 *
 *     ISA vi add_i set_i at put    as in hqm_vector.h; a vector of LANES int32 from memory and to it
 *     zero_i shifted               a vector of zeros; shifted(v, n): each int32 n bits to the left
 *     MANY SOME                    places computed together, at most and where fewer are left
 *     unpacked(from, bits, w)      w[2][BLOCK / LANES]: the 64 weights of four inputs, as multiply wants them
 *     multiply(sum, x, w, bits)    adds their products with four inputs, which are in every int32 of x
 *     TAPS GROUP                   kernel places whose weights stay in registers; those multiplied together
 *     unpacked_taps(p, t, bits, w) w[BLOCK / LANES]: the weights of places t .. t + GROUP - 1
 *     multiply_taps(sum, x, o, w)  adds their products with the inputs at x + o[0 .. GROUP - 1]
 */
enum { PARTS = BLOCK / LANES };

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

ISA INLINE void depthwise(const product *p, int32_t acc[TILE][BLOCK], const int bits) {
    int32_t start[BLOCK];
    starts(p, start);
    for (uint32_t first = 0; first < p->n_rows * p->n_columns; first += TAPS) {
        size_t offset[TAPS];
        vi w[TAPS / GROUP][PARTS];
        tap_offsets(p, first, TAPS, offset);
        for (uint32_t t = 0; t < TAPS / GROUP; t++) unpacked_taps(p, first + GROUP * t, bits, w[t]);
        for (uint32_t q = 0; q < p->n_places; q++) {
            vi sum[PARTS];
            for (int h = 0; h < PARTS; h++) sum[h] = zero_i();
            for (int t = 0; t < TAPS / GROUP; t++)
                multiply_taps(sum, (const uint8_t *)p->x + p->at[q], offset + GROUP * t, w[t]);
            put_sums(acc[q], first ? acc[q] : start, sum, p->shift);
        }
    }
}
ISA static void depthwise_4(const product *p, int32_t acc[TILE][BLOCK]) { depthwise(p, acc, 4); }
ISA static void depthwise_8(const product *p, int32_t acc[TILE][BLOCK]) { depthwise(p, acc, 8); }

/* hqm_winograd.h in 16 bits, with AVX2: |B^T d B| <= 4 * 255 and |2G g (2G)^T| <= 9 max|w|. Every int8 q and every 2 q + 1
 * keeps |4 Y| below 2^31 (channels <= WIDEST); 16-bit weights that do not go through windows. Filters take a tenth of what
 * the tiles save.
 */
/* Of each 16 channels the even ones come first. */
ISA static void transform_inputs(const uint8_t *x, const tile *tiles, uint32_t n, uint32_t channels, size_t width,
                                 int16_t *v) {
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    for (uint32_t t = 0; t < n; t++)
        for (size_t c = 0; c < channels; c += 16) {
            __m256i d[4][4];
            for (int j = 0; j < 4; j++) {
                __m256i column[4];
                for (int i = 0; i < 4; i++) {
                    const uint8_t *from = x + tiles[t].row[i] + tiles[t].column[j] + c;
                    const __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)from);
                    column[i] = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(bytes, order));
                }
                to_inputs(column);
                for (int i = 0; i < 4; i++) d[i][j] = column[i];
            }
            for (size_t i = 0; i < 4; i++) {
                to_inputs(d[i]);
                for (size_t j = 0; j < 4; j++) put(v + (4 * i + j) * (n * width + GAP) + t * width + c, d[i][j]);
            }
        }
}

/* The even or the odd ones of four inputs' weights, of 8 channels, as int16 pairs. */
ISA INLINE __m256i weight_pairs(const uint8_t *w, const int odd, const int h, const int bits) {
    const __m256i both = at(w + 32 * h + (bits == 16 ? 64 * odd : 0)), sign = _mm256_set1_epi16(128);
    if (bits == 16) return both;
    const __m256i low = _mm256_sub_epi16(_mm256_xor_si256(_mm256_and_si256(both, _mm256_set1_epi16(255)), sign), sign);
    const __m256i q = odd ? _mm256_srai_epi16(both, 8) : low;
    return bits == 9 ? _mm256_add_epi16(_mm256_add_epi16(q, q), _mm256_set1_epi16(1)) : q;
}

/* u: [16][n / 4][even, odd][BLOCK][2] of n input channels, and a GAP. Returns 0 where a weight is beyond +-most. */
ISA INLINE int transform_filters(const uint8_t *w, size_t row, size_t column, uint32_t n, uint32_t most, int16_t *u,
                                 const int bits) {
    const __m256i limit = _mm256_set1_epi16((int16_t)most);
    __m256i beyond = _mm256_setzero_si256();
    for (size_t k = 0; k < n / 4; k++, w += bits == 16 ? 128 : 64)
        for (int part = 0; part < 4; part++, u += BLOCK) {
            __m256i g[4][3], all[4];
            for (size_t j = 0; j < 3; j++) {
                __m256i from[3];
                for (size_t i = 0; i < 3; i++) {
                    from[i] = weight_pairs(w + i * row + j * column, part / 2, part % 2, bits);
                    const __m256i size = _mm256_abs_epi16(from[i]); /* of -2^15: itself, as unsigned */
                    if (bits == 16) beyond = _mm256_or_si256(beyond, _mm256_subs_epu16(size, limit));
                }
                to_filters(from, all);
                for (int i = 0; i < 4; i++) g[i][j] = all[i];
            }
            for (size_t i = 0; i < 4; i++) {
                to_filters(g[i], all);
                for (size_t j = 0; j < 4; j++) put(u + (4 * i + j) * U_STEP, all[j]);
            }
        }
    return _mm256_testz_si256(beyond, beyond);
}

/* One of 16 places of four tiles: sums[tile][16][BLOCK] += u v over 4 n4 channels. */
ISA INLINE void multiply_tiles(const int16_t *v, size_t width, const int16_t *u, uint32_t n4, int32_t *sums, int is_first) {
    __m256i sum[4][PARTS];
    for (int t = 0; t < 4; t++)
        for (int h = 0; h < PARTS; h++) sum[t][h] = is_first ? zero_i() : at(sums + 16 * BLOCK * t + LANES * h);
    for (uint32_t k = 0; k < n4; k++)
        for (int odd = 0; odd < 2; odd++, u += 2 * BLOCK) {
            const __m256i w[PARTS] = {at(u), at(u + BLOCK)};
            for (size_t t = 0; t < 4; t++) {
                int32_t two;
                memcpy(&two, v + t * width + k / 4 * 16 + k % 4 * 2 + (size_t)odd * 8, 4);
                for (int h = 0; h < PARTS; h++) sum[t][h] = add_i(sum[t][h], _mm256_madd_epi16(set_i(two), w[h]));
            }
        }
    for (int t = 0; t < 4; t++)
        for (int h = 0; h < PARTS; h++) put(sums + 16 * BLOCK * t + LANES * h, sum[t][h]);
}

ISA INLINE int tiles_of_bits(const product *p, const int16_t *v, size_t width, uint32_t n,
                             int32_t acc[2][2 * TILES][BLOCK], const int bits) {
    int16_t u[16 * U_STEP];
    int32_t sums[TILES][16][BLOCK], start[2][2][BLOCK];
    const uint32_t channels = (uint32_t)p->column_step, limit = (uint32_t)(INT32_MAX / 36 / 255) / channels;
    const size_t quadruple = bits == 16 ? 128 : 64; /* bytes of 64 weights */
    for (uint32_t c = 0, some; c < channels; c += some) {
        const uint8_t *w = (const uint8_t *)p->w + c / 4 * quadruple;
        some = at_most(CHUNK, channels - c);
        if (!transform_filters(w, p->n4 * quadruple, channels / 4 * quadruple, some, at_most(limit, INT16_MAX / 9), u, bits))
            return 0;
        for (size_t place = 0; place < 16; place++)
            for (uint32_t t = 0; t < n; t += 4)
                multiply_tiles(v + place * (n * width + GAP) + t * width + c, width, u + place * U_STEP, some / 4,
                               sums[t][place], !c);
    }
    for (int k = 0; k < 4; k++) starts(p, start[k / 2][k % 2]);
    for (uint32_t t = 0; t < n; t++)
        transform_outputs(sums[t], start, p->shift - (bits == 9), (int32_t (*)[2 * TILES][BLOCK])(void *)acc[0][2 * t]);
    return 1;
}
ISA static int tiles_of_8(const product *p, const int16_t *v, size_t width, uint32_t n, int32_t acc[2][2 * TILES][BLOCK]) {
    return tiles_of_bits(p, v, width, n, acc, 8);
}
ISA static int tiles_of_9(const product *p, const int16_t *v, size_t width, uint32_t n, int32_t acc[2][2 * TILES][BLOCK]) {
    return tiles_of_bits(p, v, width, n, acc, 9);
}
ISA static int tiles_of_16(const product *p, const int16_t *v, size_t width, uint32_t n, int32_t acc[2][2 * TILES][BLOCK]) {
    return tiles_of_bits(p, v, width, n, acc, 16);
}
static int tiles_of(const layer *l, const product *p, const int16_t *v, size_t width, uint32_t n,
                    int32_t acc[2][2 * TILES][BLOCK]) {
    return (l->bits == 16 ? tiles_of_16 : l->odd ? tiles_of_9 : tiles_of_8)(p, v, width, n, acc);
}

static int serves_tiles(const layer *l) { return l->bits != 4; }

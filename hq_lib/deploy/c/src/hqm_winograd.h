/* 3x3 convolutions of stride 1 in tiles of 2x2 outputs: F(2x2, 3x3) of Lavin & Gray (2015, arXiv:1509.09308, eq. 8 to
 * 12) in whole numbers. With 2G in place of their G, a tile Y of inputs d (4x4) and filters g is
 *
 *     4 Y = A^T [sum over channels (2G g (2G)^T) . (B^T d B)] A,      16 products where windows take 36
 *
 * |B^T d B| <= 4 * 255 and |2G g (2G)^T| <= 9 max|w| fit into 16 bits. Sums may wrap around 2^32 on the way, for
 * |4 Y| <= 36 * 255 * channels * max|w| < 2^31 does not, and so the division by 4 is exact. Every int8 q and every
 * 2 q + 1 keeps to that (channels <= WIDEST); 16-bit weights that do not go through windows. Filters are transformed
 * anew for each group of tiles: a tenth of what that saves, and no memory.
 *
 * The file that includes this says what hqm_x86.h wants.
 */
enum { TILES = 32, CHUNK = 64, ROOM = 1 << 16, GAP = 32 /* between the 16 places: one line of the cache and no more */ };
enum { U_STEP = CHUNK * BLOCK + GAP };

/* Offsets (elements) of the rows and columns of a tile's inputs; the places beyond the last count 0. */
typedef struct {
    uint32_t row[4], column[4];
} tile;

/* B^T d, of a column or a row */
ISA INLINE void to_inputs(__m256i d[4]) {
    const __m256i d1 = d[1];
    d[0] = _mm256_sub_epi16(d[0], d[2]);
    d[1] = _mm256_add_epi16(d1, d[2]);
    d[2] = _mm256_sub_epi16(d[2], d1);
    d[3] = _mm256_sub_epi16(d1, d[3]);
}

/* 2G g */
ISA INLINE void to_filters(const __m256i g[3], __m256i u[4]) {
    const __m256i ends = _mm256_add_epi16(g[0], g[2]);
    u[0] = _mm256_add_epi16(g[0], g[0]);
    u[1] = _mm256_add_epi16(ends, g[1]);
    u[2] = _mm256_sub_epi16(ends, g[1]);
    u[3] = _mm256_add_epi16(g[2], g[2]);
}

/* A^T m */
ISA INLINE void to_outputs(const __m256i m[4], __m256i y[2]) {
    y[0] = add_i(m[0], add_i(m[1], m[2]));
    y[1] = sub_i(sub_i(m[1], m[2]), m[3]);
}

/* v: [16][n tiles][width channels] and a GAP, of each 16 channels the even ones first */
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

/* acc[i][j] = start + (A^T sums A / 4 << shift) */
ISA INLINE void transform_outputs(int32_t sums[16][BLOCK], const int32_t *start, uint32_t shift,
                                  int32_t (*acc)[2 * TILES][BLOCK]) {
    for (int h = 0; h < BLOCK; h += LANES) {
        __m256i rows[2][4], y[2];
        for (int j = 0; j < 4; j++) {
            const __m256i m[4] = {at(sums[j] + h), at(sums[4 + j] + h), at(sums[8 + j] + h), at(sums[12 + j] + h)};
            to_outputs(m, y);
            rows[0][j] = y[0], rows[1][j] = y[1];
        }
        for (int i = 0; i < 2; i++) {
            to_outputs(rows[i], y);
            for (int j = 0; j < 2; j++)
                put(acc[i][j] + h, add_i(at(start + h), shifted(_mm256_srai_epi32(y[j], 2), shift)));
        }
    }
}

/* Sums of n tiles (a multiple of 4) of one block of channels, acc[row of the tile][2 * tile + column]. Returns 0 and has
 * done nothing of use where a weight is too large. */
ISA INLINE int tiles_of(const product *p, const int16_t *v, size_t width, uint32_t n, int32_t acc[2][2 * TILES][BLOCK],
                        const int bits) {
    int16_t u[16 * U_STEP];
    int32_t sums[TILES][16][BLOCK], start[BLOCK];
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
    starts(p, start);
    for (uint32_t t = 0; t < n; t++)
        transform_outputs(sums[t], start, p->shift - (bits == 9), (int32_t (*)[2 * TILES][BLOCK])(void *)acc[0][2 * t]);
    return 1;
}
ISA static int tiles_of_8(const product *p, const int16_t *v, size_t width, uint32_t n, int32_t acc[2][2 * TILES][BLOCK]) {
    return tiles_of(p, v, width, n, acc, 8);
}
ISA static int tiles_of_9(const product *p, const int16_t *v, size_t width, uint32_t n, int32_t acc[2][2 * TILES][BLOCK]) {
    return tiles_of(p, v, width, n, acc, 9);
}
ISA static int tiles_of_16(const product *p, const int16_t *v, size_t width, uint32_t n, int32_t acc[2][2 * TILES][BLOCK]) {
    return tiles_of(p, v, width, n, acc, 16);
}

/* The outputs of n tiles from `first` on, n_columns of which lie side by side, in one block of channels. */
static void put_tiles(const layer *l, product p, uint32_t first, uint32_t n, uint32_t n_columns, uint32_t channel,
                      int32_t acc[2][2 * TILES][BLOCK], int is_done) {
    const window *v = l->v;
    const uint32_t full = v->width + v->padding[1] + v->padding[3];
    uint32_t at[TILE];
    for (uint32_t t = 0, run; t < n; t += run) {
        const uint32_t row = 2 * ((first + t) / n_columns), column = 2 * ((first + t) % n_columns);
        run = at_most(n_columns - column / 2, n - t);
        p.at = at, p.n_places = at_most(2 * run, v->out_width - column);
        for (uint32_t i = 0; i < 2 && row + i < v->out_height; i++) {
            for (uint32_t k = 0; k < p.n_places && !is_done; k++) at[k] = ((row + i) * full + column + k) * v->channels;
            if (!is_done) l->kernel(&p, acc[i] + 2 * t);
            put_places(l, acc[i] + 2 * t, p.n_places, channel, p.n_out, (size_t)(row + i) * v->out_width + column);
        }
    }
}

static void run_tiles(const void *context, uint32_t part, uint32_t n_parts) {
    const layer *l = context;
    const window *v = l->v;
    const uint32_t n_rows = (v->out_height + 1) / 2, n_columns = (v->out_width + 1) / 2, channels = v->channels;
    const uint32_t last_row = v->height + v->padding[0] + v->padding[2] - 1;
    const uint32_t last_column = v->width + v->padding[1] + v->padding[3] - 1;
    const uint64_t n_tiles = (uint64_t)n_rows * n_columns;
    const uint32_t from = (uint32_t)(n_tiles * part / n_parts), to = (uint32_t)(n_tiles * (part + 1) / n_parts);
    const uint32_t width = (channels + 15) / 16 * 16, most = at_most(TILES, ROOM / 16 / width);
    int16_t inputs[ROOM + 16 * GAP];
    int32_t acc[2][2 * TILES][BLOCK];
    for (uint32_t first = from, n; first < to; first += n) {
        tile tiles[TILES];
        n = at_most(most, to - first);
        const uint32_t n_whole = (n + 3) / 4 * 4;
        for (uint32_t t = 0; t < n_whole; t++) /* the last once more to fill four up */
            for (uint32_t i = 0, here = first + at_most(t, n - 1); i < 4; i++) {
                tiles[t].row[i] = at_most(here / n_columns * 2 + i, last_row) * (last_column + 1) * channels;
                tiles[t].column[i] = at_most(here % n_columns * 2 + i, last_column) * channels;
            }
        transform_inputs(l->data, tiles, n_whole, channels, width, inputs);
        product p = l->p;
        p.x = l->data, p.w = l->w, p.column_step = channels;
        for (uint32_t b = 0; b < l->per_group; b += BLOCK) {
            p.start = l->start + b, p.n_out = at_most(BLOCK, l->per_group - b);
            const int is_done = (l->odd ? tiles_of_9 : l->bits == 8 ? tiles_of_8 : tiles_of_16)(&p, inputs, width, n_whole, acc);
            put_tiles(l, p, first, n, n_columns, b, acc, is_done);
            p.w = (const uint8_t *)p.w + (size_t)p.n4 * 3 * 8 * l->bits;
        }
    }
}

/* hqm_winograd.h in bytes, with VNNI, for inputs and weights of 4 bits: B^T d B lies in -30 .. 60 and gets 32 more, so that
 * it is unsigned; |2G g (2G)^T| <= 72. What the 32 add is the same for every tile: the sums of one whose B^T d B is 32
 * everywhere (that of d = 32 (2 0 1 -1)^T (2 0 1 -1), so it is divisible by 4, too).
 */
enum { MORE = 32 };

ISA static void transform_inputs(const uint8_t *x, const tile *tiles, uint32_t n, uint32_t channels, size_t width,
                                 uint8_t *v) {
    for (uint32_t t = 0; t < n; t++)
        for (size_t c = 0; c < channels; c += IN_VECTOR) {
            __m512i d[4][4];
            for (int j = 0; j < 4; j++) {
                __m512i column[4];
                for (int i = 0; i < 4; i++) column[i] = at(x + tiles[t].row[i] + tiles[t].column[j] + c);
                to_inputs(column);
                for (int i = 0; i < 4; i++) d[i][j] = column[i];
            }
            for (size_t i = 0; i < 4; i++) {
                to_inputs(d[i]);
                for (size_t j = 0; j < 4; j++)
                    put(v + (4 * i + j) * (n * width + GAP) + t * width + c, add_t(d[i][j], set_b(MORE)));
            }
        }
}

/* u: [16][n / 4][BLOCK][4] of n input channels, and a GAP */
ISA static void transform_filters(const uint8_t *w, size_t row, size_t column, uint32_t n, uint8_t *u) {
    for (size_t k = 0; k < n / 4; k++, w += 32, u += 4 * BLOCK) {
        __m512i g[4][3], all[4];
        for (size_t j = 0; j < 3; j++) {
            __m512i from[3], both[2][1];
            for (size_t i = 0; i < 3; i++) {
                unpacked(w + i * row + j * column, 4, both);
                from[i] = both[0][0];
            }
            to_filters(from, all);
            for (int i = 0; i < 4; i++) g[i][j] = all[i];
        }
        for (size_t i = 0; i < 4; i++) {
            to_filters(g[i], all);
            for (size_t j = 0; j < 4; j++) put(u + (4 * i + j) * U_STEP, all[j]);
        }
    }
}

/* One of 16 places of n tiles (TOGETHER or 1): sums[tile][16][BLOCK] += u v over 4 n4 channels; v NULL: MORE everywhere */
ISA INLINE void multiply_tiles(const uint8_t *v, size_t width, const uint8_t *u, uint32_t n4, int32_t *sums, int is_first,
                               const int n) {
    __m512i sum[TOGETHER];
    for (int t = 0; t < n; t++) sum[t] = is_first ? zero_i() : at(sums + 16 * BLOCK * t);
    for (uint32_t k = 0; k < n4; k++, u += 4 * BLOCK) {
        const __m512i w = at(u);
        for (size_t t = 0; t < (size_t)n; t++) {
            int32_t four = MORE * 0x01010101;
            if (v) memcpy(&four, v + t * width + 4 * k, 4);
            sum[t] = _mm512_dpbusd_epi32(sum[t], set_i(four), w);
        }
    }
    for (int t = 0; t < n; t++) put(sums + 16 * BLOCK * t, sum[t]);
}

ISA static int tiles_of(const layer *l, const product *p, const uint8_t *v, size_t width, uint32_t n,
                        int32_t acc[2][2 * TILES][BLOCK]) {
    uint8_t u[16 * U_STEP];
    int32_t sums[TILES + 1][16][BLOCK], start[2][2][BLOCK] = {{{0}}};
    const uint32_t channels = l->v->channels, quadruple = 32 /* bytes of 64 weights */;
    for (uint32_t c = 0, some; c < channels; c += some) {
        some = at_most(CHUNK, channels - c);
        transform_filters((const uint8_t *)p->w + c / 4 * quadruple, p->n4 * quadruple, channels / 4 * quadruple, some, u);
        for (size_t place = 0; place < 16; place++) {
            const uint8_t *from = v + place * (n * width + GAP) + c;
            for (uint32_t t = 0; t < n; t += TOGETHER)
                multiply_tiles(from + t * width, width, u + place * U_STEP, some / 4, sums[t][place], !c, TOGETHER);
            multiply_tiles(NULL, 0, u + place * U_STEP, some / 4, sums[TILES][place], !c, 1);
        }
    }
    transform_outputs(sums[TILES], start, p->shift, acc);
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            const __m512i more = at(acc[i][j]);
            starts(p, start[i][j]);
            put(start[i][j], sub_i(at(start[i][j]), more));
        }
    for (uint32_t t = 0; t < n; t++)
        transform_outputs(sums[t], start, p->shift, (int32_t (*)[2 * TILES][BLOCK])(void *)acc[0][2 * t]);
    return 1;
}

/* What gains: enough channels to make up for the transforms of tiles, enough tiles for those of filters. */
static int serves_tiles(const layer *l) {
    const window *v = l->v;
    const uint32_t n_tiles = (v->out_height + 1) / 2 * ((v->out_width + 1) / 2);
    return l->bits == 4 && !l->odd && largest_input(l->x) <= 15 && v->channels >= 32 && n_tiles >= 16;
}

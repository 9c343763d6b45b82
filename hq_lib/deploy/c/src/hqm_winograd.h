/* 3x3 convolutions of stride 1 in tiles of 2x2 outputs: F(2x2, 3x3) of Lavin & Gray (2015, arXiv:1509.09308, eq. 8 to
 * 12) in whole numbers. With 2G in place of their G, a tile Y of inputs d (4x4) and filters g is
 *
 *     4 Y = A^T [sum over channels (2G g (2G)^T) . (B^T d B)] A,      16 products where windows take 36
 *
 * Sums may wrap around 2^32 on the way, for |4 Y| <= 36 * max|d| * channels * max|g| < 2^31 does not, and so the division
 * by 4 is exact. Filters are transformed anew for each group of tiles, which takes no memory.
 *
 * The file that includes this says what hqm_x86.h wants, and
 *
 *     transformed                numbers that B^T d B and 2G g (2G)^T fit into: int16_t (hqm_winograd_16.h), or bytes of
 *                                the inputs (hqm_winograd_8.h)
 *     add_t sub_t                vectors of them
 *     TOGETHER                   tiles of one multiplication
 */
enum { TILES = 32, CHUNK = 64 /* input channels whose filters are transformed together */, ROOM = 1 << 16 };
enum { GAP = 64 / sizeof(transformed) /* between the 16 places: one line of the cache and no more */ };
enum { U_STEP = CHUNK * BLOCK + GAP, IN_VECTOR = sizeof(vi) / sizeof(transformed) };

/* Offsets (elements) of the rows and columns of a tile's inputs; the places beyond the last count 0. */
typedef struct {
    uint32_t row[4], column[4];
} tile;

/* v: [16][n tiles][width channels] and a GAP */
static void transform_inputs(const uint8_t *x, const tile *tiles, uint32_t n, uint32_t channels, size_t width, transformed *v);
/* Sums of n tiles (a multiple of TOGETHER) of one block of channels, acc[row of the tile][2 * tile + column]. Returns 0 and
 * has done nothing of use where a weight is too large. */
static int tiles_of(const layer *l, const product *p, const transformed *v, size_t width, uint32_t n,
                    int32_t acc[2][2 * TILES][BLOCK]);

/* B^T d, of a column or a row */
ISA INLINE void to_inputs(vi d[4]) {
    const vi d1 = d[1];
    d[0] = sub_t(d[0], d[2]);
    d[1] = add_t(d1, d[2]);
    d[2] = sub_t(d[2], d1);
    d[3] = sub_t(d1, d[3]);
}

/* 2G g */
ISA INLINE void to_filters(const vi g[3], vi u[4]) {
    const vi ends = add_t(g[0], g[2]);
    u[0] = add_t(g[0], g[0]);
    u[1] = add_t(ends, g[1]);
    u[2] = sub_t(ends, g[1]);
    u[3] = add_t(g[2], g[2]);
}

/* A^T m */
ISA INLINE void to_outputs(const vi m[4], vi y[2]) {
    y[0] = add_i(m[0], add_i(m[1], m[2]));
    y[1] = sub_i(sub_i(m[1], m[2]), m[3]);
}

/* acc[i][j] = start[i][j] + (A^T sums A / 4 << shift) */
ISA INLINE void transform_outputs(int32_t sums[16][BLOCK], int32_t start[2][2][BLOCK], uint32_t shift,
                                  int32_t (*acc)[2 * TILES][BLOCK]) {
    for (int h = 0; h < BLOCK; h += LANES) {
        vi rows[2][4], y[2];
        for (int j = 0; j < 4; j++) {
            const vi m[4] = {at(sums[j] + h), at(sums[4 + j] + h), at(sums[8 + j] + h), at(sums[12 + j] + h)};
            to_outputs(m, y);
            rows[0][j] = y[0], rows[1][j] = y[1];
        }
        for (int i = 0; i < 2; i++) {
            to_outputs(rows[i], y);
            for (int j = 0; j < 2; j++)
                put(acc[i][j] + h, add_i(at(start[i][j] + h), shifted(shifted_down(y[j], set_i(2)), shift)));
        }
    }
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
    const uint32_t width = (channels + IN_VECTOR - 1) / IN_VECTOR * IN_VECTOR, most = at_most(TILES, ROOM / 16 / width / TOGETHER * TOGETHER);
    transformed inputs[ROOM + 16 * GAP];
    int32_t acc[2][2 * TILES][BLOCK];
    for (uint32_t first = from, n; first < to; first += n) {
        tile tiles[TILES];
        n = at_most(most, to - first);
        const uint32_t n_whole = (n + TOGETHER - 1) / TOGETHER * TOGETHER;
        for (uint32_t t = 0; t < n_whole; t++) /* the last once more to fill up */
            for (uint32_t i = 0, here = first + at_most(t, n - 1); i < 4; i++) {
                tiles[t].row[i] = at_most(here / n_columns * 2 + i, last_row) * (last_column + 1) * channels;
                tiles[t].column[i] = at_most(here % n_columns * 2 + i, last_column) * channels;
            }
        transform_inputs(l->data, tiles, n_whole, channels, width, inputs);
        product p = l->p;
        p.x = l->data, p.w = l->w, p.column_step = channels;
        for (uint32_t b = 0; b < l->per_group; b += BLOCK) {
            p.start = l->start + b, p.n_out = at_most(BLOCK, l->per_group - b);
            const int is_done = tiles_of(l, &p, inputs, width, n_whole, acc);
            put_tiles(l, p, first, n, n_columns, b, acc, is_done);
            p.w = (const uint8_t *)p.w + (size_t)p.n4 * 3 * 8 * l->bits;
        }
    }
}

/* Depthwise layers of uint8 inputs, WIDE channels at a time, without a padded copy. Of each column of the input what the
 * kernel's rows have is joined channel by channel, two or four rows in an int32, once for all the windows that hold it:
 * then a multiplication takes so many of a window's places at once. Rows and columns outside are the zero point.
 *
 * The file that includes this says what hqm_x86.h wants, and
 *
 *     ROWS_8                     rows joined in an int32 for weights of 4 and 8 bits: 4 as bytes or 2 as 16 bits (of 16 bits: 2)
 *     join(from, rows, v)        v[4]: those of WIDE channels at from[0 .. rows - 1], in their order
 *     signed_weights(w, o, bits) LANES weights from channel o (a multiple of LANES) of w on, as int32
 *     multiply_joined(sum, x, w, rows)   the sum with their products
 *     put_some(to, v, n)         the first n bytes of v
 */
enum { STRIP = 1 << 14 /* bytes of joined columns: half of the nearest cache */, MOST_TAPS = 32 /* joined */ };

/* What a layer's chunk of channels needs. */
typedef struct {
    vi w[MOST_TAPS][4], start[4];
    factor f[4];
    fixed_lanes fixed[4];
    byte_rule rule;
    uint32_t first, n, groups; /* channels; joined rows */
    uint32_t shift;            /* of sums: 0 where weights have it already, as those of 4 bits that it leaves bytes */
} depthwise_chunk;

ISA INLINE vi joined_weights(const layer *l, uint32_t group, uint32_t j, uint32_t channel, uint32_t shift,
                             const uint32_t rows) {
    const uint32_t width = 32 / rows;
    vi all = zero_i();
    for (uint32_t i = 0; i < rows && group * rows + i < l->v->kernel[0]; i++) {
        const uint32_t t = (group * rows + i) * l->v->kernel[1] + j;
        const vi w = shifted(signed_weights(l->w + t * l->p.w_step * l->bits / 8, channel, (int)l->bits), shift);
        all = or_i(all, shifted(and_i(w, set_i((int32_t)(UINT32_MAX >> (32 - width)))), i * width));
    }
    return all;
}

ISA INLINE void chunk_of(const layer *l, uint32_t first, depthwise_chunk *k, const uint32_t rows) {
    int32_t starts[WIDE] = {0};
    float m[WIDE] = {0};
    k->first = first, k->n = at_most(WIDE, l->per_group - first);
    k->groups = (l->v->kernel[0] + rows - 1) / rows;
    k->shift = l->bits == 4 && l->p.shift <= 4 ? 0 : l->p.shift;
    for (uint32_t j = 0; j < l->v->kernel[1]; j++)
        for (uint32_t g = 0; g < k->groups; g++)
            for (uint32_t q = 0; q < 4 && q * LANES < k->n; q++)
                k->w[j * k->groups + g][q] = joined_weights(l, g, j, first + q * LANES, l->p.shift - k->shift, rows);
    memcpy(starts, l->start + first, k->n * sizeof *starts);
    if (l->has_bytes) memcpy(m, l->r.multiplier + first, k->n * sizeof *m);
    for (uint32_t o = 0; o < k->n && l->has_bytes && l->r.is_fixed; o += BLOCK)
        fixed_lanes_of(k->fixed + o / LANES, &l->r, first + o, at_most(BLOCK, k->n - o), 0);
    for (int q = 0; q < 4; q++) {
        k->start[q] = at(starts + q * LANES), k->f[q].m = load_f(m + q * LANES);
        k->f[q].fixed = l->r.is_fixed ? k->fixed + q : NULL;
    }
    k->rule = byte_rule_of(&l->r);
}

/* n columns from `column` of the padded input on, for the windows of output row `row` and of those that share its rows
 * (`together`): to[n][groups][nv] */
ISA INLINE void join_columns(const layer *l, const depthwise_chunk *k, uint32_t row, uint32_t column, uint32_t n, vi *to,
                             const uint32_t together, const int nv, const uint32_t rows) {
    const window *v = l->v;
    const vi outside = rows == 4 ? set_b(l->x->zero) : set_w(l->x->zero);
    const uint32_t left = v->padding[1], width = v->width, groups = k->groups;
    const size_t each = groups * (size_t)nv;
    uint8_t zeros[WIDE];
    put(zeros, set_b(l->x->zero));
    for (uint32_t g = 0; g < groups; g++, to += nv) {
        const uint8_t *from[4];
        size_t step[4];
        uint32_t c = 0;
        for (uint32_t i = 0; i < rows; i++) {
            const uint32_t y = row * v->stride[0] + (g * rows + i) * v->dilation[0];
            const uint32_t x = column > left ? column - left : 0, above = v->padding[0];
            const int inside = g * rows + i < v->kernel[0] + together - 1 && y >= above && y - above < v->height;
            step[i] = inside ? v->channels : 0;
            from[i] = inside ? l->data + ((size_t)(y - above) * width + x) * v->channels + k->first : zeros;
        }
        for (; c < n && column + c < left; c++)
            for (int q = 0; q < nv; q++) to[c * each + (size_t)q] = outside;
        for (; c < n && column + c - left < width; c++) {
            vi all[4];
            join(from, rows, all);
            for (uint32_t i = 0; i < rows; i++) from[i] += step[i];
            for (int q = 0; q < nv; q++) to[c * each + (size_t)q] = all[q];
        }
        for (; c < n; c++)
            for (int q = 0; q < nv; q++) to[c * each + (size_t)q] = outside;
    }
}

/* n outputs side by side, from `place` on, of joined columns from x on; kw, groups: of the kernel, whose rows begin `late`
 * bytes behind the joined ones (a kernel of three joined places alone) */
ISA INLINE void some_places(const layer *l, const depthwise_chunk *k, const vi *x, uint32_t n, size_t place, uint32_t late,
                            const uint32_t kw, const uint32_t groups, const int nv, const uint32_t rows) {
    const size_t each = groups * (size_t)nv, apart = l->v->dilation[1] * each, c_out = l->per_group;
    const byte_rule rule = k->rule;
    const factor f[4] = {k->f[0], k->f[1], k->f[2], k->f[3]};
    int32_t acc[WIDE / BLOCK][TILE][BLOCK];
    vi near[3][4]; /* a kernel of three joined places: in registers, whatever is written */
    for (uint32_t j = 0; j < kw * groups && kw * groups == 3; j++)
        for (int q = 0; q < nv; q++) near[j][q] = shifted(k->w[j][q], 8 * late);
    for (uint32_t c = 0; c < n; c++, x += l->v->stride[1] * each) {
        vi sum[4];
        for (int q = 0; q < nv; q++) sum[q] = k->shift ? zero_i() : k->start[q];
        for (uint32_t j = 0; j < kw; j++)
            for (uint32_t g = 0; g < groups; g++)
                for (int q = 0; q < nv; q++) {
                    const vi w = kw * groups == 3 ? near[j * groups + g][q] : k->w[j * groups + g][q];
                    sum[q] = multiply_joined(sum[q], x[j * apart + g * (uint32_t)nv + (uint32_t)q], w, rows);
                }
        for (int q = 0; q < nv && k->shift; q++) sum[q] = add_i(k->start[q], shifted(sum[q], k->shift));
        if (l->has_bytes) {
            const vi all[4] = {sum[0], sum[1 % nv], sum[2 % nv], sum[3 % nv]};
            put_some(l->y->data + (place + c) * c_out + k->first, bytes_of(all, f, &rule), k->n);
        } else
            for (int q = 0; q < nv; q++) put(acc[q / PARTS][c] + q % PARTS * LANES, sum[q]);
    }
    for (uint32_t o = 0; o < k->n && !l->has_bytes; o += BLOCK)
        put_places(l, acc[o / BLOCK], n, k->first + o, at_most(BLOCK, k->n - o), place);
}

ISA INLINE void chunk_rows(const layer *l, const depthwise_chunk *k, uint32_t from, uint32_t to, const int nv,
                           const uint32_t rows) {
    const window *v = l->v;
    const uint32_t kw = v->kernel[1], step = v->stride[1], each = k->groups * (uint32_t)nv;
    const uint32_t before = (kw - 1) * v->dilation[1];
    const uint32_t most = at_most(TILE, (STRIP / sizeof(vi) / each - before - 1) / step + 1);
    /* three rows leave room for those of the next outputs */
    const int is_3x3 = kw == 3 && v->kernel[0] == 3 && v->stride[0] == 1 && v->dilation[0] == 1;
    const uint32_t together = rows == 4 && is_3x3 ? 2 : 1;
    vi joined[STRIP / sizeof(vi)];
    for (uint32_t row = from; row < to; row += together)
        for (uint32_t c = 0, n; c < v->out_width; c += n) {
            const size_t place = (size_t)row * v->out_width + c;
            n = at_most(most, v->out_width - c);
            join_columns(l, k, row, c * step, (n - 1) * step + before + 1, joined, together, nv, rows);
            for (uint32_t i = 0; i < at_most(together, to - row); i++) {
                if (kw == 3 && k->groups == 1) some_places(l, k, joined, n, place + i * v->out_width, i, 3, 1, nv, rows);
                else some_places(l, k, joined, n, place, 0, kw, k->groups, nv, rows);
            }
        }
}

ISA INLINE void some_rows(const layer *l, uint32_t from, uint32_t to, const uint32_t rows) {
    depthwise_chunk k;
    for (uint32_t first = 0; first < l->per_group; first += WIDE) {
        chunk_of(l, first, &k, rows);
        if (k.n <= LANES) chunk_rows(l, &k, from, to, 1, rows);
        else if (k.n <= 2 * LANES) chunk_rows(l, &k, from, to, 2, rows);
        else chunk_rows(l, &k, from, to, 4, rows);
    }
}

ISA static void run_depthwise(const void *context, uint32_t part, uint32_t n_parts) {
    const layer *l = context;
    const uint64_t n = l->v->out_height;
    const uint32_t from = (uint32_t)(n * part / n_parts), to = (uint32_t)(n * (part + 1) / n_parts);
    if (l->bits < 16) some_rows(l, from, to, ROWS_8);
    else some_rows(l, from, to, 2);
}

/* Whether windows of this size are served: larger ones go place by place. */
static int joins(const window *v) {
    const uint32_t groups = (v->kernel[0] + 1) / 2; /* the most of any weights */
    return v->kernel[1] * groups <= MOST_TAPS && (v->kernel[1] - 1) * v->dilation[1] < STRIP / sizeof(vi) / 4 / groups;
}

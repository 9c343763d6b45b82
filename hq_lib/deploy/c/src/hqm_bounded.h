/* 8-bit weights in vpmaddubsw, which adds pairs of products into 16 bits and saturates: twice the products of vpmaddwd
 * in an instruction, and exact as long as no sum leaves 16 bits. What the inputs of a tile hold says how long that is:
 *
 *     sum w x = sum w low + sum w x',     low_k = the least x_k of the tile's places,  0 <= x'_k = x_k - low_k <= range_k
 *
 * and the second sum lies between the sums of range_k min(w_k, 0) and of range_k max(w_k, 0). Before one of these could
 * reach an end of int16 the sum is added to one of 32 bits; a quadruple that could reach it alone goes in two halves of
 * its weights, |w| <= 64, of which 255 * 128 < 2^15 is the most. So inputs change the time, and never a bit.
 *
 * The file that includes this says what hqm_x86.h wants.
 */
enum { LONGEST = 1024 /* bytes of a window */, FEWEST = 32 /* places that make up for the bounds */ };

/* Quadruples of inputs in the order in which they are multiplied, and how many go into each 16-bit sum. */
typedef struct {
    const uint8_t *w[LONGEST / 2];                /* the 64 weights */
    uint16_t at[LONGEST / 2], end[LONGEST / 2];   /* where its inputs lie in a window; behind the last one of each sum */
    uint32_t n, n_sums;
    uint8_t halves[LONGEST / 2][4 * BLOCK];
} schedule;

/* Windows side by side, x[place][width], less low; range: what is then left at most. */
ISA static void gather(const product *p, size_t width, uint8_t *x, uint8_t *low, uint8_t *range) {
    for (uint32_t q = 0; q < p->n_places; q++) {
        uint8_t *to = x + q * width;
        for (uint32_t i = 0; i < p->n_rows; i++)
            for (uint32_t j = 0; j < p->n_columns; j++, to += 4 * p->n4) {
                const uint8_t *from = (const uint8_t *)p->x + p->at[q] + i * p->row_step + j * p->column_step;
                for (uint32_t k = 0; k < 4 * p->n4; k += 32) put(to + k, at(from + k));
            }
    }
    for (size_t k = 0; k < width; k += 32) {
        __m256i least = at(x + k), most = least;
        for (uint32_t q = 1; q < p->n_places; q++) {
            least = _mm256_min_epu8(least, at(x + q * width + k));
            most = _mm256_max_epu8(most, at(x + q * width + k));
        }
        for (uint32_t q = 0; q < p->n_places; q++)
            put(x + q * width + k, _mm256_sub_epi8(at(x + q * width + k), least));
        put(low + k, least), put(range + k, _mm256_sub_epi8(most, least));
    }
}

/* Bounds of the sums of 16 channels, or of one quadruple's products; each saturates at an end of int16. */
typedef struct {
    __m256i up[PARTS], down[PARTS];
} bounds;

ISA INLINE int reach_an_end(const bounds *b) {
    __m256i found = zero_i();
    for (int h = 0; h < PARTS; h++) {
        found = _mm256_or_si256(found, _mm256_cmpeq_epi16(b->up[h], _mm256_set1_epi16(INT16_MAX)));
        found = _mm256_or_si256(found, _mm256_cmpeq_epi16(b->down[h], _mm256_set1_epi16(INT16_MIN)));
    }
    return !_mm256_testz_si256(found, found);
}

ISA INLINE void append(schedule *s, const uint8_t *w, uint32_t k) { s->w[s->n] = w, s->at[s->n++] = (uint16_t)(4 * k); }
ISA INLINE void end_sum(schedule *s) { s->end[s->n_sums++] = (uint16_t)s->n; }

ISA static void schedule_of(const uint8_t *w, const uint8_t *range, uint32_t n4, schedule *s) {
    bounds all, one;
    s->n = s->n_sums = 0;
    for (int h = 0; h < PARTS; h++) all.up[h] = all.down[h] = zero_i();
    for (uint32_t k = 0; k < n4; k++, w += 4 * BLOCK) {
        int32_t four;
        memcpy(&four, range + 4 * k, 4);
        for (int h = 0; h < PARTS; h++) {
            one.up[h] = _mm256_maddubs_epi16(set_i(four), _mm256_max_epi8(at(w + 32 * h), zero_i()));
            one.down[h] = _mm256_maddubs_epi16(set_i(four), _mm256_min_epi8(at(w + 32 * h), zero_i()));
            all.up[h] = _mm256_adds_epi16(all.up[h], one.up[h]);
            all.down[h] = _mm256_adds_epi16(all.down[h], one.down[h]);
        }
        if (!reach_an_end(&all)) {
            append(s, w, k);
            continue;
        }
        if (s->n) end_sum(s);
        all = one;
        if (!reach_an_end(&one)) {
            append(s, w, k);
            continue;
        }
        for (int h = 0; h < PARTS; h++) { /* floor(w / 2), from a mean of unsigned bytes, and the rest */
            const __m256i whole = at(w + 32 * h), flip = _mm256_set1_epi8(-128);
            const __m256i mean = _mm256_avg_epu8(_mm256_xor_si256(whole, flip), _mm256_set1_epi8(127));
            put(s->halves[s->n] + 32 * h, _mm256_xor_si256(mean, flip));
            put(s->halves[s->n + 1] + 32 * h, _mm256_sub_epi8(whole, _mm256_xor_si256(mean, flip)));
        }
        append(s, s->halves[s->n], k);
        end_sum(s);
        append(s, s->halves[s->n], k); /* `all` is at an end still: nothing joins the second half */
    }
    end_sum(s);
}

ISA INLINE void bounded_n(const uint8_t *x, size_t width, const schedule *s, const int32_t *start, int32_t (*acc)[BLOCK],
                          const int n) {
    for (uint32_t g = 0, i = 0; g < s->n_sums; g++) {
        __m256i sum[MANY][PARTS];
        for (int q = 0; q < n; q++)
            for (int h = 0; h < PARTS; h++) sum[q][h] = zero_i();
        for (; i < s->end[g]; i++) {
            const __m256i w[PARTS] = {at(s->w[i]), at(s->w[i] + 32)};
            for (size_t q = 0; q < (size_t)n; q++) {
                int32_t four;
                memcpy(&four, x + q * width + s->at[i], 4);
                for (int h = 0; h < PARTS; h++) {
                    sum[q][h] = _mm256_add_epi16(sum[q][h], _mm256_maddubs_epi16(set_i(four), w[h]));
                    __asm__ volatile("" : "+x"(sum[q][h])); /* in this order: others spill registers */
                }
            }
        }
        for (int q = 0; q < n; q++)
            for (int h = 0; h < PARTS; h++) {
                const int32_t *before = g ? acc[q] : start;
                put(acc[q] + LANES * h, widened(sum[q][h], before + LANES * h, 0));
            }
    }
}

/* A tile's outputs, or 0 where vpmaddwd serves it better: few places, windows of short runs or very long ones. */
ISA static int run_bounded(const layer *l, product p, size_t place, uint32_t row) {
    const uint32_t n4 = p.n_rows * p.n_columns * p.n4, nowhere = 0;
    const size_t width = ((size_t)n4 * 4 + 31) / 32 * 32, run = (size_t)p.n4 * 4 * BLOCK * p.n_columns;
    uint8_t x[TILE * LONGEST + 32], low[LONGEST], range[LONGEST];
    int32_t acc[TILE][BLOCK], start[1][BLOCK];
    schedule s;
    if (l->bits != 8 || l->x->size > 1 || l->depthwise || l->groups > 1 || p.shift) return 0;
    if (p.n_places < FEWEST || p.n4 < 4 || width > LONGEST) return 0;
    p.x = l->data + row * p.row_step, p.w = l->w + row * run;
    gather(&p, width, x, low, range);
    for (uint32_t b = 0; b < l->per_group; b += BLOCK, p.w = (const uint8_t *)p.w + run * l->v->kernel[0]) {
        p.start = l->start + b, p.n_out = at_most(BLOCK, l->per_group - b);
        product least = p;
        least.x = low, least.n_rows = least.n_columns = 1, least.n4 = n4;
        starts(&p, start[0]);
        dense_n(&least, &nowhere, start[0], start, 1, 8);
        schedule_of(p.w, range, n4, &s);
        uint32_t q = 0;
        for (; q + MANY <= p.n_places; q += MANY) bounded_n(x + q * width, width, &s, start[0], acc + q, MANY);
        for (; q < p.n_places; q++) bounded_n(x + q * width, width, &s, start[0], acc + q, 1);
        put_places(l, acc, p.n_places, b, p.n_out, place);
    }
    return 1;
}

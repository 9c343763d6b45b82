/* Tiles whose bytes come out of the registers that hold their sums, for processors with VNNI: no residual, weights
 * of 4 or 8 bits. Eight or four places go by a block of channels; the one, two or three that are left by four
 * blocks, so that there are enough sums side by side. The file that includes this says what hqm_x86.h wants.
 */
/* n values from `from` on, 0 behind them */
ISA INLINE __m512i some_i(const void *from, uint32_t n) {
    return n >= BLOCK ? at(from) : _mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), from);
}

#ifdef HQM_EMULATED
#define KEEP(v) ((void)(v))
#else
#define KEEP(v) __asm__("" : "+v"(v)) /* in this register: gcc 12 moves sums around in the loop */
#endif
#define UP_TO_8(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)

/* Outputs of the places from `from` to `to`, n of them (4 or 8) at a time; y: of the first, `channels` of a block. */
ISA INLINE void by_places(const layer *l, const product *p, uint32_t from, uint32_t to, __m512i start, factor f, uint8_t *y,
                          uint32_t channels, const int n, const int bits) {
    const size_t c_out = (size_t)l->groups * l->per_group, row_step = p->row_step, column_step = p->column_step;
    const uint32_t n_rows = p->n_rows, n_columns = p->n_columns, shift = p->shift;
    const size_t run = 4 * (size_t)p->n4;
    const factor all_f[4] = {f, f, f, f};
    const __mmask16 some = (__mmask16)((1u << channels) - 1);
    const byte_rule rule = byte_rule_of(&l->r);
    for (; from < to; from += (uint32_t)n) {
        const uint32_t *place = p->at + from;
        const uint8_t *weights = p->w;
#define BEGIN(q)                                                                                                       \
    const size_t o##q = q < n ? place[q % n] : 0;                                                                      \
    __m512i s##q = shift ? zero_i() : start;
        UP_TO_8(BEGIN)
        for (uint32_t i = 0; i < n_rows; i++)
            for (uint32_t j = 0; j < n_columns; j++) {
                const uint8_t *x = (const uint8_t *)p->x + i * row_step + j * column_step, *end = x + run;
                for (; x < end; x += 4, weights += 8 * bits) {
                    __m512i w[2][1];
                    unpacked(weights, bits, w);
#define MULTIPLY(q)                                                                                                    \
    if (q < n) {                                                                                                       \
        int32_t four;                                                                                                  \
        memcpy(&four, x + o##q, 4);                                                                                    \
        s##q = _mm512_dpbusd_epi32(s##q, set_i(four), w[0][0]);                                                        \
        KEEP(s##q);                                                                                                    \
    }
                    UP_TO_8(MULTIPLY)
                }
            }
#define SHIFT(q) s##q = add_i(start, shifted(s##q, shift));
        if (shift) { UP_TO_8(SHIFT) }
        const __m512i sums[2][4] = {{s0, s1, s2, s3}, {s4, s5, s6, s7}};
        for (int h = 0; h < n / 4; h++) {
            const __m512i bytes = bytes_of(sums[h], all_f, &rule);
#define STORE(k)                                                                                                       \
    if (channels == BLOCK) _mm_storeu_si128((__m128i *)(void *)y, _mm512_extracti32x4_epi32(bytes, k));                \
    else _mm_mask_storeu_epi8(y, some, _mm512_extracti32x4_epi32(bytes, k));                                           \
    y += c_out;
            STORE(0) STORE(1) STORE(2) STORE(3)
        }
    }
}

/* Outputs of n places (1 or 2) and four blocks, which begin at p->w + apart[block]. */
ISA INLINE void by_blocks(const layer *l, const product *p, uint32_t first, const size_t apart[4], const __m512i start[4],
                          const factor f[4], uint8_t *y, uint32_t channels, const int n, const int bits) {
    const byte_rule rule = byte_rule_of(&l->r);
    const uint8_t *weights = p->w;
    __m512i sum[2][4], w[2][1];
    for (int q = 0; q < n; q++)
        for (int b = 0; b < 4; b++) sum[q][b] = p->shift ? zero_i() : start[b];
    for (uint32_t i = 0; i < p->n_rows; i++)
        for (uint32_t j = 0; j < p->n_columns; j++) {
            const uint8_t *x = (const uint8_t *)p->x + i * p->row_step + j * p->column_step;
            for (uint32_t k = 0; k < p->n4; k++, x += 4, weights += 8 * bits) {
                int32_t four[2];
                for (int q = 0; q < n; q++) memcpy(four + q, x + p->at[first + (uint32_t)q], 4);
                for (int b = 0; b < 4; b++) {
                    unpacked(weights + apart[b], bits, w);
                    for (int q = 0; q < n; q++) sum[q][b] = _mm512_dpbusd_epi32(sum[q][b], set_i(four[q]), w[0][0]);
                }
            }
        }
    for (int q = 0; q < n; q++, y += (size_t)l->groups * l->per_group) {
        for (int b = 0; b < 4 && p->shift; b++) sum[q][b] = add_i(start[b], shifted(sum[q][b], p->shift));
        put_some(y, bytes_of(sum[q], f, &rule), channels);
    }
}

/* Functions of their own, each with the registers of one. */
#define ALONE ISA static __attribute__((noinline))
typedef void some_places_kernel(const layer *l, const product *p, uint32_t from, uint32_t to, __m512i start, factor f,
                                uint8_t *y, uint32_t channels);
typedef void few_places_kernel(const layer *l, const product *p, uint32_t place, const size_t apart[4],
                               const __m512i start[4], const factor f[4], uint8_t *y, uint32_t channels);
#define PLACES(N, BITS)                                                                                                \
    ALONE void places_##N##_##BITS(const layer *l, const product *p, uint32_t from, uint32_t to, __m512i start,        \
                                   factor f, uint8_t *y, uint32_t channels) {                                          \
        by_places(l, p, from, to, start, f, y, channels, N, BITS);                                                     \
    }
#define FEW(N, BITS)                                                                                                   \
    ALONE void few_##N##_##BITS(const layer *l, const product *p, uint32_t place, const size_t apart[4],               \
                                const __m512i start[4], const factor f[4], uint8_t *y, uint32_t channels) {            \
        by_blocks(l, p, place, apart, start, f, y, channels, N, BITS);                                                 \
    }
PLACES(8, 4)
PLACES(8, 8)
PLACES(4, 4)
PLACES(4, 8)
FEW(2, 4)
FEW(2, 8)
FEW(1, 4)
FEW(1, 8)

enum { ROOM_8 = 256 /* quadruples of a block's weights */, ENOUGH = 32 /* places that make up for unpacking them first */ };

/* A group's outputs: eight or four places at a time by a block, those left over by four blocks. */
ISA static void group_at_once(const layer *l, product p, uint32_t first, size_t place, size_t block) {
    some_places_kernel *const eights = l->bits == 4 ? places_8_4 : places_8_8;
    some_places_kernel *const fours = l->bits == 4 ? places_4_4 : places_4_8;
    few_places_kernel *const two = l->bits == 4 ? few_2_4 : few_2_8, *const one = l->bits == 4 ? few_1_4 : few_1_8;
    const uint32_t eight = p.n_places / 8 * 8, whole = p.n_places / 4 * 4;
    const size_t c_out = (size_t)l->groups * l->per_group;
    const size_t n_quads = (size_t)p.n_rows * p.n_columns * p.n4;
    const int unpacks = l->bits == 4 && p.n_places >= ENOUGH && n_quads <= ROOM_8;
    const uint8_t *weights = p.w;
    uint8_t *y = l->y->data + place * c_out + first;
    __m512i bytes[ROOM_8];
    for (uint32_t b = 0; b < l->per_group; b += 4 * BLOCK) {
        const uint32_t left = l->per_group - b, n = at_most(4 * BLOCK, left);
        size_t apart[4];
        __m512i start[4];
        fixed_lanes fixed[4];
        factor f[4];
        for (uint32_t k = 0; k < 4; k++) { /* blocks beyond the last are the last again, and not written */
            const uint32_t here = at_most(k, (left - 1) / BLOCK), channel = first + b + here * BLOCK;
            apart[k] = here * block;
            start[k] = some_i(l->start + channel, left - here * BLOCK);
            f[k].m = _mm512_castsi512_ps(some_i(l->r.multiplier + channel, left - here * BLOCK));
            f[k].fixed = l->r.is_fixed ? fixed + k : NULL;
            if (l->r.is_fixed) fixed_lanes_of(fixed + k, &l->r, channel, at_most(BLOCK, left - here * BLOCK), 0);
        }
        for (uint32_t k = 0; k < 4 && k * BLOCK < left && whole; k++) {
            const uint32_t channels = at_most(BLOCK, left - k * BLOCK);
            uint8_t *to = y + b + k * BLOCK;
            p.w = weights + (b / BLOCK + k) * block;
            for (size_t i = 0; i < n_quads && unpacks; i++) {
                __m512i w[2][1];
                unpacked((const uint8_t *)p.w + 2 * BLOCK * i, 4, w);
                bytes[i] = w[0][0];
            }
            if (unpacks) {
                p.w = bytes;
                places_8_8(l, &p, 0, eight, start[k], f[k], to, channels);
                p.w = weights + (b / BLOCK + k) * block;
            } else eights(l, &p, 0, eight, start[k], f[k], to, channels);
            fours(l, &p, eight, whole, start[k], f[k], to + eight * c_out, channels);
        }
        p.w = weights + b / BLOCK * block;
        if (whole + 2 <= p.n_places) two(l, &p, whole, apart, start, f, y + b + whole * c_out, n);
        if (p.n_places % 2) one(l, &p, p.n_places - 1, apart, start, f, y + b + (p.n_places - 1) * c_out, n);
    }
}

/* A tile whose bytes come out of registers, or 0. */
ISA static int run_at_once(const layer *l, product p, size_t place, uint32_t row) {
    const size_t run = (size_t)p.n4 * 4 * BLOCK * p.n_columns * l->bits / 8, block = run * l->v->kernel[0];
    const uint32_t n_blocks = (l->per_group + BLOCK - 1) / BLOCK;
    if (l->x->size > 1 || l->bits > 8 || l->depthwise || !l->has_bytes) return 0;
    for (uint32_t g = 0; g < l->groups; g++) {
        p.w = l->w + row * run + g * n_blocks * block, p.x = l->data + row * p.row_step + g * l->c_group;
        group_at_once(l, p, g * l->per_group, place, block);
    }
    return 1;
}

/* Tiles whose bytes come out of the registers that hold their sums, for processors with VNNI: no residual, weights
 * of 4, 8 or (bits = 9) 2 q + 1 of 8 bits. Eight or four places go by a block of channels; the one, two or three that
 * are left by four blocks, so that there are enough sums side by side. The file that includes this says what hqm_x86.h
 * wants, and nibbles(from): 64 of them as bytes, in the weights' order.
 */
/* What a tile's sums need beside inputs and weights. */
typedef struct {
    __m512i byte_of;       /* the weight that each nibble stands for, four times */
    int32_t extra[TILE];   /* bits = 9: what a place adds to every channel */
} weight_rule;

/* The 64 weights of four inputs as bytes. */
ISA INLINE __m512i weights_at(const uint8_t *from, const weight_rule *rule, const int bits) {
    return bits > 4 ? at(from) : _mm512_shuffle_epi8(rule->byte_of, nibbles(from));
}
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

/* Outputs of the places from `from` to `to`, n of them (4 or 8) at a time; y: of the first, `channels` of a block;
 * is_run: windows of one run alone, as those of 1x1. */
ISA INLINE void by_places(const layer *l, const product *p, uint32_t from, uint32_t to, __m512i start, factor f, uint8_t *y,
                          uint32_t channels, const weight_rule *of, const int n, const int bits, const int is_run) {
    const size_t c_out = (size_t)l->groups * l->per_group, row_step = p->row_step, column_step = p->column_step;
    const uint32_t n_rows = is_run ? 1 : p->n_rows, n_columns = is_run ? 1 : p->n_columns;
    const int step = bits == 4 ? 32 : 64;
    const size_t run = 4 * (size_t)p->n4;
    const factor all_f[4] = {f, f, f, f};
    const __mmask16 some = (__mmask16)((1u << channels) - 1);
    const byte_rule rule = byte_rule_of(&l->r);
    for (; from < to; from += (uint32_t)n) {
        const uint32_t *place = p->at + from;
        const uint8_t *weights = p->w;
#define BEGIN(q)                                                                                                       \
    const size_t o##q = q < n ? place[q % n] : 0;                                                                      \
    __m512i s##q = bits == 9 ? zero_i() : start;
        UP_TO_8(BEGIN)
        for (uint32_t i = 0; i < n_rows; i++)
            for (uint32_t j = 0; j < n_columns; j++) {
                const uint8_t *x = (const uint8_t *)p->x + i * row_step + j * column_step, *end = x + run;
                for (; x < end; x += 4, weights += step) {
                    const __m512i w = weights_at(weights, of, bits);
#define MULTIPLY(q)                                                                                                    \
    if (q < n) {                                                                                                       \
        int32_t four;                                                                                                  \
        memcpy(&four, x + o##q, 4);                                                                                    \
        s##q = _mm512_dpbusd_epi32(s##q, set_i(four), w);                                                              \
        KEEP(s##q);                                                                                                    \
    }
                    UP_TO_8(MULTIPLY)
                }
            }
#define WHOLE(q) s##q = add_i(add_i(start, set_i(of->extra[from + q % n])), shifted(s##q, p->shift));
        if (bits == 9) { UP_TO_8(WHOLE) }
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
                          const factor f[4], uint8_t *y, uint32_t channels, const weight_rule *of, const int n,
                          const int bits) {
    const byte_rule rule = byte_rule_of(&l->r);
    const uint8_t *weights = p->w;
    const int step = bits == 4 ? 32 : 64;
    __m512i sum[2][4];
    for (int q = 0; q < n; q++)
        for (int b = 0; b < 4; b++) sum[q][b] = bits == 9 ? zero_i() : start[b];
    for (uint32_t i = 0; i < p->n_rows; i++)
        for (uint32_t j = 0; j < p->n_columns; j++) {
            const uint8_t *x = (const uint8_t *)p->x + i * p->row_step + j * p->column_step;
            for (uint32_t k = 0; k < p->n4; k++, x += 4, weights += step) {
                int32_t four[2];
                for (int q = 0; q < n; q++) memcpy(four + q, x + p->at[first + (uint32_t)q], 4);
                for (int b = 0; b < 4; b++) {
                    const __m512i w = weights_at(weights + apart[b], of, bits);
                    for (int q = 0; q < n; q++) sum[q][b] = _mm512_dpbusd_epi32(sum[q][b], set_i(four[q]), w);
                }
            }
        }
    for (int q = 0; q < n; q++, y += (size_t)l->groups * l->per_group) {
        const __m512i extra = set_i(bits == 9 ? of->extra[first + (uint32_t)q] : 0);
        for (int b = 0; b < 4 && bits == 9; b++) sum[q][b] = add_i(add_i(start[b], extra), shifted(sum[q][b], p->shift));
        put_some(y, bytes_of(sum[q], f, &rule), channels);
    }
}

/* Functions of their own, each with the registers of one. */
#define ALONE ISA static __attribute__((noinline))
typedef void some_places_kernel(const layer *l, const product *p, uint32_t from, uint32_t to, __m512i start, factor f,
                                uint8_t *y, uint32_t channels, const weight_rule *of);
typedef void few_places_kernel(const layer *l, const product *p, uint32_t place, const size_t apart[4],
                               const __m512i start[4], const factor f[4], uint8_t *y, uint32_t channels,
                               const weight_rule *of);
#define PLACES(NAME, N, BITS, IS_RUN)                                                                                  \
    ALONE void NAME(const layer *l, const product *p, uint32_t from, uint32_t to, __m512i start,        \
                                   factor f, uint8_t *y, uint32_t channels, const weight_rule *of) {                   \
        by_places(l, p, from, to, start, f, y, channels, of, N, BITS, IS_RUN);                                         \
    }
#define FEW(N, BITS)                                                                                                   \
    ALONE void few_##N##_##BITS(const layer *l, const product *p, uint32_t place, const size_t apart[4],               \
                                const __m512i start[4], const factor f[4], uint8_t *y, uint32_t channels,              \
                                const weight_rule *of) {                                                               \
        by_blocks(l, p, place, apart, start, f, y, channels, of, N, BITS);                                             \
    }
PLACES(places_8_4, 8, 4, 0)
PLACES(places_8_8, 8, 8, 0)
PLACES(places_8_9, 8, 9, 0)
PLACES(places_4_4, 4, 4, 0)
PLACES(places_4_8, 4, 8, 0)
PLACES(places_4_9, 4, 9, 0)
PLACES(places_of_a_run, 8, 8, 1)
FEW(2, 4)
FEW(2, 8)
FEW(2, 9)
FEW(1, 4)
FEW(1, 8)
FEW(1, 9)
/* by their weights: nibbles, bytes, 2 q + 1 of bytes */
static some_places_kernel *const eights[3] = {places_8_4, places_8_8, places_8_9};
static some_places_kernel *const fours[3] = {places_4_4, places_4_8, places_4_9};
static few_places_kernel *const twos[3] = {few_2_4, few_2_8, few_2_9}, *const ones[3] = {few_1_4, few_1_8, few_1_9};

enum { ROOM_8 = 320 /* quadruples of a block's weights */, ENOUGH = 32 /* places that make up for unpacking them first */ };

/* A group's outputs: eight or four places at a time by a block, those left over by four blocks. */
ISA static void group_at_once(const layer *l, product p, uint32_t first, size_t place, size_t block,
                              const weight_rule *of) {
    const uint32_t kind = l->bits == 4 ? 0 : 1 + l->odd;
    some_places_kernel *const bytes_by_eight = p.n_rows * p.n_columns == 1 ? places_of_a_run : places_8_8;
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
            for (size_t i = 0; i < n_quads && unpacks; i++) bytes[i] = weights_at((const uint8_t *)p.w + 2 * BLOCK * i, of, 4);
            if (unpacks) p.w = bytes;
            some_places_kernel *const by_eight = unpacks || kind == 1 ? bytes_by_eight : eights[kind];
            by_eight(l, &p, 0, eight, start[k], f[k], to, channels, of);
            fours[unpacks ? 1 : kind](l, &p, eight, whole, start[k], f[k], to + eight * c_out, channels, of);
        }
        p.w = weights + b / BLOCK * block;
        if (whole + 2 <= p.n_places) twos[kind](l, &p, whole, apart, start, f, y + b + whole * c_out, n, of);
        if (p.n_places % 2) ones[kind](l, &p, p.n_places - 1, apart, start, f, y + b + (p.n_places - 1) * c_out, n, of);
    }
}

/* What each nibble stands for, or 0 where that is no byte. */
ISA INLINE int bytes_of_nibbles(const layer *l, const product *p, weight_rule *of) {
    int8_t each[64];
    for (int i = 0; i < 16; i++) {
        const int w = (2 * (i - 8) + (int)l->odd) * (1 << p->shift) / 2;
        if (w < INT8_MIN || w > INT8_MAX) return 0;
        each[i] = each[i + 16] = each[i + 32] = each[i + 48] = (int8_t)w;
    }
    of->byte_of = at(each);
    return 1;
}

/* What weights of 2 q + 1 have beyond 2 q: the sums of the places' inputs in the weights' step, of four places at a time. */
ISA static void extra_of(const product *p, weight_rule *of) {
    static const uint8_t ones[32] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const uint32_t last = p->n_places - 1, run = 4 * p->n4;
    const __m128i tail = at_128(ones + (16 - run % 16) % 16), one = at_128(ones);
    for (uint32_t q = 0; q <= last; q += 4) {
        const uint32_t *place = p->at + q;
        const size_t o0 = place[0], o1 = p->at[at_most(q + 1, last)], o2 = p->at[at_most(q + 2, last)];
        const size_t o3 = p->at[at_most(q + 3, last)];
        __m128i s0 = _mm_setzero_si128(), s1 = s0, s2 = s0, s3 = s0;
        for (uint32_t i = 0; i < p->n_rows; i++)
            for (uint32_t j = 0; j < p->n_columns; j++) {
                const uint8_t *x = (const uint8_t *)p->x + i * p->row_step + j * p->column_step, *end = x + run;
                for (; x < end; x += 16) {
                    const __m128i here = end - x > 16 ? one : tail;
                    s0 = _mm_dpbusd_epi32(s0, at_128(x + o0), here), s1 = _mm_dpbusd_epi32(s1, at_128(x + o1), here);
                    s2 = _mm_dpbusd_epi32(s2, at_128(x + o2), here), s3 = _mm_dpbusd_epi32(s3, at_128(x + o3), here);
                }
            }
        const __m128i all = _mm_hadd_epi32(_mm_hadd_epi32(s0, s1), _mm_hadd_epi32(s2, s3));
        const __m128i shift = _mm_cvtsi32_si128((int)p->shift - 1);
        _mm_storeu_si128((__m128i *)(void *)(of->extra + q), _mm_sll_epi32(all, shift));
    }
}

/* A tile whose bytes come out of registers, or 0. */
ISA static int run_at_once(const layer *l, product p, size_t place, uint32_t row) {
    const size_t run = (size_t)p.n4 * 4 * BLOCK * p.n_columns * l->bits / 8, block = run * l->v->kernel[0];
    const uint32_t n_blocks = (l->per_group + BLOCK - 1) / BLOCK;
    weight_rule of;
    if (l->x->size > 1 || l->bits > 8 || l->depthwise || !l->has_bytes) return 0;
    if (l->bits == 4 ? !bytes_of_nibbles(l, &p, &of) : !l->odd && p.shift) return 0;
    for (uint32_t g = 0; g < l->groups; g++) {
        p.w = l->w + row * run + g * n_blocks * block, p.x = l->data + row * p.row_step + g * l->c_group;
        if (l->odd && l->bits == 8) extra_of(&p, &of);
        group_at_once(l, p, g * l->per_group, place, block, &of);
    }
    return 1;
}

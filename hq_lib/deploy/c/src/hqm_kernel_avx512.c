/* Kernels for x86-64 with AVX-512 (F, BW, VL) and VNNI: vpdpbusd adds u8 x s8 quadruples to 32-bit lanes without
 * saturation, vpdpwssd pairs of 16 bits; lane o is output channel o. Attributes say what each function is compiled for.
 */
#include "hqm_kernel.h"

#ifdef HQM_X86
#ifdef HQM_EMULATED /* a test replaces each instruction by plain C */
#define ISA
#else
#define ISA __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#endif

#define LANES 16
#define V(name) avx512_##name
#define vi __m512i
#define vf __m512
#define load_i(p) at(p)
#define load_f(p) _mm512_loadu_ps(p)
#define set_i(x) _mm512_set1_epi32(x)
#define set_f(x) _mm512_set1_ps(x)
#define wide(p) _mm512_cvtepu8_epi32(at_128(p))
#define to_f(q) _mm512_cvtepi32_ps(q)
#define to_i(y) _mm512_cvtps_epi32(y)
#define add_i(a, b) _mm512_add_epi32(a, b)
#define sub_i(a, b) _mm512_sub_epi32(a, b)
#define mul_f(a, b) _mm512_mul_ps(a, b)
#define add_f(a, b) _mm512_add_ps(a, b)
#define fma_f(a, b, c) _mm512_fmadd_ps(a, b, c)
#define clamp_f(y, low, high) _mm512_min_ps(_mm512_max_ps(y, low), high)
#define narrow(out, q) _mm_storeu_si128((__m128i *)(void *)(out), _mm512_cvtepi32_epi8((q)[0]))
#define zero_i() _mm512_setzero_si512()
#define shifted(v, n) _mm512_sll_epi32(v, _mm_cvtsi32_si128((int)(n)))
ISA INLINE __m512i at(const void *from) { return _mm512_loadu_si512(from); }
ISA INLINE void put(void *to, __m512i v) { _mm512_storeu_si512(to, v); }
ISA INLINE __m128i at_128(const void *from) { return _mm_loadu_si128((const __m128i *)from); }
#include "hqm_vector.h"

enum { MANY = 8, SOME = 4 };

ISA INLINE void unpacked(const uint8_t *from, const int bits, __m512i w[2][1]) {
    if (bits == 4) {
        const __m256i both = _mm256_loadu_si256((const __m256i *)(const void *)from), mask = _mm256_set1_epi8(15);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
        w[0][0] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(both, mask)), high, 1);
        w[0][0] = _mm512_sub_epi8(w[0][0], _mm512_set1_epi8(8));
    } else w[0][0] = at(from);
    w[1][0] = bits == 16 ? at(from + 64) : w[0][0];
}

ISA INLINE void multiply(__m512i sum[1], __m512i x, __m512i w[2][1], const int bits) {
    if (bits < 16) sum[0] = _mm512_dpbusd_epi32(sum[0], x, w[0][0]);
    else {
        sum[0] = _mm512_dpwssd_epi32(sum[0], _mm512_and_si512(x, _mm512_set1_epi16(255)), w[0][0]);
        sum[0] = _mm512_dpwssd_epi32(sum[0], _mm512_srli_epi16(x, 8), w[1][0]);
    }
}

#define set_b(x) _mm512_set1_epi8((char)(x))
#define set_w(x) _mm512_set1_epi16((int16_t)(x))
#define within(b, low, high) _mm512_min_epu8(_mm512_max_epu8(b, low), high)
/* Dword 4 i + j from 4 j + i: what packing and unpacking in four lanes needs around it. */
ISA INLINE __m512i transposed(__m512i v) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
}
ISA INLINE __m512i packed(const __m512i v[4], __m512i zero) {
    const __m512i a = _mm512_adds_epi16(_mm512_packs_epi32(v[0], v[1]), zero);
    const __m512i b = _mm512_adds_epi16(_mm512_packs_epi32(v[2], v[3]), zero);
    return transposed(_mm512_packus_epi16(a, b));
}
ISA INLINE int below_one(__m512 m) { return _mm512_cmp_ps_mask(m, set_f(1.0f), _CMP_NLT_UQ) == 0; }
#include "hqm_x86.h"
ISA static void dense_4(const product *p, int32_t acc[TILE][BLOCK]) { dense(p, acc, 4); }

#define ROWS(bits) ((bits) == 16 ? 2u : 4u)
#define or_i(a, b) _mm512_or_si512(a, b)
#define and_i(a, b) _mm512_and_si512(a, b)
ISA INLINE void join(const uint8_t *const rows[4], const int bits, __m512i v[4]) {
    const __m512i a = transposed(at(rows[0])), b = transposed(at(rows[1])), zero = zero_i();
    __m512i low[2] = {_mm512_unpacklo_epi8(a, zero), _mm512_unpacklo_epi8(b, zero)};
    __m512i high[2] = {_mm512_unpackhi_epi8(a, zero), _mm512_unpackhi_epi8(b, zero)};
    if (bits < 16) {
        const __m512i c = transposed(at(rows[2])), d = transposed(at(rows[3]));
        low[0] = _mm512_unpacklo_epi8(a, b), low[1] = _mm512_unpacklo_epi8(c, d);
        high[0] = _mm512_unpackhi_epi8(a, b), high[1] = _mm512_unpackhi_epi8(c, d);
    }
    v[0] = _mm512_unpacklo_epi16(low[0], low[1]), v[1] = _mm512_unpackhi_epi16(low[0], low[1]);
    v[2] = _mm512_unpacklo_epi16(high[0], high[1]), v[3] = _mm512_unpackhi_epi16(high[0], high[1]);
}
ISA INLINE __m512i signed_weights(const uint8_t *w, uint32_t channel, const int bits) {
    if (bits == 16) return _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)(w + 2 * channel)));
    return _mm512_cvtepi8_epi32(block_bytes(w + channel * (uint32_t)bits / 8, bits));
}
ISA INLINE __m512i multiply_joined(__m512i sum, __m512i x, __m512i w, const int bits) {
    return bits == 16 ? _mm512_dpwssd_epi32(sum, x, w) : _mm512_dpbusd_epi32(sum, x, w);
}
ISA INLINE void put_some(uint8_t *to, __m512i v, uint32_t n) {
    if (n == 64) put(to, v);
    else _mm512_mask_storeu_epi8(to, ((__mmask64)1 << n) - 1, v);
}
#include "hqm_depthwise.h"

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
ISA INLINE void by_places(const layer *l, const product *p, uint32_t from, uint32_t to, __m512i start, __m512 m, uint8_t *y,
                          uint32_t channels, const int n, const int bits) {
    const size_t c_out = (size_t)l->groups * l->per_group, row_step = p->row_step, column_step = p->column_step;
    const uint32_t n_rows = p->n_rows, n_columns = p->n_columns, shift = p->shift;
    const size_t run = 4 * (size_t)p->n4;
    const __m512 all_m[4] = {m, m, m, m};
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
            const __m512i bytes = bytes_of(sums[h], all_m, &rule);
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
                          const __m512 m[4], uint8_t *y, uint32_t channels, const int n, const int bits) {
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
        put_some(y, bytes_of(sum[q], m, &rule), channels);
    }
}

/* Functions of their own, each with the registers of one. */
#define ALONE ISA static __attribute__((noinline))
typedef void some_places_kernel(const layer *l, const product *p, uint32_t from, uint32_t to, __m512i start, __m512 m,
                                uint8_t *y, uint32_t channels);
typedef void few_places_kernel(const layer *l, const product *p, uint32_t place, const size_t apart[4],
                               const __m512i start[4], const __m512 m[4], uint8_t *y, uint32_t channels);
#define PLACES(N, BITS)                                                                                                \
    ALONE void places_##N##_##BITS(const layer *l, const product *p, uint32_t from, uint32_t to, __m512i start,        \
                                   __m512 m, uint8_t *y, uint32_t channels) {                                          \
        by_places(l, p, from, to, start, m, y, channels, N, BITS);                                                     \
    }
#define FEW(N, BITS)                                                                                                   \
    ALONE void few_##N##_##BITS(const layer *l, const product *p, uint32_t place, const size_t apart[4],               \
                                const __m512i start[4], const __m512 m[4], uint8_t *y, uint32_t channels) {            \
        by_blocks(l, p, place, apart, start, m, y, channels, N, BITS);                                                 \
    }
PLACES(8, 4)
PLACES(8, 8)
PLACES(4, 4)
PLACES(4, 8)
FEW(2, 4)
FEW(2, 8)
FEW(1, 4)
FEW(1, 8)

/* A group's outputs: eight or four places at a time by a block, those left over by four blocks. */
ISA static void group_at_once(const layer *l, product p, uint32_t first, size_t place, size_t block) {
    some_places_kernel *const eights = l->bits == 4 ? places_8_4 : places_8_8;
    some_places_kernel *const fours = l->bits == 4 ? places_4_4 : places_4_8;
    few_places_kernel *const two = l->bits == 4 ? few_2_4 : few_2_8, *const one = l->bits == 4 ? few_1_4 : few_1_8;
    const uint32_t eight = p.n_places / 8 * 8, whole = p.n_places / 4 * 4;
    const size_t c_out = (size_t)l->groups * l->per_group;
    const uint8_t *weights = p.w;
    uint8_t *y = l->y->data + place * c_out + first;
    for (uint32_t b = 0; b < l->per_group; b += 4 * BLOCK) {
        const uint32_t left = l->per_group - b, n = at_most(4 * BLOCK, left);
        size_t apart[4];
        __m512i start[4];
        __m512 m[4];
        for (uint32_t k = 0; k < 4; k++) { /* blocks beyond the last are the last again, and not written */
            const uint32_t here = at_most(k, (left - 1) / BLOCK), channel = first + b + here * BLOCK;
            apart[k] = here * block;
            start[k] = some_i(l->start + channel, left - here * BLOCK);
            m[k] = _mm512_castsi512_ps(some_i(l->r.multiplier + channel, left - here * BLOCK));
        }
        for (uint32_t k = 0; k < 4 && k * BLOCK < left && whole; k++) {
            const uint32_t channels = at_most(BLOCK, left - k * BLOCK);
            uint8_t *to = y + b + k * BLOCK;
            p.w = weights + (b / BLOCK + k) * block;
            eights(l, &p, 0, eight, start[k], m[k], to, channels);
            fours(l, &p, eight, whole, start[k], m[k], to + eight * c_out, channels);
        }
        p.w = weights + b / BLOCK * block;
        if (whole + 2 <= p.n_places) two(l, &p, whole, apart, start, m, y + b + whole * c_out, n);
        if (p.n_places % 2) one(l, &p, p.n_places - 1, apart, start, m, y + b + (p.n_places - 1) * c_out, n);
    }
}

/* A tile whose bytes come out of registers; 0 for other requantizers, and for weights of 16 bits. */
ISA static int run_at_once(const layer *l, product p, size_t place, uint32_t row) {
    const size_t run = (size_t)p.n4 * 4 * BLOCK * p.n_columns * l->bits / 8, block = run * l->v->kernel[0];
    const uint32_t c_out = l->groups * l->per_group, n_blocks = (l->per_group + BLOCK - 1) / BLOCK;
    if (l->x->size > 1 || l->bits > 8 || l->depthwise || l->residual || l->y->size > 1) return 0;
    if (!l->r.multiplier || l->r.is_fixed) return 0;
    for (uint32_t o = 0; o < c_out; o += BLOCK)
        if (!below_one(_mm512_castsi512_ps(some_i(l->r.multiplier + o, c_out - o)))) return 0;
    for (uint32_t g = 0; g < l->groups; g++) {
        p.w = l->w + row * run + g * n_blocks * block, p.x = l->data + row * p.row_step + g * l->c_group;
        group_at_once(l, p, g * l->per_group, place, block);
    }
    return 1;
}

/* The "fixed" requantizer on 8 channels at a time: int64 sums, arithmetic shift. */
ISA static void fixed_u8(int32_t acc[TILE][BLOCK], uint32_t n_places, const rescale *r, uint32_t first, uint32_t n,
                         const void *residual, uint8_t *out, size_t step) {
    int64_t m[BLOCK], m2[BLOCK], shift[BLOCK], half[BLOCK];
    uint8_t whole[BLOCK];
    for (uint32_t o = 0; o < BLOCK; o++) {
        const uint32_t c = r->is_shared ? 0 : first + at_most(o, n - 1);
        m[o] = r->fixed[c], m2[o] = residual ? r->fixed_2[c] : 0, shift[o] = r->shift[c];
        half[o] = (int64_t)1 << (r->shift[c] - 1);
    }
    const int is_byte = r->residual_dtype == HQM_UINT8;
    const __m512i low = _mm512_set1_epi64(r->low), high = _mm512_set1_epi64(r->high), zero = _mm512_set1_epi64(r->zero);
    const __m512i other_zero = _mm512_set1_epi64(r->residual_zero);
    for (uint32_t p = 0; p < n_places; p++, out += step) {
        const uint8_t *bytes = residual ? (const uint8_t *)residual + p * step * (is_byte ? 1 : 4) : NULL;
        for (int o = 0; o < BLOCK; o += 8) {
            const __m256i sums = _mm256_loadu_si256((const __m256i *)(const void *)(acc[p] + o));
            __m512i y = _mm512_add_epi64(_mm512_mul_epi32(_mm512_cvtepi32_epi64(sums), at(m + o)), at(half + o));
            if (bytes) {
                const void *from = bytes + o * (is_byte ? 1 : 4);
                const __m512i q = is_byte ? _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)from))
                                          : _mm512_cvtepi32_epi64(_mm256_loadu_si256((const __m256i *)from));
                y = _mm512_add_epi64(y, _mm512_mul_epi32(_mm512_sub_epi64(q, other_zero), at(m2 + o)));
            }
            y = _mm512_min_epi64(_mm512_max_epi64(_mm512_srav_epi64(y, at(shift + o)), low), high);
            _mm_storel_epi64((__m128i *)(void *)(whole + o), _mm512_cvtepi64_epi8(_mm512_add_epi64(y, zero)));
        }
        memcpy(out, whole, n);
    }
}

const kernels hqm_avx512vnni = {
    .name = "avx512vnni", .dense = {dense_4, dense_8, dense_16}, .rescale_u8 = together_u8, .fixed_u8 = fixed_u8,
    .add_u8 = avx512_add_u8, .depthwise_rows = run_depthwise, .joins = joins,
    .whole_tile = run_at_once};

#endif

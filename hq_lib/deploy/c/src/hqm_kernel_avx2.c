/* Kernels for x86-64 with AVX2 and FMA. Attributes, not flags, say what each function is compiled for.
 *
 * Products are exact in vpmaddwd, which adds pairs of 16-bit products into 32 bits: of four bytes side by side the even
 * ones make one pair and the odd ones the other. vpmaddubsw, twice as wide, adds pairs into 16 bits: it serves weights
 * of 4 bits, whose sums are widened before they could overflow, and those of 8 bits as hqm_bounded.h tells.
 */
#include "hqm_kernel.h"

#ifdef HQM_X86
#define ISA __attribute__((target("avx2,fma")))

#define LANES 8
#define V(name) avx2_##name
#define vi __m256i
#define vf __m256
#define load_i(p) at(p)
#define load_f(p) _mm256_loadu_ps(p)
#define set_i(x) _mm256_set1_epi32(x)
#define set_f(x) _mm256_set1_ps(x)
#define wide(p) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(p)))
#define to_f(q) _mm256_cvtepi32_ps(q)
#define to_i(y) _mm256_cvtps_epi32(y)
#define add_i(a, b) _mm256_add_epi32(a, b)
#define sub_i(a, b) _mm256_sub_epi32(a, b)
#define mul_f(a, b) _mm256_mul_ps(a, b)
#define add_f(a, b) _mm256_add_ps(a, b)
#define fma_f(a, b, c) _mm256_fmadd_ps(a, b, c)
#define clamp_f(y, low, high) _mm256_min_ps(_mm256_max_ps(y, low), high)
#define zero_i() _mm256_setzero_si256()
#define shifted(v, n) _mm256_sll_epi32(v, _mm_cvtsi32_si128((int)(n)))
ISA INLINE __m256i at(const void *from) { return _mm256_loadu_si256(from); }
ISA INLINE void put(void *to, __m256i v) { _mm256_storeu_si256(to, v); }
ISA INLINE void narrow(uint8_t *out, const __m256i q[2]) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8); /* which saturates */
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)(void *)out, bytes);
}
#include "hqm_vector.h"

enum { MANY = 4, SOME = 2 };

/* Of four weights the even ones, w[0], and the odd ones, w[1], as int16 pairs. */
ISA INLINE void unpacked(const uint8_t *from, const int bits, __m256i w[2][2]) {
    for (int h = 0; h < 2; h++) {
        const __m256i here = at(from + 32 * h);
        w[0][h] = bits == 8 ? _mm256_srai_epi16(_mm256_slli_epi16(here, 8), 8) : here;
        w[1][h] = bits == 8 ? _mm256_srai_epi16(here, 8) : at(from + 64 + 32 * h);
    }
}

ISA INLINE void multiply(__m256i sum[2], __m256i x, __m256i w[2][2], const int bits) {
    const __m256i xs[2] = {_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srli_epi16(x, 8)};
    (void)bits;
    for (int e = 0; e < 2; e++)
        for (int h = 0; h < 2; h++) sum[h] = add_i(sum[h], _mm256_madd_epi16(xs[e], w[e][h]));
}

ISA INLINE __m256i packed(const __m256i v[4], __m256i zero) {
    const __m256i a = _mm256_adds_epi16(_mm256_packs_epi32(v[0], v[1]), zero);
    const __m256i b = _mm256_adds_epi16(_mm256_packs_epi32(v[2], v[3]), zero);
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
ISA INLINE int below_one(__m256 m) { return _mm256_movemask_ps(_mm256_cmp_ps(m, set_f(1.0f), _CMP_NLT_UQ)) == 0; }
#define set_b(x) _mm256_set1_epi8((char)(x))
#define set_w(x) _mm256_set1_epi16((int16_t)(x))
#define within(b, low, high) _mm256_min_epu8(_mm256_max_epu8(b, low), high)
#include "hqm_x86.h"

#define ROWS(bits) ((void)(bits), 2u)
#define or_i(a, b) _mm256_or_si256(a, b)
#define and_i(a, b) _mm256_and_si256(a, b)
/* Dwords so that what unpacking in halves leaves lies in the channels' order. */
ISA INLINE __m256i apart(const uint8_t *x) {
    return _mm256_permutevar8x32_epi32(at(x), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}
ISA INLINE void join(const uint8_t *const rows[4], const int bits, __m256i v[4]) {
    const __m256i a = apart(rows[0]), b = apart(rows[1]), zero = zero_i();
    const __m256i low[2] = {_mm256_unpacklo_epi8(a, zero), _mm256_unpacklo_epi8(b, zero)};
    const __m256i high[2] = {_mm256_unpackhi_epi8(a, zero), _mm256_unpackhi_epi8(b, zero)};
    (void)bits;
    v[0] = _mm256_unpacklo_epi16(low[0], low[1]), v[1] = _mm256_unpackhi_epi16(low[0], low[1]);
    v[2] = _mm256_unpacklo_epi16(high[0], high[1]), v[3] = _mm256_unpackhi_epi16(high[0], high[1]);
}
ISA INLINE __m256i signed_weights(const uint8_t *w, uint32_t channel, const int bits) {
    if (bits == 16) return _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(w + 2 * channel)));
    const __m128i all = block_bytes(w + channel / BLOCK * BLOCK * (uint32_t)bits / 8, bits);
    return _mm256_cvtepi8_epi32(channel % BLOCK ? _mm_srli_si128(all, 8) : all);
}
ISA INLINE __m256i multiply_joined(__m256i sum, __m256i x, __m256i w, const int bits) {
    (void)bits;
    return add_i(sum, _mm256_madd_epi16(x, w));
}
ISA INLINE void put_some(uint8_t *to, __m256i v, uint32_t n) {
    uint8_t all[32];
    if (n == 32) put(to, v);
    else put(all, v), memcpy(to, all, n);
}
#include "hqm_depthwise.h"
#include "hqm_winograd.h"

/* Sums of pairs in 32 bits, added to those in acc unless they are the first. */
ISA INLINE __m256i widened(__m256i sum, const int32_t *acc, int is_first) {
    const __m256i total = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
    return is_first ? total : _mm256_add_epi32(total, at(acc));
}
#include "hqm_bounded.h"

ISA INLINE void nibbles_n(const product *p, const uint32_t *place, const int32_t *start, int32_t (*acc)[BLOCK],
                          const int n) {
    __m256i sum[MANY][2];
    const __m256i mask = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
    const uint8_t *weights = p->w;
    uint32_t left = p->n_safe;
    int is_first = 1;
    for (int q = 0; q < n; q++) sum[q][0] = sum[q][1] = _mm256_setzero_si256();
    for (uint32_t i = 0; i < p->n_rows; i++)
        for (uint32_t j = 0; j < p->n_columns; j++) {
            const uint8_t *x = (const uint8_t *)p->x + i * p->row_step + j * p->column_step;
            for (uint32_t k = 0, stop; k < p->n4;) {
                stop = k + at_most(p->n4 - k, left);
                left -= stop - k;
                for (; k < stop; k++, x += 4, weights += 32) {
                    const __m256i both = at(weights);
                    const __m256i low = _mm256_sub_epi8(_mm256_and_si256(both, mask), eight);
                    const __m256i high = _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(both, 4), mask), eight);
                    for (int q = 0; q < n; q++) {
                        int32_t four;
                        memcpy(&four, x + place[q], 4);
                        const __m256i v = set_i(four);
                        sum[q][0] = _mm256_add_epi16(sum[q][0], _mm256_maddubs_epi16(v, low));
                        sum[q][1] = _mm256_add_epi16(sum[q][1], _mm256_maddubs_epi16(v, high));
                    }
                }
                for (int q = 0; q < n && !left; q++)
                    for (int h = 0; h < 2; h++) {
                        put(acc[q] + 8 * h, widened(sum[q][h], acc[q] + 8 * h, is_first));
                        sum[q][h] = _mm256_setzero_si256();
                    }
                if (!left) left = p->n_safe, is_first = 0;
            }
        }
    const __m128i shift = _mm_cvtsi32_si128((int)p->shift);
    for (int q = 0; q < n; q++)
        for (int h = 0; h < 2; h++) {
            const __m256i total = _mm256_sll_epi32(widened(sum[q][h], acc[q] + 8 * h, is_first), shift);
            put(acc[q] + 8 * h, _mm256_add_epi32(total, at(start + 8 * h)));
        }
}

ISA static void dense_4(const product *p, int32_t acc[TILE][BLOCK]) {
    int32_t start[BLOCK];
    uint32_t q = 0;
    starts(p, start);
    for (; q + MANY <= p->n_places; q += MANY) nibbles_n(p, p->at + q, start, acc + q, MANY);
    for (; q + SOME <= p->n_places; q += SOME) nibbles_n(p, p->at + q, start, acc + q, SOME);
    if (q < p->n_places) nibbles_n(p, p->at + q, start, acc + q, 1);
}

/* What "fixed" needs for eight channels: sums of the even and of the odd ones in 64 bits, of which the high halves are
 * shifted once more. A sum that needs a smaller shift than 32 is of small integers, moved up before (`up`). */
typedef struct {
    int32_t multiplier[2][8], multiplier_2[2][8], shift[8]; /* [1]: the odd channels' in the low halves */
    int64_t half[2][4];
    int32_t up;
} fixed_8;

/* The least shift that fixed_of serves: an Add's integers have 17 bits, an accumulator all of 32. */
static inline uint32_t least_shift(const rescale *r, int is_sum) { return r->is_shared && is_sum ? 18 : 32; }

static inline void fixed_8_of(fixed_8 f[2], const rescale *r, uint32_t first, uint32_t n, int is_sum) {
    for (uint32_t o = 0; o < BLOCK; o++) {
        const uint32_t c = r->is_shared ? 0 : first + at_most(o, n - 1), j = o % 8;
        fixed_8 *to = f + o / 8;
        to->up = r->shift[c] < 32 ? 32 - r->shift[c] : 0;
        for (uint32_t odd = 0; odd <= j % 2; odd++) {
            to->multiplier[odd][j - odd] = r->fixed[c];
            to->multiplier_2[odd][j - odd] = is_sum ? r->fixed_2[c] : 0;
        }
        to->shift[j] = r->shift[c] < 32 ? 0 : r->shift[c] - 32;
        to->half[j % 2][j / 2] = (int64_t)1 << (r->shift[c] - 1 + to->up);
    }
}

/* The requantized integers of acc (and, with is_sum, of other), before zero point and clamp. */
ISA INLINE __m256i fixed_of(const fixed_8 *f, __m256i acc, __m256i other, const int is_sum) {
    __m256i sum[2];
    if (is_sum) acc = _mm256_slli_epi32(acc, f->up), other = _mm256_slli_epi32(other, f->up);
    for (int odd = 0; odd < 2; odd++) {
        const __m256i x = odd ? _mm256_srli_epi64(acc, 32) : acc;
        sum[odd] = _mm256_add_epi64(_mm256_mul_epi32(x, at(f->multiplier[odd])), at(f->half[odd]));
        if (!is_sum) continue;
        const __m256i r = odd ? _mm256_srli_epi64(other, 32) : other;
        sum[odd] = _mm256_add_epi64(sum[odd], _mm256_mul_epi32(r, at(f->multiplier_2[odd])));
    }
    return _mm256_srav_epi32(_mm256_blend_epi32(_mm256_srli_epi64(sum[0], 32), sum[1], 0xaa), at(f->shift));
}

/* size: bytes of one element of the residual, 0 without one; whole: 0..255 are all integers that there are */
ISA INLINE void fixed_sized(int32_t acc[TILE][BLOCK], uint32_t n_places, const rescale *r, const fixed_8 f[2], uint32_t n,
                            const uint8_t *residual, uint8_t *out, size_t step, const int size, const int whole) {
    const __m256i low = set_i(r->low), high = set_i(r->high), zero = set_i(r->zero), minus = set_i(r->residual_zero);
    uint8_t all[BLOCK];
    for (uint32_t p = 0; p < n_places; p++, out += step) {
        __m256i q[2];
        for (size_t h = 0; h < 2; h++) {
            __m256i other = _mm256_setzero_si256();
            if (size) {
                const uint8_t *from = residual + (p * step + 8 * h) * (size_t)size;
                other = sub_i(size == 1 ? wide(from) : at(from), minus);
            }
            q[h] = fixed_of(f + h, at(acc[p] + 8 * h), other, size != 0);
            if (!whole) q[h] = _mm256_min_epi32(_mm256_max_epi32(q[h], low), high);
            q[h] = add_i(q[h], zero);
        }
        narrow(n == BLOCK ? out : all, q);
        if (n < BLOCK) memcpy(out, all, n);
    }
}

ISA static void fixed_u8(int32_t acc[TILE][BLOCK], uint32_t n_places, const rescale *r, uint32_t first, uint32_t n,
                         const void *residual, uint8_t *out, size_t step) {
    const int whole = r->low == -r->zero && r->high == 255 - r->zero, is_byte = r->residual_dtype == HQM_UINT8;
    fixed_8 f[2];
    for (uint32_t o = 0; o < n; o++)
        if (r->shift[r->is_shared ? 0 : first + o] < least_shift(r, residual != NULL)) {
            rescale_each(acc, n_places, r, first, n, residual, out, step);
            return;
        }
    fixed_8_of(f, r, first, n, residual != NULL);
    if (!residual && whole) fixed_sized(acc, n_places, r, f, n, NULL, out, step, 0, 1);
    else if (!residual) fixed_sized(acc, n_places, r, f, n, NULL, out, step, 0, 0);
    else if (is_byte) fixed_sized(acc, n_places, r, f, n, residual, out, step, 1, 0);
    else fixed_sized(acc, n_places, r, f, n, residual, out, step, 4, 0);
}

/* Returns how many of n elements of a "fixed" Add it has written, a multiple of BLOCK. */
ISA static uint32_t fixed_add_u8(const uint8_t *a, int32_t a_zero, const uint8_t *b, uint32_t n, const rescale *r,
                                 uint8_t *out) {
    const __m256i low = set_i(r->low), high = set_i(r->high), zero = set_i(r->zero);
    fixed_8 f[2];
    uint32_t i = 0;
    if (r->shift[0] < least_shift(r, 1)) return 0;
    fixed_8_of(f, r, 0, 1, 1);
    for (; i + BLOCK <= n; i += BLOCK) {
        __m256i q[2];
        for (uint32_t h = 0; h < BLOCK; h += 8) {
            const __m256i x = sub_i(wide(a + i + h), set_i(a_zero)), y = sub_i(wide(b + i + h), set_i(r->residual_zero));
            q[h / 8] = add_i(_mm256_min_epi32(_mm256_max_epi32(fixed_of(f, x, y, 1), low), high), zero);
        }
        narrow(out + i, q);
    }
    return i;
}

const kernels hqm_avx2 = {
    .name = "avx2", .dense = {dense_4, dense_8, dense_16}, .rescale_u8 = together_u8, .fixed_u8 = fixed_u8,
    .add_u8 = avx2_add_u8, .fixed_add_u8 = fixed_add_u8, .depthwise_rows = run_depthwise, .joins = joins,
    .tiles = run_tiles, .whole_tile = run_bounded};

#endif

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

ISA INLINE __m256i packed(const __m256i v[4], __m256i zero, int has_zero) {
    __m256i a = _mm256_packs_epi32(v[0], v[1]), b = _mm256_packs_epi32(v[2], v[3]);
    if (has_zero) a = _mm256_adds_epi16(a, zero), b = _mm256_adds_epi16(b, zero);
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
ISA INLINE int below_one(__m256 m) { return _mm256_movemask_ps(_mm256_cmp_ps(m, set_f(1.0f), _CMP_NLT_UQ)) == 0; }
#define mul_even(a, b) _mm256_mul_epi32(a, b)
#define add_64(a, b) _mm256_add_epi64(a, b)
#define high_half(v) _mm256_srli_epi64(v, 32)
#define high_halves(a, b) _mm256_blend_epi32(_mm256_srli_epi64(a, 32), b, 0xaa)
#define shifted_down(v, n) _mm256_srav_epi32(v, n)
#define min_i(a, b) _mm256_min_epi32(a, b)
#define max_i(a, b) _mm256_max_epi32(a, b)
#define set_b(x) _mm256_set1_epi8((char)(x))
#define set_w(x) _mm256_set1_epi16((int16_t)(x))
#define within(b, low, high) _mm256_min_epu8(_mm256_max_epu8(b, low), high)
#include "hqm_x86.h"

#define ROWS_8 2
#define or_i(a, b) _mm256_or_si256(a, b)
#define and_i(a, b) _mm256_and_si256(a, b)
/* Dwords so that what unpacking in halves leaves lies in the channels' order. */
ISA INLINE __m256i apart(const uint8_t *x) {
    return _mm256_permutevar8x32_epi32(at(x), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}
ISA INLINE void join(const uint8_t *const from[4], const uint32_t rows, __m256i v[4]) {
    const __m256i a = apart(from[0]), b = apart(from[1]), zero = zero_i();
    const __m256i low[2] = {_mm256_unpacklo_epi8(a, zero), _mm256_unpacklo_epi8(b, zero)};
    const __m256i high[2] = {_mm256_unpackhi_epi8(a, zero), _mm256_unpackhi_epi8(b, zero)};
    (void)rows;
    v[0] = _mm256_unpacklo_epi16(low[0], low[1]), v[1] = _mm256_unpackhi_epi16(low[0], low[1]);
    v[2] = _mm256_unpacklo_epi16(high[0], high[1]), v[3] = _mm256_unpackhi_epi16(high[0], high[1]);
}
ISA INLINE __m256i signed_weights(const uint8_t *w, uint32_t channel, const int bits) {
    if (bits == 16) return _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(w + 2 * channel)));
    const __m128i all = block_bytes(w + channel / BLOCK * BLOCK * (uint32_t)bits / 8, bits);
    return _mm256_cvtepi8_epi32(channel % BLOCK ? _mm_srli_si128(all, 8) : all);
}
ISA INLINE __m256i multiply_joined(__m256i sum, __m256i x, __m256i w, const uint32_t rows) {
    (void)rows;
    return add_i(sum, _mm256_madd_epi16(x, w));
}
ISA INLINE void put_some(uint8_t *to, __m256i v, uint32_t n) {
    uint8_t all[32];
    if (n == 32) put(to, v);
    else put(all, v), memcpy(to, all, n);
}
#include "hqm_depthwise.h"
#define transformed int16_t
#define add_t(a, b) _mm256_add_epi16(a, b)
#define sub_t(a, b) _mm256_sub_epi16(a, b)
enum { TOGETHER = 4 };
#include "hqm_winograd.h"
#include "hqm_winograd_16.h"

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

const kernels hqm_avx2 = {
    .name = "avx2", .dense = {dense_4, dense_8, dense_16}, .rescale_u8 = together_u8, .fixed_u8 = fixed_u8,
    .add_u8 = avx2_add_u8, .fixed_add_u8 = fixed_add_u8, .depthwise_rows = run_depthwise, .joins = joins,
    .tiles = run_tiles, .serves_tiles = serves_tiles, .whole_tile = run_bounded};

#endif

/* Kernels for x86-64 with AVX-512 (F, BW, VL) and VNNI: vpdpbusd adds u8 x s8 quadruples to 32-bit lanes without
 * saturation, vpdpwssd pairs of 16 bits; lane o is output channel o. Attributes say what each function is compiled for.
 */
#include "hqm_kernel.h"

#ifdef HQM_X86
#include <immintrin.h>

#ifdef HQM_EMULATED /* a test replaces each instruction by plain C */
#define ISA
#else
#define ISA __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#endif

ISA INLINE __m512i at(const void *from) { return _mm512_loadu_si512(from); }
ISA INLINE void put(void *to, __m512i v) { _mm512_storeu_si512(to, v); }
ISA INLINE __m128i at_128(const void *from) { return _mm_loadu_si128((const __m128i *)from); }
ISA INLINE __m512i four(const uint8_t *x) {
    int32_t word;
    memcpy(&word, x, 4);
    return _mm512_set1_epi32(word);
}
ISA INLINE __m512i add_shifted(const int32_t *start, __m512i sum, uint32_t shift) {
    return _mm512_add_epi32(at(start), _mm512_sll_epi32(sum, _mm_cvtsi32_si128((int)shift)));
}

/* The 64 weights of a quadruple from nibbles. */
ISA INLINE __m512i from_nibbles(const uint8_t *w) {
    const __m256i both = _mm256_loadu_si256((const __m256i *)(const void *)w), mask = _mm256_set1_epi8(15);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    const __m512i all = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(both, mask)), high, 1);
    return _mm512_sub_epi8(all, _mm512_set1_epi8(8));
}

ISA INLINE void dense_n(const product *p, const uint32_t *place, const int32_t *start, int32_t (*acc)[BLOCK],
                        const int n, const int bits) {
    __m512i sum[8];
    const __m512i mask = _mm512_set1_epi16(255);
    const uint8_t *weights = p->w;
    for (int q = 0; q < n; q++) sum[q] = _mm512_setzero_si512();
    for (uint32_t i = 0; i < p->n_rows; i++)
        for (uint32_t j = 0; j < p->n_columns; j++) {
            const uint8_t *x = (const uint8_t *)p->x + i * p->row_step + j * p->column_step;
            for (uint32_t k = 0; k < p->n4; k++, x += 4, weights += 8 * bits) {
                const __m512i w = bits == 4 ? from_nibbles(weights) : at(weights);
                const __m512i odd = bits == 16 ? at(weights + 64) : w;
                for (int q = 0; q < n; q++) {
                    const __m512i v = four(x + place[q]);
                    if (bits < 16) {
                        sum[q] = _mm512_dpbusd_epi32(sum[q], v, w);
                        continue;
                    }
                    sum[q] = _mm512_dpwssd_epi32(sum[q], _mm512_and_si512(v, mask), w);
                    sum[q] = _mm512_dpwssd_epi32(sum[q], _mm512_srli_epi16(v, 8), odd);
                }
            }
        }
    for (int q = 0; q < n; q++) put(acc[q], add_shifted(start, sum[q], p->shift));
}

ISA INLINE void dense(const product *p, int32_t acc[TILE][BLOCK], const int bits) {
    int32_t start[BLOCK];
    uint32_t q = 0;
    starts(p, start);
    for (; q + 8 <= p->n_places; q += 8) dense_n(p, p->at + q, start, acc + q, 8, bits);
    for (; q + 4 <= p->n_places; q += 4) dense_n(p, p->at + q, start, acc + q, 4, bits);
    for (; q < p->n_places; q++) dense_n(p, p->at + q, start, acc + q, 1, bits);
}
ISA static void dense_4(const product *p, int32_t acc[TILE][BLOCK]) { dense(p, acc, 4); }
ISA static void dense_8(const product *p, int32_t acc[TILE][BLOCK]) { dense(p, acc, 8); }
ISA static void dense_16(const product *p, int32_t acc[TILE][BLOCK]) { dense(p, acc, 16); }

/* The weights of one kernel place, as bytes. */
ISA INLINE __m128i tap(const product *p, uint32_t t, const int bits) {
    const uint8_t *w = (const uint8_t *)p->w + t * p->w_step * (size_t)bits / 8;
    if (t >= p->n_rows * p->n_columns) return _mm_setzero_si128();
    if (bits == 8) return at_128(w);
    const __m128i both = _mm_loadl_epi64((const __m128i *)(const void *)w), mask = _mm_set1_epi8(15);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
    return _mm_sub_epi8(_mm_unpacklo_epi64(_mm_and_si128(both, mask), high), _mm_set1_epi8(8));
}

enum { TAPS = 12 }; /* kernel places whose weights stay in registers */

/* Quadruples of kernel places: byte t of lane o is channel o of place t, each moved there by a shuffle of its own. */
ISA INLINE void depthwise(const product *p, int32_t acc[TILE][BLOCK], const int bits) {
    int8_t order[4][64];
    __m512i spread[4];
    int32_t start[BLOCK];
    memset(order, -1, sizeof order);
    for (int t = 0; t < 4; t++)
        for (int o = 0; o < BLOCK; o++) order[t][4 * o + t] = (int8_t)o;
    for (int t = 0; t < 4; t++) spread[t] = at(order[t]);
    starts(p, start);
    for (uint32_t first = 0; first < p->n_rows * p->n_columns; first += TAPS) {
        size_t offset[TAPS];
        __m512i w[TAPS / 4];
        tap_offsets(p, first, TAPS, offset);
        for (uint32_t t = 0; t < TAPS / 4; t++) {
            w[t] = _mm512_setzero_si512();
            for (uint32_t k = 0; k < 4; k++)
                w[t] = _mm512_or_si512(w[t], _mm512_shuffle_epi8(_mm512_broadcast_i32x4(tap(p, first + 4 * t + k, bits)),
                                                                 spread[k]));
        }
        for (uint32_t q = 0; q < p->n_places; q++) {
            const uint8_t *x = (const uint8_t *)p->x + p->at[q];
            __m512i sum = _mm512_setzero_si512();
            for (uint32_t t = 0; t < TAPS / 4; t++) {
                __m512i v[4];
                for (uint32_t k = 0; k < 4; k++)
                    v[k] = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(at_128(x + offset[4 * t + k])), spread[k]);
                const __m512i all = _mm512_or_si512(_mm512_or_si512(v[0], v[1]), _mm512_or_si512(v[2], v[3]));
                sum = _mm512_dpbusd_epi32(sum, all, w[t]);
            }
            put(acc[q], add_shifted(first ? acc[q] : start, sum, p->shift));
        }
    }
}
ISA static void depthwise_4(const product *p, int32_t acc[TILE][BLOCK]) { depthwise(p, acc, 4); }
ISA static void depthwise_8(const product *p, int32_t acc[TILE][BLOCK]) { depthwise(p, acc, 8); }

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
#include "hqm_vector.h"

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

const kernels hqm_avx512vnni = {"avx512vnni", {dense_4, dense_8, dense_16}, {depthwise_4, depthwise_8, NULL},
                                avx512_rescale_u8, fixed_u8, avx512_add_u8, NULL};

#endif

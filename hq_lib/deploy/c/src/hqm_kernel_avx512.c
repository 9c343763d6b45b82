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

enum { MANY = 8, SOME = 4, TAPS = 12, GROUP = 4 };

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

/* Byte t of each int32: channel by channel what four kernel places have. */
ISA INLINE __m512i joined(__m128i a, __m128i b, __m128i c, __m128i d) {
    const __m512i low = _mm512_or_si512(_mm512_cvtepu8_epi32(a), _mm512_slli_epi32(_mm512_cvtepu8_epi32(b), 8));
    const __m512i high = _mm512_or_si512(_mm512_cvtepu8_epi32(c), _mm512_slli_epi32(_mm512_cvtepu8_epi32(d), 8));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

ISA INLINE void unpacked_taps(const product *p, uint32_t t, const int bits, __m512i w[1]) {
    w[0] = joined(tap(p, t, bits), tap(p, t + 1, bits), tap(p, t + 2, bits), tap(p, t + 3, bits));
}

ISA INLINE void multiply_taps(__m512i sum[1], const uint8_t *x, const size_t *o, const __m512i w[1]) {
    const __m512i all = joined(at_128(x + o[0]), at_128(x + o[1]), at_128(x + o[2]), at_128(x + o[3]));
    sum[0] = _mm512_dpbusd_epi32(sum[0], all, w[0]);
}
#include "hqm_x86.h"
ISA static void dense_4(const product *p, int32_t acc[TILE][BLOCK]) { dense(p, acc, 4); }

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
                                avx512_rescale_u8, fixed_u8, avx512_add_u8, NULL, NULL, NULL};

#endif

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

/* 64 nibbles as bytes, in the weights' order */
ISA INLINE __m512i nibbles(const uint8_t *from) {
    const __m256i both = _mm256_loadu_si256((const __m256i *)(const void *)from);
    const __m512i apart = _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
    return _mm512_and_si512(apart, _mm512_set1_epi8(15));
}

ISA INLINE void unpacked(const uint8_t *from, const int bits, __m512i w[2][1]) {
    w[0][0] = bits == 4 ? _mm512_sub_epi8(nibbles(from), _mm512_set1_epi8(8)) : at(from);
    w[1][0] = bits == 16 ? at(from + 64) : w[0][0];
}

ISA INLINE void multiply(__m512i sum[1], __m512i x, __m512i w[2][1], const int bits) {
    if (bits < 16) sum[0] = _mm512_dpbusd_epi32(sum[0], x, w[0][0]);
    else {
        sum[0] = _mm512_dpwssd_epi32(sum[0], _mm512_and_si512(x, _mm512_set1_epi16(255)), w[0][0]);
        sum[0] = _mm512_dpwssd_epi32(sum[0], _mm512_srli_epi16(x, 8), w[1][0]);
    }
}

#define mul_even(a, b) _mm512_mul_epi32(a, b)
#define add_64(a, b) _mm512_add_epi64(a, b)
#define high_half(v) _mm512_srli_epi64(v, 32)
#define high_halves(a, b) _mm512_mask_shuffle_epi32(b, 0x5555, a, 0xf5)
#define shifted_down(v, n) _mm512_srav_epi32(v, n)
#define min_i(a, b) _mm512_min_epi32(a, b)
#define max_i(a, b) _mm512_max_epi32(a, b)
#define set_b(x) _mm512_set1_epi8((char)(x))
#define set_w(x) _mm512_set1_epi16((int16_t)(x))
#define within(b, low, high) _mm512_min_epu8(_mm512_max_epu8(b, low), high)
/* Dword 4 i + j from 4 j + i: what packing and unpacking in four lanes needs around it. */
ISA INLINE __m512i transposed(__m512i v) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
}
ISA INLINE __m512i packed(const __m512i v[4], __m512i zero, int has_zero) {
    __m512i a = _mm512_packs_epi32(v[0], v[1]), b = _mm512_packs_epi32(v[2], v[3]);
    if (has_zero) a = _mm512_adds_epi16(a, zero), b = _mm512_adds_epi16(b, zero);
    return transposed(_mm512_packus_epi16(a, b));
}
ISA INLINE int below_one(__m512 m) { return _mm512_cmp_ps_mask(m, set_f(1.0f), _CMP_NLT_UQ) == 0; }
#include "hqm_x86.h"
ISA static void dense_4(const product *p, int32_t acc[TILE][BLOCK]) { dense(p, acc, 4); }

#define ROWS_8 4
#define or_i(a, b) _mm512_or_si512(a, b)
#define and_i(a, b) _mm512_and_si512(a, b)
ISA INLINE void join(const uint8_t *const from[4], const uint32_t rows, __m512i v[4]) {
    const __m512i a = transposed(at(from[0])), b = transposed(at(from[1])), zero = zero_i();
    __m512i low[2] = {_mm512_unpacklo_epi8(a, zero), _mm512_unpacklo_epi8(b, zero)};
    __m512i high[2] = {_mm512_unpackhi_epi8(a, zero), _mm512_unpackhi_epi8(b, zero)};
    if (rows == 4) {
        const __m512i c = transposed(at(from[2])), d = transposed(at(from[3]));
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
ISA INLINE __m512i multiply_joined(__m512i sum, __m512i x, __m512i w, const uint32_t rows) {
    return rows == 2 ? _mm512_dpwssd_epi32(sum, x, w) : _mm512_dpbusd_epi32(sum, x, w);
}
ISA INLINE void put_some(uint8_t *to, __m512i v, uint32_t n) {
    if (n == 64) put(to, v);
    else _mm512_mask_storeu_epi8(to, ((__mmask64)1 << n) - 1, v);
}
#include "hqm_depthwise.h"
#include "hqm_registers.h"
#define transformed uint8_t
#define add_t(a, b) _mm512_add_epi8(a, b)
#define sub_t(a, b) _mm512_sub_epi8(a, b)
enum { TOGETHER = 8 };
#include "hqm_winograd.h"
#include "hqm_winograd_8.h"

const kernels hqm_avx512vnni = {
    .name = "avx512vnni", .dense = {dense_4, dense_8, dense_16}, .rescale_u8 = together_u8, .fixed_u8 = fixed_u8,
    .add_u8 = avx512_add_u8, .fixed_add_u8 = fixed_add_u8, .depthwise_rows = run_depthwise, .joins = joins,
    .tiles = run_tiles, .serves_tiles = serves_tiles, .whole_tile = run_at_once};

#endif

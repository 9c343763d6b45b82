/* Kernels for x86-64: AVX2, and AVX-512 with VNNI. Attributes, not flags, say what each function is compiled for. */
#include "hqm_kernel.h"

#ifdef HQM_X86
#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

static inline __mmask16 first_lanes(uint32_t n) { return (__mmask16)((1u << n) - 1u); }

/* Four uint8 in every lane. */
AVX512 static inline __m512i four(const uint8_t *x) {
    int32_t word;
    memcpy(&word, x, 4);
    return _mm512_set1_epi32(word);
}

/* vpdpbusd adds u8 x s8 quadruples to 32-bit lanes without saturation: lane o is output channel o. */
#define VNNI_TILE(NAME, N)                                                                                            \
    AVX512 static void NAME(const product *p, const uint8_t *x0, int32_t acc[][BLOCK]) {                              \
        __m512i sum[N];                                                                                               \
        const __m512i start = _mm512_maskz_loadu_epi32(first_lanes(p->n_out), p->start);                              \
        const uint8_t *w = p->w;                                                                                      \
        for (int n = 0; n < N; n++) sum[n] = start;                                                                   \
        for (uint32_t i = 0; i < p->n_rows; i++)                                                                      \
            for (uint32_t j = 0; j < p->n_columns; j++) {                                                             \
                const uint8_t *x = x0 + i * p->row_step + j * p->column_step;                                         \
                for (uint32_t k = 0; k < p->n4; k++, x += 4, w += 64) {                                               \
                    const __m512i ws = _mm512_loadu_si512(w);                                                         \
                    for (int n = 0; n < N; n++) sum[n] = _mm512_dpbusd_epi32(sum[n], four(x + n * p->x_step), ws);    \
                }                                                                                                     \
            }                                                                                                         \
        for (int n = 0; n < N; n++) _mm512_storeu_si512(acc[n], sum[n]);                                              \
    }
VNNI_TILE(vnni_8, 8)
VNNI_TILE(vnni_4, 4)
VNNI_TILE(vnni_1, 1)

AVX512 static void vnni_dense(const product *p, int32_t acc[TILE][BLOCK]) {
    const uint8_t *x = p->x;
    uint32_t place = 0;
    for (; place + 8 <= p->n_places; place += 8) vnni_8(p, x + place * p->x_step, acc + place);
    for (; place + 4 <= p->n_places; place += 4) vnni_4(p, x + place * p->x_step, acc + place);
    for (; place < p->n_places; place++) vnni_1(p, x + place * p->x_step, acc + place);
}

AVX512 static void avx512_depthwise(const product *p, int32_t acc[TILE][BLOCK]) {
    const __mmask16 mask = first_lanes(p->n_out);
    for (uint32_t place = 0; place < p->n_places; place++) {
        const uint8_t *x0 = (const uint8_t *)p->x + place * p->x_step, *w = p->w;
        __m512i sum = _mm512_maskz_loadu_epi32(mask, p->start);
        for (uint32_t i = 0; i < p->n_rows; i++)
            for (uint32_t j = 0; j < p->n_columns; j++, w += p->w_step) {
                const uint8_t *x = x0 + i * p->row_step + j * p->column_step;
                const __m512i xs = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, x));
                const __m512i ws = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)w));
                sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(xs, ws));
            }
        _mm512_storeu_si512(acc[place], sum);
    }
}

AVX512 static void avx512_rescale_u8(const int32_t *acc, const rescale *r, uint32_t first, uint32_t n,
                                     const uint8_t *residual, uint8_t *out) {
    const __mmask16 mask = first_lanes(n);
    __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(acc)),
                             _mm512_maskz_loadu_ps(mask, r->multiplier + first));
    if (residual) {
        const __m512i q = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, residual));
        const __m512 other = _mm512_cvtepi32_ps(_mm512_sub_epi32(q, _mm512_set1_epi32(r->residual_zero)));
        y = _mm512_add_ps(y, _mm512_mul_ps(other, _mm512_maskz_loadu_ps(mask, r->multiplier_2 + first)));
    }
    y = _mm512_min_ps(_mm512_max_ps(y, _mm512_set1_ps((float)r->low)), _mm512_set1_ps((float)r->high));
    const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(y), _mm512_set1_epi32(r->zero));
    _mm_mask_storeu_epi8(out, mask, _mm512_cvtepi32_epi8(q));
}

AVX512 static void avx512_add_u8(const uint8_t *a, const uint8_t *b, uint32_t n, const float m[2], float offset,
                                 int32_t qmin, int32_t qmax, uint8_t *out) {
    const __m512 ma = _mm512_set1_ps(m[0]), mb = _mm512_set1_ps(m[1]), start = _mm512_set1_ps(offset);
    const __m512 low = _mm512_set1_ps((float)qmin), high = _mm512_set1_ps((float)qmax);
    for (uint32_t i = 0; i < n; i += 16) {
        const __mmask16 mask = n - i < 16 ? first_lanes(n - i) : 0xffff;
        const __m512 qa = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, a + i)));
        const __m512 qb = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, b + i)));
        __m512 y = _mm512_fmadd_ps(qa, ma, _mm512_fmadd_ps(qb, mb, start));
        y = _mm512_min_ps(_mm512_max_ps(y, low), high);
        _mm_mask_storeu_epi8(out + i, mask, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(y)));
    }
}

/* The "fixed" requantizer on 8 channels: int64 sums, arithmetic shift. */
AVX512 static inline __m128i fixed_8(const int32_t *acc, const rescale *r, uint32_t at, __mmask8 mask,
                                     const uint8_t *residual) {
    const __m512i shift = _mm512_cvtepu8_epi64(_mm_maskz_loadu_epi8(mask, r->shift + at)), one = _mm512_set1_epi64(1);
    __m512i y = _mm512_mul_epi32(_mm512_cvtepi32_epi64(_mm256_loadu_si256((const __m256i *)(const void *)acc)),
                                 _mm512_cvtepi32_epi64(_mm256_maskz_loadu_epi32(mask, r->fixed + at)));
    if (residual) {
        const __m512i q = _mm512_cvtepu8_epi64(_mm_maskz_loadu_epi8(mask, residual));
        const __m512i other = _mm512_sub_epi64(q, _mm512_set1_epi64(r->residual_zero));
        const __m512i n = _mm512_cvtepi32_epi64(_mm256_maskz_loadu_epi32(mask, r->fixed_2 + at));
        y = _mm512_add_epi64(y, _mm512_mul_epi32(other, n));
    }
    y = _mm512_add_epi64(y, _mm512_sllv_epi64(one, _mm512_sub_epi64(shift, one)));
    y = _mm512_max_epi64(_mm512_srav_epi64(y, shift), _mm512_set1_epi64(r->low));
    y = _mm512_min_epi64(y, _mm512_set1_epi64(r->high));
    return _mm512_cvtepi64_epi8(_mm512_add_epi64(y, _mm512_set1_epi64(r->zero)));
}

AVX512 static void avx512_fixed_u8(const int32_t *acc, const rescale *r, uint32_t first, uint32_t n,
                                   const uint8_t *residual, uint8_t *out) {
    for (uint32_t i = 0; i < n; i += 8) {
        const __mmask8 mask = (__mmask8)(n - i < 8 ? (1u << (n - i)) - 1u : 0xffu);
        const __m128i q = fixed_8(acc + i, r, first + i, mask, residual ? residual + i : NULL);
        _mm_mask_storeu_epi8(out + i, mask, q);
    }
}

#define AVX2 __attribute__((target("avx2,fma")))

/* u8 x s8 in 16 bits: vpmaddwd adds pairs into 32 bits exactly (vpmaddubsw would saturate). */
#define AVX2_TILE(NAME, N)                                                                                            \
    AVX2 static void NAME(const product *p, const uint8_t *x0, int32_t acc[][BLOCK]) {                                \
        __m256i sum[N][4];                                                                                            \
        const int8_t *w = p->w;                                                                                       \
        for (int n = 0; n < N; n++)                                                                                   \
            for (int q = 0; q < 4; q++) sum[n][q] = _mm256_setzero_si256();                                           \
        for (uint32_t i = 0; i < p->n_rows; i++)                                                                      \
            for (uint32_t j = 0; j < p->n_columns; j++) {                                                             \
                const uint8_t *x = x0 + i * p->row_step + j * p->column_step;                                         \
                for (uint32_t k = 0; k < p->n4; k++, x += 4, w += 64) {                                               \
                    __m256i xs[N];                                                                                    \
                    for (int n = 0; n < N; n++) xs[n] = four_words(x + n * p->x_step);                                \
                    for (int q = 0; q < 4; q++) {                                                                     \
                        const __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)(w + 16 * q));           \
                        const __m256i ws = _mm256_cvtepi8_epi16(bytes);                                               \
                        for (int n = 0; n < N; n++)                                                                   \
                            sum[n][q] = _mm256_add_epi32(sum[n][q], _mm256_madd_epi16(xs[n], ws));                    \
                    }                                                                                                 \
                }                                                                                                     \
            }                                                                                                         \
        for (int n = 0; n < N; n++) store_pairs(p, sum[n], acc[n]);                                                   \
    }

AVX2 static inline __m256i four_words(const uint8_t *x) {
    int32_t word;
    memcpy(&word, x, 4);
    return _mm256_cvtepu8_epi16(_mm_set1_epi32(word));
}

/* Adds each channel's two halves and its start. */
AVX2 static inline void store_pairs(const product *p, const __m256i sum[4], int32_t acc[BLOCK]) {
    for (int h = 0; h < 2; h++) {
        const __m256i both = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sum[2 * h], sum[2 * h + 1]), 0xd8);
        _mm256_storeu_si256((__m256i *)(void *)(acc + 8 * h), both);
    }
    add_start(p, acc);
}
AVX2_TILE(avx2_2, 2)
AVX2_TILE(avx2_1, 1)

AVX2 static void avx2_dense(const product *p, int32_t acc[TILE][BLOCK]) {
    const uint8_t *x = p->x;
    uint32_t place = 0;
    for (; place + 2 <= p->n_places; place += 2) avx2_2(p, x + place * p->x_step, acc + place);
    if (place < p->n_places) avx2_1(p, x + place * p->x_step, acc + place);
}

AVX2 static inline __m256 eight(const uint8_t *q, int32_t zero) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)q));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(wide, _mm256_set1_epi32(zero)));
}

/* Clamps, rounds half to even, adds zero and stores 8 bytes. */
AVX2 static inline void store_eight(uint8_t *out, __m256 y, int32_t low, int32_t high, int32_t zero) {
    y = _mm256_min_ps(_mm256_max_ps(y, _mm256_set1_ps((float)low)), _mm256_set1_ps((float)high));
    const __m256i q = _mm256_add_epi32(_mm256_cvtps_epi32(y), _mm256_set1_epi32(zero));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    _mm_storel_epi64((__m128i *)(void *)out, _mm_packus_epi16(words, words));
}

AVX2 static void avx2_rescale_u8(const int32_t *acc, const rescale *r, uint32_t first, uint32_t n,
                                 const uint8_t *residual, uint8_t *out) {
    uint32_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256i sums = _mm256_loadu_si256((const __m256i *)(const void *)(acc + i));
        __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_loadu_ps(r->multiplier + first + i));
        if (residual) {
            const __m256 other = eight(residual + i, r->residual_zero);
            y = _mm256_add_ps(y, _mm256_mul_ps(other, _mm256_loadu_ps(r->multiplier_2 + first + i)));
        }
        store_eight(out + i, y, r->low, r->high, r->zero);
    }
    for (; i < n; i++) out[i] = rescaled_u8(acc[i], r, first + i, residual ? residual + i : NULL);
}

AVX2 static void avx2_add_u8(const uint8_t *a, const uint8_t *b, uint32_t n, const float m[2], float offset,
                             int32_t qmin, int32_t qmax, uint8_t *out) {
    const __m256 ma = _mm256_set1_ps(m[0]), mb = _mm256_set1_ps(m[1]), start = _mm256_set1_ps(offset);
    uint32_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 inner = _mm256_fmadd_ps(eight(b + i, 0), mb, start);
        store_eight(out + i, _mm256_fmadd_ps(eight(a + i, 0), ma, inner), qmin, qmax, 0);
    }
    for (; i < n; i++) out[i] = (uint8_t)added(a[i], b[i], m, offset, qmin, qmax);
}

static const kernels avx2 = {"avx2", avx2_dense, NULL, avx2_rescale_u8, NULL, avx2_add_u8};
static const kernels avx512vnni = {"avx512vnni", vnni_dense, avx512_depthwise, avx512_rescale_u8, avx512_fixed_u8,
                                   avx512_add_u8};

static int has_avx512vnni(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

const kernels *vector_kernels(const char *name) {
    int any = !strcmp(name, "auto");
    if ((any || !strcmp(name, "avx512vnni")) && has_avx512vnni()) return &avx512vnni;
    if ((any || !strcmp(name, "avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2;
    return NULL;
}

#endif

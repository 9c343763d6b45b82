/* The one file with processor-specific code: vector forms of the frequent cases, chosen when the program runs. */
#include "hqm_internal.h"

static const kernels scalar = {"scalar", NULL, NULL, NULL, NULL};
static const kernels *chosen;

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__)) && !defined(HQM_PORTABLE)
#define HAVE_X86 1
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

static const kernels avx512vnni = {"avx512vnni", vnni_dense, avx512_depthwise, avx512_rescale_u8, avx512_add_u8};

static int has_avx512vnni(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#endif

static const kernels *find(const char *name) {
#ifdef HAVE_X86
    int any = !strcmp(name, "auto");
    if ((any || !strcmp(name, "avx512vnni")) && has_avx512vnni()) return &avx512vnni;
#endif
    return !strcmp(name, "scalar") || !strcmp(name, "auto") ? &scalar : NULL;
}

const kernels *hqm_kernels(void) {
    if (!chosen) chosen = find("auto");
    return chosen;
}

int hqm_use_kernel(const char *name) {
    const kernels *found = name ? find(name) : NULL;
    if (found) chosen = found;
    return found != NULL;
}

const char *hqm_kernel_name(void) { return hqm_kernels()->name; }

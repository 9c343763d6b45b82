/* What the files of vector kernels share. Each is empty on processors not its own, so that one list of sources serves
 * all; with HQM_PORTABLE every one is empty. A kernel reads at most SLACK bytes behind what it is given, and writes the
 * bytes it is asked for alone.
 */
#ifndef HQM_KERNEL_H
#define HQM_KERNEL_H

#include "hqm_internal.h"

#if (defined(__GNUC__) || defined(__clang__)) && !defined(HQM_PORTABLE)
#if defined(__x86_64__)
#define HQM_X86 1
extern const kernels hqm_avx2, hqm_avx512vnni;
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define HQM_NEON 1
extern const kernels hqm_neon;
#endif
#endif

#define INLINE static inline __attribute__((always_inline))

/* The start of each channel of a block, 0 behind the last. */
static inline void starts(const product *p, int32_t start[BLOCK]) {
    memset(start, 0, BLOCK * sizeof *start);
    memcpy(start, p->start, p->n_out * sizeof *start);
}

/* The float32 multipliers of n channels from `first` on; 0 behind them, and where there are none. */
static inline void multipliers(const float *from, const rescale *r, uint32_t first, uint32_t n, float to[BLOCK]) {
    memset(to, 0, BLOCK * sizeof *to);
    for (uint32_t o = 0; from && o < n; o++) to[o] = from[r->is_shared ? 0 : first + o];
}

#ifdef HQM_X86
#include <immintrin.h>

/* The weights of a depthwise block, 4 or 8 bits each, as bytes. */
INLINE __m128i block_bytes(const uint8_t *w, const int bits) {
    if (bits == 8) return _mm_loadu_si128((const __m128i *)(const void *)w);
    const __m128i both = _mm_loadl_epi64((const __m128i *)(const void *)w), mask = _mm_set1_epi8(15);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
    return _mm_sub_epi8(_mm_unpacklo_epi64(_mm_and_si128(both, mask), high), _mm_set1_epi8(8));
}
#endif

#endif

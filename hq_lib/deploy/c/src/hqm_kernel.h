/* What the files of vector kernels share. Each is empty on processors not its own, so that one list of sources serves
 * all; with HQM_PORTABLE every one is empty.
 */
#ifndef HQM_KERNEL_H
#define HQM_KERNEL_H

#include "hqm_internal.h"

#if (defined(__GNUC__) || defined(__clang__)) && !defined(HQM_PORTABLE)
#if defined(__x86_64__)
#define HQM_X86 1
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define HQM_NEON 1
#endif
#endif

#if defined(HQM_X86) || defined(HQM_NEON)
/* The kernels called `name`, the fastest for "auto"; NULL where this processor has none such. */
const kernels *vector_kernels(const char *name);
#else
static inline const kernels *vector_kernels(const char *name) { return (void)name, NULL; }
#endif

/* Adds each channel's start to its sum, modulo 2^32. */
static inline void add_start(const product *p, int32_t acc[BLOCK]) {
    for (uint32_t o = 0; o < p->n_out; o++) acc[o] = (int32_t)((uint32_t)acc[o] + (uint32_t)p->start[o]);
}

/* One element of a rescale_kernel, one at a time behind the last whole vector. */
static inline uint8_t rescaled_u8(int32_t acc, const rescale *r, uint32_t channel, const uint8_t *residual) {
    return (uint8_t)rescaled(r, channel, acc, residual ? (int64_t)*residual - r->residual_zero : 0);
}

#endif

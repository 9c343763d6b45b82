/* Kernels for 64-bit ARM: NEON, which every such processor has. */
#include "hqm_kernel.h"

#ifdef HQM_NEON
#include <arm_neon.h>

/* Four accumulators per channel, one for each of a quadruple's products; 16 channels fill half of the registers. */
static void neon_one(const product *p, const uint8_t *x0, int32_t acc[BLOCK]) {
    int32x4_t sum[BLOCK];
    const int8_t *w = p->w;
    for (int o = 0; o < BLOCK; o++) sum[o] = vdupq_n_s32(0);
    for (uint32_t i = 0; i < p->n_rows; i++)
        for (uint32_t j = 0; j < p->n_columns; j++) {
            const uint8_t *x = x0 + i * p->row_step + j * p->column_step;
            for (uint32_t k = 0; k < p->n4; k++, x += 4, w += 64) {
                uint32_t word;
                memcpy(&word, x, 4);
                const int16x4_t xs = vreinterpret_s16_u16(vget_low_u16(vmovl_u8(vcreate_u8(word))));
                for (int q = 0; q < 8; q++) { /* two channels */
                    const int16x8_t ws = vmovl_s8(vld1_s8(w + 8 * q));
                    sum[2 * q] = vmlal_s16(sum[2 * q], vget_low_s16(ws), xs);
                    sum[2 * q + 1] = vmlal_s16(sum[2 * q + 1], vget_high_s16(ws), xs);
                }
            }
        }
    for (int q = 0; q < 4; q++) {
        const int32x4_t left = vpaddq_s32(sum[4 * q], sum[4 * q + 1]);
        vst1q_s32(acc + 4 * q, vpaddq_s32(left, vpaddq_s32(sum[4 * q + 2], sum[4 * q + 3])));
    }
    add_start(p, acc);
}

static void neon_dense(const product *p, int32_t acc[TILE][BLOCK]) {
    for (uint32_t place = 0; place < p->n_places; place++)
        neon_one(p, (const uint8_t *)p->x + place * p->x_step, acc[place]);
}

/* (q - zero) of four uint8 as float32. */
static inline float32x4_t neon_four(const uint8_t *q, int32_t zero) {
    uint32_t word;
    memcpy(&word, q, 4);
    const uint32x4_t wide = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(word))));
    return vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(wide), vdupq_n_s32(zero)));
}

/* Clamps (NaN to low), rounds half to even, adds zero and stores 4 bytes. */
static inline void neon_store(uint8_t *out, float32x4_t y, int32_t low, int32_t high, int32_t zero) {
    y = vminq_f32(vmaxnmq_f32(y, vdupq_n_f32((float)low)), vdupq_n_f32((float)high));
    const int32x4_t q = vaddq_s32(vcvtnq_s32_f32(y), vdupq_n_s32(zero));
    const uint16x4_t words = vqmovun_s32(q);
    const uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(vqmovn_u16(vcombine_u16(words, words))), 0);
    memcpy(out, &bytes, 4);
}

static void neon_rescale_u8(const int32_t *acc, const rescale *r, uint32_t first, uint32_t n, const uint8_t *residual,
                            uint8_t *out) {
    uint32_t i = 0;
    for (; i + 4 <= n; i += 4) {
        float32x4_t y = vmulq_f32(vcvtq_f32_s32(vld1q_s32(acc + i)), vld1q_f32(r->multiplier + first + i));
        if (residual) {
            const float32x4_t other = neon_four(residual + i, r->residual_zero);
            y = vaddq_f32(y, vmulq_f32(other, vld1q_f32(r->multiplier_2 + first + i)));
        }
        neon_store(out + i, y, r->low, r->high, r->zero);
    }
    for (; i < n; i++) out[i] = rescaled_u8(acc[i], r, first + i, residual ? residual + i : NULL);
}

static void neon_add_u8(const uint8_t *a, const uint8_t *b, uint32_t n, const float m[2], float offset, int32_t qmin,
                        int32_t qmax, uint8_t *out) {
    const float32x4_t ma = vdupq_n_f32(m[0]), mb = vdupq_n_f32(m[1]), start = vdupq_n_f32(offset);
    uint32_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const float32x4_t inner = vfmaq_f32(start, neon_four(b + i, 0), mb);
        neon_store(out + i, vfmaq_f32(inner, neon_four(a + i, 0), ma), qmin, qmax, 0);
    }
    for (; i < n; i++) out[i] = (uint8_t)added(a[i], b[i], m, offset, qmin, qmax);
}

static const kernels neon = {"neon", neon_dense, NULL, neon_rescale_u8, NULL, neon_add_u8};

const kernels *vector_kernels(const char *name) {
    return !strcmp(name, "neon") || !strcmp(name, "auto") ? &neon : NULL;
}

#endif

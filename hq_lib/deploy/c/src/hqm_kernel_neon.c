/* Kernels for 64-bit ARM: NEON, which every such processor has. */
#include "hqm_kernel.h"

#ifdef HQM_NEON
#include <arm_neon.h>

/* Weights 8 q .. 8 q + 7 of the 64 of a quadruple, two channels. */
INLINE int16x8_t two_channels(const uint8_t *w, int q, const int bits) {
    if (bits == 8) return vmovl_s8(vreinterpret_s8_u8(vld1_u8(w + 8 * q)));
    const uint8x8_t both = vld1_u8(w + 8 * (q % 4));
    const uint8x8_t nibbles = q < 4 ? vand_u8(both, vdup_n_u8(15)) : vshr_n_u8(both, 4);
    return vreinterpretq_s16_u16(vsubl_u8(nibbles, vdup_n_u8(8)));
}

/* Four accumulators per channel, one for each of a quadruple's products; 16 channels fill half of the registers. */
INLINE void dense_1(const product *p, const uint8_t *x0, int32_t acc[BLOCK], const int bits) {
    int32x4_t sum[BLOCK];
    const uint8_t *w = p->w;
    for (int o = 0; o < BLOCK; o++) sum[o] = vdupq_n_s32(0);
    for (uint32_t i = 0; i < p->n_rows; i++)
        for (uint32_t j = 0; j < p->n_columns; j++) {
            const uint8_t *x = x0 + i * p->row_step + j * p->column_step;
            for (uint32_t k = 0; k < p->n4; k++, x += 4, w += 8 * bits) {
                uint32_t word;
                memcpy(&word, x, 4);
                const int16x4_t xs = vreinterpret_s16_u16(vget_low_u16(vmovl_u8(vcreate_u8(word))));
                for (int q = 0; q < 8; q++) {
                    const int16x8_t ws = two_channels(w, q, bits);
                    sum[2 * q] = vmlal_s16(sum[2 * q], vget_low_s16(ws), xs);
                    sum[2 * q + 1] = vmlal_s16(sum[2 * q + 1], vget_high_s16(ws), xs);
                }
            }
        }
    for (int q = 0; q < 4; q++) {
        const int32x4_t left = vpaddq_s32(sum[4 * q], sum[4 * q + 1]);
        vst1q_s32(acc + 4 * q, vpaddq_s32(left, vpaddq_s32(sum[4 * q + 2], sum[4 * q + 3])));
    }
    for (uint32_t o = 0; o < p->n_out; o++)
        acc[o] = (int32_t)((uint32_t)p->start[o] + ((uint32_t)acc[o] << p->shift));
}

static void dense_4(const product *p, int32_t acc[TILE][BLOCK]) {
    for (uint32_t q = 0; q < p->n_places; q++) dense_1(p, (const uint8_t *)p->x + p->at[q], acc[q], 4);
}
static void dense_8(const product *p, int32_t acc[TILE][BLOCK]) {
    for (uint32_t q = 0; q < p->n_places; q++) dense_1(p, (const uint8_t *)p->x + p->at[q], acc[q], 8);
}

static inline int32x4_t neon_wide(const uint8_t *q) {
    uint32_t word;
    memcpy(&word, q, 4);
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(word)))));
}

static inline void neon_narrow(uint8_t *out, const int32x4_t q[4]) {
    const uint16x8_t low = vcombine_u16(vqmovun_s32(q[0]), vqmovun_s32(q[1]));
    const uint16x8_t high = vcombine_u16(vqmovun_s32(q[2]), vqmovun_s32(q[3]));
    vst1q_u8(out, vcombine_u8(vqmovn_u16(low), vqmovn_u16(high)));
}

#define ISA
#define LANES 4
#define V(name) neon_##name
#define vi int32x4_t
#define vf float32x4_t
#define load_i(p) vld1q_s32(p)
#define load_f(p) vld1q_f32(p)
#define set_i(x) vdupq_n_s32(x)
#define set_f(x) vdupq_n_f32(x)
#define wide(p) neon_wide(p)
#define to_f(q) vcvtq_f32_s32(q)
#define to_i(y) vcvtnq_s32_f32(y)
#define add_i(a, b) vaddq_s32(a, b)
#define sub_i(a, b) vsubq_s32(a, b)
#define mul_f(a, b) vmulq_f32(a, b)
#define add_f(a, b) vaddq_f32(a, b)
#define fma_f(a, b, c) vfmaq_f32(c, a, b)
#define clamp_f(y, low, high) vminq_f32(vmaxnmq_f32(y, low), high)
#define narrow(out, q) neon_narrow(out, q)
#include "hqm_vector.h"

const kernels hqm_neon = {
    .name = "neon", .dense = {dense_4, dense_8, NULL}, .rescale_u8 = neon_rescale_u8, .add_u8 = neon_add_u8};

#endif

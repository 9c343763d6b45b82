/* Integer networks from one container (.hqm): no allocation, no library beyond C99's, no state but the caller's arena.
 *
 *     hqm_model model;
 *     if (hqm_open(&model, bytes, size) != HQM_OK) ...            bytes: whole file, 4-byte aligned, kept by the caller
 *     hqm_run(&model, arena, image, logits);                      arena: hqm_arena_size(&model) bytes, 4-byte aligned
 *
 * Results equal the NumPy executor's bit for bit. hqm_open checks everything that hqm_run relies on, so that no content
 * of a file makes hqm_run leave the file, the arena, the image or the logits.
 */
#ifndef HQM_H
#define HQM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HQM_VERSION 2u
#define HQM_MAX_RANK 8

typedef enum {
    HQM_OK = 0,
    HQM_BAD_ARGUMENT,  /* null, or bytes or arena not aligned */
    HQM_BAD_HOST,      /* big-endian */
    HQM_BAD_MAGIC,     /* no .hqm file */
    HQM_BAD_VERSION,   /* of another version */
    HQM_BAD_SIZE,      /* truncated, or longer than it says */
    HQM_BAD_CRC,       /* altered */
    HQM_BAD_HEADER,    /* counts, offsets or sizes that cannot be */
    HQM_BAD_TENSOR,    /* see hqm_model.where */
    HQM_BAD_OP,        /* see hqm_model.where */
    HQM_NAN,           /* the image holds NaN */
    HQM_NO_PIXELS      /* the container knows no mean and std: give float images */
} hqm_status;

typedef enum { HQM_UINT8, HQM_UINT16, HQM_INT32, HQM_FLOAT32 } hqm_dtype;

typedef struct {
    const uint8_t *bytes;
    uint32_t n_ops, where; /* where: index of the tensor or operation that hqm_open refused */
} hqm_model;

typedef struct {
    uint32_t rank, shape[HQM_MAX_RANK], n; /* n: elements */
    hqm_dtype dtype;
} hqm_shape;

hqm_status hqm_open(hqm_model *model, const void *bytes, size_t size);
size_t hqm_arena_size(const hqm_model *model);
hqm_shape hqm_input(const hqm_model *model);  /* (C, H, W) */
hqm_shape hqm_output(const hqm_model *model); /* (n_classes,) as a rule */
int hqm_takes_pixels(const hqm_model *model);
const char *hqm_meta(const hqm_model *model, size_t *size); /* JSON, not terminated */

/* image: float32 (C, H, W), normalised as in training; pixels: uint8 (C, H, W). logits: float32, hqm_output().n */
hqm_status hqm_run(const hqm_model *model, void *arena, const float *image, float *logits);
hqm_status hqm_run_pixels(const hqm_model *model, void *arena, const uint8_t *pixels, float *logits);
/* operation i of model.n_ops alone, all before it having been run in this arena: to see where the time goes */
hqm_status hqm_run_operation(const hqm_model *model, uint32_t i, void *arena, const float *image);

const char *hqm_message(hqm_status status);
size_t hqm_model_size(void); /* sizeof(hqm_model), for callers in other languages */

/* Kernels: the fastest that this processor has, unless one is asked for; returns 0 where there is no such kernel here.
 * Names: "auto", "scalar", "avx2", "avx512vnni" (x86-64), "neon" (64-bit ARM). All give the same bits. Process-wide.
 * "avx2" takes up to 256 KiB of stack, the others 16 KiB, and with HQM_PORTABLE, which leaves "scalar" alone, 4 KiB. */
int hqm_use_kernel(const char *name);
const char *hqm_kernel_name(void);

/* Threads that share the rows of a large layer, 1 to begin with: the bits stay. Returns 0 where there are none to be had
 * (without HQM_THREADS and POSIX threads at all). Process-wide. */
int hqm_use_threads(uint32_t n);

#ifdef __cplusplus
}
#endif

#endif

/* The network and one image: constants. */
#ifndef @upper@_H
#define @upper@_H

#include <stdint.h>

#define @upper@_ARENA_SIZE @arena@u
#define @upper@_N_LOGITS @n_logits@u

#ifdef __cplusplus
extern "C" {
#endif
extern const uint32_t @name@_model[@n_words@];
extern const @type@ @name@_image[@n_values@];
extern const uint32_t @name@_logits[@n_logits@]; /* the bits of what the image's float32 logits must be */
#ifdef __cplusplus
}
#endif

#endif

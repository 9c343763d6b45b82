/* Image and label files, one record at a time: CIFAR-10 binary, IDX, raw. */
#ifndef HQM_IMAGES_H
#define HQM_IMAGES_H

#include <stdio.h>

#include "hqm.h"

typedef enum { CIFAR10, IDX, RAW_U8, RAW_F32 } image_format;

typedef struct {
    FILE *file;
    const char *path;
    image_format format;
    size_t n_values; /* of one image */
    uint64_t n_images;
} image_file;

/* Both return 0, or print what is wrong with which file and return an exit code. */
int images_open(image_file *f, const char *path, image_format format, const hqm_shape *shape);
/* values: n_values floats (RAW_F32) or bytes; label: set from a CIFAR-10 record, else left alone */
int images_next(image_file *f, void *values, int *label);

/* Labels of an IDX file, or one byte each; *n of them are there. */
FILE *labels_open(const char *path, int is_idx, uint64_t *n);

enum { EXIT_OK = 0, EXIT_USAGE = 2, EXIT_FILE = 3, EXIT_MODEL = 4, EXIT_IMAGE = 5, EXIT_MEMORY = 6 };

#endif

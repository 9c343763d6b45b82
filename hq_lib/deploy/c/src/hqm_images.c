#include "hqm_images.h"

static int complain(const char *path, const char *what, int code) {
    fprintf(stderr, "hqm: %s: %s\n", path, what);
    return code;
}

/* Bytes from here to the end, or -1. */
static int64_t rest_of(FILE *file) {
    long here = ftell(file), end;
    if (here < 0 || fseek(file, 0, SEEK_END)) return -1;
    end = ftell(file);
    return end < 0 || fseek(file, here, SEEK_SET) ? -1 : (int64_t)end - here;
}

static uint32_t big_endian(const uint8_t *b) {
    return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

/* An IDX header of unsigned bytes: the dimensions, or 0 of them where it is none. */
static uint32_t idx_header(FILE *file, uint32_t dims[4]) {
    uint8_t b[4];
    if (fread(b, 1, 4, file) != 4 || b[0] || b[1] || b[2] != 8 || b[3] < 1 || b[3] > 4) return 0;
    uint32_t rank = b[3];
    for (uint32_t i = 0; i < rank; i++) {
        if (fread(b, 1, 4, file) != 4) return 0;
        dims[i] = big_endian(b);
    }
    return rank;
}

/* (N, H, W) or (N, C, H, W) of the model's shape. */
static int idx_fits(FILE *file, const hqm_shape *s, uint64_t *n) {
    uint32_t dims[4], rank = idx_header(file, dims);
    if (rank < 3) return 0;
    *n = dims[0];
    uint32_t channels = rank == 4 ? dims[1] : 1;
    return channels == s->shape[0] && dims[rank - 2] == s->shape[1] && dims[rank - 1] == s->shape[2];
}

int images_open(image_file *f, const char *path, image_format format, const hqm_shape *shape) {
    f->path = path, f->format = format, f->n_values = shape->n, f->n_images = 0;
    f->file = fopen(path, "rb");
    if (!f->file) return complain(path, "cannot be opened", EXIT_FILE);
    uint64_t each = format == CIFAR10 ? f->n_values + 1 : format == RAW_F32 ? f->n_values * 4 : f->n_values;
    if (format == CIFAR10 && (shape->shape[0] != 3 || shape->shape[1] != 32 || shape->shape[2] != 32))
        return complain(path, "the model does not take CIFAR-10's 3 x 32 x 32 images", EXIT_IMAGE);
    if (format == IDX && !idx_fits(f->file, shape, &f->n_images))
        return complain(path, "not an IDX file of unsigned bytes with images of the model's shape", EXIT_IMAGE);
    int64_t rest = rest_of(f->file);
    if (rest < 0) return complain(path, "cannot be read (a file is needed, not a stream)", EXIT_FILE);
    if (format != IDX) f->n_images = (uint64_t)rest / each;
    if (!f->n_images || (uint64_t)rest / each != f->n_images || (uint64_t)rest % each)
        return complain(path, "empty, truncated, or no whole number of images of the model's shape", EXIT_IMAGE);
    return EXIT_OK;
}

int images_next(image_file *f, void *values, int *label) {
    size_t size = f->format == RAW_F32 ? 4 : 1;
    if (f->format == CIFAR10) {
        *label = fgetc(f->file);
        if (*label == EOF || *label > 9) return complain(f->path, "a label is not 0..9: no CIFAR-10 binary", EXIT_IMAGE);
    }
    return fread(values, size, f->n_values, f->file) == f->n_values ? EXIT_OK
                                                                    : complain(f->path, "ends too early", EXIT_IMAGE);
}

FILE *labels_open(const char *path, int is_idx, uint64_t *n) {
    FILE *file = fopen(path, "rb");
    uint32_t dims[4] = {0};
    if (!file) {
        complain(path, "cannot be opened", EXIT_FILE);
        return NULL;
    }
    int ok = !is_idx || idx_header(file, dims) == 1;
    int64_t rest = ok ? rest_of(file) : -1;
    *n = is_idx ? dims[0] : (uint64_t)(rest < 0 ? 0 : rest);
    if (ok && rest >= 0 && (uint64_t)rest >= *n) return file;
    complain(path, "not a file of labels, or truncated", EXIT_IMAGE);
    fclose(file);
    return NULL;
}

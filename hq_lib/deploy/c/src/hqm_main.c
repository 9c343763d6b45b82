/* The program hqm: a container and image files in, accuracy and time out. */
#define _POSIX_C_SOURCE 199309L
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "hqm_images.h"
#include <string.h>

static const char HELP[] =
    "usage: hqm MODEL.hqm FORMAT FILE... [options]\n"
    "\n"
    "formats\n"
    "  --cifar10     CIFAR-10 binary files: label byte, then 3072 pixels, per record\n"
    "  --idx         IDX files of unsigned bytes, (N, H, W) or (N, C, H, W)\n"
    "  --raw-u8      pixels, one byte each, (C, H, W) per image, nothing else\n"
    "  --raw-f32     float32 little-endian, (C, H, W) per image, normalised as in training\n"
    "  --info        no images: describe the container\n"
    "options\n"
    "  --labels FILE   labels of the images: IDX with --idx, else one byte each\n"
    "  --logits FILE   write the logits, float32 per class and image\n"
    "  --n N           at most N images\n"
    "  --kernel NAME   auto (default), scalar, avx2, avx512vnni or neon: equal bits, other speed\n"
    "  --help          this text\n"
    "\n"
    "exit codes: 0 done, 2 usage, 3 a file cannot be read or written, 4 no sound container,\n"
    "            5 no sound images or labels, 6 out of memory\n";

typedef struct {
    const char *model, *labels, *logits;
    const char **files;
    int n_files, info;
    int format; /* image_format, or -1 */
    uint64_t n;
} options;

typedef struct {
    hqm_model model;
    hqm_shape in, out;
    void *bytes, *raw_arena, *arena, *image;
    float *logits;
    FILE *labels, *written;
    uint64_t n_labels, n_images, n_labelled, n_right;
    double seconds;
} session;

static int usage(const char *what, const char *which) {
    fprintf(stderr, "hqm: %s%s (hqm --help tells more)\n", what, which);
    return EXIT_USAGE;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int set_format(options *o, const char *word) {
    static const char *const names[] = {"--cifar10", "--idx", "--raw-u8", "--raw-f32"};
    for (int k = 0; k < 4; k++)
        if (!strcmp(word, names[k])) {
            if (o->format >= 0) return usage("two formats: ", word);
            o->format = k;
            return -1;
        }
    return usage("unknown option ", word);
}

static int set_value(options *o, const char *word, const char *value) {
    char *end = NULL;
    if (!strcmp(word, "--labels")) o->labels = value;
    else if (!strcmp(word, "--logits")) o->logits = value;
    else if (!strcmp(word, "--kernel")) {
        if (!hqm_use_kernel(value)) return usage("no such kernel on this processor: ", value);
    } else {
        errno = 0;
        o->n = strtoull(value, &end, 10);
        if (errno || *end || *value < '0' || *value > '9' || !o->n) return usage("--n takes a number of images, not ", value);
    }
    return -1;
}

/* Returns an exit code, or -1 to go on. */
static int parse(options *o, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        const char *word = argv[i];
        int code = -1;
        if (!strcmp(word, "--help") || !strcmp(word, "-h")) {
            fputs(HELP, stdout);
            return EXIT_OK;
        }
        if (!strcmp(word, "--info")) o->info = 1;
        else if (!strcmp(word, "--labels") || !strcmp(word, "--logits") || !strcmp(word, "--n") || !strcmp(word, "--kernel")) {
            if (++i == argc) return usage("a value is missing after ", word);
            code = set_value(o, word, argv[i]);
        } else if (!strncmp(word, "--", 2)) code = set_format(o, word);
        else if (!o->model) o->model = word;
        else o->files[o->n_files++] = word;
        if (code >= 0) return code;
    }
    if (!o->model) return usage("no model given", "");
    if (!o->info && (o->format < 0 || !o->n_files)) return usage("a format and image files are needed", "");
    return o->labels && o->format == CIFAR10 ? usage("CIFAR-10 files hold their own labels", "") : -1;
}

static int read_model(session *s, const char *path) {
    FILE *file = fopen(path, "rb");
    long size = -1;
    int readable = file && (fgetc(file) != EOF || !ferror(file)); /* a folder can be opened, but not read */
    if (readable && !fseek(file, 0, SEEK_END)) size = ftell(file);
    if (size < 0 || fseek(file, 0, SEEK_SET)) {
        fprintf(stderr, "hqm: %s: cannot be read\n", path);
        if (file) fclose(file);
        return EXIT_FILE;
    }
    if (size > 1L << 30) {
        fprintf(stderr, "hqm: %s: %s\n", path, hqm_message(HQM_BAD_SIZE));
        fclose(file);
        return EXIT_MODEL;
    }
    s->bytes = malloc(size ? (size_t)size : 1);
    int whole = s->bytes && fread(s->bytes, 1, (size_t)size, file) == (size_t)size;
    fclose(file);
    if (!whole) {
        fprintf(stderr, "hqm: %s: cannot be read, or no memory for it\n", path);
        return s->bytes ? EXIT_FILE : EXIT_MEMORY;
    }
    hqm_status status = hqm_open(&s->model, s->bytes, (size_t)size);
    if (status == HQM_OK) return EXIT_OK;
    fprintf(stderr, "hqm: %s: %s", path, hqm_message(status));
    if (status == HQM_BAD_TENSOR || status == HQM_BAD_OP) fprintf(stderr, " (number %u)", (unsigned)s->model.where);
    fputc('\n', stderr);
    return EXIT_MODEL;
}

static int prepare(session *s, const options *o) {
    s->in = hqm_input(&s->model), s->out = hqm_output(&s->model);
    s->raw_arena = calloc(hqm_arena_size(&s->model) + 64, 1);
    s->image = malloc((size_t)s->in.n * 4), s->logits = malloc((size_t)s->out.n * 4);
    if (!s->raw_arena || !s->image || !s->logits) {
        fprintf(stderr, "hqm: no memory for an arena of %lu bytes\n", (unsigned long)hqm_arena_size(&s->model));
        return EXIT_MEMORY;
    }
    s->arena = (uint8_t *)s->raw_arena + (64 - (uintptr_t)s->raw_arena % 64);
    if (o->format != RAW_F32 && !o->info && !hqm_takes_pixels(&s->model)) {
        fprintf(stderr, "hqm: %s: %s (--raw-f32)\n", o->model, hqm_message(HQM_NO_PIXELS));
        return EXIT_IMAGE;
    }
    if (o->labels && !(s->labels = labels_open(o->labels, o->format == IDX, &s->n_labels))) return EXIT_IMAGE;
    if (o->logits && !(s->written = fopen(o->logits, "wb"))) {
        fprintf(stderr, "hqm: %s: cannot be written\n", o->logits);
        return EXIT_FILE;
    }
    return EXIT_OK;
}

static void describe(const session *s) {
    size_t size;
    const char *meta = hqm_meta(&s->model, &size);
    printf("image       %u x %u x %u\nlogits      %u\noperations  %u\narena_KiB   %.1f\npixels      %s\nmeta        %.*s\n",
           (unsigned)s->in.shape[0], (unsigned)s->in.shape[1], (unsigned)s->in.shape[2], (unsigned)s->out.n,
           (unsigned)s->model.n_ops, (double)hqm_arena_size(&s->model) / 1024,
           hqm_takes_pixels(&s->model) ? "yes" : "no", (int)size, meta);
}

static void score(session *s, int label) {
    uint32_t best = 0;
    for (uint32_t k = 1; k < s->out.n; k++)
        if (s->logits[k] > s->logits[best]) best = k;
    s->n_labelled++;
    s->n_right += label == (int)best;
}

static int run_one(session *s, image_file *f) {
    int label = -1, code = images_next(f, s->image, &label);
    if (code) return code;
    if (s->labels && (label = fgetc(s->labels)) == EOF) {
        fprintf(stderr, "hqm: fewer labels than images\n");
        return EXIT_IMAGE;
    }
    double start = now();
    hqm_status status = f->format == RAW_F32 ? hqm_run(&s->model, s->arena, s->image, s->logits)
                                             : hqm_run_pixels(&s->model, s->arena, s->image, s->logits);
    s->seconds += now() - start;
    if (status != HQM_OK) {
        fprintf(stderr, "hqm: %s: image %lu: %s\n", f->path, (unsigned long)s->n_images, hqm_message(status));
        return EXIT_IMAGE;
    }
    s->n_images++;
    if (label >= 0) score(s, label);
    if (s->written && fwrite(s->logits, 4, s->out.n, s->written) != s->out.n) {
        fprintf(stderr, "hqm: the logits cannot be written\n");
        return EXIT_FILE;
    }
    return EXIT_OK;
}

static int run_files(session *s, const options *o) {
    for (int k = 0; k < o->n_files; k++) {
        image_file f;
        int code = images_open(&f, o->files[k], (image_format)o->format, &s->in);
        for (uint64_t i = 0; !code && i < f.n_images && s->n_images < o->n; i++) code = run_one(s, &f);
        if (f.file) fclose(f.file);
        if (code) return code;
    }
    printf("n_images        %lu\n", (unsigned long)s->n_images);
    if (s->n_labelled) printf("acc_pct         %.4f\n", 100.0 * (double)s->n_right / (double)s->n_labelled);
    printf("ms_per_image    %.4f\nkernel          %s\n", 1e3 * s->seconds / (double)s->n_images, hqm_kernel_name());
    return EXIT_OK;
}

static int close_all(session *s, int code) {
    if (s->labels) fclose(s->labels);
    if (s->written && fclose(s->written) && !code) {
        fprintf(stderr, "hqm: the logits cannot be written\n");
        code = EXIT_FILE;
    }
    free(s->bytes), free(s->raw_arena), free(s->image), free(s->logits);
    return code;
}

int main(int argc, char **argv) {
    options o = {NULL, NULL, NULL, NULL, 0, 0, -1, UINT64_MAX};
    session s;
    memset(&s, 0, sizeof s);
    o.files = malloc((size_t)(argc + 1) * sizeof *o.files);
    int code = o.files ? parse(&o, argc, argv) : EXIT_MEMORY;
    if (code < 0) {
        code = read_model(&s, o.model);
        if (!code) code = prepare(&s, &o);
        if (!code && o.info) describe(&s);
        else if (!code) code = run_files(&s, &o);
        code = close_all(&s, code);
    }
    free((void *)o.files);
    return code;
}

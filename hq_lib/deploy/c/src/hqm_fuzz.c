/* Test program: opens, and where that succeeds runs, every container of a stream of (size as 4 bytes, container).
 * Each lies in memory of exactly its size, so that AddressSanitizer sees any step outside. Prints opened / refused. */
#include <stdio.h>
#include <stdlib.h>

#include "hqm.h"

static void run(const hqm_model *model) {
    size_t n_in = hqm_input(model).n, n_out = hqm_output(model).n, n_arena = hqm_arena_size(model);
    float *image = calloc(n_in, 4), *logits = malloc(n_out * 4);
    uint8_t *pixels = calloc(n_in, 1);
    void *arena = calloc(n_arena, 1);
    if (image && logits && arena && pixels) {
        for (size_t i = 0; i < n_in; i++) image[i] = (float)(i % 17) - 8.0f, pixels[i] = (uint8_t)(i * 7);
        (void)hqm_run(model, arena, image, logits);
        (void)hqm_run_pixels(model, arena, pixels, logits);
    }
    free(image), free(logits), free(arena), free(pixels);
}

int main(int argc, char **argv) {
    FILE *stream = argc == 3 ? fopen(argv[1], "rb") : NULL;
    uint32_t size, n_opened = 0, n_refused = 0;
    if (!stream || !hqm_use_kernel(argv[2])) return 2;
    while (fread(&size, 4, 1, stream) == 1) {
        uint8_t *bytes = malloc(size ? size : 1);
        hqm_model model;
        if (!bytes || fread(bytes, 1, size, stream) != size) return 2;
        if (hqm_open(&model, bytes, size) == HQM_OK) n_opened++, run(&model);
        else n_refused++;
        free(bytes);
    }
    fclose(stream);
    printf("%u %u\n", (unsigned)n_opened, (unsigned)n_refused);
    return 0;
}

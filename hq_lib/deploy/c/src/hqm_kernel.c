/* The choice of kernels, made when the program runs. */
#include "hqm_kernel.h"

static const kernels scalar = {"scalar", NULL, NULL, NULL, NULL, NULL};
static const kernels *chosen;

static const kernels *find(const char *name) {
    const kernels *found = vector_kernels(name);
    if (!found && (!strcmp(name, "scalar") || !strcmp(name, "auto"))) found = &scalar;
    return found;
}

const kernels *hqm_kernels(void) {
    if (!chosen) chosen = find("auto");
    return chosen;
}

int hqm_use_kernel(const char *name) {
    const kernels *found = name ? find(name) : NULL;
    if (found) chosen = found;
    return found != NULL;
}

const char *hqm_kernel_name(void) { return hqm_kernels()->name; }

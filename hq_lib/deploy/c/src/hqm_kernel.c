/* The choice of kernels, made when the program runs. */
#include "hqm_kernel.h"

static const kernels scalar = {.name = "scalar"};
static const kernels *chosen;

/* The fastest first. */
static const kernels *const all[] = {
#ifdef HQM_X86
    &hqm_avx512vnni, &hqm_avx2,
#endif
#ifdef HQM_NEON
    &hqm_neon,
#endif
    &scalar};

static int runs_here(const kernels *k) {
#ifdef HQM_X86
    if (k == &hqm_avx512vnni)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (k == &hqm_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return k != NULL;
}

static const kernels *find(const char *name) {
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if ((!strcmp(name, "auto") || !strcmp(name, all[i]->name)) && runs_here(all[i])) return all[i];
    return NULL;
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

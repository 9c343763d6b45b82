/* Runs the network on one image and prints its class; 1: the network cannot run here, 2: other logits than NumPy's. */
#include <stdio.h>
#include <string.h>

#include "hqm.h"
#include "@name@.h"

static uint32_t arena[@upper@_ARENA_SIZE / 4];

int main(void) {
    static float logits[@upper@_N_LOGITS];
    hqm_model model;
    unsigned best = 0;
    hqm_status status = hqm_open(&model, @name@_model, sizeof @name@_model);
    if (status == HQM_OK) status = @call@(&model, arena, @name@_image, logits);
    if (status != HQM_OK) {
        printf("%s\n", hqm_message(status));
        return 1;
    }
    for (unsigned k = 1; k < @upper@_N_LOGITS; k++)
        if (logits[k] > logits[best]) best = k;
    printf("class %u\n", best);
    if (!memcmp(logits, @name@_logits, sizeof logits)) return 0;
    printf("the logits are not those of the network\n");
    return 2;
}

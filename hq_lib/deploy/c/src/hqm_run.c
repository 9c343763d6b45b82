/* hqm_run: the operations in their order, and everything that is not a layer. */
#include "hqm_internal.h"

enum { CHUNK = 128 }; /* integers made side by side, in vectors, before they go to their places */

/* q[i] = t's element at + i */
static void load_ints(int32_t *restrict q, uint32_t n, const tensor *t, size_t at) {
    if (t->size == 1) {
        const uint8_t *from = t->data + at;
        for (uint32_t i = 0; i < n; i++) q[i] = from[i];
    } else {
        const uint16_t *from = (const uint16_t *)(const void *)t->data + at;
        for (uint32_t i = 0; i < n; i++) q[i] = from[i];
    }
}

/* t's element at + i * step = q[i] */
static void store_ints(const int32_t *restrict q, uint32_t n, const tensor *t, size_t at, size_t step) {
    if (t->size == 1) {
        uint8_t *restrict to = t->data + at;
        for (uint32_t i = 0; i < n; i++) to[i * step] = (uint8_t)q[i];
    } else {
        uint16_t *restrict to = (uint16_t *)(void *)t->data + at;
        for (uint32_t i = 0; i < n; i++) to[i * step] = (uint16_t)q[i];
    }
}

static hqm_status run_quantize(const float *image, const tensor *y) {
    const float scale = y->scale[0], low = (float)(y->qmin - y->zero), high = (float)(y->qmax - y->zero);
    const uint32_t channels = y->shape[0], plane = y->n / channels;
    int32_t q[CHUNK];
    for (uint32_t c = 0; c < channels; c++)
        for (uint32_t i = 0, n; i < plane; i += n, image += n) {
            int is_nan = 0;
            n = at_most(CHUNK, plane - i);
            for (uint32_t k = 0; k < n; k++) {
                float x = image[k] / scale; /* clamp_float in two steps, each one instruction of a vector unit */
                is_nan |= image[k] != image[k];
                x = x > low ? x : low, x = x < high ? x : high;
                q[k] = round_half_even(x) + y->zero;
            }
            if (is_nan) return HQM_NAN;
            store_ints(q, n, y, (size_t)i * channels + c, channels);
        }
    return HQM_OK;
}

static hqm_status run_table(const hqm_model *m, const uint32_t *op, const uint8_t *pixels, const tensor *y) {
    if (!op[O_TABLE]) return HQM_NO_PIXELS;
    const uint16_t *table = (const uint16_t *)(const void *)(m->bytes + op[O_TABLE]);
    const uint32_t channels = y->shape[0], plane = y->n / channels;
    for (uint32_t c = 0; c < channels; c++, table += 256, pixels += plane)
        if (y->size == 1) {
            uint8_t *restrict to = y->data + c;
            for (size_t i = 0; i < plane; i++) to[i * channels] = (uint8_t)table[pixels[i]];
        } else {
            uint16_t *restrict to = (uint16_t *)(void *)y->data + c;
            for (size_t i = 0; i < plane; i++) to[i * channels] = table[pixels[i]];
        }
    return HQM_OK;
}

/* The sum as a requantization of a with residual b. */
static void add_fixed(rescale *r, const tensor *a, const tensor *b, const tensor *y) {
    int32_t acc[TILE][BLOCK], *q = acc[0];
    const kernels *fast = hqm_kernels();
    uint32_t at = 0;
    r->is_shared = 1, r->residual_dtype = b->dtype, r->residual_zero = b->zero;
    if (fast->fixed_add_u8 && a->size == 1 && b->size == 1 && y->size == 1)
        at = fast->fixed_add_u8(a->data, a->zero, b->data, y->n, r, y->data);
    for (uint32_t n; at < y->n; at += n) {
        n = at_most(TILE * BLOCK, y->n - at);
        load_ints(q, n, a, at);
        for (uint32_t i = 0; i < n; i++) q[i] -= a->zero;
        rescale_row(acc, n, r, b->data, y, at);
    }
}

void run_add(const hqm_model *m, const uint32_t *op, const tensor *a, const tensor *b, const tensor *y) {
    rescale r = rescale_of(m, op, y);
    const float ms[2] = {r.multiplier[0], r.multiplier_2[0]}, offset = float_of(op[O_OFFSET]);
    const kernels *fast = hqm_kernels();
    if (!r.is_fixed && fast->add_u8 && a->size == 1 && b->size == 1 && y->size == 1) {
        fast->add_u8(a->data, b->data, y->n, ms, offset, y->qmin, y->qmax, y->data);
        return;
    }
    if (r.is_fixed) {
        add_fixed(&r, a, b, y);
        return;
    }
    int32_t qa[CHUNK / 2], qb[CHUNK / 2];
    for (uint32_t i = 0, n; i < y->n; i += n) {
        n = at_most(CHUNK / 2, y->n - i);
        load_ints(qa, n, a, i), load_ints(qb, n, b, i);
        for (uint32_t k = 0; k < n; k++) qa[k] = added(qa[k], qb[k], ms, offset, y->qmin, y->qmax);
        store_ints(qa, n, y, i, 1);
    }
}

/* Logits in the order of the record: (C, H, W), or row-major with channels last, which is the order of the arena. */
static void write_logits(const tensor *y, float *logits) {
    const int is_map = y->rank == 3;
    const uint32_t channels = y->shape[is_map ? 0 : y->rank - 1], places = y->n / channels;
    for (uint32_t c = 0; c < channels; c++)
        for (uint32_t i = 0; i < places; i++) {
            const size_t at = (size_t)i * channels + c;
            const float real = (float)(load_int(y->data, y->dtype, at) - y->zero);
            logits[is_map ? (size_t)c * places + i : at] = real * y->scale[y->n_scales > 1 ? c : 0];
        }
}

static hqm_status run_operation(const hqm_model *m, uint32_t i, void *arena, const float *image, const uint8_t *pixels) {
    const uint32_t *op = op_at(m, i);
    tensor x = tensor_at(m, input_of(m, op, 0), arena), y = tensor_at(m, i + 1, arena), second = x;
    int has_second = op[O_N_INPUTS] > 1;
    if (has_second) second = tensor_at(m, input_of(m, op, 1), arena);
    switch (op[O_KIND]) {
    case QUANTIZE: return image ? run_quantize(image, &y) : run_table(m, op, pixels, &y);
    case CONV: case LINEAR: run_layer(m, op, &x, has_second ? &second : NULL, &y, arena); break;
    case ADD: run_add(m, op, &x, &second, &y); break;
    case TABLE: run_lookup(m, op, &x, &y); break;
    case MUL: run_mul(m, op, &x, &second, &y); break;
    case MAX_POOL: run_max_pool(op, &x, &y); break;
    case AVG_POOL: run_avg_pool(m, op, &x, &y); break;
    case CONCAT: run_concat(m, op, &y, arena); break;
    default: run_move(op, &x, &y); break;
    }
    return HQM_OK;
}

static hqm_status run_all(const hqm_model *m, void *arena, const float *image, const uint8_t *pixels, float *logits) {
    if (!m || !m->n_ops || !arena || (uintptr_t)arena % 4 || !logits || (!image && !pixels)) return HQM_BAD_ARGUMENT;
    for (uint32_t i = 0; i < m->n_ops; i++) {
        hqm_status status = run_operation(m, i, arena, image, pixels);
        if (status != HQM_OK) return status;
    }
    tensor y = tensor_at(m, header_of(m)[H_OUTPUT], arena);
    write_logits(&y, logits);
    return HQM_OK;
}

hqm_status hqm_run_operation(const hqm_model *m, uint32_t i, void *arena, const float *image) {
    if (!m || i >= m->n_ops || !arena || (uintptr_t)arena % 4 || !image) return HQM_BAD_ARGUMENT;
    return run_operation(m, i, arena, image, NULL);
}

hqm_status hqm_run(const hqm_model *m, void *arena, const float *image, float *logits) {
    return image ? run_all(m, arena, image, NULL, logits) : HQM_BAD_ARGUMENT;
}

hqm_status hqm_run_pixels(const hqm_model *m, void *arena, const uint8_t *pixels, float *logits) {
    return pixels ? run_all(m, arena, NULL, pixels, logits) : HQM_BAD_ARGUMENT;
}

static hqm_shape shape_of(const hqm_model *m, uint32_t i) {
    tensor t = tensor_at(m, i, NULL);
    hqm_shape s;
    s.rank = t.rank, s.n = t.n, s.dtype = t.dtype;
    memcpy(s.shape, t.shape, sizeof s.shape);
    return s;
}

hqm_shape hqm_input(const hqm_model *m) { return shape_of(m, 0); }
hqm_shape hqm_output(const hqm_model *m) { return shape_of(m, header_of(m)[H_OUTPUT]); }
size_t hqm_arena_size(const hqm_model *m) { return header_of(m)[H_ARENA]; }
size_t hqm_model_size(void) { return sizeof(hqm_model); }

int hqm_takes_pixels(const hqm_model *m) {
    for (uint32_t i = 0; i < m->n_ops; i++)
        if (op_at(m, i)[O_KIND] == QUANTIZE && !op_at(m, i)[O_TABLE]) return 0;
    return 1;
}

const char *hqm_meta(const hqm_model *m, size_t *size) {
    *size = header_of(m)[H_META_SIZE];
    return (const char *)m->bytes + header_of(m)[H_META];
}

const char *hqm_message(hqm_status status) {
    static const char *const messages[] = {
        "ok", "null or misaligned argument", "big-endian processors are not supported", "not a .hqm container",
        "a container of another version: export it again", "truncated, or not of the size that it says",
        "its bytes are not those that were written (CRC-32 differs)", "its header cannot be", "a tensor cannot be",
        "an operation cannot be", "the image holds NaN", "it knows no mean and std of pixels: give float images"};
    return (unsigned)status < sizeof messages / sizeof *messages ? messages[status] : "unknown status";
}

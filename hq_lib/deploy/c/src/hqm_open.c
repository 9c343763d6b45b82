/* hqm_open: everything a container promises, checked before anything runs. */
#include "hqm_internal.h"

enum { LIMIT = 1 << 30 };

/* a * b, or LIMIT * LIMIT (more than anything allowed) where that is larger */
static uint64_t times(uint64_t a, uint64_t b) {
    const uint64_t most = (uint64_t)LIMIT * LIMIT;
    return b && a > most / b ? most : a * b;
}

/* Does [offset, offset + n * size) lie in the file behind the header, at a multiple of 4? */
static int holds(const hqm_model *m, uint32_t offset, uint64_t n, uint64_t size) {
    uint64_t bytes = times(n, size), total = header_of(m)[H_SIZE];
    return offset % 4 == 0 && offset >= H_WORDS * 4 && offset <= total && bytes <= total - offset;
}

static uint32_t size_of(uint32_t dtype) { return dtype == HQM_UINT8 ? 1 : dtype == HQM_UINT16 ? 2 : 4; }

static int is_narrow(const tensor *t) { return t->dtype == HQM_UINT8 || t->dtype == HQM_UINT16; }

tensor tensor_at(const hqm_model *m, uint32_t i, void *arena) {
    const uint32_t *w = words_at(m, header_of(m)[H_TENSORS]) + (size_t)i * T_WORDS;
    tensor t;
    memset(&t, 0, sizeof t);
    t.rank = w[T_RANK], t.n = 1, t.dtype = (hqm_dtype)w[T_DTYPE], t.size = size_of(w[T_DTYPE]);
    for (uint32_t a = 0; a < t.rank; a++) t.n *= t.shape[a] = w[T_SHAPE + a];
    size_t step = 1;
    for (uint32_t a = t.rank; a-- > 0; step *= t.shape[a]) t.stride[a] = step;
    if (t.rank == 3) t.stride[0] = 1, t.stride[1] = (size_t)t.shape[2] * t.shape[0], t.stride[2] = t.shape[0];
    t.qmin = (int32_t)w[T_QMIN], t.qmax = (int32_t)w[T_QMAX], t.zero = (int32_t)w[T_ZERO];
    t.scale = floats_at(m, w[T_SCALES]), t.n_scales = w[T_N_SCALES];
    t.data = arena && i ? (uint8_t *)arena + w[T_ARENA] : NULL;
    return t;
}

static int tensor_is_sound(const hqm_model *m, uint32_t i) {
    const uint32_t *h = header_of(m), *w = words_at(m, h[H_TENSORS]) + (size_t)i * T_WORDS;
    static const int64_t most[] = {255, 65535, INT32_MAX, 0}, least[] = {0, 0, INT32_MIN, 0};
    uint64_t n = 1;
    if (w[T_RANK] < 1 || w[T_RANK] > HQM_MAX_RANK || w[T_DTYPE] > HQM_FLOAT32) return 0;
    for (uint32_t a = 0; a < w[T_RANK]; a++) {
        n = times(n, w[T_SHAPE + a]);
        if (!w[T_SHAPE + a] || n > MAX_ELEMENTS) return 0;
    }
    int64_t low = least[w[T_DTYPE]], high = most[w[T_DTYPE]];
    int64_t qmin = (int32_t)w[T_QMIN], qmax = (int32_t)w[T_QMAX], zero = (int32_t)w[T_ZERO];
    if (qmin < low || qmin > qmax || qmax > high || zero < low || zero > high) return 0;
    if (w[T_DTYPE] >= HQM_INT32 && zero) return 0;
    uint32_t channels = w[T_RANK] == 3 ? w[T_SHAPE] : w[T_SHAPE + w[T_RANK] - 1];
    if (w[T_N_SCALES] != 1 && (w[T_N_SCALES] != channels || w[T_DTYPE] != HQM_INT32)) return 0;
    if (!holds(m, w[T_SCALES], w[T_N_SCALES], 4)) return 0;
    for (uint32_t k = 0; k < w[T_N_SCALES]; k++)
        if (!(floats_at(m, w[T_SCALES])[k] > 0.0f && floats_at(m, w[T_SCALES])[k] <= FLT_MAX)) return 0;
    if ((w[T_DTYPE] == HQM_FLOAT32) != (i == 0)) return 0; /* the image, and it alone */
    if (i == 0) return w[T_RANK] == 3;
    uint64_t end = w[T_ARENA] + times(n, size_of(w[T_DTYPE])) + SLACK;
    return w[T_ARENA] % 4 == 0 && end <= h[H_ARENA];
}

window window_of(const uint32_t *op, const tensor *x, const tensor *y) {
    window v;
    int image = x->rank == 3; /* a linear layer is a 1x1 convolution of one row of T places */
    v.channels = image ? x->shape[0] : x->shape[x->rank - 1];
    v.height = image ? x->shape[1] : 1, v.width = image ? x->shape[2] : (x->rank == 2 ? x->shape[0] : 1);
    v.out_height = image ? y->shape[1] : 1, v.out_width = image ? y->shape[2] : v.width;
    memcpy(v.kernel, op + O_KERNEL, sizeof v.kernel);
    memcpy(v.stride, op + O_STRIDE, sizeof v.stride);
    memcpy(v.padding, op + O_PADDING, sizeof v.padding);
    memcpy(v.dilation, op + O_DILATION, sizeof v.dilation);
    return v;
}

static int window_is_sound(const window *v) {
    const uint32_t in[2] = {v->height, v->width}, out[2] = {v->out_height, v->out_width};
    for (int i = 0; i < 2; i++) {
        uint32_t k = v->kernel[i], s = v->stride[i], d = v->dilation[i], before = v->padding[i], after = v->padding[i + 2];
        if (k < 1 || k > MAX_SIZE || s < 1 || s > MAX_SIZE || d < 1 || d > MAX_SIZE) return 0;
        if (before > MAX_SIZE || after > MAX_SIZE) return 0;
        uint64_t room = (uint64_t)in[i] + before + after, reach = (uint64_t)d * (k - 1) + 1;
        if (room < reach || (room - reach) / s + 1 != out[i]) return 0;
    }
    return 1;
}

/* One or two multipliers per channel (n) in both forms, with one shift. */
static int requant_is_sound(const hqm_model *m, const uint32_t *op, uint32_t n, const uint32_t *at, int shared) {
    if (!holds(m, at[0], n, 4) || !holds(m, at[1], n, 4) || !holds(m, op[O_SHIFT], n, 1)) return 0;
    const int32_t most = shared ? 1 << 30 : INT32_MAX; /* so that sums fit int64 */
    for (uint32_t i = 0; i < n; i++) {
        uint8_t shift = m->bytes[op[O_SHIFT] + i];
        float multiplier = floats_at(m, at[0])[i];
        int32_t fixed = ints_at(m, at[1])[i];
        if (!(multiplier >= 0.0f && multiplier <= FLT_MAX) || fixed < 0 || fixed > most) return 0;
        if (shift < 1 || shift > 62) return 0;
    }
    return 1;
}

static int layer_is_sound(const hqm_model *m, const uint32_t *op, const tensor *x, const tensor *r, const tensor *y) {
    int is_conv = op[O_KIND] == CONV;
    if (!is_narrow(x) || x->rank > 3 || (is_conv ? x->rank != 3 || y->rank != 3 : x->rank > 2)) return 0;
    if (y->rank != x->rank || (x->rank == 2 && y->shape[0] != x->shape[0])) return 0;
    window v = window_of(op, x, y);
    static const uint32_t ones[2] = {1, 1}, zeros[4] = {0, 0, 0, 0};
    if (!is_conv && (memcmp(v.kernel, ones, 8) || memcmp(v.stride, ones, 8) || memcmp(v.padding, zeros, 16))) return 0;
    if (!window_is_sound(&v)) return 0;
    uint64_t c_out = op[O_C_OUT], per_group = op[O_C_GROUP], groups = op[O_GROUPS];
    if (c_out != (is_conv ? y->shape[0] : y->shape[y->rank - 1]) || !groups || !per_group || c_out % groups) return 0;
    if (times(per_group, groups) != v.channels || op[O_WEIGHT_SHIFT] > 7) return 0;
    const uint32_t odd = op[O_WEIGHT_BITS] % 2, bits = op[O_WEIGHT_BITS] - odd;
    if ((bits != 4 && bits != 8 && bits != 16) || (odd && (bits == 16 || op[O_DEPTHWISE]))) return 0;
    uint64_t runs = (uint64_t)v.kernel[0] * v.kernel[1], blocks, size;
    if (op[O_DEPTHWISE] > 1 || (op[O_DEPTHWISE] && (per_group != 1 || c_out != groups))) return 0;
    blocks = op[O_DEPTHWISE] ? (c_out + BLOCK - 1) / BLOCK : times(groups, (c_out / groups + BLOCK - 1) / BLOCK);
    if (!op[O_DEPTHWISE] && v.dilation[1] == 1 && groups == 1) runs = v.kernel[0], per_group = times(per_group, v.kernel[1]);
    size = op[O_DEPTHWISE] ? 1 : times((per_group + 3) / 4, 4);
    if (odd && per_group % 4) return 0;
    if (!holds(m, op[O_WEIGHT], times(times(blocks, BLOCK), times(runs, size)) / 2, bits / 4)) return 0;
    if (!holds(m, op[O_BIAS], c_out, 4)) return 0;
    uint64_t rows = (uint64_t)v.height + v.padding[0] + v.padding[2], columns = (uint64_t)v.width + v.padding[1] + v.padding[3];
    int padded = v.padding[0] | v.padding[1] | v.padding[2] | v.padding[3] ? 1 : 0;
    uint64_t size_padded = times(times(rows, columns), times(v.channels, x->size)) + SLACK;
    if (padded && (op[O_PADDED] % 4 || op[O_PADDED] + size_padded > header_of(m)[H_ARENA])) return 0;
    if (!op[O_MULTIPLIER]) return !r && y->dtype == HQM_INT32;
    if (!is_narrow(y) && !header_of(m)[H_FIXED]) return 0;
    if (!requant_is_sound(m, op, (uint32_t)c_out, op + O_MULTIPLIER, r != NULL)) return 0;
    if (!r) return !op[O_MULTIPLIER_2];
    if (r->n != y->n || r->rank != y->rank || memcmp(r->shape, y->shape, sizeof r->shape)) return 0;
    const uint32_t second[2] = {op[O_MULTIPLIER_2], op[O_FIXED_2]};
    return requant_is_sound(m, op, (uint32_t)c_out, second, 1);
}

static int pool_is_sound(const hqm_model *m, const uint32_t *op, const tensor *x, const tensor *y) {
    if (x->rank != 3 || y->rank != 3 || !is_narrow(x) || !is_narrow(y) || x->shape[0] != y->shape[0]) return 0;
    window v = window_of(op, x, y);
    if (!window_is_sound(&v)) return 0;
    if (op[O_KIND] == MAX_POOL) return x->dtype == y->dtype;
    return !op[O_MULTIPLIER] || (!op[O_MULTIPLIER_2] && requant_is_sound(m, op, 1, op + O_MULTIPLIER, 0));
}

static int add_is_sound(const hqm_model *m, const uint32_t *op, const tensor *a, const tensor *b, const tensor *y) {
    if (!is_narrow(a) || !is_narrow(b) || !is_narrow(y) || a->rank != y->rank || b->rank != y->rank) return 0;
    if (memcmp(a->shape, y->shape, sizeof a->shape) || memcmp(b->shape, y->shape, sizeof b->shape)) return 0;
    const uint32_t second[2] = {op[O_MULTIPLIER_2], op[O_FIXED_2]};
    float offset = float_of(op[O_OFFSET]);
    return offset >= -FLT_MAX && offset <= FLT_MAX && requant_is_sound(m, op, 1, op + O_MULTIPLIER, 1) &&
           requant_is_sound(m, op, 1, second, 1);
}

static int concat_is_sound(const hqm_model *m, const uint32_t *op, const tensor *y) {
    uint32_t axis = op[O_AXES];
    uint64_t joined = 0;
    if (axis >= y->rank) return 0;
    for (uint32_t k = 0; k < op[O_N_INPUTS]; k++) {
        tensor x = tensor_at(m, input_of(m, op, k), NULL);
        if (x.rank != y->rank || x.dtype != y->dtype) return 0;
        for (uint32_t a = 0; a < y->rank; a++)
            if (a != axis && x.shape[a] != y->shape[a]) return 0;
        joined += x.shape[axis];
    }
    return joined == y->shape[axis];
}

static int move_is_sound(const uint32_t *op, const tensor *x, const tensor *y) {
    uint32_t seen = 0, kind = op[O_KIND];
    if (x->dtype != y->dtype || x->dtype == HQM_FLOAT32) return 0;
    if (kind == RESHAPE) return x->n == y->n;
    if (x->rank != y->rank) return 0;
    for (uint32_t a = 0; a < x->rank; a++) {
        if (kind == CLIP && x->shape[a] != y->shape[a]) return 0;
        if (kind == TRANSPOSE) {
            uint32_t from = op[O_AXES + a];
            if (from >= x->rank || seen >> from & 1 || x->shape[from] != y->shape[a]) return 0;
            seen |= 1u << from;
        }
        uint64_t start = op[O_START + a], step = op[O_STEP + a], before = op[O_BEFORE + a];
        if (kind == SLICE && (!step || start + step * (y->shape[a] - 1u) >= x->shape[a])) return 0;
        if (kind == PAD && before + x->shape[a] > y->shape[a]) return 0;
    }
    return 1;
}

static int quantize_is_sound(const hqm_model *m, const uint32_t *op, const tensor *x, const tensor *y) {
    if (x->dtype != HQM_FLOAT32 || !is_narrow(y) || x->rank != y->rank || memcmp(x->shape, y->shape, sizeof x->shape))
        return 0;
    return !op[O_TABLE] || holds(m, op[O_TABLE], times(x->shape[0], 256), 2);
}

/* One value for every integer that memory can hold, so that no content of a tensor leads outside. */
static int table_is_sound(const hqm_model *m, const uint32_t *op, const tensor *x, const tensor *y) {
    if (!is_narrow(x) || !is_narrow(y) || x->rank != y->rank || memcmp(x->shape, y->shape, sizeof x->shape)) return 0;
    return holds(m, op[O_TABLE], x->size == 1 ? 256 : 65536, 2);
}

static int mul_is_sound(const hqm_model *m, const uint32_t *op, const tensor *a, const tensor *b, const tensor *y) {
    if (!is_narrow(a) || !is_narrow(b) || !is_narrow(y) || a->rank != y->rank || b->rank != y->rank) return 0;
    if (memcmp(a->shape, y->shape, sizeof a->shape)) return 0;
    for (uint32_t k = 0; k < y->rank; k++)
        if (b->shape[k] != 1 && b->shape[k] != y->shape[k]) return 0;
    return !op[O_MULTIPLIER_2] && requant_is_sound(m, op, 1, op + O_MULTIPLIER, 0);
}

static int op_is_sound(const hqm_model *m, uint32_t i) {
    const uint32_t *op = op_at(m, i);
    uint32_t n = op[O_N_INPUTS], kind = op[O_KIND];
    if (kind >= N_KINDS || !holds(m, op[O_INPUTS], n, 4) || (i == 0 && kind != QUANTIZE)) return 0;
    uint32_t least = kind == ADD || kind == MUL ? 2 : 1;
    uint32_t most = kind == CONCAT ? 64 : kind == CONV || kind == LINEAR || kind == ADD || kind == MUL ? 2 : 1;
    if (n < least || n > most) return 0;
    for (uint32_t k = 0; k < n; k++) /* operation i writes tensor i + 1 and reads what is written; the image once */
        if (input_of(m, op, k) > i || (input_of(m, op, k) == 0) != (kind == QUANTIZE)) return 0;
    tensor x = tensor_at(m, input_of(m, op, 0), NULL), y = tensor_at(m, i + 1, NULL), second = x;
    if (n > 1) second = tensor_at(m, input_of(m, op, 1), NULL);
    switch (kind) {
    case QUANTIZE: return quantize_is_sound(m, op, &x, &y);
    case CONV: case LINEAR: return layer_is_sound(m, op, &x, n > 1 ? &second : NULL, &y);
    case ADD: return add_is_sound(m, op, &x, &second, &y);
    case MAX_POOL: case AVG_POOL: return pool_is_sound(m, op, &x, &y);
    case TABLE: return table_is_sound(m, op, &x, &y);
    case MUL: return mul_is_sound(m, op, &x, &second, &y);
    case CONCAT: return concat_is_sound(m, op, &y);
    default: return move_is_sound(op, &x, &y);
    }
}

static uint32_t crc32_of(const uint8_t *bytes, size_t n) {
    uint32_t table[16], crc = 0xffffffffu;
    for (uint32_t i = 0; i < 16; i++) {
        table[i] = i;
        for (int k = 0; k < 4; k++) table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xedb88320u : 0);
    }
    for (size_t i = 0; i < n; i++) {
        crc ^= bytes[i];
        crc = crc >> 4 ^ table[crc & 15];
        crc = crc >> 4 ^ table[crc & 15];
    }
    return ~crc;
}

static hqm_status check_header(const hqm_model *m, size_t size) {
    const uint32_t *h = header_of(m);
    if (memcmp(m->bytes, "HQM\x1a", 4)) return HQM_BAD_MAGIC;
    if (h[H_VERSION] != HQM_VERSION) return HQM_BAD_VERSION;
    if (h[H_SIZE] != size || size > LIMIT) return HQM_BAD_SIZE;
    if (crc32_of(m->bytes + 16, size - 16) != h[H_CRC]) return HQM_BAD_CRC;
    uint64_t n_ops = h[H_N_OPS], n_tensors = h[H_N_TENSORS];
    int ok = n_ops >= 1 && n_tensors == n_ops + 1 && h[H_FIXED] <= 1 && h[H_ARENA] <= MAX_ARENA;
    ok = ok && h[H_OUTPUT] >= 1 && h[H_OUTPUT] <= n_ops;
    ok = ok && holds(m, h[H_TENSORS], n_tensors, T_WORDS * 4) && holds(m, h[H_OPS], n_ops, O_WORDS * 4);
    return ok && holds(m, h[H_META], h[H_META_SIZE], 1) ? HQM_OK : HQM_BAD_HEADER;
}

hqm_status hqm_open(hqm_model *model, const void *bytes, size_t size) {
    const uint32_t one = 1;
    if (!model || !bytes || (uintptr_t)bytes % 4) return HQM_BAD_ARGUMENT;
    if (!*(const uint8_t *)(const void *)&one) return HQM_BAD_HOST;
    if (size < H_WORDS * 4) return size >= 4 && memcmp(bytes, "HQM\x1a", 4) ? HQM_BAD_MAGIC : HQM_BAD_SIZE;
    model->bytes = bytes, model->n_ops = 0, model->where = 0;
    hqm_status status = check_header(model, size);
    if (status != HQM_OK) return status;
    uint32_t n = header_of(model)[H_N_OPS];
    for (model->where = 0; model->where <= n; model->where++)
        if (!tensor_is_sound(model, model->where)) return HQM_BAD_TENSOR;
    for (model->where = 0; model->where < n; model->where++)
        if (!op_is_sound(model, model->where)) return HQM_BAD_OP;
    model->n_ops = n;
    return HQM_OK;
}

/* Reading some rows; read.c includes this once for each kind of processor, under another NAME. */

/* Columns start..start + n_rows of the matrix rows of n pixels from the first one on, padded with zeros to width. Of a
   row of three neighbouring taps four are copied, and the fourth is written over; the last row stops at its end. */
static void NAME(gather)(const work *k, int64_t first, int64_t n, int64_t start, int64_t n_rows, int64_t width) {
    const hqx_shape *s = k->s;
    const int64_t taps = s->kernel_y * s->kernel_x, down = s->dilation_y * s->width, plane = s->height * s->width;
    const int64_t c0 = start / taps, i0 = start % taps / s->kernel_x, j0 = start % s->kernel_x;
    const int64_t n_windows = s->out_y * s->out_x;
    int64_t image = first / n_windows, y = first % n_windows / s->out_x, x = first % s->out_x;
    for (int64_t p = 0; p < n; p++) {
        const int16_t *from = k->x + (image * s->channels + c0) * plane + y * s->stride_y * s->width + x * s->stride_x;
        int16_t *out = k->rows + p * width, *const end = out + n_rows;
        int64_t i = i0, j = j0;
        from += i * down;
        while (out < end) {
            if (s->kernel_x == 3 && s->dilation_x == 1 && j == 0 && end - out > 3) {
                memcpy(out, from, 4 * sizeof *out);
                out += 3;
            } else {
                for (; j < s->kernel_x && out < end; j++) *out++ = from[j * s->dilation_x];
                j = 0;
            }
            from += down;
            if (++i == s->kernel_y) i = 0, from += plane - s->kernel_y * down;
        }
        memset(end, 0, (size_t)(width - n_rows) * sizeof *out);
        if (++x == s->out_x) {
            x = 0;
            if (++y == s->out_y) y = 0, image++;
        }
    }
    for (int64_t p = n; p < (n + 3) / 4 * 4; p++) memset(k->rows + p * width, 0, (size_t)width * sizeof(int16_t));
}

/* Per pixel and four rows, which of them have a one at bit shift; and the root of the number of ones. */
static void NAME(subsets)(const work *k, int64_t n, int64_t fours, int64_t b, int64_t shift, int counted) {
    for (int64_t p = 0; p < n; p++) {
        uint64_t ones = 0;
        for (int64_t f = 0; f < fours; f++) {
            uint64_t four; /* one bit in each 16 */
            memcpy(&four, k->rows + 4 * (p * fours + f), sizeof four);
            four = four >> shift & 0x0001000100010001u;
            ones += four;
            k->at[(b * PIXELS + p) * fours + f] = (uint16_t)((four * 0x0001000200040008u >> 48 & 15) * LANES);
        }
        if (counted) k->power[b * PIXELS + p] = sqrtf((float)(ones * 0x0001000100010001u >> 48));
    }
}

/* Replaces every x by its digit of one step. */
static void NAME(digits)(int16_t *out, const int16_t *x, int64_t n, const hqx_step *step) {
    for (int64_t r = 0; r < n; r++) out[r] = (int16_t)(step->mask ? (x[r] >> step->shift) & step->mask : x[r]);
}

/* The normals of one pixel's LANES columns, from an array with n_columns to a row; the last block is copied. */
static inline __attribute__((always_inline)) const float *NAME(lane_normals)(const float *all, int64_t row, int64_t c, int64_t n_columns, float *room) {
    if (!all) return NULL;
    const float *z = all + row * n_columns + c;
    if (c + LANES <= n_columns) return z;
    memset(room, 0, LANES * sizeof *room);
    memcpy(room, z, (size_t)(n_columns - c) * sizeof *room);
    return room;
}

/* One conversion of LANES sums of one pixel: adds the codes to total, and -1 to the lanes of saturated that did; padded
   columns never do, their factor, shift and spread are zero. */
static inline __attribute__((always_inline)) void NAME(convert)(const hqx_shape *s, const hqx_tile *t, int64_t block, const int32_t *acc, const float *normals, int64_t row, float power,
                    float step, float *total, ints *saturated) {
    const int64_t c = block * LANES;
    float room[LANES];
    const float *z = NAME(lane_normals)(normals, row, c, s->n_columns, room);
    const floats low = s->low - (floats){0}, high = s->high - (floats){0};
    for (int i = 0; i < LANES; i += WIDE) {
        ints sum;
        floats v, other, out;
        LOAD(sum, acc + i);
        LOAD(other, t->factor + c + i);
        v = __builtin_convertvector(sum, floats) * other;
        if (t->shift) {
            LOAD(other, t->shift + c + i);
            v += other;
        }
        if (z) {
            floats noise;
            LOAD(noise, z + i);
            LOAD(other, t->spread + c + i);
            v += noise * power * other;
        }
#if defined(WITH_AVX2)
        v = _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        *saturated += (v < low) | (v > high);
        v = _mm256_min_ps(_mm256_max_ps(v, low), high);
#else
        v = PICK(v < low - 1.0f, low - 1.0f, v);
        v = PICK(v > high + 1.0f, high + 1.0f, v);
        v = (v + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: to even, for all that is left */
        *saturated += (v < low) | (v > high);
        v = PICK(v < low, low, v);
        v = PICK(v > high, high, v);
#endif
        LOAD(out, total + i);
        out += v * step;
        memcpy(total + i, &out, sizeof out);
    }
}

/* Four pixels' sums of n_pairs pairs of rows in LANES columns. */
static void NAME(sums)(const int16_t *x, int64_t stride, int64_t n_pairs, const int16_t *w, int32_t acc[4][LANES]) {
#if defined(WITH_AVX2)
    __m256i a[4][2];
    for (int p = 0; p < 4; p++) a[p][0] = a[p][1] = _mm256_setzero_si256();
    for (int64_t k = 0; k < n_pairs; k++, w += 2 * LANES) {
        const __m256i w0 = _mm256_loadu_si256((const __m256i *)(const void *)w);
        const __m256i w1 = _mm256_loadu_si256((const __m256i *)(const void *)(w + LANES));
        for (int p = 0; p < 4; p++) {
            int32_t pair;
            memcpy(&pair, x + p * stride + 2 * k, 4);
            const __m256i xs = _mm256_set1_epi32(pair);
            a[p][0] = _mm256_add_epi32(a[p][0], _mm256_madd_epi16(xs, w0));
            a[p][1] = _mm256_add_epi32(a[p][1], _mm256_madd_epi16(xs, w1));
        }
    }
    for (int p = 0; p < 4; p++)
        for (int h = 0; h < 2; h++) _mm256_storeu_si256((__m256i *)(void *)(acc[p] + 8 * h), a[p][h]);
#else
    memset(acc, 0, 4 * LANES * sizeof(int32_t));
    for (int64_t k = 0; k < n_pairs; k++, w += 2 * LANES)
        for (int p = 0; p < 4; p++)
            for (int c = 0; c < LANES; c++)
                acc[p][c] += x[p * stride + 2 * k] * w[2 * c] + x[p * stride + 2 * k + 1] * w[2 * c + 1];
#endif
}

/* Sums of LANES columns over the subsets that at names, one of each four rows, by its place in the four's table. */
static void NAME(table_sums)(const int32_t *table, const uint16_t *at, int64_t fours, int32_t acc[LANES]) {
    ints left = {0}, right = {0}, from;
    for (int64_t f = 0; f < fours; f += 4, table += 4 * 16 * LANES, at += 4)
        for (int i = 0; i < 4; i++) {
            const int32_t *row = table + 16 * LANES * i + at[i];
            LOAD(from, row);
            left += from;
            LOAD(from, row + WIDE);
            right += from;
        }
    memcpy(acc, &left, sizeof left);
    memcpy(acc + WIDE, &right, sizeof right);
}

/* All one-bit steps of a tile: a block of tables stays in the cache for all of them. */
static void NAME(read_bits)(const work *k, int64_t n, const hqx_tile *t, const hqx_step *steps,
                            const float *const *normals, ints *saturated) {
    const int64_t fours = (t->n_rows + 15) / 16 * 4, blocks = (k->s->n_columns + LANES - 1) / LANES;
    for (int64_t b = 0; b < k->s->n_steps; b++) NAME(subsets)(k, n, fours, b, steps[b].shift, t->spread != NULL);
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t b = 0; b < k->s->n_steps; b++)
            for (int64_t p = 0; p < n; p++) {
                int32_t acc[LANES];
                NAME(table_sums)((const int32_t *)t->cells + block * fours * 16 * LANES,
                                 k->at + (b * PIXELS + p) * fours, fours, acc);
                NAME(convert)(k->s, t, block, acc, normals ? normals[b] : NULL, p, k->power[b * PIXELS + p],
                              steps[b].factor, k->total + (p * blocks + block) * LANES, saturated);
            }
}

/* Steps of several bits, or of whole numbers, one after another. */
static void NAME(read_digits)(const work *k, int64_t n, const hqx_tile *t, const hqx_step *steps,
                              const float *const *normals, ints *saturated) {
    const int64_t width = (t->n_rows + 15) / 16 * 16, blocks = (k->s->n_columns + LANES - 1) / LANES;
    int16_t *driven = k->rows + PIXELS * width;
    for (int64_t b = 0; b < k->s->n_steps; b++) {
        const int16_t *x = steps[b].mask ? driven : k->rows;
        if (steps[b].mask) NAME(digits)(driven, k->rows, (n + 3) / 4 * 4 * width, steps + b);
        for (int64_t p = 0; t->spread && p < n; p++) {
            int32_t power = 0;
            for (int64_t r = 0; r < width; r++) power += x[p * width + r] * x[p * width + r];
            k->power[p] = sqrtf((float)power);
        }
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t p = 0; p < n; p += 4) {
                int32_t acc[4][LANES];
                NAME(sums)(x + p * width, width, width / 2, (const int16_t *)t->cells + block * width * LANES, acc);
                for (int64_t q = p; q < p + 4 && q < n; q++)
                    NAME(convert)(k->s, t, block, acc[q - p], normals ? normals[b] : NULL, q, k->power[q],
                                  steps[b].factor, k->total + (q * blocks + block) * LANES, saturated);
            }
    }
}

static int64_t NAME(read_all)(const work *k, int64_t first, int64_t n_rows, const hqx_tile *tiles, const hqx_step *steps,
                        const float *const *normals, const double *coefficient, double *y) {
    const hqx_shape *s = k->s;
    const int64_t padded = (s->n_columns + LANES - 1) / LANES * LANES, n_planes = s->n_columns / s->n_outputs;
    const float *at[64];
    ints saturated = {0};
    for (int64_t done = 0; done < n_rows; done += PIXELS) {
        const int64_t n = n_rows - done < PIXELS ? n_rows - done : PIXELS;
        memset(k->total, 0, (size_t)(PIXELS * padded) * sizeof(float));
        for (int64_t t = 0; t < s->n_tiles; t++) {
            for (int64_t b = 0; normals && b < s->n_steps; b++)
                at[b] = normals[b * s->n_tiles + t] + done * s->n_columns;
            NAME(gather)(k, first + done, n, tiles[t].start, tiles[t].n_rows, (tiles[t].n_rows + 15) / 16 * 16);
            (s->one_bit ? NAME(read_bits) : NAME(read_digits))(k, n, tiles + t, steps, normals ? at : NULL, &saturated);
        }
        for (int64_t p = 0; p < n; p++) {
            double *out = y + (done + p) * s->n_outputs;
            const float *total = k->total + p * padded;
            for (int64_t o = 0; o < s->n_outputs; o++) out[o] = total[o] * coefficient[o];
            for (int64_t q = 1; q < n_planes; q++)
                for (int64_t o = 0; o < s->n_outputs; o++)
                    out[o] += total[q * s->n_outputs + o] * coefficient[q * s->n_outputs + o];
        }
    }
    int64_t n_saturated = 0;
    for (int i = 0; i < WIDE; i++) n_saturated -= saturated[i];
    return n_saturated;
}

/* See hqx_channels_last. Eight channels of eight places at a time: 64 bytes whose halves, interleaved three times, are
   the same bytes place by place. */
static void NAME(channels_last)(const uint8_t *x, int64_t n_images, int64_t channels, int64_t places, float *out) {
    for (int64_t image = 0; image < n_images; image++, x += channels * places, out += channels * places) {
        int64_t c = 0;
#if defined(WITH_AVX2)
        for (; c + 8 <= channels; c += 8) {
            int64_t p = 0;
            for (; p + 8 <= places; p += 8) {
                __m128i v[4];
                for (int r = 0; r < 4; r++) {
                    const uint8_t *from = x + (c + 2 * r) * places + p;
                    v[r] = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *)(const void *)from),
                                              _mm_loadl_epi64((const __m128i *)(const void *)(from + places)));
                }
                for (int times = 0; times < 3; times++) {
                    const __m128i a = v[0], b = v[1], low = v[2], high = v[3];
                    v[0] = _mm_unpacklo_epi8(a, low), v[1] = _mm_unpackhi_epi8(a, low);
                    v[2] = _mm_unpacklo_epi8(b, high), v[3] = _mm_unpackhi_epi8(b, high);
                }
                for (int r = 0; r < 4; r++) {
                    float *to = out + (p + 2 * r) * channels + c;
                    _mm256_storeu_ps(to, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(v[r])));
                    _mm256_storeu_ps(to + channels, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(v[r], 8))));
                }
            }
            for (; p < places; p++)
                for (int64_t i = c; i < c + 8; i++) out[p * channels + i] = x[i * places + p];
        }
#endif
        for (; c < channels; c++)
            for (int64_t p = 0; p < places; p++) out[p * channels + c] = x[c * places + p];
    }
}

/* See hqx_round. */
static int NAME(round)(const float *raw, int64_t n, double *out) {
    floats odd = {0};
    int64_t r = 0;
    for (; r + WIDE <= n; r += WIDE) {
        floats v;
        LOAD(v, raw + r);
        odd += v - v; /* 0, or NaN from then on */
        for (int i = 0; i < WIDE; i++) out[r + i] = rint(raw[r + i]);
    }
    for (; r < n; r++) odd[0] += raw[r] - raw[r], out[r] = rint(raw[r]);
    float sum = 0;
    for (int i = 0; i < WIDE; i++) sum += odd[i];
    return sum == 0;
}

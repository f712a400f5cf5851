// Inputs rounded to bytes. Included behind matmul.h.

// Row m as float32, zeros behind it; all zeros where there is none.
static void take_row(const Inputs &x, ptrdiff_t m, float *to) {
    const ptrdiff_t K = m < x.M ? x.K : 0;
    if (x.half) {
        const uint16_t *from = (const uint16_t *)x.source + m * x.K;
        for (ptrdiff_t k = 0; k < K; k++) to[k] = float_of((uint32_t)from[k] << 16);
    } else {
        const float *from = (const float *)x.source + m * x.K;
        for (ptrdiff_t k = 0; k < K; k++) to[k] = from[k];
    }
    for (ptrdiff_t k = K; k < x.padded; k++) to[k] = 0;
}

// The largest magnitude of n numbers, n a multiple of 16; NaN if one is not finite.
static float largest(const float *v, ptrdiff_t n) {
    Vec most{}, nothing{};  // nothing: 0, or NaN
    for (ptrdiff_t k = 0; k < n; k += LANES) {
        const Vec each = magnitude(load(v + k));
        nothing += each - each;
        most = each > most ? each : most;
    }
    float all = 0;
    for (int i = 0; i < LANES; i++) all = most[i] > all ? most[i] : all;
    for (int i = 0; i < LANES; i++) all += nothing[i];
    return all;
}

// n numbers as integers of so many bytes; returns their scale: NaN if one is not finite; then all are 0.
static float round_span(const float *__restrict v, ptrdiff_t n, int bytes, int16_t *__restrict q) {
    const float extreme = largest(v, n), scale = extreme / (bytes == 2 ? 32512.0f : 127.0f), inverse = 1 / scale;
    const bool usable = finite(extreme) && finite(inverse);  // not where all are 0, or nearly
    for (ptrdiff_t k = 0; k < n; k++) q[k] = usable ? (int16_t)nearest(v[k] * inverse) : 0;
    return scale;
}

static int32_t sum_of(const int16_t *q, ptrdiff_t n) {
    int32_t total = 0;
    for (ptrdiff_t k = 0; k < n; k++) total += q[k];
    return total;
}

// A row of integers as bytes: the high ones, and of two the low ones.
static void split(const int16_t *__restrict q, ptrdiff_t n, int bytes, int8_t *__restrict high, int8_t *__restrict low) {
    if (bytes == 1)
        for (ptrdiff_t k = 0; k < n; k++) high[k] = (int8_t)q[k];
    else
        for (ptrdiff_t k = 0; k < n; k++) high[k] = (int8_t)((q[k] + 128) >> 8), low[k] = (int8_t)q[k];
}

// Four columns as words, in the order of dot.h: the second and the third change places.
static inline void put_words(const int16_t *q, int8_t *to) {
    uint64_t x;
    __builtin_memcpy(&x, q, 8);
    x = (x & 0xffff00000000ffffu) | (x >> 16 & 0xffff0000u) | (x & 0xffff0000u) << 16;
    __builtin_memcpy(to, &x, 8);
}

// Rows [first, last) of the inputs as bytes, and their sums over blocks. `scratch` has room for two rows.
static void round_inputs(const Inputs &x, float *scratch, ptrdiff_t first, ptrdiff_t last) {
    const int H = x.height;
    const ptrdiff_t span = x.repeat * x.block;
    int16_t *q = (int16_t *)(scratch + x.padded);
    int8_t *spread = (int8_t *)(q + x.padded);  // bytes, before they are put between those of other rows
    for (ptrdiff_t row = first; row < last; row++) {
        const ptrdiff_t tile = row / H, r = row % H;
        take_row(x, row, scratch);
        for (ptrdiff_t s = 0, k = 0; s < x.spans; s++, k += span)
            x.scale[(tile * x.spans + s) * H + r] = round_span(scratch + k, k + span < x.padded ? span : x.padded - k, x.bytes, q + k);
        for (ptrdiff_t b = 0, k = 0; b < x.blocks; b++, k += x.block)
            x.sum[(tile * x.blocks + b) * H + r] = sum_of(q + k, k + x.block < x.padded ? x.block : x.padded - k);
        if (H > 1 && WORDS && x.bytes == 2) {
            for (ptrdiff_t k = 0; k < x.padded; k += 4) put_words(q + k, x.high + 2 * ((tile * x.padded + k) * H + 4 * r));
            continue;
        }
        int8_t *high = H > 1 ? spread : x.high + row * x.padded, *low = H > 1 ? high + x.padded : x.low + row * x.padded;
        split(q, x.padded, x.bytes, high, low);
        for (ptrdiff_t k = 0; H > 1 && k < x.padded; k += 4) {
            const ptrdiff_t at = (tile * x.padded + k) * H + 4 * r;
            __builtin_memcpy(x.high + at, high + k, 4);
            if (x.bytes == 2) __builtin_memcpy(x.low + at, low + k, 4);
        }
    }
}

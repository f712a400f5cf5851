// Inputs rounded to bytes. Included behind matmul.h.

typedef int8_t Bytes16 __attribute__((vector_size(16)));
typedef Bytes16 LooseBytes16 __attribute__((aligned(1), may_alias));

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
    Floats most{}, nothing{};  // nothing: 0, or NaN
    for (ptrdiff_t k = 0; k < n; k += 16) {
        Floats each = *(const LooseFloats *)(v + k);
        nothing += each - each;
        each = each < 0 ? -each : each;
        most = each > most ? each : most;
    }
    float all = 0;
    for (int i = 0; i < 16; i++) all = most[i] > all ? most[i] : all;
    for (int i = 0; i < 16; i++) all += nothing[i];
    return all;
}

// n numbers as bytes; returns their scale: NaN if one is not finite; then all bytes are 0.
static float round_span(const float *v, ptrdiff_t n, int bytes, int8_t *high, int8_t *low) {
    const float extreme = largest(v, n), scale = extreme / (bytes == 2 ? 32512.0f : 127.0f), inverse = 1 / scale;
    const bool usable = finite(extreme) && finite(inverse);  // not where all are 0, or nearly
    for (ptrdiff_t k = 0; k < n; k += 16) {
        Sums q = usable ? __builtin_convertvector(nearest(*(const LooseFloats *)(v + k) * inverse), Sums) : Sums{};
        Sums top = bytes == 2 ? (q + 128) >> 8 : q;
        *(LooseBytes16 *)(high + k) = __builtin_convertvector(top, Bytes16);
        if (bytes == 2) *(LooseBytes16 *)(low + k) = __builtin_convertvector(q - (top << 8), Bytes16);
    }
    return scale;
}

static int32_t sum_of(const int8_t *v, ptrdiff_t n) {
    int32_t total = 0;
    for (ptrdiff_t k = 0; k < n; k++) total += v[k];
    return total;
}

// Rows [first, last) of the inputs as bytes, and their sums over blocks. `scratch` has room for two rows.
static void round_inputs(const Inputs &x, float *scratch, ptrdiff_t first, ptrdiff_t last) {
    const int H = x.height;
    const ptrdiff_t span = x.repeat * x.block;
    for (ptrdiff_t row = first; row < last; row++) {
        const ptrdiff_t tile = row / H, r = row % H;
        int8_t *high = H > 1 ? (int8_t *)(scratch + x.padded) : x.high + row * x.padded;
        int8_t *low = H > 1 ? high + x.padded : x.low + row * x.padded;
        take_row(x, row, scratch);
        for (ptrdiff_t s = 0, k = 0; s < x.spans; s++, k += span) {
            const ptrdiff_t n = k + span < x.padded ? span : x.padded - k;
            x.scale[(tile * x.spans + s) * H + r] = round_span(scratch + k, n, x.bytes, high + k, low + k);
        }
        for (ptrdiff_t k = 0; H > 1 && k < x.padded; k += 4) {
            __builtin_memcpy(x.high + (tile * x.padded + k) * H + 4 * r, high + k, 4);
            if (x.bytes == 2) __builtin_memcpy(x.low + (tile * x.padded + k) * H + 4 * r, low + k, 4);
        }
        for (ptrdiff_t b = 0, k = 0; b < x.blocks; b++, k += x.block) {
            const ptrdiff_t n = k + x.block < x.padded ? x.block : x.padded - k;
            x.sum[(tile * x.blocks + b) * H + r] = x.bytes == 2 ? 256 * sum_of(high + k, n) + sum_of(low + k, n) : sum_of(high + k, n);
        }
    }
}

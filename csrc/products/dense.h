// Products with float weights as they are stored, for few inputs: every weight is read from memory once. A sum is of sixteen, over
// every sixteenth column, whatever the number of inputs. Included behind matmul.h.

static inline float one_weight(int type, const void *w, ptrdiff_t at) {
    if (type == F32) return ((const float *)w)[at];
    uint16_t bits[16] = {((const uint16_t *)w)[at]};
    return type == F16 ? floats_of_halves(bits)[0] : float_of((uint32_t)bits[0] << 16);
}

// Of each run of 2 HALF lanes of a, then of b: the second half added to the first.
template <int HALF, int... LANE>
static inline Vec paired(Vec a, Vec b, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(a, b, (LANE / HALF * 2 * HALF + LANE % HALF)...) +
           __builtin_shufflevector(a, b, (LANE / HALF * 2 * HALF + LANE % HALF + HALF)...);
}

// Vectors that hold 2 HALF numbers of each of sixteen sums -> vectors with one.
template <int HALF>
static inline void pair_up(Vec *v) {
    for (int i = 0; i < 16 * HALF / LANES; i++) v[i] = paired<HALF>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, LANES>());
    if constexpr (HALF > 1) pair_up<HALF / 2>(v);
}

// Sixteen lanes in strips: the second half is added to the first, as long as there are several.
static inline Vec folded(const Vec *strips) {
    if constexpr (STRIPS == 1) return strips[0];
    else if constexpr (STRIPS == 2) return strips[0] + strips[1];
    else return (strips[0] + strips[2]) + (strips[1] + strips[3]);
}

// The sums of sixteen times sixteen lanes, each `folded`, side by side: of each, the second half is added to the first, and so on.
static inline void add_up(Vec *v, float *to) {
    pair_up<LANES / 2>(v);
    for (int i = 0; i < STRIPS; i++) store(to + i * LANES, v[i]);
}

// The sum of one.
static inline float added_up(const Vec *strips) {
    float lanes[LANES];
    store(lanes, folded(strips));
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// LANES weights in their place.
template <int TYPE>
static inline Vec lane_weights_at(const void *w, ptrdiff_t at) {
    if (TYPE == F32) return load((const float *)w + at);
    if (TYPE == F16) return halves_at((const uint16_t *)w + at);
    return bfloats_at((const uint16_t *)w + at);
}

constexpr int SIXTEEN = 16;  // outputs whose sums are added up together

// Sums for each of OUTPUTS rows of w, from n on, and INPUTS rows of x, sixteen lanes folded into LANES. The lanes are taken strip by
// strip where there are several inputs: so many sums fit the registers, and each weight is widened once for all inputs.
template <int TYPE, int INPUTS, int OUTPUTS>
static inline void dense_tile(const Dense &d, const float *x, ptrdiff_t n, ptrdiff_t last, Vec (&to)[INPUTS][SIXTEEN], int place) {
    constexpr int PARTS = INPUTS == 1 ? STRIPS : 1;
    const ptrdiff_t whole = d.K / 16 * 16;
    Vec lanes[OUTPUTS][INPUTS][STRIPS];
    for (int part = 0; part < STRIPS; part += PARTS) {
        Vec sum[OUTPUTS][INPUTS][PARTS] = {};
        for (ptrdiff_t k = part * LANES; k < whole; k += 16) {
#pragma GCC unroll 8
            for (int o = 0; o < OUTPUTS; o++) {
                const ptrdiff_t at = (n + o < last ? n + o : last - 1) * d.K + k;
                if (part == 0) __builtin_prefetch((const char *)d.w + (at + SIXTEEN * d.K) * (TYPE == F32 ? 4 : 2), 0, 2);
#pragma GCC unroll 4
                for (int p = 0; p < PARTS; p++) {
                    const Vec w = lane_weights_at<TYPE>(d.w, at + p * LANES);
#pragma GCC unroll 4
                    for (int i = 0; i < INPUTS; i++) sum[o][i][p] += w * load(x + i * d.K + k + p * LANES);
                }
            }
        }
        for (int o = 0; o < OUTPUTS; o++)
            for (int i = 0; i < INPUTS; i++)
                for (int p = 0; p < PARTS; p++) lanes[o][i][part + p] = sum[o][i][p];
    }
    for (int o = 0; o < OUTPUTS; o++)
        for (int i = 0; i < INPUTS; i++) to[i][place + o] = folded(lanes[o][i]);
}

// Up to sixteen outputs from n on of INPUTS rows of x.
template <int TYPE, int INPUTS>
static inline void dense_rows(const Dense &d, const float *x, ptrdiff_t n, ptrdiff_t last, float *y) {
    constexpr int OUTPUTS = INPUTS == 1 ? 8 / STRIPS : 8 / INPUTS;
    Vec sums[INPUTS][SIXTEEN];  // those behind the last row are of that row again
    for (int o = 0; o < SIXTEEN; o += OUTPUTS) dense_tile<TYPE, INPUTS, OUTPUTS>(d, x, n + o, last, sums, o);
    const int count = last - n < SIXTEEN ? (int)(last - n) : SIXTEEN;
    for (int i = 0; i < INPUTS; i++) {
        float found[SIXTEEN];
        add_up(sums[i], found);
        for (int o = 0; o < count; o++) {
            for (ptrdiff_t k = d.K / 16 * 16; k < d.K; k++) found[o] += one_weight(TYPE, d.w, (n + o) * d.K + k) * x[i * d.K + k];
            y[i * d.N + n + o] = found[o];
        }
    }
}

template <int TYPE>
static void dense(const Dense &d, ptrdiff_t first, ptrdiff_t last) {
    for (ptrdiff_t n = first; n < last; n += SIXTEEN) {
        ptrdiff_t m = 0;
        for (; m + 4 <= d.M; m += 4) dense_rows<TYPE, 4>(d, d.x + m * d.K, n, last, d.y + m * d.N);
        for (; m + 2 <= d.M; m += 2) dense_rows<TYPE, 2>(d, d.x + m * d.K, n, last, d.y + m * d.N);
        if (m < d.M) dense_rows<TYPE, 1>(d, d.x + m * d.K, n, last, d.y + m * d.N);
    }
}

// y [M, N] for outputs [first, last).
static void dense(const Dense &d, ptrdiff_t first, ptrdiff_t last) {
    if (d.type == F32) dense<F32>(d, first, last);
    else if (d.type == F16) dense<F16>(d, first, last);
    else dense<BF16>(d, first, last);
}

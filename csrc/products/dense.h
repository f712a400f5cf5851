// Products with float weights as they are stored, for few inputs: every weight is read once. Included behind matmul.h.

template <int TYPE>
static inline Floats weights_at(const void *w, ptrdiff_t at) {
    typedef uint32_t Bits __attribute__((vector_size(64)));
    typedef uint16_t Shorts __attribute__((vector_size(32), aligned(2), may_alias));
    if (TYPE == F32) return *(const LooseFloats *)((const float *)w + at);
    if (TYPE == F16) return floats_of_halves((const uint16_t *)w + at);
    return (Floats)(__builtin_convertvector(*(const Shorts *)((const uint16_t *)w + at), Bits) << 16);
}

static inline float one_weight(int type, const void *w, ptrdiff_t at) {
    if (type == F32) return ((const float *)w)[at];
    uint16_t bits[16] = {((const uint16_t *)w)[at]};
    return type == F16 ? floats_of_halves(bits)[0] : float_of((uint32_t)bits[0] << 16);
}

// Of each run of 2 HALF lanes of a, then of b: the second half added to the first.
template <int HALF, int... LANE>
static inline Floats paired(Floats a, Floats b, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(a, b, (LANE / HALF * 2 * HALF + LANE % HALF)...) +
           __builtin_shufflevector(a, b, (LANE / HALF * 2 * HALF + LANE % HALF + HALF)...);
}

template <int HALF>
static inline Floats paired(Floats a, Floats b) {
    return paired<HALF>(a, b, std::make_integer_sequence<int, 16>());
}

// The sums of sixteen vectors, side by side: of each, the second half is added to the first, and so on.
static inline Floats added_up(const Floats *v) {
    Floats halves[8], quarters[4];
    for (int i = 0; i < 8; i++) halves[i] = paired<8>(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 4; i++) quarters[i] = paired<4>(halves[2 * i], halves[2 * i + 1]);
    return paired<1>(paired<2>(quarters[0], quarters[1]), paired<2>(quarters[2], quarters[3]));
}

static inline float added_up(Floats v) {
    Floats all[16] = {v};
    return added_up(all)[0];
}

constexpr int ROWS_TOGETHER = 4;  // of w: sums that do not wait for one another

// `rows` outputs of one input.
template <int TYPE>
static inline void dense_rows(const Dense &d, const float *x, ptrdiff_t n, int rows, float *y) {
    const ptrdiff_t whole = d.K / 32 * 32;
    Floats even[ROWS_TOGETHER] = {}, odd[ROWS_TOGETHER] = {};
    for (ptrdiff_t k = 0; k < whole; k += 32) {
        const Floats first = *(const LooseFloats *)(x + k), second = *(const LooseFloats *)(x + k + 16);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS_TOGETHER; r++) {
            const ptrdiff_t at = (n + (r < rows ? r : 0)) * d.K + k;
            __builtin_prefetch((const char *)d.w + (at + ROWS_TOGETHER * d.K) * (TYPE == F32 ? 4 : 2), 0, 2);
            even[r] += weights_at<TYPE>(d.w, at) * first;
            odd[r] += weights_at<TYPE>(d.w, at + 16) * second;
        }
    }
    for (int r = 0; r < rows; r++) {
        y[n + r] = added_up(even[r] + odd[r]);
        for (ptrdiff_t k = whole; k < d.K; k++) y[n + r] += one_weight(TYPE, d.w, (n + r) * d.K + k) * x[k];
    }
}

template <int TYPE>
static void dense(const Dense &d, ptrdiff_t first, ptrdiff_t last) {
    for (ptrdiff_t n = first; n < last; n += ROWS_TOGETHER)
        for (ptrdiff_t m = 0; m < d.M; m++)
            dense_rows<TYPE>(d, d.x + m * d.K, n, last - n < ROWS_TOGETHER ? (int)(last - n) : ROWS_TOGETHER, d.y + m * d.N);
}

// y [M, N] for outputs [first, last).
static void dense(const Dense &d, ptrdiff_t first, ptrdiff_t last) {
    if (d.type == F32) dense<F32>(d, first, last);
    else if (d.type == F16) dense<F16>(d, first, last);
    else dense<BF16>(d, first, last);
}

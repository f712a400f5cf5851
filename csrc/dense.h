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

static inline float added_up(Floats v) {
    for (int n = 8; n > 0; n /= 2)
        for (int i = 0; i < n; i++) v[i] += v[i + n];
    return v[0];
}

template <int TYPE>
static void dense(const Dense &d, ptrdiff_t first, ptrdiff_t last) {
    const ptrdiff_t whole = d.K / 32 * 32;
    for (ptrdiff_t n = first; n < last; n++)
        for (ptrdiff_t m = 0; m < d.M; m++) {
            const float *x = d.x + m * d.K;
            Floats even{}, odd{};
            for (ptrdiff_t k = 0; k < whole; k += 32) {
                even += weights_at<TYPE>(d.w, n * d.K + k) * *(const LooseFloats *)(x + k);
                odd += weights_at<TYPE>(d.w, n * d.K + k + 16) * *(const LooseFloats *)(x + k + 16);
            }
            float sum = added_up(even + odd);
            for (ptrdiff_t k = whole; k < d.K; k++) sum += one_weight(TYPE, d.w, n * d.K + k) * x[k];
            d.y[m * d.N + n] = sum;
        }
}

// y [M, N] for outputs [first, last).
static void dense(const Dense &d, ptrdiff_t first, ptrdiff_t last) {
    if (d.type == F32) dense<F32>(d, first, last);
    else if (d.type == F16) dense<F16>(d, first, last);
    else dense<BF16>(d, first, last);
}

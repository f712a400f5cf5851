// The gates of LSTM and GRU in float, a few units in the last place from torch's. Included behind attention.h.

static inline Floats sigmoid(Floats x) { return 1 / (exponential(-x) + 1); }
static inline Floats tangent(Floats x) { return 2 * sigmoid(2 * x) - 1; }

static inline Floats some(const float *at, ptrdiff_t n) {
    if (n == 16) return *(const LooseFloats *)at;
    Floats x{};
    __builtin_memcpy(&x, at, 4 * n);
    return x;
}

// Samples [first, last).
static void gates(const Gates &a, ptrdiff_t first, ptrdiff_t last) {
    const int count = a.c ? 4 : 3;
    for (ptrdiff_t b = first; b < last; b++)
        for (ptrdiff_t k = 0; k < a.H; k += 16) {
            const ptrdiff_t n = a.H - k < 16 ? a.H - k : 16, at = b * a.H + k;
            Floats x[4], h[4], y;
            for (int i = 0; i < count; i++) {
                x[i] = some(a.x + (b * count + i) * a.H + k, n);
                h[i] = some(a.h + (b * count + i) * a.H + k, n);
            }
            if (a.c) {  // in, forget, cell, out
                const Floats c = sigmoid(x[1] + h[1]) * some(a.c + at, n) + sigmoid(x[0] + h[0]) * tangent(x[2] + h[2]);
                __builtin_memcpy(a.c + at, &c, 4 * n);
                y = sigmoid(x[3] + h[3]) * tangent(c);
            } else {    // reset, update, new
                const Floats z = sigmoid(x[1] + h[1]), fresh = tangent(x[2] + sigmoid(x[0] + h[0]) * h[2]);
                y = fresh + z * (some(a.before + at, n) - fresh);
            }
            __builtin_memcpy(a.y + at, &y, 4 * n);
        }
}

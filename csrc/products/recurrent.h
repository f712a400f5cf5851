// The gates of LSTM and GRU in float, a few units in the last place from torch's. Included behind attention.h.

static inline Vec sigmoid(Vec x) { return 1 / (exponential(-x) + 1); }
static inline Vec tangent(Vec x) { return 2 * sigmoid(2 * x) - 1; }

// Samples [first, last).
static void gates(const Gates &a, ptrdiff_t first, ptrdiff_t last) {
    const int count = a.c ? 4 : 3;
    for (ptrdiff_t b = first; b < last; b++)
        for (ptrdiff_t k = 0; k < a.H; k += LANES) {
            const int n = a.H - k < LANES ? (int)(a.H - k) : LANES;
            const ptrdiff_t at = b * a.H + k;
            Vec x[4], h[4], y;
            for (int i = 0; i < count; i++) {
                x[i] = some(a.x + (b * count + i) * a.H + k, n);
                h[i] = some(a.h + (b * count + i) * a.H + k, n);
            }
            if (a.c) {  // in, forget, cell, out
                const Vec c = sigmoid(x[1] + h[1]) * some(a.c + at, n) + sigmoid(x[0] + h[0]) * tangent(x[2] + h[2]);
                put(a.c + at, c, n);
                y = sigmoid(x[3] + h[3]) * tangent(c);
            } else {    // reset, update, new
                const Vec z = sigmoid(x[1] + h[1]), fresh = tangent(x[2] + sigmoid(x[0] + h[0]) * h[2]);
                y = fresh + z * (some(a.before + at, n) - fresh);
            }
            put(a.y + at, y, n);
        }
}

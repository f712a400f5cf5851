// Pooling and addition of codes: what lies between integer products and keeps their scale. Included behind integer.h.

typedef int8_t Bytes16 __attribute__((vector_size(16)));
typedef Bytes16 LooseBytes16 __attribute__((aligned(1), may_alias));

// The largest codes of a window's taps, n channels (16 at most) of each: rows and columns of taps lie `down` and `right` apart.
static inline Bytes16 largest_of(const int8_t *x, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t down, ptrdiff_t right, ptrdiff_t n) {
    Bytes16 most = Bytes16{} + (int8_t)-128;
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t c = 0; c < columns; c++) {
            Bytes16 each{};
            if (n == 16) each = *(const LooseBytes16 *)(x + r * down + c * right);
            else __builtin_memcpy(&each, x + r * down + c * right, n);
            most = each > most ? each : most;
        }
    return most;
}

// Taps of a window from `at` on that lie inside n positions: how many come before them, and how many there are.
struct Inside { ptrdiff_t skipped, count; };

static inline Inside inside(ptrdiff_t at, ptrdiff_t taps, ptrdiff_t step, ptrdiff_t n) {
    const ptrdiff_t skipped = at < 0 ? (step - 1 - at) / step : 0, end = at < n ? (n - at + step - 1) / step : 0;
    return {skipped, (end < taps ? end : taps) - skipped};
}

// Rows [first, last) of all pooled images.
static void pool_codes(const Pooling &a, ptrdiff_t first, ptrdiff_t last) {
    const ptrdiff_t down = a.dilation[0] * a.W * a.C, right = a.dilation[1] * a.C;
    for (ptrdiff_t i = first; i < last; i++) {
        const ptrdiff_t h = i % a.rows * a.stride[0] - a.top;
        const Inside rows = inside(h, a.kernel[0], a.dilation[0], a.H);
        const int8_t *row = a.x + ((i / a.rows * a.H + h) * a.W - a.left) * a.C + rows.skipped * down;
        int8_t *to = a.y + i * a.columns * a.C;
        for (ptrdiff_t column = 0; column < a.columns; column++, row += a.stride[1] * a.C, to += a.C) {
            const Inside columns = inside(column * a.stride[1] - a.left, a.kernel[1], a.dilation[1], a.W);
            const int8_t *from = row + columns.skipped * right;
            ptrdiff_t c = 0;
            for (; c + 16 <= a.C; c += 16)
                *(LooseBytes16 *)(to + c) = largest_of(from + c, rows.count, columns.count, down, right, 16);
            if (c == a.C) continue;
            const Bytes16 rest = largest_of(from + c, rows.count, columns.count, down, right, a.C - c);
            __builtin_memcpy(to + c, &rest, a.C - c);
        }
    }
}

// Codes [first, last) of a sum.
static void add_codes(const Total &t, ptrdiff_t first, ptrdiff_t last) {
    const Vec low = all(t.low), high = all(t.high);
    auto total = [&](const int8_t *a, const int8_t *b) {
        Vec y = t.factor[2] + __builtin_convertvector(ints_of(a), Vec) * t.factor[0];
        return codes_of(y + __builtin_convertvector(ints_of(b), Vec) * t.factor[1], low, high);
    };
    ptrdiff_t i = first;
    for (; i + LANES <= last; i += LANES) *(LooseBytes *)(t.y + i) = total(t.a + i, t.b + i);
    if (i == last) return;
    int8_t a[LANES] = {}, b[LANES] = {};
    __builtin_memcpy(a, t.a + i, last - i), __builtin_memcpy(b, t.b + i, last - i);
    const Bytes y = total(a, b);
    __builtin_memcpy(t.y + i, &y, last - i);
}

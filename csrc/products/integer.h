// Products of codes and signed bytes, for linear layers and convolutions. Included behind dot.h, matmul.h and inputs.h.
//
// Codes become octets on the way in, 128 more than they were, with the border of a convolution around them and the
// channels last. Then what a position sees is a few stretches of memory, and nothing needs to be unfolded: sums run over
// a stretch, four octets at a time, from stretch to stretch. They start at -128 Σ w, what the octets are too much.

// Rows and panels whose sums fit the registers.
constexpr bool LONG = LANES == 16;
constexpr int FEWEST = LONG ? 6 : 2, MOST_PANELS = LONG ? 4 : 2;
constexpr int rows_for(int panels) { return !LONG ? 2 : panels < 3 ? 8 : FEWEST; }

// ----------------------------------------------------------------------------------------------------------- on the way in

typedef int32_t LooseInts __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// The codes low..high nearest to some numbers; the lowest for a NaN.
static inline Bytes codes_of(Vec v, Vec low, Vec high) {
    v = v > low ? v : low;
    v = v < high ? v : high;
    return bytes_of(__builtin_convertvector(nearest(v), Ints));
}

// n numbers to codes: x / scale + zero, rounded; `flip` makes octets of them (128), or not (0).
static void round_numbers(const float *x, ptrdiff_t n, float scale, float zero, float low, float high, int8_t flip, int8_t *to) {
    const Vec least = all(low), most = all(high), divisor = all(scale), point = all(zero);
    auto round = [&](Vec v) { return codes_of(v / divisor + point, least, most) ^ flip; };
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES) *(LooseBytes *)(to + i) = round(load(x + i));
    if (i == n) return;
    Vec last{};
    __builtin_memcpy(&last, x + i, 4 * (n - i));
    const Bytes codes = round(last);
    __builtin_memcpy(to + i, &codes, n - i);
}

// Numbers [first, last).
static void enter_codes(const Entry &a, ptrdiff_t first, ptrdiff_t last) {
    round_numbers(a.x + first, last - first, a.scale, a.zero, a.low, a.high, 0, a.codes + first);
}

struct Range { float low, high; };

// The smallest and the largest of n numbers and 0; NaN if one is.
static Range range_of(const float *x, ptrdiff_t n) {
    Vec low{}, high{}, nothing{};
    ptrdiff_t i = 0;
    auto see = [&](Vec v) {
        nothing += v - v;
        low = v < low ? v : low;
        high = v > high ? v : high;
    };
    for (; i + LANES <= n; i += LANES) see(load(x + i));
    Vec last{};
    __builtin_memcpy(&last, x + i, 4 * (n - i));
    see(last);
    Range all{0, 0};
    float none = 0;
    for (int l = 0; l < LANES; l++) {
        all.low = low[l] < all.low ? low[l] : all.low, all.high = high[l] > all.high ? high[l] : all.high;
        none += nothing[l];
    }
    return {all.low + none, all.high + none};
}

// Samples [first, last), each n numbers that lie together, rounded by their own range; codec.py: raw_scales.
static void round_samples(const Samples &a, ptrdiff_t first, ptrdiff_t last) {
    for (ptrdiff_t i = first; i < last; i++) {
        const float *x = a.x + i * a.n;
        const Range r = range_of(x, a.n);
        const float extreme = -r.low > r.high ? -r.low : r.high;
        float scale = a.zero ? (r.high - r.low) / (a.high - a.low) : extreme * a.inverse, zero = 0;
        if (a.zero) {
            zero = a.low - nearest(r.low / safe(scale));
            zero = zero < a.low ? a.low : zero > a.high ? a.high : zero;
            a.zero[i] = zero;
        }
        a.scale[i] = scale;
        round_numbers(x, a.n, safe(scale), zero, a.low, a.high, -128, (int8_t *)a.octets + i * a.n);
    }
}

// Rows [first, last) of all images with their border, as octets with the channels last.
static void place_codes(const Images &a, ptrdiff_t first, ptrdiff_t last) {
    const bool together = (a.C == 1 || a.step[3] == 1) && (a.W == 1 || a.step[2] == a.C);
    for (ptrdiff_t i = first; i < last; i++) {
        const ptrdiff_t b = i / a.height, h = i % a.height - a.top;
        uint8_t *to = a.octets + b * a.image + (h + a.top) * a.width * a.C;
        const uint8_t border = a.border ? a.border[b] : a.fixed;
        const bool inside = h >= 0 && h < a.H;
        const ptrdiff_t before = inside ? a.left * a.C : a.width * a.C, n = inside ? a.W * a.C : 0;
        for (ptrdiff_t k = 0; k < before; k++) to[k] = border;
        for (ptrdiff_t k = before + n; k < a.width * a.C; k++) to[k] = border;
        if (!inside) continue;
        const uint8_t *from = a.x + b * a.step[0] + h * a.step[1];
        to += before;
        if (together) {
            ptrdiff_t k = 0;
            for (; k + 4 * LANES <= n; k += 4 * LANES) *(LooseOctets *)(to + k) = octets(from + k) ^ a.flip;
            for (; k < n; k++) to[k] = from[k] ^ a.flip;
        } else
            for (ptrdiff_t c = 0; c < a.C; c++)
                for (ptrdiff_t w = 0; w < a.W; w++) to[w * a.C + c] = from[w * a.step[2] + c * a.step[3]] ^ a.flip;
    }
}

// ---------------------------------------------------------------------------------------------------------- on the way out

// Where an output row sees its first octet, and whose range its inputs were rounded by.
struct Seen { const uint8_t *from; ptrdiff_t sample; };

// Rows [first, last), in turn: dividing for each would cost as much as multiplying. Behind them the last one again.
static void find_rows(const Codes &a, ptrdiff_t first, ptrdiff_t last, Seen (&rows)[CODE_ROWS + 8]) {
    ptrdiff_t column = first % a.columns, row = first / a.columns % a.rows, image = first / a.columns / a.rows;
    for (ptrdiff_t m = first; m < last; m++) {
        rows[m - first] = {a.octets + image * a.image + row * a.down + column * a.right, image};
        if (++column < a.columns) continue;
        column = 0;
        if (++row < a.rows) continue;
        row = 0, image++;
    }
    for (int i = 0; i < 8; i++) rows[last - first + i] = rows[last - first - 1];
}

// Sixteen outputs of one panel, where they begin and where those of their group end, and what goes with them.
struct Sixteen { ptrdiff_t n, end; const float *constant, *sums; };

// Sums y of `count` rows from m on, `step` apart, as what the layer gives.
static inline void finish(const Codes &a, const Seen *rows, ptrdiff_t m, ptrdiff_t count, float *y, int step, const Sixteen &b) {
    const ptrdiff_t N = a.N, at = m * N + b.n, some = b.end - b.n < 16 ? b.end - b.n : 16;
    if (a.scales)  // inputs were rounded as they came
        for (ptrdiff_t r = 0; r < count; r++)
            for (int i = 0; i < 16; i += LANES) {
                Vec v = load(y + r * step + i);
                if (a.zeros) v -= a.zeros[rows[r].sample] * load(b.sums + i);
                store(y + r * step + i, load(b.constant + i) + v * a.scales[rows[r].sample]);
            }
    if (!a.codes) {
        for (ptrdiff_t r = 0; r < count; r++)
            if (some == 16) __builtin_memcpy(a.y + at + r * N, y + r * step, 64);
            else __builtin_memcpy(a.y + at + r * N, y + r * step, 4 * some);
        return;
    }
    const Vec low = all(a.low), high = all(a.high);
    int8_t *to = a.codes + at;
    for (ptrdiff_t r = 0; r < count; r++) {
        int8_t codes[16], *here = some == 16 ? to + r * N : codes;
        for (int i = 0; i < 16; i += LANES) *(LooseBytes *)(here + i) = codes_of(load(y + r * step + i), low, high);
        if (some < 16) __builtin_memcpy(to + r * N, codes, some);
    }
}

// ---------------------------------------------------------------------------------------------------------------- products

// One block of panels, `width` side by side: where its weights and numbers lie.
struct Side {
    const int8_t *w;                // [scales, taps, steps, width, 16, 4]
    const int32_t *start;           // [scales, width, 16]
    const float *scale;             // [scales, width, 16]
    const float *constant, *sums;   // [width, 16]
    ptrdiff_t width, n, end;        // n: its first output
};

// The sums of one group of columns, from its first tap on: ROWS rows by PANELS panels. By itself, so that the sums have the
// registers to themselves.
template <int ROWS, int PANELS>
__attribute__((noinline)) static void add_products(const Codes &a, const Seen *rows, const int8_t *w, ptrdiff_t width, const ptrdiff_t *tap,
                                                   const int32_t *start, int32_t (&sums)[ROWS][PANELS * 16]) {
    constexpr int COUNT = PANELS * STRIPS;
    Ints sum[ROWS][COUNT];
    const uint8_t *from[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        from[r] = rows[r].from;
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++) sum[r][i] = *(const LooseInts *)(start + i * LANES);
    }
    for (int t = 0; t < a.taps; t++)
        for (ptrdiff_t k = tap[t], end = k + 4 * a.steps; k < end; k += 4, w += width * 64) {
            Octets v[COUNT];
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; i++) v[i] = *(const LooseOctets *)(w + i * sizeof(Octets));
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                int32_t four;
                __builtin_memcpy(&four, from[r] + k, 4);
                const Octets x = (Octets)(Ints{} + four);
#pragma GCC unroll 4
                for (int i = 0; i < COUNT; i++) sum[r][i] = dot<false>(sum[r][i], x, v[i]);
            }
        }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++) *(LooseInts *)(sums[r] + i * LANES) = sum[r][i];
}

// ROWS rows, the first of them m, by PANELS panels of a block, from panel p on; `count` of the rows are wanted.
template <int ROWS, int PANELS>
static void multiply_codes(const Codes &a, const Side &b, ptrdiff_t p, const Seen *rows, ptrdiff_t m, ptrdiff_t count) {
    alignas(64) int32_t sums[ROWS][PANELS * 16];
    alignas(64) float y[ROWS][PANELS * 16];
    const ptrdiff_t K = (ptrdiff_t)a.taps * a.steps * 64;
    const float *constant = b.constant + p * 16;
    for (int g = 0; g < a.groups_of_k; g++) {
        const ptrdiff_t at = (g * b.width + p) * 16;
        add_products<ROWS, PANELS>(a, rows, b.w + (g * b.width * K + p * 64), b.width, a.tap + g * a.taps, b.start + at, sums);
        for (int i = 0; i < PANELS * 16; i += LANES) {
            const Vec base = a.scales ? Vec{} : load(constant + i), scale = load(b.scale + at + i);
            for (int r = 0; r < ROWS; r++)
                store(y[r] + i, (g ? load(y[r] + i) : base) + __builtin_convertvector(*(const LooseInts *)(sums[r] + i), Vec) * scale);
        }
    }
    for (int i = 0; i < PANELS * 16; i += 16)
        finish(a, rows, m, count, y[0] + i, PANELS * 16, {b.n + p * 16 + i, b.end, constant + i, b.sums + p * 16 + i});
}

template <int PANELS>
static void multiply_codes(const Codes &a, const Side &b, ptrdiff_t p, const Seen *rows, ptrdiff_t from, ptrdiff_t to) {
    constexpr int ROWS = rows_for(PANELS);
    if (to - from == 1) return multiply_codes<1, PANELS>(a, b, p, rows, from, 1);
    for (ptrdiff_t m = from; m < to; m += ROWS, rows += ROWS)
        multiply_codes<ROWS, PANELS>(a, b, p, rows, m, to - m < ROWS ? to - m : ROWS);
}

// Each channel by itself: its taps, sixteen channels in turn. Rows [from, to).
static void multiply_channels(const Codes &a, const Seen *rows, ptrdiff_t from, ptrdiff_t to) {
    constexpr int ROWS = LONG ? 8 : 4;
    alignas(64) float y[ROWS][16];
    for (ptrdiff_t m = from; m < to; m += ROWS, rows += ROWS)
        for (ptrdiff_t n = 0; n < a.N; n += 16) {
            for (int i = 0; i < 16; i += LANES) {
                Ints sum[ROWS];
                for (int r = 0; r < ROWS; r++) sum[r] = *(const LooseInts *)(a.start + n + i);
                const int8_t *w = a.w + n * a.taps + i;
                for (int t = 0; t < a.taps; t++, w += 16) {
                    const Ints each = ints_of(w);
#pragma GCC unroll 8
                    for (int r = 0; r < ROWS; r++) sum[r] += ints_of(rows[r].from + a.tap[t] + n + i) * each;
                }
                const Vec base = a.scales ? Vec{} : load(a.constant + n + i), scale = load(a.scale + n + i);
                for (int r = 0; r < ROWS; r++) store(y[r] + i, base + __builtin_convertvector(sum[r], Vec) * scale);
            }
            finish(a, rows, m, to - m < ROWS ? to - m : ROWS, y[0], 16, {n, a.N, a.constant + n, a.sums + n});
        }
}

// Pieces [first, last): a block of panels and some rows. Weights that fit a cache are used for one set of rows after the other,
// so that what is written lies together; of larger ones each block is used for all rows.
static void multiply_codes(const Codes &a, ptrdiff_t first, ptrdiff_t last) {
    const ptrdiff_t panels = (a.n + 15) / 16, blocks = (panels + 3) / 4, K = (ptrdiff_t)a.groups_of_k * a.taps * a.steps * 4;
    const ptrdiff_t sets = (a.M + CODE_ROWS - 1) / CODE_ROWS, all = a.alone ? 1 : a.N / a.n * blocks;
    const bool by_rows = a.N * K <= 1 << 20;
    for (ptrdiff_t i = first; i < last; i++) {
        const ptrdiff_t from = (by_rows ? i / all : i % sets) * CODE_ROWS, to = from + CODE_ROWS < a.M ? from + CODE_ROWS : a.M;
        const ptrdiff_t at = by_rows ? i % all : i / sets, group = at / blocks, block = at % blocks;
        Seen rows[CODE_ROWS + 8];
        find_rows(a, from, to, rows);
        if (a.alone) {
            multiply_channels(a, rows, from, to);
            continue;
        }
        const ptrdiff_t before = group * panels + block * 4;
        const ptrdiff_t width = panels - block * 4 < 4 ? panels - block * 4 : 4;
        for (Seen *row = rows; row < rows + (to - from) + 8; row++) row->from += group * a.C;
        const Side b{a.w + before * 16 * K, a.start + before * 16 * a.groups_of_k, a.scale + before * 16 * a.groups_of_k,
                     a.constant + before * 16, a.sums + before * 16, width, group * a.n + block * 64, (group + 1) * a.n};
        for (ptrdiff_t p = 0; p < width;) {
            const ptrdiff_t left = width - p;
            if (MOST_PANELS == 4 && left == 4) multiply_codes<4>(a, b, p, rows, from, to), p += 4;
            else if (MOST_PANELS == 4 && left == 3) multiply_codes<3>(a, b, p, rows, from, to), p += 3;
            else if (left >= 2) multiply_codes<2>(a, b, p, rows, from, to), p += 2;
            else multiply_codes<1>(a, b, p, rows, from, to), p += 1;
        }
    }
}

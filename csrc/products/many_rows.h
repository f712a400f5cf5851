// Many inputs: a block of weights is unpacked, then used often. Included behind few_rows.h.

// Weights of some tiles of two panels as they multiply; of one byte for inputs in words: the even ones and the odd ones.
struct Unpacked {
    static constexpr int PANEL = (BLOCK / 4 + 17) * STRIPS;  // from one panel to the next: 4096 bytes, or little more, would make caches collide
    alignas(64) Octets high[2 * PANEL], low[2 * PANEL];

    // Where a strip of the two panels has its part of a vector; STRIPS further on lies that of the next.
    static ptrdiff_t place(int strip, ptrdiff_t vector) { return strip / STRIPS * PANEL + vector * STRIPS + strip % STRIPS; }
};

// WORDS_OF: as even and odd ones.
template <int BITS, bool TABLE, bool WORDS_OF>
static void unpack(const Weights &w, ptrdiff_t panel, ptrdiff_t tile, int tiles, Unpacked &to) {
    const Octets high = repeated(w.high), low = repeated(w.low);
    const bool two = w.bytes == 2;
    for (int strip = 0; strip < 2 * STRIPS; strip++) {
        const uint8_t *from = w.panels + place(panel + strip / STRIPS, tile, w.tiles) * 64 * BITS + strip % STRIPS * 4 * LANES;
        Octets *at = to.high + Unpacked::place(strip, 0), *below = to.low + (at - to.high);
        for (int t = 0; t < tiles; t++, from += 4 * 64 * BITS, at += TILE_STEPS * STRIPS, below += TILE_STEPS * STRIPS) {
            Octets v[TILE_STEPS];
            const uint8_t *next = w.panels + place(panel + 2 + strip / STRIPS, tile + t, w.tiles) * 64 * BITS;  // of the next two panels
            for (int i = strip % STRIPS; i < BITS; i += STRIPS) __builtin_prefetch(next + 64 * i, 0, 2);
            unpack_tile<BITS>(from, v);
            if (TABLE && two)
                for (int i = 0; i < TILE_STEPS; i++) below[i * STRIPS] = look_up(low, v[i]);
#pragma GCC unroll 8
            for (int i = 0; i < TILE_STEPS; i++) {
                const Octets octets = TABLE ? look_up(high, v[i]) : v[i];
                at[i * STRIPS] = WORDS_OF ? (Octets)even_of(octets) : octets;
                if (WORDS_OF) below[i * STRIPS] = (Octets)odd_of(octets);
            }
        }
    }
}

static void unpack(const Weights &w, ptrdiff_t panel, ptrdiff_t tile, int tiles, bool words, Unpacked &to) {
    with_codes(w, [&](auto bits, auto, auto table) {
        if (WORDS && words) unpack<bits.value, table.value, WORDS>(w, panel, tile, tiles, to);
        else unpack<bits.value, table.value, false>(w, panel, tile, tiles, to);
    });
}

// Inputs that are multiplied with the same unpacked block: their sums stay in the cache beside them.
constexpr int ROWS_AT_ONCE = 128;

constexpr bool TOGETHER = LANES == 16;  // whether the registers hold both kinds of sums

// Products of two strips of w, some vectors of them, and as many columns of ROWS inputs: which bytes of an input and of a
// weight say HH, LH and HL.
template <int ROWS, bool HH, bool LH, bool HL, bool SMALL>
static inline void add_products(Ints (&top)[ROWS][2], Ints (&mid)[ROWS][2], const Unpacked &u, ptrdiff_t from, const int8_t *high,
                                const int8_t *low, int height, int steps) {
    constexpr ptrdiff_t NEXT = STRIPS == 1 ? Unpacked::PANEL : 1;  // from one strip to the other
    for (ptrdiff_t at = from; at < from + steps * STRIPS; at += STRIPS, high += 4 * height, low += 4 * height) {
        Octets wh[2], wl[2];
        for (int p = 0; p < 2; p++) {
            if (HH || LH) wh[p] = u.high[at + p * NEXT];
            if (HL) wl[p] = u.low[at + p * NEXT];
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            int32_t xh = 0, xl = 0;
            if (HH || HL) __builtin_memcpy(&xh, high + 4 * r, 4);
            if (LH) __builtin_memcpy(&xl, low + 4 * r, 4);
#pragma GCC unroll 2
            for (int p = 0; p < 2; p++) {
                if (HH) top[r][p] = dot<SMALL>(top[r][p], wh[p], xh);
                if (LH) mid[r][p] = dot<SMALL>(mid[r][p], wh[p], xl);
                if (HL) mid[r][p] = dot<SMALL>(mid[r][p], wl[p], xh);
            }
        }
    }
}

// The same for inputs of one byte where no code is above 15.
template <int ROWS>
static inline void add_tiny(Ints (&top)[ROWS][2], const Unpacked &u, ptrdiff_t from, const int8_t *x, int height, int steps) {
    constexpr ptrdiff_t NEXT = STRIPS == 1 ? Unpacked::PANEL : 1;
    for (int begin = 0; begin < steps; begin += TILE_STEPS) {
        Pairs sum[ROWS][2] = {};
        const int count = steps - begin < TILE_STEPS ? steps - begin : TILE_STEPS;
        for (int i = 0; i < count; i++, from += STRIPS, x += 4 * height)
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                int32_t four;
                __builtin_memcpy(&four, x + 4 * r, 4);
#pragma GCC unroll 2
                for (int p = 0; p < 2; p++) sum[r][p] = dot_tiny(sum[r][p], u.high[from + p * NEXT], (Octets)(Ints{} + four));
            }
        for (int r = 0; r < ROWS; r++)
            for (int p = 0; p < 2; p++) top[r][p] = dot(top[r][p], sum[r][p], Pairs{} + 1);
    }
}

// The same where inputs are words and weights of one byte too: whole sums.
template <int ROWS>
static inline void add_words(Ints (&sum)[ROWS][2], const Unpacked &u, ptrdiff_t from, const int8_t *x, int height, int steps) {
    constexpr ptrdiff_t NEXT = STRIPS == 1 ? Unpacked::PANEL : 1;
    for (ptrdiff_t at = from; at < from + steps * STRIPS; at += STRIPS, x += 8 * height) {
        const Pairs even[2] = {(Pairs)u.high[at], (Pairs)u.high[at + NEXT]}, odd[2] = {(Pairs)u.low[at], (Pairs)u.low[at + NEXT]};
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const Pairs first = words_at(x + 8 * r), second = words_at(x + 8 * r + 4);
#pragma GCC unroll 2
            for (int p = 0; p < 2; p++) sum[r][p] = dot(dot(sum[r][p], even[p], first), odd[p], second);
        }
    }
}

// And with weights of two bytes.
template <int ROWS>
static inline void add_wide_words(Ints (&top)[ROWS][2], Ints (&mid)[ROWS][2], const Unpacked &u, ptrdiff_t from, const int8_t *x, int height,
                                  int steps) {
    constexpr ptrdiff_t NEXT = STRIPS == 1 ? Unpacked::PANEL : 1;
    for (ptrdiff_t at = from; at < from + steps * STRIPS; at += STRIPS, x += 8 * height)
        for (int r = 0; r < ROWS; r++)
            for (int p = 0; p < 2; p++)
                add_four_words<2>(top[r][p], mid[r][p], u.high[at + p * NEXT], u.low[at + p * NEXT], x + 8 * r);
}

// Where a block lies: columns of the inputs, its group in the weights, its span in the inputs.
struct Block {
    ptrdiff_t index, group, span;
    int skip, steps;  // its vectors among those that were unpacked together
};

static inline Block block_at(const Weights &w, const Inputs &x, ptrdiff_t k, int inside, int columns) {
    const ptrdiff_t i = (k + inside) / x.block;
    return {i, i / w.repeat, i / x.repeat, inside / 4, (columns - inside < x.block ? columns - inside : x.block) / 4};
}

// One block: ROWS inputs and two strips from `strip` on, added to y [2][height][LANES].
template <int ROWS, int XBYTES, int WBYTES, Offset OFFSET, bool SMALL>
static void add_block(const Weights &w, const Inputs &x, const Unpacked &u, int strip, const Scaling<OFFSET> *groups, const Block &b,
                      ptrdiff_t tile, int row, float *y) {
    const int H = x.height;
    Ints top[ROWS][2] = {}, mid[ROWS][2] = {};
    const int32_t *sum = x.sum + (tile * x.blocks + b.index) * H + row;
    const float *unit = x.scale + (tile * x.spans + b.span) * H + row;
    constexpr bool BEFORE = XBYTES + WBYTES == 2 && OFFSET == SAME;  // taken away before it is added up
    if (BEFORE)
        for (int r = 0; r < ROWS; r++) top[r][0] = top[r][1] = Ints{} - w.offset * sum[r];
    const ptrdiff_t start = tile * x.padded * H + b.index * x.block * H + 4 * row;
    const int8_t *high = x.high + start, *low = x.low + start;
    const ptrdiff_t from = Unpacked::place(strip, b.skip);
    constexpr bool TWO = XBYTES == 2, WIDE = WBYTES == 2;
    if constexpr (WORDS && TWO && WIDE) add_wide_words<ROWS>(top, mid, u, from, x.high + 2 * start, H, b.steps);
    else if constexpr (WORDS && TWO) add_words<ROWS>(top, u, from, x.high + 2 * start, H, b.steps);
    else if constexpr (TOGETHER) add_products<ROWS, true, TWO, WIDE, SMALL>(top, mid, u, from, high, low, H, b.steps);
    else if (WORDS && SMALL && w.bits <= 4) add_tiny<ROWS>(top, u, from, high, H, b.steps);
    else {
        add_products<ROWS, true, false, false, SMALL>(top, mid, u, from, high, low, H, b.steps);
        if (TWO) add_products<ROWS, false, true, false, SMALL>(top, mid, u, from, high, low, H, b.steps);
        if (WIDE) add_products<ROWS, false, false, true, SMALL>(top, mid, u, from, high, low, H, b.steps);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
            float *to = y + (p * H + row + r) * LANES;
            const int offset = BEFORE ? 0 : w.offset;
            store(to, added<XBYTES, WBYTES, OFFSET, WORDS>(load(to), groups[p], offset, top[r][p], mid[r][p], sum[r], unit[r]));
        }
}

// Not inlined, where it would share its caller's registers.
template <int ROWS, int XBYTES, int WBYTES, Offset OFFSET, bool SMALL>
__attribute__((noinline)) static void multiply_panels(const Weights &w, const Inputs &x, float *y, ptrdiff_t panel, ptrdiff_t from, ptrdiff_t to) {
    static thread_local Unpacked u;
    alignas(64) static thread_local float sums[2 * ROWS_AT_ONCE * 16];  // [pairs of strips][tiles][2][height][LANES]
    const ptrdiff_t first = from / x.height, last = (to + x.height - 1) / x.height, room = 2 * x.height * LANES;
    auto sums_of = [&](int pair, ptrdiff_t tile) { return sums + (pair * (last - first) + tile - first) * room; };
    for (ptrdiff_t i = 0; i < STRIPS * (last - first) * room; i++) sums[i] = 0;
    const int unit = x.block > TILE ? x.block : TILE;  // columns unpacked together
    for (ptrdiff_t k = 0; k < x.padded; k += unit) {
        const int columns = x.padded - k < unit ? (int)(x.padded - k) : unit;
        unpack(w, panel, k / TILE, columns / TILE, WORDS && XBYTES == 2 && WBYTES == 1, u);
        for (int inside = 0; inside < columns && k + inside < x.K; inside += x.block) {
            const Block b = block_at(w, x, k, inside, columns);
            for (int strip = 0; strip < 2 * STRIPS; strip += 2) {
                auto group = [&](int s) { return Scaling<OFFSET>(w, panel + s / STRIPS, s % STRIPS, b.group); };
                const Scaling<OFFSET> groups[2] = {group(strip), group(strip + 1)};
                for (ptrdiff_t t = first; t < last; t++)
                    for (int row = 0; row < x.height && t * x.height + row < x.M; row += ROWS)
                        add_block<ROWS, XBYTES, WBYTES, OFFSET, SMALL>(w, x, u, strip, groups, b, t, row, sums_of(strip / 2, t));
            }
        }
    }
    for (ptrdiff_t m = from; m < to; m++)
        for (int strip = 0; strip < 2 * STRIPS; strip++) {
            const float *sum = sums_of(strip / 2, m / x.height) + (strip % 2 * x.height + m % x.height) * LANES;
            write_sums(load(sum), w, panel * 16 + strip * LANES, y + m * w.N);
        }
}

// y [M, N] of two panels. Rows of inputs are taken together as long as their sums fit the registers.
template <int XBYTES, int WBYTES, Offset OFFSET, bool SMALL>
static void multiply_many(const Weights &w, const Inputs &x, float *y, ptrdiff_t panel) {
    constexpr int R = PLAIN ? 1 : TOGETHER && XBYTES + WBYTES == 2 ? 8 : 4;
    for (ptrdiff_t from = 0; from < x.M; from += ROWS_AT_ONCE)
        multiply_panels<R, XBYTES, WBYTES, OFFSET, SMALL>(w, x, y, panel, from, from + ROWS_AT_ONCE < x.M ? from + ROWS_AT_ONCE : x.M);
}

template <int XBYTES, Offset OFFSET>
static void multiply_many(const Weights &w, const Inputs &x, float *y, ptrdiff_t first, ptrdiff_t last) {
    constexpr bool SMALLER = SMALL_ARE_FASTER && !(WORDS && XBYTES == 2);
    for (ptrdiff_t four = first; four < last; four++)
        for (ptrdiff_t panel = 4 * four; panel < 4 * four + 4; panel += 2)
            if (w.bytes == 2) multiply_many<XBYTES, 2, SAME, false>(w, x, y, panel);
            else if (SMALLER && !w.table && w.bits < 8) multiply_many<XBYTES, 1, OFFSET, SMALLER>(w, x, y, panel);
            else multiply_many<XBYTES, 1, OFFSET, false>(w, x, y, panel);
}

template <int XBYTES>
static void multiply(const Weights &w, const Inputs &x, float *y, ptrdiff_t first, ptrdiff_t last) {
    if constexpr (!PLAIN)
        if (x.height <= FEW<XBYTES> && x.M <= FEW<XBYTES>) return multiply_few<XBYTES>(w, x, y, first, last);
    if (w.minimum) multiply_many<XBYTES, MINIMUM>(w, x, y, first, last);
    else if (w.point) multiply_many<XBYTES, POINT>(w, x, y, first, last);
    else multiply_many<XBYTES, SAME>(w, x, y, first, last);
}

// y [M, N] for the panels of fours [first, last).
static void multiply(const Weights &w, const Inputs &x, float *y, ptrdiff_t first, ptrdiff_t last) {
    x.bytes == 2 ? multiply<2>(w, x, y, first, last) : multiply<1>(w, x, y, first, last);
}

// Products of float inputs and packed weights, in integers. Included behind tiles.h.
//
// Inputs are rounded to 8 bits, or to 16 in two bytes of 8: x = scale (256 high + low), which is finer than bfloat16.
// Weights are bytes again before they multiply, from any number of bits and any table, one or two bytes a weight. So one
// loop of byte products serves every format; what differs is how a group's integer sum becomes a float.
//
// A panel is 16 rows of w side by side, a tile of it 32 columns: 8 vectors of [16 rows][4 columns] in `bits` x 64 bytes.
// A strip is what a register holds of a panel: LANES of its rows, the same quarter, half or whole of every vector.
// A block is what is summed in integers: a group, or 256 columns of a longer one.

// What an integer sum of products must have taken away, and added, to become part of y.
enum Offset { SAME, POINT, MINIMUM };

// Where panel `p` has its tile or group `i` of `count`: four panels lie side by side.
static inline ptrdiff_t place(ptrdiff_t p, ptrdiff_t i, ptrdiff_t count) { return (p / 4 * count + i) * 4 + p % 4; }

// One group's scales of one strip, and what goes with them.
template <Offset OFFSET>
struct Scaling {
    Vec scale, minimum;
    Ints point;

    Scaling(const Weights &w, ptrdiff_t panel, int strip, ptrdiff_t group) {
        const ptrdiff_t at = place(panel, group, w.groups) * 16 + strip * LANES;
        scale = halves_at(w.scale + at);
        if (OFFSET == POINT) point = ints_of(w.point + at);
        if (OFFSET == MINIMUM) minimum = halves_at(w.minimum + at);
    }
};

// y and what a block adds to it: top and mid are its sums of high and of mixed products, sum that of its inputs alone.
// Weights of one byte stay in integers: |c - z| <= 255, |x| < 2^15 and 256 columns fit in 31 bits. WHOLE: top is all of it.
template <int XBYTES, int WBYTES, Offset OFFSET, bool WHOLE = false>
static inline Vec added(Vec y, const Scaling<OFFSET> &g, int offset, Ints top, Ints mid, int32_t sum, float unit) {
    Vec f;
    if (WBYTES == 2) {
        f = __builtin_convertvector(top, Vec) * 256 + __builtin_convertvector(mid, Vec);
        f -= (XBYTES == 2 ? 128.0f : 32768.0f) * (float)sum;
    } else {
        Ints s = XBYTES == 2 && !WHOLE ? (top << 8) + mid : top;
        if (OFFSET == SAME) s -= offset * sum;
        if (OFFSET == POINT) s -= g.point * sum;
        f = __builtin_convertvector(s, Vec);
    }
    y += f * (g.scale * (XBYTES + WBYTES == 4 ? 256 * unit : unit));
    return OFFSET == MINIMUM ? y + g.minimum * ((float)sum * unit) : y;
}

// Sums of the strip of rows from n on as they are read, to the y of one input.
static inline void write_sums(Vec sum, const Weights &w, ptrdiff_t n, float *y) {
    if (n + LANES <= w.N) store(y + n, sum * load(w.unit + n));
    else
        for (ptrdiff_t i = n; i < w.N; i++) y[i] = sum[i - n] * w.unit[i];
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

// A table of sixteen bytes, repeated.
static inline Octets repeated(const uint8_t *table) {
    Octets v;
    for (int i = 0; i < 4 * LANES; i += 16) __builtin_memcpy((char *)&v + i, table, 16);
    return v;
}

// ------------------------------------------------------------------------------------------ one row: no room, no detour

// What codes multiply as, where they are looked up: the high bytes and, of weights of two bytes, the low ones.
struct Tables {
    Octets high, low;
};

// A tile of four panels, its vectors from FIRST on, multiplied with one input's bytes as it is unpacked.
template <int BITS, int XBYTES, int WBYTES, bool TABLE, int FIRST, int STEPS>
static inline void add_tile(const uint8_t *tile, const Tables &tables, const int8_t *high, const int8_t *low, Ints (&top)[4][STRIPS],
                            Ints (&mid)[4][STRIPS]) {
    constexpr bool TINY = WORDS && !TABLE && BITS <= 4;
    Octets xh[STEPS], xl[STEPS];  // the same for all panels
#pragma GCC unroll 8
    for (int i = 0; i < STEPS; i++) {
        xh[i] = everywhere(high + 4 * (FIRST + i));
        if (XBYTES == 2) xl[i] = everywhere(low + 4 * (FIRST + i));
    }
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++, tile += 64 * BITS) {
        for (int i = 0; i < BITS; i++) __builtin_prefetch(tile + AHEAD + 64 * i, 0, 2);  // into the second cache: the first is small
#pragma GCC unroll 4
        for (int strip = 0; strip < STRIPS; strip++) {
            Octets v[TILE_STEPS];
            unpack_tile<BITS>(tile + strip * 4 * LANES, v);
            TileSum<TINY, !TABLE && BITS < 8> upper(top[p][strip]), lower(mid[p][strip]);
#pragma GCC unroll 8
            for (int i = 0; i < STEPS; i++) {
                const Octets code = v[FIRST + i], wh = TABLE ? look_up(tables.high, code) : code;
                upper.add(wh, xh[i]);
                if (XBYTES == 2) lower.add(wh, xl[i]);
                if (WBYTES == 2) lower.add(look_up(tables.low, code), xh[i]);
            }
            top[p][strip] = upper.total(), mid[p][strip] = lower.total();
        }
    }
}

// y [4 panels][16] of one input.
template <int BITS, int XBYTES, int WBYTES, bool TABLE, Offset OFFSET>
static void multiply_row(const Weights &w, const Inputs &x, float *y, ptrdiff_t panel) {
    const Tables tables = {repeated(w.high), repeated(w.low)};
    const uint8_t *tile = w.panels + place(panel, 0, w.tiles) * 64 * BITS;
    Vec total[4][STRIPS] = {};
    ptrdiff_t group = 0, span = 0;
    int in_group = 0, in_span = 0;  // blocks
    for (ptrdiff_t index = 0, k = 0; k < x.K; index++, k += x.block) {
        Ints top[4][STRIPS] = {}, mid[4][STRIPS] = {};
        const int8_t *high = x.high + k / TILE * TILE, *low = x.low + k / TILE * TILE;
        if (x.block >= TILE) {
            for (ptrdiff_t left = (x.block < x.padded - k ? x.block : x.padded - k) / TILE; left > 0; left--) {
                add_tile<BITS, XBYTES, WBYTES, TABLE, 0, TILE_STEPS>(tile, tables, high, low, top, mid);
                tile += 4 * 64 * BITS, high += TILE, low += TILE;
            }
        } else if (k % TILE == 0) {
            add_tile<BITS, XBYTES, WBYTES, TABLE, 0, TILE_STEPS / 2>(tile, tables, high, low, top, mid);
        } else {
            add_tile<BITS, XBYTES, WBYTES, TABLE, TILE_STEPS / 2, TILE_STEPS / 2>(tile, tables, high, low, top, mid);
            tile += 4 * 64 * BITS;
        }
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++)
#pragma GCC unroll 4
            for (int strip = 0; strip < STRIPS; strip++) {
                const Scaling<OFFSET> g(w, panel + p, strip, group);
                Vec &sum = total[p][strip];
                sum = added<XBYTES, WBYTES, OFFSET>(sum, g, w.offset, top[p][strip], mid[p][strip], x.sum[index], x.scale[span]);
            }
        if (++in_group == w.repeat) in_group = 0, group++;
        if (++in_span == x.repeat) in_span = 0, span++;
    }
    for (int p = 0; p < 4; p++)
        for (int strip = 0; strip < STRIPS; strip++) write_sums(total[p][strip], w, (panel + p) * 16 + strip * LANES, y);
}

template <int XBYTES, Offset OFFSET>
static void multiply_row(const Weights &w, const Inputs &x, float *y, ptrdiff_t panel) {
    if (w.table && w.bytes == 2) return multiply_row<4, XBYTES, 2, true, SAME>(w, x, y, panel);
    if (w.table && w.bits == 4) return multiply_row<4, XBYTES, 1, true, SAME>(w, x, y, panel);
    if (w.table && w.bits == 3) return multiply_row<3, XBYTES, 1, true, SAME>(w, x, y, panel);
    if (w.table) return multiply_row<1, XBYTES, 1, true, SAME>(w, x, y, panel);
    switch (w.bits) {
        case 1: return multiply_row<1, XBYTES, 1, false, OFFSET>(w, x, y, panel);
        case 2: return multiply_row<2, XBYTES, 1, false, OFFSET>(w, x, y, panel);
        case 3: return multiply_row<3, XBYTES, 1, false, OFFSET>(w, x, y, panel);
        case 4: return multiply_row<4, XBYTES, 1, false, OFFSET>(w, x, y, panel);
        case 5: return multiply_row<5, XBYTES, 1, false, OFFSET>(w, x, y, panel);
        case 6: return multiply_row<6, XBYTES, 1, false, OFFSET>(w, x, y, panel);
        case 7: return multiply_row<7, XBYTES, 1, false, OFFSET>(w, x, y, panel);
        default: return multiply_row<8, XBYTES, 1, false, OFFSET>(w, x, y, panel);
    }
}

// --------------------------------------------------------------------------- many rows: unpack a block, then use it often

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

template <int BITS>
static void unpack(const Weights &w, ptrdiff_t panel, ptrdiff_t tile, int tiles, bool words, Unpacked &to) {
    constexpr bool TABLES = BITS <= 4;  // that there are
    if (TABLES && w.table) {
        if (WORDS && words) unpack<BITS, TABLES, WORDS>(w, panel, tile, tiles, to);
        else unpack<BITS, TABLES, false>(w, panel, tile, tiles, to);
    } else {
        if (WORDS && words) unpack<BITS, false, WORDS>(w, panel, tile, tiles, to);
        else unpack<BITS, false, false>(w, panel, tile, tiles, to);
    }
}

static void unpack(const Weights &w, ptrdiff_t panel, ptrdiff_t tile, int tiles, bool words, Unpacked &to) {
    switch (w.bits) {
        case 1: return unpack<1>(w, panel, tile, tiles, words, to);
        case 2: return unpack<2>(w, panel, tile, tiles, words, to);
        case 3: return unpack<3>(w, panel, tile, tiles, words, to);
        case 4: return unpack<4>(w, panel, tile, tiles, words, to);
        case 5: return unpack<5>(w, panel, tile, tiles, words, to);
        case 6: return unpack<6>(w, panel, tile, tiles, words, to);
        case 7: return unpack<7>(w, panel, tile, tiles, words, to);
        default: return unpack<8>(w, panel, tile, tiles, words, to);
    }
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
            for (int i = 0; i < 2; i++) {
                const Pairs words = words_at(x + 8 * r + 4 * i), upper = upper_of(words), lower = lower_of(words);
                for (int p = 0; p < 2; p++) {
                    const Octets high = u.high[at + p * NEXT], low = u.low[at + p * NEXT];
                    const Pairs wh = i ? odd_of(high) : even_of(high), wl = i ? odd_of(low) : even_of(low);
                    top[r][p] = dot(top[r][p], wh, upper);
                    mid[r][p] = dot(dot(mid[r][p], wh, lower), wl, upper);
                }
            }
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

template <int ROWS, int XBYTES, int WBYTES, Offset OFFSET, bool SMALL>
static void multiply_panels(const Weights &w, const Inputs &x, float *y, ptrdiff_t panel, ptrdiff_t from, ptrdiff_t to) {
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

template <int XBYTES, int WBYTES, Offset OFFSET, bool SMALL>
static void multiply_rows(const Weights &w, const Inputs &x, float *y, ptrdiff_t panel, ptrdiff_t from, ptrdiff_t to) {
    constexpr int MOST = TOGETHER && XBYTES + WBYTES == 2 ? 8 : 4;  // rows whose sums fit the registers
    if (x.height == 1) multiply_panels<1, XBYTES, WBYTES, OFFSET, SMALL>(w, x, y, panel, from, to);
    else if (x.height == 2) multiply_panels<2, XBYTES, WBYTES, OFFSET, SMALL>(w, x, y, panel, from, to);
    else if (x.height == 4) multiply_panels<4, XBYTES, WBYTES, OFFSET, SMALL>(w, x, y, panel, from, to);
    else multiply_panels<MOST, XBYTES, WBYTES, OFFSET, SMALL>(w, x, y, panel, from, to);
}

template <int XBYTES, Offset OFFSET>
static void multiply(const Weights &w, const Inputs &x, float *y, ptrdiff_t first, ptrdiff_t last) {
    constexpr bool SMALLER = SMALL_ARE_FASTER && !(WORDS && XBYTES == 2);
    for (ptrdiff_t panel = 4 * first; panel < 4 * last; panel += 4) {
        if constexpr (!PLAIN)
            if (x.height == 1) {
                multiply_row<XBYTES, OFFSET>(w, x, y, panel);
                continue;
            }
        for (ptrdiff_t from = 0; from < x.M; from += ROWS_AT_ONCE)
            for (ptrdiff_t p = panel; p < panel + 4; p += 2) {
                const ptrdiff_t to = from + ROWS_AT_ONCE < x.M ? from + ROWS_AT_ONCE : x.M;
                if (w.bytes == 2) multiply_rows<XBYTES, 2, SAME, false>(w, x, y, p, from, to);
                else if (SMALLER && !w.table && w.bits < 8) multiply_rows<XBYTES, 1, OFFSET, SMALLER>(w, x, y, p, from, to);
                else multiply_rows<XBYTES, 1, OFFSET, false>(w, x, y, p, from, to);
            }
    }
}

// y [M, N] for the panels of fours [first, last).
static void multiply(const Weights &w, const Inputs &x, float *y, ptrdiff_t first, ptrdiff_t last) {
    if (w.minimum) x.bytes == 2 ? multiply<2, MINIMUM>(w, x, y, first, last) : multiply<1, MINIMUM>(w, x, y, first, last);
    else if (w.point) x.bytes == 2 ? multiply<2, POINT>(w, x, y, first, last) : multiply<1, POINT>(w, x, y, first, last);
    else x.bytes == 2 ? multiply<2, SAME>(w, x, y, first, last) : multiply<1, SAME>(w, x, y, first, last);
}

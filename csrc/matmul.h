// Products of float inputs and packed weights, in integers. Included behind rounding.h and dot.h.
//
// Inputs are rounded to 8 bits, or to 16 in two bytes of 8: x = scale (256 high + low), which is finer than bfloat16.
// Weights are bytes again before they multiply, from any number of bits and any table, one or two bytes a weight. So one
// loop of byte products serves every format; what differs is how a group's integer sum becomes a float.
//
// A panel is 16 rows of w side by side, a tile of it 32 columns: 8 vectors of [16 rows][4 columns] in `bits` x 64 bytes.
// A block is what is summed in integers: a group, or 256 columns of a longer one.

typedef Octets LooseOctets __attribute__((aligned(1), may_alias));
typedef Floats LooseFloats __attribute__((aligned(4), may_alias));
typedef uint8_t Points __attribute__((vector_size(16)));
typedef Points LoosePoints __attribute__((aligned(1), may_alias));

constexpr int TILE = 32, TILE_STEPS = 8, AHEAD = 4096;  // AHEAD: bytes that are fetched before they are needed

static inline Octets octets(const uint8_t *at) { return *(const LooseOctets *)at; }

// The 8 vectors of a tile, an octet a weight.
template <int BITS>
static inline void unpack_tile(const uint8_t *tile, Octets *to) {
    if (BITS == 8) {
        for (int i = 0; i < 8; i++) to[i] = octets(tile + 64 * i);
        return;
    }
    int below = 0;  // bits that stand already
    if (BITS & 4) {
        for (int i = 0; i < 4; i++) {
            Octets v = octets(tile + 64 * i);
            to[2 * i] = v & 15, to[2 * i + 1] = v >> 4;
        }
        tile += 256, below = 4;
    }
    if (BITS & 2) {
        for (int i = 0; i < 2; i++) {
            Octets v = octets(tile + 64 * i);
            for (int j = 0; j < 4; j++) {
                Octets part = (v >> (2 * j) & 3) << below;
                to[4 * i + j] = below ? to[4 * i + j] | part : part;
            }
        }
        tile += 128, below += 2;
    }
    if (BITS & 1) {
        Octets v = octets(tile);
        for (int j = 0; j < 8; j++) {
            Octets part = (v >> j & 1) << below;
            to[j] = below ? to[j] | part : part;
        }
    }
}

static void unpack_tile(const uint8_t *tile, int bits, Octets *to) {
    switch (bits) {
        case 1: return unpack_tile<1>(tile, to);
        case 2: return unpack_tile<2>(tile, to);
        case 3: return unpack_tile<3>(tile, to);
        case 4: return unpack_tile<4>(tile, to);
        case 5: return unpack_tile<5>(tile, to);
        case 6: return unpack_tile<6>(tile, to);
        case 7: return unpack_tile<7>(tile, to);
        default: return unpack_tile<8>(tile, to);
    }
}

// What an integer sum of products must have taken away, and added, to become part of y.
enum Offset { SAME, POINT, MINIMUM };

// Where panel `p` has its tile or group `i` of `count`: four panels lie side by side.
static inline ptrdiff_t place(ptrdiff_t p, ptrdiff_t i, ptrdiff_t count) { return (p / 4 * count + i) * 4 + p % 4; }

// One group's scales of one panel, and what goes with them.
template <Offset OFFSET>
struct Group16 {
    Floats scale, minimum;
    Sums point;

    Group16(const Weights &w, ptrdiff_t panel, ptrdiff_t group) {
        const ptrdiff_t at = place(panel, group, w.groups) * 16;
        scale = floats_of_halves(w.scale + at);
        if (OFFSET == POINT) point = __builtin_convertvector(*(const LoosePoints *)(w.point + at), Sums);
        if (OFFSET == MINIMUM) minimum = floats_of_halves(w.minimum + at);
    }
};

// y and what a block adds to it: top and mid are its sums of high and of mixed products, sum that of its inputs alone.
// Weights of one byte stay in integers: |c - z| <= 255, |x| < 2^15 and 256 columns fit in 31 bits.
template <int XBYTES, int WBYTES, Offset OFFSET>
static inline Floats added(Floats y, const Group16<OFFSET> &g, int offset, Sums top, Sums mid, int32_t sum, float unit) {
    Floats f;
    if (WBYTES == 2) {
        f = __builtin_convertvector(top, Floats) * 256 + __builtin_convertvector(mid, Floats);
        f -= (XBYTES == 2 ? 128.0f : 32768.0f) * (float)sum;
    } else {
        Sums s = XBYTES == 2 ? (top << 8) + mid : top;
        if (OFFSET == SAME) s -= offset * sum;
        if (OFFSET == POINT) s -= g.point * sum;
        f = __builtin_convertvector(s, Floats);
    }
    y += f * (g.scale * (XBYTES + WBYTES == 4 ? 256 * unit : unit));
    return OFFSET == MINIMUM ? y + g.minimum * ((float)sum * unit) : y;
}

// Sums of rows [n, n + 16) of w as they are read, to the y of one input.
static inline void write_sums(Floats sum, const Weights &w, ptrdiff_t n, float *y) {
    if (n + 16 <= w.N) *(LooseFloats *)(y + n) = sum * *(const LooseFloats *)(w.unit + n);
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

// ------------------------------------------------------------------------------------------ one row: no room, no detour

// y [4 panels][16] of one input: each tile is multiplied as it is unpacked.
template <int BITS, int XBYTES, int WBYTES, bool TABLE, Offset OFFSET>
static void multiply_row(const Weights &w, const Inputs &x, float *y, ptrdiff_t panel) {
    Octets high_table, low_table;
    if (TABLE)
        for (int i = 0; i < 64; i++) high_table[i] = w.high[i % 16], low_table[i] = w.low[i % 16];
    Floats total[4] = {};
    const int unit = x.block > TILE ? x.block : TILE;
    for (ptrdiff_t k = 0; k < x.padded; k += unit) {
        const int columns = x.padded - k < unit ? (int)(x.padded - k) : unit;
        for (int inside = 0; inside < columns && k + inside < x.K; inside += x.block) {
            const Block b = block_at(w, x, k, inside, columns);
            Sums top[4] = {}, mid[4] = {};
            const int per_tile = b.steps < TILE_STEPS ? b.steps : TILE_STEPS;
            for (int t = 0; t * TILE_STEPS < b.steps; t++) {
                const ptrdiff_t column = k + inside + t * TILE;
#pragma GCC unroll 4
                for (int p = 0; p < 4; p++) {
                    const uint8_t *from = w.panels + place(panel + p, column / TILE, w.tiles) * 64 * BITS;
                    for (int i = 0; i < BITS; i++) __builtin_prefetch(from + AHEAD + 64 * i, 0, 2);  // into the second cache: the first is small
                    Octets v[TILE_STEPS];
                    unpack_tile<BITS>(from, v);
                    const int first = inside % TILE / 4;
                    auto multiply = [&](int i) {
                        int32_t xh, xl = 0;
                        __builtin_memcpy(&xh, x.high + column / TILE * TILE + 4 * i, 4);
                        if (XBYTES == 2) __builtin_memcpy(&xl, x.low + column / TILE * TILE + 4 * i, 4);
                        Octets wh = TABLE ? look_up(high_table, v[i]) : v[i];
                        top[p] = dot(top[p], wh, xh);
                        if (XBYTES == 2) mid[p] = dot(mid[p], wh, xl);
                        if (WBYTES == 2) mid[p] = dot(mid[p], look_up(low_table, v[i]), xh);
                    };
                    if (per_tile == TILE_STEPS) {
#pragma GCC unroll 8
                        for (int i = 0; i < TILE_STEPS; i++) multiply(i);
                    } else if (first == 0) {
#pragma GCC unroll 4
                        for (int i = 0; i < 4; i++) multiply(i);
                    } else {
#pragma GCC unroll 4
                        for (int i = 4; i < 8; i++) multiply(i);
                    }
                }
            }
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) {
                const Group16<OFFSET> g(w, panel + p, b.group);
                total[p] = added<XBYTES, WBYTES, OFFSET>(total[p], g, w.offset, top[p], mid[p], x.sum[b.index], x.scale[b.span]);
            }
        }
    }
    for (int p = 0; p < 4; p++) write_sums(total[p], w, (panel + p) * 16, y);
}

template <int XBYTES, Offset OFFSET>
static void multiply_row(const Weights &w, const Inputs &x, float *y, ptrdiff_t panel) {
    if (w.table && w.bytes == 2) return multiply_row<4, XBYTES, 2, true, SAME>(w, x, y, panel);
    if (w.table && w.bits == 4) return multiply_row<4, XBYTES, 1, true, SAME>(w, x, y, panel);
    if (w.table) return multiply_row<1, XBYTES, 1, true, SAME>(w, x, y, panel);
    switch (w.bits) {
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

// Weights of some tiles of two panels as they multiply.
struct Unpacked {
    static constexpr int PANEL = BLOCK / 4 + 1;  // vectors from one panel to the next: 4096 bytes would make caches collide
    Octets high[2 * PANEL], low[2 * PANEL];
};

static void unpack(const Weights &w, ptrdiff_t panel, ptrdiff_t tile, int tiles, Unpacked &to) {
    Octets high, low;
    for (int i = 0; i < 64; i++) high[i] = w.high[i % 16], low[i] = w.low[i % 16];
    for (int t = 0; t < tiles; t++)
        for (int p = 0; p < 2; p++) {
            Octets *at = to.high + p * Unpacked::PANEL + t * TILE_STEPS, *below = to.low + (at - to.high);
            unpack_tile(w.panels + place(panel + p, tile + t, w.tiles) * 64 * w.bits, w.bits, at);
            if (!w.table) continue;
            for (int i = 0; i < TILE_STEPS; i++) {
                if (w.bytes == 2) below[i] = look_up(low, at[i]);
                at[i] = look_up(high, at[i]);
            }
        }
}

// Inputs that are multiplied with the same unpacked block: their sums stay in the cache beside them.
constexpr int ROWS_AT_ONCE = 128;

// One block: ROWS inputs and two panels, added to y [2][height][16].
template <int ROWS, int XBYTES, int WBYTES, Offset OFFSET>
static void add_block(const Weights &w, const Inputs &x, const Unpacked &u, const Group16<OFFSET> *groups, const Block &b,
                      ptrdiff_t tile, int row, float *y) {
    const int H = x.height;
    Sums top[ROWS][2] = {}, mid[XBYTES + WBYTES > 2 ? ROWS : 1][2] = {};
    const int32_t *sum = x.sum + (tile * x.blocks + b.index) * H + row;
    const float *unit = x.scale + (tile * x.spans + b.span) * H + row;
    constexpr bool BEFORE = XBYTES + WBYTES == 2 && OFFSET == SAME;  // taken away before it is added up
    if (BEFORE)
        for (int r = 0; r < ROWS; r++) top[r][0] = top[r][1] = Sums{} - w.offset * sum[r];
    const ptrdiff_t start = tile * x.padded * H + b.index * x.block * H + 4 * row;
    const int8_t *high = x.high + start, *low = x.low + start;
    for (int s = b.skip; s < b.skip + b.steps; s++, high += 4 * H, low += 4 * H) {
        Octets wh[2], wl[2];
        for (int p = 0; p < 2; p++) {
            wh[p] = u.high[p * Unpacked::PANEL + s];
            if (WBYTES == 2) wl[p] = u.low[p * Unpacked::PANEL + s];
        }
        for (int r = 0; r < ROWS; r++) {
            int32_t xh, xl = 0;
            __builtin_memcpy(&xh, high + 4 * r, 4);
            if (XBYTES == 2) __builtin_memcpy(&xl, low + 4 * r, 4);
            for (int p = 0; p < 2; p++) {
                top[r][p] = dot(top[r][p], wh[p], xh);
                if (XBYTES == 2) mid[r][p] = dot(mid[r][p], wh[p], xl);
                if (WBYTES == 2) mid[r][p] = dot(mid[r][p], wl[p], xh);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
            LooseFloats *to = (LooseFloats *)(y + (p * H + row + r) * 16);
            *to = added<XBYTES, WBYTES, OFFSET>(*to, groups[p], BEFORE ? 0 : w.offset, top[r][p], mid[XBYTES + WBYTES > 2 ? r : 0][p], sum[r], unit[r]);
        }
}

template <int ROWS, int XBYTES, int WBYTES, Offset OFFSET>
static void multiply_panels(const Weights &w, const Inputs &x, float *y, ptrdiff_t panel, ptrdiff_t from, ptrdiff_t to) {
    static thread_local Unpacked u;
    static thread_local float sums[2 * ROWS_AT_ONCE * 16];
    const ptrdiff_t first = from / x.height, last = (to + x.height - 1) / x.height, room = 2 * x.height * 16;
    for (ptrdiff_t i = 0; i < (last - first) * room; i++) sums[i] = 0;
    const int unit = x.block > TILE ? x.block : TILE;  // columns unpacked together
    for (ptrdiff_t k = 0; k < x.padded; k += unit) {
        const int columns = x.padded - k < unit ? (int)(x.padded - k) : unit;
        unpack(w, panel, k / TILE, columns / TILE, u);
        for (int inside = 0; inside < columns && k + inside < x.K; inside += x.block) {
            const Block b = block_at(w, x, k, inside, columns);
            const Group16<OFFSET> groups[2] = {{w, panel, b.group}, {w, panel + 1, b.group}};
            for (ptrdiff_t t = first; t < last; t++)
                for (int row = 0; row < x.height; row += ROWS)
                    add_block<ROWS, XBYTES, WBYTES, OFFSET>(w, x, u, groups, b, t, row, sums + (t - first) * room);
        }
    }
    for (ptrdiff_t m = from; m < to; m++)
        for (int p = 0; p < 2; p++) {
            const float *sum = sums + (m / x.height - first) * room + (p * x.height + m % x.height) * 16;
            write_sums(*(const LooseFloats *)sum, w, (panel + p) * 16, y + m * w.N);
        }
}

template <int XBYTES, int WBYTES, Offset OFFSET>
static void multiply_rows(const Weights &w, const Inputs &x, float *y, ptrdiff_t panel, ptrdiff_t from, ptrdiff_t to) {
    constexpr int MOST = XBYTES + WBYTES > 2 ? 4 : 8;  // rows whose sums fit the registers
    if (x.height == 1) multiply_panels<1, XBYTES, WBYTES, OFFSET>(w, x, y, panel, from, to);
    else if (x.height == 2) multiply_panels<2, XBYTES, WBYTES, OFFSET>(w, x, y, panel, from, to);
    else if (x.height == 4) multiply_panels<4, XBYTES, WBYTES, OFFSET>(w, x, y, panel, from, to);
    else multiply_panels<MOST, XBYTES, WBYTES, OFFSET>(w, x, y, panel, from, to);
}

template <int XBYTES, Offset OFFSET>
static void multiply(const Weights &w, const Inputs &x, float *y, ptrdiff_t first, ptrdiff_t last) {
    for (ptrdiff_t panel = 4 * first; panel < 4 * last; panel += 4) {
        if constexpr (WIDE)
            if (x.height == 1) {
                multiply_row<XBYTES, OFFSET>(w, x, y, panel);
                continue;
            }
        for (ptrdiff_t from = 0; from < x.M; from += ROWS_AT_ONCE)
            for (ptrdiff_t p = panel; p < panel + 4; p += 2) {
                const ptrdiff_t to = from + ROWS_AT_ONCE < x.M ? from + ROWS_AT_ONCE : x.M;
                if (w.bytes == 2) multiply_rows<XBYTES, 2, SAME>(w, x, y, p, from, to);
                else multiply_rows<XBYTES, 1, OFFSET>(w, x, y, p, from, to);
            }
    }
}

// y [M, N] for the panels of fours [first, last).
static void multiply(const Weights &w, const Inputs &x, float *y, ptrdiff_t first, ptrdiff_t last) {
    if (w.minimum) x.bytes == 2 ? multiply<2, MINIMUM>(w, x, y, first, last) : multiply<1, MINIMUM>(w, x, y, first, last);
    else if (w.point) x.bytes == 2 ? multiply<2, POINT>(w, x, y, first, last) : multiply<1, POINT>(w, x, y, first, last);
    else x.bytes == 2 ? multiply<2, SAME>(w, x, y, first, last) : multiply<1, SAME>(w, x, y, first, last);
}

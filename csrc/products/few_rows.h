// A few inputs: weights multiply with all of them as they are unpacked. Included behind one_row.h.
//
// What is unpacked never goes to memory: the sums of up to eight inputs stay in registers beside the codes of a tile. Four panels
// are read as they lie, so that few inputs take the time of reading.

// Inputs up to which that is faster than to unpack first: fewer where bytes are widened before they multiply.
template <int XBYTES>
constexpr int FEW = SMALL_ARE_FASTER && XBYTES == 2 ? 4 : 8;

// The bytes of an input that are read from `high`.
template <int XBYTES>
constexpr int WIDTH = WORDS && XBYTES == 2 ? 2 : 1;

// Four columns of a strip times two bytes of an input each, in words.
template <int WBYTES>
static inline void add_four_words(Ints &top, Ints &mid, Octets wh, Octets wl, const int8_t *x) {
    const Pairs words[2] = {words_at(x), words_at(x + 4)}, high[2] = {even_of(wh), odd_of(wh)}, low[2] = {even_of(wl), odd_of(wl)};
    for (int i = 0; i < 2; i++)
        if (WBYTES == 1) {
            top = dot(top, high[i], words[i]);
        } else {
            const Pairs upper = upper_of(words[i]);
            top = dot(top, high[i], upper);
            mid = dot(dot(mid, high[i], lower_of(words[i])), low[i], upper);
        }
}

// A strip of a tile, its vectors from FIRST on, times R inputs.
template <int BITS, int R, int XBYTES, int WBYTES, bool TABLE, int FIRST, int STEPS>
static inline void add_strip(const uint8_t *tile, const Tables &tables, const int8_t *high, const int8_t *low, Ints (&top)[R],
                             Ints (&mid)[R]) {
    constexpr bool CODES = !TABLE && BITS < 8, TINY = WORDS && XBYTES == 1 && !TABLE && BITS <= 4;
    for (int i = 0; i < BITS; i++) __builtin_prefetch(tile + AHEAD + 64 * i, 0, 2);
    Octets v[TILE_STEPS];
    unpack_tile<BITS>(tile, v);
    TileSum<TINY, CODES> upper[R];
#pragma GCC unroll 8
    for (int i = 0; i < STEPS; i++) {
        const Octets code = v[FIRST + i], wh = TABLE ? look_up(tables.high, code) : code;
        const Octets wl = WBYTES == 2 ? look_up(tables.low, code) : code;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const ptrdiff_t at = 4 * (i * R + r);
            if constexpr (WIDTH<XBYTES> == 2) {
                add_four_words<WBYTES>(top[r], mid[r], wh, wl, high + 2 * at);
                continue;
            }
            const Octets xh = everywhere(high + at);
            upper[r].add(wh, xh);
            if (XBYTES == 2) mid[r] = dot<CODES>(mid[r], wh, everywhere(low + at));
            if (WBYTES == 2) mid[r] = dot<CODES>(mid[r], wl, xh);
        }
    }
    for (int r = 0; r < R; r++) top[r] += upper[r].total();
}

// y [4 panels][16] of up to R inputs.
template <int BITS, int R, int XBYTES, int WBYTES, bool TABLE>
static void multiply_few(const Weights &w, const Inputs &x, float *y, ptrdiff_t panel) {
    const Tables tables = {repeated(w.high), repeated(w.low)};
    const uint8_t *tile = w.panels + place(panel, 0, w.tiles) * 64 * BITS;
    Vec total[4][STRIPS][R] = {};
    ptrdiff_t group = 0, span = 0;
    int in_group = 0, in_span = 0;  // blocks
    for (ptrdiff_t index = 0, k = 0; k < x.K; index++, k += x.block) {
        const ptrdiff_t columns = x.block < x.padded - k ? x.block : x.padded - k;
        const int8_t *high = x.high + k * R * WIDTH<XBYTES>, *low = x.low + k * R;
        for (int p = 0; p < 4; p++)
#pragma GCC unroll 1
            for (int strip = 0; strip < STRIPS; strip++) {
                Ints top[R] = {}, mid[R] = {};
                const uint8_t *from = tile + p * 64 * BITS + strip * 4 * LANES;
                auto add_vectors = [&](auto first, auto steps, ptrdiff_t i) {
                    add_strip<BITS, R, XBYTES, WBYTES, TABLE, first.value, steps.value>(
                        from + i / TILE * 4 * 64 * BITS, tables, high + i * R * WIDTH<XBYTES>, low + i * R, top, mid);
                };
                if (columns < TILE && k % TILE) add_vectors(Constant<TILE_STEPS / 2>{}, Constant<TILE_STEPS / 2>{}, 0);
                else if (columns < TILE) add_vectors(Constant<0>{}, Constant<TILE_STEPS / 2>{}, 0);
                else
                    for (ptrdiff_t i = 0; i < columns; i += TILE) add_vectors(Constant<0>{}, Constant<TILE_STEPS>{}, i);
                auto add_sums = [&](auto kind) {
                    constexpr Offset OFFSET = (Offset)kind.value;
                    const Scaling<OFFSET> g(w, panel + p, strip, group);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) {
                        Vec &y = total[p][strip][r];
                        y = added<XBYTES, WBYTES, OFFSET, WORDS>(y, g, w.offset, top[r], mid[r], x.sum[index * R + r], x.scale[span * R + r]);
                    }
                };
                w.minimum ? add_sums(Constant<MINIMUM>{}) : w.point ? add_sums(Constant<POINT>{}) : add_sums(Constant<SAME>{});
            }
        if ((k + columns) % TILE == 0) tile += (columns + TILE - 1) / TILE * 4 * 64 * BITS;
        if (++in_group == w.repeat) in_group = 0, group++;
        if (++in_span == x.repeat) in_span = 0, span++;
    }
    for (int p = 0; p < 4; p++)
        for (int strip = 0; strip < STRIPS; strip++)
            for (ptrdiff_t m = 0; m < x.M; m++) write_sums(total[p][strip][m], w, (panel + p) * 16 + strip * LANES, y + m * w.N);
}

// y [M, N] for the panels of fours [first, last) of at most FEW inputs.
template <int XBYTES>
static void multiply_few(const Weights &w, const Inputs &x, float *y, ptrdiff_t first, ptrdiff_t last) {
    with_codes(w, [&](auto bits, auto bytes, auto table) {
        constexpr int BITS = bits.value, WBYTES = bytes.value;
        for (ptrdiff_t panel = 4 * first; panel < 4 * last; panel += 4)
            if (x.height == 1) multiply_row<BITS, XBYTES, WBYTES, table.value>(w, x, y, panel);
            else if (x.height == 2) multiply_few<BITS, 2, XBYTES, WBYTES, table.value>(w, x, y, panel);
            else if (x.height == 4) multiply_few<BITS, 4, XBYTES, WBYTES, table.value>(w, x, y, panel);
            else multiply_few<BITS, FEW<XBYTES>, XBYTES, WBYTES, table.value>(w, x, y, panel);
    });
}

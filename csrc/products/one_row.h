// One input: four panels at a time, whose sums stay in registers. Included behind matmul.h.

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
static void multiply_row_of(const Weights &w, const Inputs &x, float *y, ptrdiff_t panel) {
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

template <int BITS, int XBYTES, int WBYTES, bool TABLE>
static void multiply_row(const Weights &w, const Inputs &x, float *y, ptrdiff_t panel) {
    if (!TABLE && w.minimum) multiply_row_of<BITS, XBYTES, WBYTES, TABLE, TABLE ? SAME : MINIMUM>(w, x, y, panel);
    else if (!TABLE && w.point) multiply_row_of<BITS, XBYTES, WBYTES, TABLE, TABLE ? SAME : POINT>(w, x, y, panel);
    else multiply_row_of<BITS, XBYTES, WBYTES, TABLE, SAME>(w, x, y, panel);
}

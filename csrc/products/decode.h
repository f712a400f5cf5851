// Packed weights as floats again, a tile of rows at a time, for products that are not of integers. Included behind matmul.h.

// Columns [from, to) of a tile, of one group, for one strip of rows. Column by column, as rows lie side by side in a strip.
template <bool TABLE, class T>
static inline void decode_columns(const Weights &w, const Decoded &d, const Octets *octets, ptrdiff_t panel, int strip, ptrdiff_t tile,
                                  int from, int to) {
    const ptrdiff_t n = panel * 16 + strip * LANES, column = tile * TILE, group = (column + from) / (w.block * w.repeat);
    const int wide = w.N - n < LANES ? (int)(w.N - n) : LANES;
    const Vec unit = some(w.unit + n, wide) * d.factor;
    const ptrdiff_t at = place(panel, group, w.groups) * 16 + strip * LANES;
    const Vec scale = halves_at(w.scale + at) * unit, minimum = w.minimum ? halves_at(w.minimum + at) * unit : Vec{};
    const Ints point = w.point ? ints_of(w.point + at) : Ints{} + w.offset;
    T *out = (T *)d.to + column * d.apart + n - d.first;
#pragma GCC unroll 4
    for (int k = from; k < to; k++) {
        const Ints code = (Ints)((Words)octets[k / 4] >> (8 * (k % 4)) & 255);
        const Vec number = TABLE ? level_at(d.level, code) : __builtin_convertvector(code - point, Vec);
        put(out + k * d.apart, w.minimum ? number * scale + minimum : number * scale, wide);
    }
}

// Panels of fours [first, last).
template <int BITS, bool TABLE, class T>
static void decode(const Weights &w, const Decoded &d, ptrdiff_t first, ptrdiff_t last) {
    for (ptrdiff_t four = 4 * first; four < 4 * last; four += 4)
        for (ptrdiff_t tile = 0; tile < w.tiles; tile++)
            for (int strip = 0; strip < 4 * STRIPS; strip++) {
                const ptrdiff_t panel = four + strip / STRIPS, left = w.K - tile * TILE;
                if (panel * 16 + strip % STRIPS * LANES >= w.N) break;
                Octets octets[TILE_STEPS];
                unpack_tile<BITS>(w.panels + place(panel, tile, w.tiles) * 64 * BITS + strip % STRIPS * 4 * LANES, octets);
                for (int from = 0; from < TILE && from < left; from += 16)  // as many columns as the smallest group has
                    decode_columns<TABLE, T>(w, d, octets, panel, strip % STRIPS, tile, from, left - from < 16 ? (int)left : from + 16);
            }
}

template <int BITS>
static void decode(const Weights &w, const Decoded &d, ptrdiff_t first, ptrdiff_t last) {
    constexpr bool TABLES = BITS <= 4;  // that there are
    if (TABLES && w.table) d.half ? decode<BITS, TABLES, uint16_t>(w, d, first, last) : decode<BITS, TABLES, float>(w, d, first, last);
    else d.half ? decode<BITS, false, uint16_t>(w, d, first, last) : decode<BITS, false, float>(w, d, first, last);
}

static void decode(const Weights &w, const Decoded &d, ptrdiff_t first, ptrdiff_t last) {
    switch (w.bits) {
        case 1: return decode<1>(w, d, first, last);
        case 2: return decode<2>(w, d, first, last);
        case 3: return decode<3>(w, d, first, last);
        case 4: return decode<4>(w, d, first, last);
        case 5: return decode<5>(w, d, first, last);
        case 6: return decode<6>(w, d, first, last);
        case 7: return decode<7>(w, d, first, last);
        default: return decode<8>(w, d, first, last);
    }
}

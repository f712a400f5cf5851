// Products of float inputs and packed weights, in integers: what one_row.h, few_rows.h and many_rows.h have in common.
// Included behind tiles.h.
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

// A table of sixteen bytes, repeated.
static inline Octets repeated(const uint8_t *table) {
    Octets v;
    for (int i = 0; i < 4 * LANES; i += 16) __builtin_memcpy((char *)&v + i, table, 16);
    return v;
}

// What codes multiply as, where they are looked up: the high bytes and, of weights of two bytes, the low ones.
struct Tables {
    Octets high, low;
};

// A constant that is passed as an argument.
template <int N>
struct Constant {
    static constexpr int value = N;
};

// body(bits, bytes, table): with what w's codes are as constants.
template <class Body>
static inline void with_codes(const Weights &w, const Body &body) {
    if (w.table && w.bytes == 2) return body(Constant<4>{}, Constant<2>{}, Constant<true>{});
    if (w.table && w.bits == 4) return body(Constant<4>{}, Constant<1>{}, Constant<true>{});
    if (w.table && w.bits == 3) return body(Constant<3>{}, Constant<1>{}, Constant<true>{});
    if (w.table) return body(Constant<1>{}, Constant<1>{}, Constant<true>{});
    switch (w.bits) {
        case 1: return body(Constant<1>{}, Constant<1>{}, Constant<false>{});
        case 2: return body(Constant<2>{}, Constant<1>{}, Constant<false>{});
        case 3: return body(Constant<3>{}, Constant<1>{}, Constant<false>{});
        case 4: return body(Constant<4>{}, Constant<1>{}, Constant<false>{});
        case 5: return body(Constant<5>{}, Constant<1>{}, Constant<false>{});
        case 6: return body(Constant<6>{}, Constant<1>{}, Constant<false>{});
        case 7: return body(Constant<7>{}, Constant<1>{}, Constant<false>{});
        default: return body(Constant<8>{}, Constant<1>{}, Constant<false>{});
    }
}

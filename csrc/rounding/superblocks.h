// Refine the k-quants' second level of scales: methods/superblocks.py. A super-block's weights are read
// once and stay in the cache while its integers and f16s are tried. Included behind search.h.

constexpr int SUPERBLOCK = 256, MOST_GROUPS = SUPERBLOCK / 16;

// One super-block in LANES rows: its groups, their errors, scales and zeros.
struct Superblock {
    Group group[MOST_GROUPS];
    Vec error[MOST_GROUPS], scale[MOST_GROUPS], zero[MOST_GROUPS];
    Vec outer, outer_zero;
    int count, whole;  // groups that there are, and that a whole super-block has
};

// Sum of term(j) over the groups, in halves; groups that are not there count 0.
template <class Term>
static INLINE Vec over_groups(const Superblock &b, const Term &term) {
    Vec t[MOST_GROUPS];
    for (int j = 0; j < b.whole; j++) t[j] = j < b.count ? term(j) : Vec{};
    for (int n = b.whole / 2; n > 0; n /= 2)
        for (int j = 0; j < n; j++) t[j] += t[j + n];
    return t[0];
}

static inline Vec integer_of(Vec x, Vec outer) { return nearest(x / safe(outer)); }

static inline Vec integer_in(const Refine &a, Vec x) {
    x = x < a.low ? all(a.low) : x;
    return x > a.high ? all(a.high) : x;
}

// Give each group the best of the integers around its own, scale and minimum together.
template <int kind>
static void try_neighbours(const Format &f, const Refine &a, Superblock &b) {
    for (int j = 0; j < b.count; j++) {
        Vec own = integer_of(b.scale[j], b.outer), other = integer_of(-b.zero[j], b.outer_zero);
        Best best{};
        for (ptrdiff_t m = 0; m < a.moves; m++) {
            Vec scale = integer_in(a, own + a.move[2 * m]) * b.outer;
            Vec zero = kind == MIN ? -(integer_in(a, other + a.move[2 * m + 1]) * b.outer_zero) : b.zero[j];
            best.meet(error_of<kind>(f, b.group[j], scale, zero), scale, zero, m == 0);
        }
        b.error[j] = best.error, b.scale[j] = best.scale, b.zero[j] = best.zero;
    }
}

// Rounded to f16; the old one where it is not finite.
static inline Vec wanted_half(Vec wanted, Vec old) {
    wanted = finite(wanted) ? wanted : old;
    wanted = wanted < -65504.0f ? all(-65504.0f) : wanted;
    return to_half(wanted > 65504.0f ? all(65504.0f) : wanted);
}

// The f16s of least Σ u · (w − outer · integer · c + outer_zero · minimum)².
template <int kind>
static void solve_outer(const Format &f, Superblock &b, Vec &outer, Vec &outer_zero) {
    Vec own[MOST_GROUPS], other[MOST_GROUPS];
    Moments m[MOST_GROUPS];
    for (int j = 0; j < b.count; j++) {
        m[j] = moments_of<kind, false>(f, b.group[j], b.scale[j], b.zero[j]);
        own[j] = integer_of(b.scale[j], b.outer), other[j] = integer_of(-b.zero[j], b.outer_zero);
    }
    Vec aa = over_groups(b, [&](int j) EACH { return own[j] * own[j] * m[j].cc; });
    Vec av = over_groups(b, [&](int j) EACH { return own[j] * m[j].cv; });
    if (kind != MIN) {
        outer = wanted_half(av / safe(aa), b.outer);
        return;
    }
    Vec ab = over_groups(b, [&](int j) EACH { return own[j] * other[j] * m[j].c1; });
    Vec bb = over_groups(b, [&](int j) EACH { return other[j] * other[j] * b.group[j].total_u; });
    Vec bv = over_groups(b, [&](int j) EACH { return other[j] * b.group[j].total_uv; });
    Vec det = aa * bb - ab * ab;
    outer = (bb * av - ab * bv) / safe(det), outer_zero = (ab * av - aa * bv) / safe(det);
    Ints good = (det > 0) & (outer > 0) & (outer_zero >= 0);
    outer = wanted_half(good ? outer : av / safe(aa), b.outer);
    outer_zero = wanted_half(good ? outer_zero : b.outer_zero, b.outer_zero);
}

// Give the super-block the least-squares f16s for its codes and integers, if they lower the error.
template <int kind>
static void try_outer(const Format &f, Superblock &b) {
    Vec outer{}, outer_zero{}, error[MOST_GROUPS], scale[MOST_GROUPS], zero[MOST_GROUPS];
    solve_outer<kind>(f, b, outer, outer_zero);
    for (int j = 0; j < b.count; j++) {
        scale[j] = integer_of(b.scale[j], b.outer) * outer;
        zero[j] = kind == MIN ? -(integer_of(-b.zero[j], b.outer_zero) * outer_zero) : b.zero[j];
        error[j] = error_of<kind>(f, b.group[j], scale[j], zero[j]);
    }
    Ints better = over_groups(b, [&](int j) EACH { return error[j]; }) < over_groups(b, [&](int j) EACH { return b.error[j]; });
    for (int j = 0; j < b.count; j++) {
        b.error[j] = better ? error[j] : b.error[j];
        b.scale[j] = better ? scale[j] : b.scale[j];
        b.zero[j] = better ? zero[j] : b.zero[j];
    }
    b.outer = better ? outer : b.outer;
    b.outer_zero = better ? outer_zero : b.outer_zero;
}

// Rows [at, at + wide) of table [N, n] at one column, in or out.
static inline Vec column(const float *table, ptrdiff_t at, int wide, ptrdiff_t n, ptrdiff_t j) {
    Vec x{};
    for (int l = 0; table && l < wide; l++) x[l] = table[(at + l) * n + j];
    return x;
}

static inline void put_column(float *table, Vec x, ptrdiff_t at, int wide, ptrdiff_t n, ptrdiff_t j) {
    for (int l = 0; table && l < wide; l++) table[(at + l) * n + j] = x[l];
}

template <int kind>
static void refine_block(const Format &f, const Refine &a, Superblock &b, ptrdiff_t at, int wide, ptrdiff_t begin) {
    ptrdiff_t G = (a.K + a.g - 1) / a.g, S = (a.K + SUPERBLOCK - 1) / SUPERBLOCK;
    ptrdiff_t first = begin / a.g, s = begin / SUPERBLOCK;
    b.whole = (int)(SUPERBLOCK / a.g), b.count = (int)(G - first < b.whole ? G - first : b.whole);
    for (int j = 0; j < b.count; j++) {
        read_group(b.group[j], a.w, a.weight, a.K, at, wide, begin + j * a.g, a.g);
        measure(f, b.group[j], false);
        b.scale[j] = column(a.scale, at, wide, G, first + j), b.zero[j] = column(a.zero, at, wide, G, first + j);
    }
    b.outer = column(a.outer, at, wide, S, s), b.outer_zero = column(a.outer_zero, at, wide, S, s);
    for (ptrdiff_t round = 0; round < a.rounds; round++) {
        try_neighbours<kind>(f, a, b);
        try_outer<kind>(f, b);
    }
    try_neighbours<kind>(f, a, b);
    for (int j = 0; j < b.count; j++) {
        put_column(a.scale, b.scale[j], at, wide, G, first + j);
        put_column(a.zero, b.zero[j], at, wide, G, first + j);
    }
    put_column(a.outer, b.outer, at, wide, S, s);
    put_column(a.outer_zero, b.outer_zero, at, wide, S, s);
}

static void refine(const Format &f, const Refine &a, float *scratch, ptrdiff_t first, ptrdiff_t last) {
    Superblock b{};
    for (int j = 0; j < SUPERBLOCK / a.g; j++) {
        Group &p = b.group[j];
        p.v = scratch + j * a.g * LANES, p.u = scratch + SUPERBLOCK * LANES + j * a.g;
    }
    by_kind(f, [&](auto kind) {
        for (ptrdiff_t at = first; at < last; at += LANES)
            for (ptrdiff_t begin = 0; begin < a.K; begin += SUPERBLOCK)
                refine_block<kind.value>(f, a, b, at, (int)(last - at < LANES ? last - at : LANES), begin);
    });
}

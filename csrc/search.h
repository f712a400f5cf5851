// The scale search: each group of a row on its own, LANES rows side by side. Included behind rounding.h.

// Sum of n = 2^k >= LANES numbers in halves; overwrites them.
static inline float folded(float *x, int n) {
    while (n > LANES) {
        n /= 2;
        for (int i = 0; i < n; i += LANES) store(x + i, load(x + i) + load(x + i + n));
    }
    while (n > 1) {
        n /= 2;
        for (int i = 0; i < n; i++) x[i] += x[i + n];
    }
    return x[0];
}

// One group of g weights in LANES rows: weights v, the values c of their codes, room t, each [g, LANES], t with zeros up
// to n = 2^k; importance u [g]. low, high: the range of each row, with 0 in it.
struct Group {
    float *v, *c, *t, *u;
    int g, n;
    Vec low, high, mean, total_uv, total_u;
};

// Sum of t over the group, in halves; overwrites t.
static inline Vec folded(Group &p) {
    int n = p.n;
    while (n > 1) {
        n /= 2;
        for (int i = 0; i < n; i++) store(p.t + i * LANES, load(p.t + i * LANES) + load(p.t + (i + n) * LANES));
    }
    return load(p.t);
}

// The range's own scale and zero, narrowed.
static void from_range(const Format &f, Group &p, float shrink, float factor, Vec &scale, Vec &zero) {
    if (f.zero == SYM) {
        scale = f.reach == 0 ? p.mean * shrink : (-p.low > p.high ? -p.low : p.high) * factor;
        return;
    }
    Vec low = p.low * shrink, high = p.high * factor;
    scale = (high - low) / f.span;
    if (f.zero == MIN) {
        zero = low;
        return;
    }
    Vec first = all(f.first), last = all(f.hi);
    zero = f.lo - nearest(low / safe(scale));
    zero = zero < first ? first : zero;
    zero = zero > last ? last : zero;
}

// Replace scale and zero by those of least Σ u (v - decoded)² for the codes' values in c; keep them where there are none.
static void least_squares(const Format &f, Group &p, Vec &scale, Vec &zero) {
    for (int i = 0; i < p.g; i++) {
        Vec c = load(p.c + i * LANES);
        if (f.zero == ASYM) store(p.c + i * LANES, c -= zero);
        store(p.t + i * LANES, p.u[i] * c * c);
    }
    Vec cc = folded(p);
    for (int i = 0; i < p.g; i++) store(p.t + i * LANES, p.u[i] * load(p.c + i * LANES) * load(p.v + i * LANES));
    Vec cv = folded(p);
    if (f.zero != MIN) {
        Vec solved = cv / safe(cc);
        scale = same_sign(solved, scale) & finite(solved) ? solved : scale;
        return;
    }
    for (int i = 0; i < p.g; i++) store(p.t + i * LANES, p.u[i] * load(p.c + i * LANES));
    Vec c1 = folded(p), n = p.total_u, v1 = p.total_uv;
    Vec det = n * cc - c1 * c1;
    Vec solved = (n * cv - c1 * v1) / safe(det);
    Vec low = (v1 - solved * c1) / safe(n);
    low = low > 0 ? Vec{} : low;
    solved = low == 0 ? cv / safe(cc) : solved;
    Ints good = (det > 0) & (solved > 0) & finite(solved) & finite(low);
    scale = good ? solved : scale;
    zero = good ? low : zero;
}

// The squared error under a scale and zero; leaves the codes' values in c.
static Vec error_of(const Format &f, Group &p, Vec scale, Vec zero) {
    Vec d = safe(scale), decoded;
    for (int i = 0; i < p.g; i++) {
        Vec v = load(p.v + i * LANES);
        store(p.c + i * LANES, round_to(f, v, scale, d, zero, decoded));
        Vec e = v - decoded;
        store(p.t + i * LANES, e * e * p.u[i]);
    }
    return folded(p);
}

// What has lost least so far, in each row.
struct Best {
    Vec error, scale, zero;
    void meet(Vec e, Vec s, Vec z, bool first) {
        Ints better = first ? Ints{} == 0 : e < error;
        error = better ? e : error;
        scale = better ? s : scale;
        zero = better ? z : zero;
    }
};

// Rows [at, at + wide) of the group that begins at column `begin`.
static void read_group(Group &p, const float *w, const float *weight, ptrdiff_t K, ptrdiff_t at, int wide, ptrdiff_t begin,
                       ptrdiff_t g) {
    p.g = (int)(K - begin < g ? K - begin : g);
    for (p.n = 1; p.n < p.g;) p.n *= 2;
    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < p.g; i++) p.v[i * LANES + l] = l < wide ? w[(at + l) * K + begin + i] : 0;
    for (int i = 0; i < p.g; i++) p.u[i] = weight[begin + i];
    for (int i = p.g; i < p.n; i++) store(p.t + i * LANES, Vec{});
}

// What the search wants to know of a group beforehand. Gives 0, or NaN for a row with a weight that is not finite.
static Vec measure(const Format &f, Group &p) {
    p.low = p.high = Vec{};
    for (int i = 0; i < p.g; i++) {
        Vec v = load(p.v + i * LANES);
        p.low = v < p.low ? v : p.low;
        p.high = v > p.high ? v : p.high;
        store(p.t + i * LANES, v - v);
    }
    Vec check = folded(p);
    if (f.reach == 0 && f.zero == SYM) {
        for (int i = 0; i < p.g; i++) store(p.t + i * LANES, magnitude(load(p.v + i * LANES)));
        p.mean = folded(p) / (float)p.g;
    }
    if (f.zero == MIN) {
        for (int i = 0; i < p.g; i++) store(p.t + i * LANES, all(p.u[i]));
        p.total_u = folded(p);
        for (int i = 0; i < p.g; i++) store(p.t + i * LANES, p.u[i] * load(p.v + i * LANES));
        p.total_uv = folded(p);
    }
    return check;
}

static Best search_group(const Format &f, const Search &a, Group &p) {
    Best best{};
    for (ptrdiff_t step = 0; step < a.steps; step++) {
        Vec scale{}, zero{};
        from_range(f, p, a.shrink[step], a.factor[step], scale, zero);
        for (int again = 0; again < 2; again++) {
            scale = stored_scale(scale, f.encoding);
            if (f.zero == MIN) zero = stored(zero, f.encoding, false);
            best.meet(error_of(f, p, scale, zero), scale, zero, step == 0 && again == 0);
            if (again == 0) least_squares(f, p, scale, zero);
        }
    }
    return best;
}

static Group group_in(float *scratch, ptrdiff_t g) {
    ptrdiff_t n = 1;
    while (n < g) n *= 2;
    Group p{};
    p.v = scratch, p.c = scratch + n * LANES, p.t = scratch + 2 * n * LANES, p.u = scratch + 3 * n * LANES;
    return p;
}

// Call body(group of LANES rows, first row, rows that exist, its place among the G groups of a row) for every group.
template <class Args, class Body>
static void each_group(const Args &a, float *scratch, ptrdiff_t first, ptrdiff_t last, Body body) {
    Group p = group_in(scratch, a.g);
    for (ptrdiff_t at = first; at < last; at += LANES) {
        int wide = (int)(last - at < LANES ? last - at : LANES);
        for (ptrdiff_t begin = 0; begin < a.K; begin += a.g) {
            read_group(p, a.w, a.weight, a.K, at, wide, begin, a.g);
            body(p, at, wide, begin / a.g);
        }
    }
}

static void search(const Format &f, const Search &a, float *scratch, ptrdiff_t first, ptrdiff_t last) {
    ptrdiff_t G = (a.K + a.g - 1) / a.g;
    each_group(a, scratch, first, last, [&](Group &p, ptrdiff_t at, int wide, ptrdiff_t group) {
        Vec check = measure(f, p);
        Best best = search_group(f, a, p);
        for (int l = 0; l < wide; l++) {
            a.scale[(at + l) * G + group] = best.scale[l] + check[l];
            if (a.zero) a.zero[(at + l) * G + group] = best.zero[l];
        }
    });
}

// The best of C given scales and zeros for each group; the first of equals.
static void pick(const Format &f, const Pick &a, float *scratch, ptrdiff_t first, ptrdiff_t last) {
    ptrdiff_t G = (a.K + a.g - 1) / a.g;
    each_group(a, scratch, first, last, [&](Group &p, ptrdiff_t at, int wide, ptrdiff_t group) {
        Best best{};
        for (ptrdiff_t c = 0; c < a.C; c++) {
            Vec scale{}, zero{};
            for (int l = 0; l < wide; l++) {
                ptrdiff_t from = (c * a.N + at + l) * G + group;
                scale[l] = a.scales[from];
                zero[l] = a.zeros ? a.zeros[from] : 0;
            }
            best.meet(error_of(f, p, scale, zero), scale, zero, c == 0);
        }
        for (int l = 0; l < wide; l++) {
            a.error[(at + l) * G + group] = best.error[l];
            a.scale[(at + l) * G + group] = best.scale[l];
            if (a.zero) a.zero[(at + l) * G + group] = best.zero[l];
        }
    });
}

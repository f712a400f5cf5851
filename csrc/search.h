// The scale search: each group of a row on its own. Included behind rounding.h.

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

// A group of g weights v of importance u, padded with zeros to n = 2^k; the values c of its codes; room to work.
struct Group {
    float *v, *u, *c, *decoded, *t;
    int n, g;
    float low, high, total_u, total_uv;
};

static float sum_of_products(Group &p, const float *a, const float *b) {
    for (int i = 0; i < p.n; i += LANES) store(p.t + i, load(a + i) * load(b + i));
    return folded(p.t, p.n);
}

// The range's own scale and zero, narrowed.
static void from_range(const Format &f, Group &p, float shrink, float factor, float mean, float &scale, float &zero) {
    if (f.zero == SYM) {
        float top = -p.low > p.high ? -p.low : p.high;
        scale = f.reach == 0 ? mean * shrink : top * factor;
        return;
    }
    float low = (p.low > 0 ? 0 : p.low) * shrink, high = (p.high < 0 ? 0 : p.high) * shrink;
    scale = (high - low) / f.span;
    zero = f.zero == MIN ? low : clamp(f.lo - __builtin_nearbyintf(low / safe(scale)), f.first, f.hi);
}

// Replace scale and zero by those of least Σ u (v - decoded)² for the codes' values in c; keep them where there are none.
static void least_squares(const Format &f, Group &p, float &scale, float &zero) {
    float *uc = p.decoded;  // no longer needed
    for (int i = 0; i < p.n; i += LANES) {
        if (f.zero == ASYM) store(p.c + i, load(p.c + i) - zero);
        store(uc + i, load(p.u + i) * load(p.c + i));
    }
    float cc = sum_of_products(p, uc, p.c), cv = sum_of_products(p, uc, p.v);
    if (f.zero != MIN) {
        float solved = cv / safe(cc);
        scale = solved > 0 && finite(solved) ? solved : scale;
        return;
    }
    float c1 = folded(uc, p.n), n = p.total_u, v1 = p.total_uv;
    float det = n * cc - c1 * c1;
    float solved = (n * cv - c1 * v1) / safe(det);
    float low = (v1 - solved * c1) / safe(n);
    low = low > 0 ? 0 : low;
    if (low == 0) solved = cv / safe(cc);
    if (det > 0 && solved > 0 && finite(solved) && finite(low)) {
        scale = solved;
        zero = low;
    }
}

// The squared error under a scale and zero; leaves the codes' values in c.
static float error_of(const Format &f, Group &p, float scale, float zero) {
    Vec s = all(scale), d = all(safe(scale)), z = all(zero), decoded;
    for (int i = 0; i < p.n; i += LANES) {
        Vec v = load(p.v + i);
        store(p.c + i, round_to(f, v, s, d, z, decoded));
        Vec e = v - decoded;
        store(p.t + i, e * e * load(p.u + i));
    }
    return folded(p.t, p.n);
}

static void search_group(const Format &f, const Search &a, Group &p, float &best_scale, float &best_zero) {
    float best = 0, mean = 0;
    if (f.reach == 0) {
        for (int i = 0; i < p.n; i++) p.t[i] = magnitude(p.v[i]);
        mean = folded(p.t, p.n) / (float)p.g;
    }
    for (ptrdiff_t step = 0; step < a.steps; step++) {
        float scale = 0, zero = 0;
        from_range(f, p, a.shrink[step], a.factor[step], mean, scale, zero);
        for (int again = 0; again < 2; again++) {
            scale = stored_scale(scale, f.encoding);
            if (f.zero == MIN) zero = stored(zero, f.encoding, false);
            float error = error_of(f, p, scale, zero);
            if ((step == 0 && again == 0) || error < best) {
                best = error;
                best_scale = scale;
                best_zero = zero;
            }
            if (again == 0) least_squares(f, p, scale, zero);
        }
    }
}

static void search(const Format &f, const Search &a, float *scratch, ptrdiff_t first, ptrdiff_t last) {
    ptrdiff_t G = (a.K + a.g - 1) / a.g;
    int n = LANES;
    while (n < a.g) n *= 2;
    Group p{scratch, scratch + n, scratch + 2 * n, scratch + 3 * n, scratch + 4 * n, n, 0, 0, 0, 0, 0};
    for (ptrdiff_t group = 0; group < G; group++) {
        ptrdiff_t begin = group * a.g;
        p.g = (int)(a.K - begin < a.g ? a.K - begin : a.g);
        for (int i = 0; i < n; i++) p.t[i] = p.u[i] = i < p.g ? a.weight[begin + i] : 0;
        p.total_u = folded(p.t, n);
        for (ptrdiff_t row = first; row < last; row++) {
            const float *w = a.w + row * a.K + begin;
            for (int i = 0; i < n; i++) p.v[i] = i < p.g ? w[i] : 0;
            p.low = p.high = 0;  // the range counts from zero for every format
            for (int i = 0; i < n; i++) {
                p.low = p.v[i] < p.low ? p.v[i] : p.low;
                p.high = p.v[i] > p.high ? p.v[i] : p.high;
                p.t[i] = p.v[i] - p.v[i];  // 0, or NaN if it is not finite
            }
            float check = folded(p.t, n);
            if (f.zero == MIN) p.total_uv = sum_of_products(p, p.u, p.v);
            float scale = 0, zero = 0;
            search_group(f, a, p, scale, zero);
            a.scale[row * G + group] = scale + check;
            if (a.zero) a.zero[row * G + group] = zero;
        }
    }
}

// The rounding kernels, written once in vectors of LANES numbers (an extension of GCC and Clang), which the compiler
// makes of whatever registers it may use. Each instruction set's file includes this inside its own namespace. Nothing of
// the standard library is used here: the linker merges inline functions of that across files, and might keep the copy
// that an older CPU cannot run.

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float Loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // as it lies in memory
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef int8_t LooseBytes __attribute__((vector_size(LANES), aligned(1), may_alias));

constexpr float TINY = 1.17549435e-38f, HUGE_F32 = 3.40282347e38f;

static inline Vec load(const float *x) { return *(const Loose *)x; }
static inline void store(float *to, Vec x) { *(Loose *)to = x; }
static inline Vec all(float x) { return x - Vec{}; }
static inline bool finite(float x) { return x - x == 0; }
static inline float magnitude(float x) { return __builtin_fabsf(x); }
static inline float clamp(float x, float lo, float hi) { x = x < lo ? lo : x; return x > hi ? hi : x; }
static inline float safe(float scale) { return scale == 0 ? 1.0f : scale; }

// Nearest integers, ties to even, for |x| < 2^22.
template <class T>
static inline T nearest(T x) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
    return (x + magic) - magic;
}

static inline uint32_t bits_of(float x) { uint32_t u; __builtin_memcpy(&u, &x, 4); return u; }
static inline float float_of(uint32_t u) { float x; __builtin_memcpy(&x, &u, 4); return x; }

// x with its low `drop` mantissa bits rounded away, ties to even.
static inline float shortened(float x, int drop) {
    uint32_t u = bits_of(x), mask = (1u << drop) - 1;
    return float_of((u + (mask >> 1) + ((u >> drop) & 1)) & ~mask);
}

static float to_half(float x) {  // |x| <= 65504
    if (magnitude(x) >= 6.103515625e-05f) return shortened(x, 13);
    constexpr float step = 5.9604644775390625e-08f;  // 2^-24, of the subnormal numbers
    return nearest(x / step) * step;
}

// Magnitudes are kept between `low` (or the encoding's smallest normal number) and its largest; exact zeros stay.
static float stored(float x, int encoding, bool above_smallest) {
    if (x == 0 || encoding == E8M0) return x;
    float low = 0, high = HUGE_F32;
    if (encoding == F16) high = 65504.0f;
    if (encoding == BF16) high = 3.38953139e38f;
    if (above_smallest) low = encoding == F16 ? 6.103515625e-05f : TINY;
    float bounded = clamp(magnitude(x), low, high);
    bounded = x < 0 ? -bounded : bounded;
    return encoding == F16 ? to_half(bounded) : encoding == BF16 ? shortened(bounded, 16) : bounded;
}

// The power of two nearest on a logarithmic scale, 2^-127 to 2^127.
static float power_of_two(float x) {
    int exponent;
    float mantissa = __builtin_frexpf(magnitude(x), &exponent);
    exponent -= mantissa < 0.70710678f;
    exponent = exponent < -127 ? -127 : exponent > 127 ? 127 : exponent;
    return __builtin_ldexpf(1.0f, exponent);
}

static float stored_scale(float x, int encoding) {
    return encoding == E8M0 ? (x == 0 ? x : power_of_two(x)) : stored(x, encoding, true);
}

// LANES numbers w under scales s (d: to divide by) and zeros z: the values that the nearest codes stand for, and, in
// `decoded`, the weights that gives.
static inline Vec round_to(const Format &f, Vec w, Vec s, Vec d, Vec z, Vec &decoded) {
    Vec lo = all(f.lo), hi = all(f.hi), x, value;
    if (f.levels) {
        x = w / d;
        value = all(f.level[0]);
        for (int k = 0; k + 1 < f.levels; k++) value = x > all(f.middle[k]) ? all(f.level[k + 1]) : value;
        decoded = value * s;
        return value;
    }
    x = f.zero == SYM ? w / d : f.zero == ASYM ? w / d + z : (w - z) / d;
    x = x < lo ? lo : x;
    value = nearest(x > hi ? hi : x);
    decoded = f.zero == SYM ? value * s : f.zero == ASYM ? (value - z) * s : value * s + z;
    return value;
}

// The codes that stand for values.
static inline Bytes codes_of(const Format &f, Vec value) {
    Ints k{};
    if (!f.levels) return __builtin_convertvector(__builtin_convertvector(value, Ints), Bytes);
    for (int i = 0; i + 1 < f.levels; i++) k -= value > all(f.middle[i]);  // true is -1
    Bytes code{};
    for (int l = 0; l < LANES; l++) code[l] = f.code[k[l]];
    return code;
}

// And back.
static inline float value_of(const Format &f, int8_t code) {
    if (f.levels) return f.value[code & 15];
    return f.zero == MIN ? (float)(uint8_t)code : (float)code;
}

// ------------------------------------------------------------------------------------------------------------ search

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

// ------------------------------------------------------------------------------------------------- columns, row by row

// LANES rows of a transposed matrix [n, N] from row `at` on, of which `wide` exist, to and from [n, LANES].
static void gather(const float *from, ptrdiff_t n, ptrdiff_t N, ptrdiff_t at, int wide, float *to) {
    for (ptrdiff_t i = 0; i < n; i++)
        for (int l = 0; l < LANES; l++) to[i * LANES + l] = l < wide ? from[i * N + at + l] : 0;
}

static void scatter(const float *from, ptrdiff_t n, ptrdiff_t N, ptrdiff_t at, int wide, float *to) {
    for (ptrdiff_t i = 0; i < n; i++)
        for (int l = 0; l < wide; l++) to[i * N + at + l] = from[i * LANES + l];
}

static void scatter_codes(const Format &f, Vec value, int wide, int8_t *to) {
    Bytes code = codes_of(f, value);
    if (wide == LANES) {
        *(LooseBytes *)to = code;
    } else {
        for (int l = 0; l < wide; l++) to[l] = code[l];
    }
}

// The scales, divisors and zeros of LANES rows in one group.
struct Row {
    Vec s, d, z;
    void read(const float *scale, const float *zero, ptrdiff_t at, int wide) {
        for (int l = 0; l < LANES; l++) {
            s[l] = l < wide ? scale[at + l] : 1;
            z[l] = l < wide && zero ? zero[at + l] : 0;
            d[l] = safe(s[l]);
        }
    }
};

// Columns are dealt with STEP at a time: inside a step each change reaches the next columns at once, the columns behind
// it wait for the step's end, so that they are read and written once for STEP changes. The order of the sums stays.
constexpr int STEP = 8;

// Rows [from, to) of x [n, LANES] += sign * Σ M[i, :] * change[i], over `count` rows of M [n, n] from i = begin on.
static void carry(const float *M, ptrdiff_t n, ptrdiff_t begin, ptrdiff_t count, const float *change, float sign, float *x,
                  ptrdiff_t from, ptrdiff_t to) {
    const float *m = M + begin * n;
    if (count == STEP) {
        Vec moved[STEP];
        for (int q = 0; q < STEP; q++) moved[q] = load(change + q * LANES) * sign;
        for (ptrdiff_t j = from; j < to; j++) {
            Vec sum = load(x + j * LANES);
            for (int q = 0; q < STEP; q++) sum += m[q * n + j] * moved[q];
            store(x + j * LANES, sum);
        }
        return;
    }
    for (ptrdiff_t j = from; j < to; j++) {
        Vec sum = load(x + j * LANES);
        for (ptrdiff_t q = 0; q < count; q++) sum += m[q * n + j] * (load(change + q * LANES) * sign);
        store(x + j * LANES, sum);
    }
}

static void visit(const Format &f, const Visit &a, float *scratch, ptrdiff_t first, ptrdiff_t last) {
    float *aim = scratch, *original = scratch + a.n * LANES, *errors = scratch + 2 * a.n * LANES;  // [n, LANES]
    for (ptrdiff_t at = first; at < last; at += LANES) {
        int wide = (int)(last - at < LANES ? last - at : LANES);
        Row row;
        ptrdiff_t group = -1;
        gather(a.aim, a.n, a.N, at, wide, aim);
        gather(a.original, a.n, a.N, at, wide, original);
        for (ptrdiff_t start = 0, stop; start < a.n; start = stop) {
            stop = start + STEP < a.n ? start + STEP : a.n;
            for (ptrdiff_t i = start; i < stop; i++) {
                if (a.group[i] != group) {
                    group = a.group[i];
                    row.read(a.scale + group * a.N, a.zero ? a.zero + group * a.N : nullptr, at, wide);
                }
                Vec decoded, value = round_to(f, load(aim + i * LANES), row.s, row.d, row.z, decoded);
                store(errors + i * LANES, load(original + i * LANES) - decoded);
                scatter_codes(f, value, wide, a.codes + i * a.N + at);
                carry(a.spread, a.n, i, 1, errors + i * LANES, 1, aim, i + 1, stop);
            }
            carry(a.spread, a.n, start, stop - start, errors + start * LANES, 1, aim, stop, a.n);
        }
        scatter(aim, a.n, a.N, at, wide, a.aim);
        scatter(errors, a.n, a.N, at, wide, a.errors);
    }
}

// LANES rows of a sweep: decoded, pull, the codes' values (c), H c, and room to work, each [n, LANES].
struct Lanes {
    float *decoded, *pull, *c, *bent, *work;
};

// carry() for as many columns [begin, end) as there are.
static void carry_all(const Sweep &a, ptrdiff_t begin, ptrdiff_t end, const float *change, float sign, float *x,
                      ptrdiff_t from, ptrdiff_t to) {
    for (ptrdiff_t i = begin; i < end; i += STEP)
        carry(a.H, a.n, i, i + STEP < end ? STEP : end - i, change + i * LANES, sign, x, from, to);
}

// Move the scales of the group in columns [from, to) to their least-squares value where that, once stored, loses less.
static void solve_scale(const Format &f, const Sweep &a, const Lanes &t, Row &row, ptrdiff_t from, ptrdiff_t to) {
    Vec slope{}, bend{}, change{}, shift = f.zero == ASYM ? row.z : Vec{};
    for (ptrdiff_t i = from * LANES; i < to * LANES; i += LANES) {
        Vec c = load(t.c + i) - shift;
        store(t.work + i, c);
        store(t.bent + i, a.ridge * c);
        slope += load(t.pull + i) * c;
    }
    carry_all(a, from, to, t.work, 1, t.bent, from, to);
    for (ptrdiff_t i = from * LANES; i < to * LANES; i += LANES) bend += load(t.bent + i) * load(t.work + i);
    for (int l = 0; l < LANES; l++) {
        float wanted = row.s[l] + slope[l] / safe(bend[l]);
        float now = wanted > 0 && finite(wanted) ? stored_scale(wanted, f.encoding) : row.s[l];
        float by = now - row.s[l];
        if (!(by * (2 * slope[l] - by * bend[l]) > 0)) continue;
        change[l] = by;
        row.s[l] = now;
        row.d[l] = safe(now);
    }
    for (ptrdiff_t i = from * LANES; i < to * LANES; i += LANES) {
        store(t.pull + i, load(t.pull + i) - load(t.bent + i) * change);
        Vec scaled = load(t.work + i) * row.s;
        store(t.decoded + i, f.zero == MIN ? scaled + row.z : scaled);
    }
}

// Choose each code of the group anew.
static void sweep_group(const Format &f, const Sweep &a, const Lanes &t, const Row &row, ptrdiff_t from, ptrdiff_t to) {
    for (ptrdiff_t start = from, stop; start < to; start = stop) {
        stop = start + STEP < to ? start + STEP : to;
        for (ptrdiff_t i = start; i < stop; i++) {
            Vec old = load(t.decoded + i * LANES), decoded;
            Vec target = old + (1 / a.curvature[i]) * load(t.pull + i * LANES);
            store(t.c + i * LANES, round_to(f, target, row.s, row.d, row.z, decoded));
            store(t.decoded + i * LANES, decoded);
            store(t.work + i * LANES, decoded - old);
            carry(a.H, a.n, i, 1, t.work + i * LANES, -1, t.pull, i + 1, stop);
        }
        carry(a.H, a.n, start, stop - start, t.work + start * LANES, -1, t.pull, stop, to);
    }
}

static void sweep(const Format &f, const Sweep &a, float *scratch, ptrdiff_t first, ptrdiff_t last) {
    ptrdiff_t size = a.n * LANES;
    Lanes t{scratch, scratch + size, scratch + 2 * size, scratch + 3 * size, scratch + 4 * size};
    float *moved = scratch + 5 * size;
    for (ptrdiff_t at = first; at < last; at += LANES) {
        int wide = (int)(last - at < LANES ? last - at : LANES);
        gather(a.decoded, a.n, a.N, at, wide, t.decoded);
        gather(a.pull, a.n, a.N, at, wide, t.pull);
        for (ptrdiff_t i = 0; i < a.n; i++)
            for (int l = 0; l < LANES; l++) t.c[i * LANES + l] = l < wide ? value_of(f, a.codes[i * a.N + at + l]) : 0;
        for (ptrdiff_t from = 0, to; from < a.n; from = to) {
            ptrdiff_t group = (a.begin + from) / a.g;
            to = (group + 1) * a.g - a.begin;
            to = to < a.n ? to : a.n;
            Row row;
            row.read(a.scale + group * a.N, a.zero ? a.zero + group * a.N : nullptr, at, wide);
            for (ptrdiff_t i = from * LANES; i < to * LANES; i++) moved[i] = t.decoded[i];
            if (a.solve) {
                solve_scale(f, a, t, row, from, to);
                for (int l = 0; l < wide; l++) a.scale[group * a.N + at + l] = row.s[l];
            }
            sweep_group(f, a, t, row, from, to);
            for (ptrdiff_t i = from * LANES; i < to * LANES; i++) moved[i] = t.decoded[i] - moved[i];
            carry_all(a, from, to, moved, -1, t.pull, to, a.n);
        }
        scatter(t.decoded, a.n, a.N, at, wide, a.decoded);
        scatter(t.pull, a.n, a.N, at, wide, a.pull);
        for (ptrdiff_t i = 0; i < a.n; i++) scatter_codes(f, load(t.c + i * LANES), wide, a.codes + i * a.N + at);
    }
}

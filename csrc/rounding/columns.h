// GPTQ's column loop and the sweep of coordinate descent, column by column with LANES rows in a vector. Included after rounding.h.

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

static void round_columns(const Format &f, const Columns &a, float *scratch, ptrdiff_t first, ptrdiff_t last) {
    float *target = scratch, *original = scratch + a.n * LANES, *errors = scratch + 2 * a.n * LANES;  // [n, LANES]
    for (ptrdiff_t at = first; at < last; at += LANES) {
        int wide = (int)(last - at < LANES ? last - at : LANES);
        Row row;
        ptrdiff_t group = -1;
        gather(a.target, a.n, a.N, at, wide, target);
        gather(a.original, a.n, a.N, at, wide, original);
        for (ptrdiff_t start = 0, stop; start < a.n; start = stop) {
            stop = start + STEP < a.n ? start + STEP : a.n;
            for (ptrdiff_t i = start; i < stop; i++) {
                if (a.group[i] != group) {
                    group = a.group[i];
                    row.read(a.scale + group * a.N, a.zero ? a.zero + group * a.N : nullptr, at, wide);
                }
                Vec decoded, value = round_to(f, load(target + i * LANES), row.s, row.d, row.z, decoded);
                store(errors + i * LANES, load(original + i * LANES) - decoded);
                scatter_codes(f, value, wide, a.codes + i * a.N + at);
                carry(a.propagation, a.n, i, 1, errors + i * LANES, 1, target, i + 1, stop);
            }
            carry(a.propagation, a.n, start, stop - start, errors + start * LANES, 1, target, stop, a.n);
        }
        scatter(target, a.n, a.N, at, wide, a.target);
        scatter(errors, a.n, a.N, at, wide, a.errors);
    }
}

// LANES rows of a sweep: decoded, pull (E H, see methods/coordinate_descent.py), the codes' values c, H c, scratch; each [n, LANES].
struct Lanes {
    float *decoded, *pull, *c, *bent, *work;
};

// carry() for as many columns [begin, end) as there are.
static void carry_all(const Sweep &a, ptrdiff_t begin, ptrdiff_t end, const float *change, float sign, float *x,
                      ptrdiff_t from, ptrdiff_t to) {
    for (ptrdiff_t i = begin; i < end; i += STEP)
        carry(a.H, a.n, i, i + STEP < end ? STEP : end - i, change + i * LANES, sign, x, from, to);
}

// Set the scales of the group in columns [from, to) to their least-squares value, as stored, where that lowers the loss.
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
        float now = same_sign(wanted, row.s[l]) && finite(wanted) ? stored_scale(wanted, f.encoding) : row.s[l];
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

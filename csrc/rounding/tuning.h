// AutoRound's step on one matrix, group by group in row order. Included after search.h.

static inline Vec root(Vec x) {
    Vec r;
    for (int l = 0; l < LANES; l++) r[l] = __builtin_sqrtf(x[l]);
    return r;
}

// LANES weights under one scale and zero: where they lie among the codes before offsets (`plain`, without an integer
// zero point), what is multiplied by the scale (`by`), and whether the code is within the grid (all bits set, or none).
struct Placed {
    Vec plain, by;
    Ints inside;
};

static inline Placed place(const Format &f, Vec w, Vec shift, float scale, float zero) {
    Vec lo = all(f.lo), hi = all(f.hi), z = all(zero), plain, at;
    plain = (f.zero == MIN ? w - z : w) / all(safe(scale));
    at = (f.zero == ASYM ? plain + z : plain) + shift;
    at = at < lo - 1 ? lo - 1 : at;  // beyond the grid it does not matter how far
    at = nearest(at > hi + 1 ? hi + 1 : at);
    Ints inside = (at >= lo) & (at <= hi);
    at = at < lo ? lo : at > hi ? hi : at;
    return {plain, f.zero == ASYM ? at - z : at, inside};
}

// x where the mask has all bits set, else 0.
static inline Vec where(Ints mask, Vec x) { return (Vec)(mask & (Ints)x); }

// A step of a variable against its gradient, divided by the running root mean square.
static inline float stepped(float knob, float gradient, float square, float rate) {
    float size = __builtin_sqrtf(square);
    return knob - rate * (gradient / (size < TINY ? TINY : size));
}

// Move the offsets of `count` weights from `at` on and the scale `group`, against the gradient.
template <class T>
static void move_group(const Format &f, const Tune &a, float *t, ptrdiff_t at, int count, ptrdiff_t group) {
    float scale = a.scale[group], zero = a.zero ? a.zero[group] : 0;
    const T *gradient = (const T *)a.gradient + at;
    int n = LANES;
    while (n < count) n *= 2;
    for (int i = 0; i < n; i += LANES) {
        if (i >= count) {
            store(t + i, Vec{});
            continue;
        }
        int wide = count - i < LANES ? count - i : LANES;
        Vec offset = some(a.offset + at + i, wide), slope = some(gradient + i, wide);
        Placed p = place(f, some(a.w + at + i, wide), some(a.base + at + i, wide) + offset, scale, zero);
        store(t + i, slope * (p.by - where(p.inside, p.plain)));
        slope = where(p.inside, slope * scale);
        Vec square = some(a.square + at + i, wide);
        square += (slope * slope - square) * a.fresh;
        put(a.square + at + i, square, wide);
        Vec size = root(square);
        offset -= (slope / (size < all(TINY) ? all(TINY) : size)) * a.rate;
        offset = offset < all(-0.5f) ? all(-0.5f) : offset > all(0.5f) ? all(0.5f) : offset;
        put(a.offset + at + i, offset, wide);
    }
    if (!a.movable) return;
    float slope = folded(t, n) * a.start[group], &square = a.stretch_square[group];
    square += (slope * slope - square) * a.fresh;
    a.stretch[group] = stepped(a.stretch[group], slope, square, a.scale_rate);
    a.scale[group] = stored_scale(a.start[group] * (1 + a.stretch[group]), f.encoding);
}

template <class T>
static void decode_group(const Format &f, const Tune &a, ptrdiff_t at, int count, ptrdiff_t group) {
    float scale = a.scale[group], zero = a.zero ? a.zero[group] : 0;
    for (int i = 0; i < count; i += LANES) {
        int wide = count - i < LANES ? count - i : LANES;
        Vec shift = some(a.base + at + i, wide) + some(a.offset + at + i, wide);
        Vec decoded = place(f, some(a.w + at + i, wide), shift, scale, zero).by * scale;
        put((T *)a.decoded + at + i, f.zero == MIN ? decoded + zero : decoded, wide);
    }
}

template <class T>
static void tune_rows(const Format &f, const Tune &a, float *scratch, ptrdiff_t first, ptrdiff_t last) {
    ptrdiff_t G = (a.K + a.g - 1) / a.g;
    for (ptrdiff_t row = first; row < last; row++)
        for (ptrdiff_t group = 0; group < G; group++) {
            ptrdiff_t begin = group * a.g, at = row * a.K + begin;
            int count = (int)(a.K - begin < a.g ? a.K - begin : a.g);
            if (a.gradient) move_group<T>(f, a, scratch, at, count, row * G + group);
            decode_group<T>(f, a, at, count, row * G + group);
        }
}

static void tune(const Format &f, const Tune &a, float *scratch, ptrdiff_t first, ptrdiff_t last) {
    if (a.half) {
        tune_rows<uint16_t>(f, a, scratch, first, last);
    } else {
        tune_rows<float>(f, a, scratch, first, last);
    }
}

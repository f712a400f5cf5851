// Attention of tokens over those before them, and the MLP's gate. Included behind key_values.h.

// e^x to about 2 units in the last place, 0 below -87: 2^n times a polynomial on half a binade.
static inline Vec exponential(Vec x) {
    x = x < -87.0f ? Vec{} - 87.0f : x > 88.0f ? Vec{} + 88.0f : x;
    const Vec n = nearest(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    return p * (Vec)power;
}

// up *= silu(gate), numbers [first, last), both multiples of 16.
static void gate(const float *gate, float *up, ptrdiff_t first, ptrdiff_t last) {
    for (ptrdiff_t i = first; i < last; i += LANES) {
        const Vec g = load(gate + i);
        store(up + i, load(up + i) * (g / (exponential(-g) + 1)));
    }
}

// The positions that a row sees: [first, last). Sixteen are taken at a time, from multiples of sixteen on, so that what a token's
// sums are does not depend on the tokens beside it.
struct Positions {
    ptrdiff_t first, last;
    Positions(const Attention &a, ptrdiff_t row) : first(0), last(a.position + row + 1) {
        if (a.window && last > a.window) first = last - a.window;
    }
    ptrdiff_t begin() const { return first / 16 * 16; }
};

// What is kept of the positions [t, end), sixteen at most, as floats.
static inline void take_near(const Attention &a, const uint8_t *rows, ptrdiff_t t, ptrdiff_t end) {
    for (ptrdiff_t j = 0; j < 16 && t + j < end; j++) take_kept(rows + (t + j) * a.width, a.type, a.D, a.near + j * a.D);
}

// Scores of one query over sixteen positions from t on.
static inline void find_scores(const Attention &a, const float *q, ptrdiff_t t, const Positions &seen, float *scores) {
    Vec each[16];
    for (int j = 0; j < 16; j++) {
        Vec sum[STRIPS] = {};
        for (ptrdiff_t i = 0; i < a.D; i += 16)
            for (int s = 0; s < STRIPS; s++) sum[s] += load(q + i + s * LANES) * load(a.near + j * a.D + i + s * LANES);
        each[j] = folded(sum);
    }
    add_up(each, scores);
    for (int j = 0; j < 16; j++) scores[j] = t + j < seen.first || t + j >= seen.last ? -HUGE_F32 : scores[j] * a.scaling;
}

// n scores, a multiple of 16, become weights.
static inline void soften(float *scores, ptrdiff_t n) {
    Vec most = load(scores), total[STRIPS] = {};
    for (ptrdiff_t t = 0; t < n; t += LANES) {
        const Vec each = load(scores + t);
        most = each > most ? each : most;
    }
    float highest = most[0];
    for (int i = 1; i < LANES; i++) highest = most[i] > highest ? most[i] : highest;
    for (ptrdiff_t t = 0; t < n; t += 16)
        for (int s = 0; s < STRIPS; s++) {
            const Vec weight = exponential(load(scores + t + s * LANES) - highest);
            store(scores + t + s * LANES, weight);
            total[s] += weight;
        }
    const float factor = 1 / added_up(total);
    for (ptrdiff_t t = 0; t < n; t += LANES) store(scores + t, load(scores + t) * factor);
}

// What a query takes of the values of positions [from, to) of sixteen, WIDE numbers of a head at a time, added to out.
template <int WIDE>
static inline void add_values(const Attention &a, const float *weights, ptrdiff_t from, ptrdiff_t to, float *out) {
    constexpr int PARTS = WIDE / LANES;
    for (ptrdiff_t i = 0; i < a.D; i += WIDE) {
        Vec sum[PARTS];
        for (int p = 0; p < PARTS; p++) sum[p] = load(out + i + p * LANES);
        for (ptrdiff_t j = from; j < to; j++)
#pragma GCC unroll 16
            for (int p = 0; p < PARTS; p++) sum[p] += weights[j] * load(a.near + j * a.D + i + p * LANES);
        for (int p = 0; p < PARTS; p++) store(out + i + p * LANES, sum[p]);
    }
}

// Keys and values become floats once, sixteen positions at a time, for all queries that see them.
static void attend(const Attention &a) {
    const Positions earliest(a, 0), latest(a, a.rows - 1);
    const ptrdiff_t begin = earliest.begin(), end = latest.last;
    auto each = [&](auto visit) {
        for (ptrdiff_t row = 0; row < a.rows; row++)
            for (ptrdiff_t h = 0; h < a.share; h++)
                visit(Positions(a, row), row * a.apart + h * a.D, a.scores + (row * a.share + h) * a.padded - begin);
    };
    for (ptrdiff_t t = begin; t < end; t += 16) {
        take_near(a, a.keys, t, end);
        each([&](const Positions &seen, ptrdiff_t at, float *scores) {
            if (t + 16 > seen.first && t < seen.last) find_scores(a, a.q + at, t, seen, scores + t);
        });
    }
    each([&](const Positions &seen, ptrdiff_t at, float *scores) {
        soften(scores + seen.begin(), (seen.last - seen.begin() + 15) / 16 * 16);
        for (ptrdiff_t i = 0; i < a.D; i++) a.out[at + i] = 0;
    });
    for (ptrdiff_t t = begin; t < end; t += 16) {
        take_near(a, a.values, t, end);
        each([&](const Positions &seen, ptrdiff_t at, float *scores) {
            const ptrdiff_t from = seen.first > t ? seen.first - t : 0, to = seen.last < t + 16 ? seen.last - t : 16;
            if (a.D % 64 == 0) add_values<64>(a, scores + t, from, to, a.out + at);
            else add_values<16>(a, scores + t, from, to, a.out + at);
        });
    }
}

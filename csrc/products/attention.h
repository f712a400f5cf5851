// Attention of tokens over those before them, the MLP's gate and the norms. Included behind key_values.h.

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

// Root mean square norm of n numbers (arXiv:1910.07467): squares are added up over every sixteenth number, then those sums in turn.
static void normalize(const float *x, const float *weight, ptrdiff_t n, float epsilon, float *to) {
    Vec strips[STRIPS] = {};
    float squares[16], total = 0;
    const ptrdiff_t whole = n / 16 * 16;
    for (ptrdiff_t i = 0; i < whole; i += 16)
        for (int s = 0; s < STRIPS; s++) {
            const Vec some = load(x + i + s * LANES);
            strips[s] += some * some;
        }
    for (int s = 0; s < STRIPS; s++) store(squares + s * LANES, strips[s]);
    for (ptrdiff_t i = whole; i < n; i++) squares[i - whole] += x[i] * x[i];
    for (float square : squares) total += square;
    const float factor = 1 / __builtin_sqrtf(total / (float)n + epsilon);
    for (ptrdiff_t i = 0; i < n; i++) to[i] = x[i] * factor * weight[i];
}

// The positions that a row sees: [first, last). Sixteen are taken at a time, from multiples of sixteen on, so that what a token's
// sums are does not depend on the tokens beside it.
struct Positions {
    ptrdiff_t first, last;
    Positions(const Attention &a, ptrdiff_t row) : first(0), last(a.position + row + 1) {
        if (a.window && last > a.window) first = last - a.window;
    }
    ptrdiff_t begin() const { return first / 16 * 16; }
    bool any_from(ptrdiff_t t) const { return t + 16 > first && t < last; }  // of sixteen
};

// What is kept of the positions [t, end), sixteen at most, as floats.
static inline void take_near(const Attention &a, const uint8_t *rows, ptrdiff_t t, ptrdiff_t end) {
    for (ptrdiff_t j = 0; j < 16 && t + j < end; j++) take_kept(rows + (t + j) * a.width, a.type, a.D, a.near + j * a.D);
}

// Of rows a and b of a matrix, HALF rows apart: the numbers right of the diagonal of each block of 2 HALF change places with those below.
template <int HALF, int... LANE>
static inline void swap_blocks(Vec &a, Vec &b, std::integer_sequence<int, LANE...>) {
    const Vec upper = __builtin_shufflevector(a, b, (LANE & HALF ? LANES + LANE - HALF : LANE)...);
    b = __builtin_shufflevector(a, b, (LANE & HALF ? LANES + LANE : LANE + HALF)...);
    a = upper;
}

// A matrix of LANES rows transposed.
template <int HALF>
static inline void turn(Vec *v) {
    for (int i = 0; i < LANES; i++)
        if (!(i & HALF)) swap_blocks<HALF>(v[i], v[i + HALF], std::make_integer_sequence<int, LANES>());
    if constexpr (HALF > 1) turn<HALF / 2>(v);
}

// Keys [16, D] -> [D, 16].
static inline void turn_keys(const float *keys, ptrdiff_t D, float *to) {
    for (int j = 0; j < 16; j += LANES)
        for (ptrdiff_t i = 0; i < D; i += LANES) {
            Vec v[LANES];
            for (int r = 0; r < LANES; r++) v[r] = load(keys + (j + r) * D + i);
            turn<LANES / 2>(v);
            for (int r = 0; r < LANES; r++) store(to + (i + r) * 16 + j, v[r]);
        }
}

// Sums become scores of sixteen positions from t on.
static inline void scale_scores(const Attention &a, ptrdiff_t t, const Positions &seen, float *scores) {
    const int first = (int)(seen.first - t), last = (int)(seen.last - t < 16 ? seen.last - t : 16);
    const float scaling = a.scaling;
    for (int j = 0; j < 16; j += LANES) store(scores + j, load(scores + j) * scaling);
    if (first <= 0 && last == 16) return;
    for (int j = 0; j < first; j++) scores[j] = -HUGE_F32;
    for (int j = last; j < 16; j++) scores[j] = -HUGE_F32;
}

// The sums of one query over sixteen positions.
static inline void find_scores(const Attention &a, const float *q, float *scores) {
    Vec each[16];
    for (int j = 0; j < 16; j++) {
        Vec sum[STRIPS] = {};
        for (ptrdiff_t i = 0; i < a.D; i += 16)
            for (int s = 0; s < STRIPS; s++) sum[s] += load(q + i + s * LANES) * load(a.near + j * a.D + i + s * LANES);
        each[j] = folded(sum);
    }
    add_up(each, scores);
}

// The same sums of QUERIES queries, without shuffles: sixteen for each position, over every sixteenth channel, and of those the
// second half added to the first, and so on. This adds up what LANE and every HALFth behind it have.
constexpr int QUERIES = 4;
template <int LANE, int HALF>
static inline void add_channels(const float *const *q, const float *keys, ptrdiff_t D, Vec (&to)[QUERIES]) {
    if constexpr (HALF == 16) {
        for (int r = 0; r < QUERIES; r++) to[r] = q[r][LANE] * load(keys + LANE * 16);
        for (ptrdiff_t i = LANE + 16; i < D; i += 16)
            for (int r = 0; r < QUERIES; r++) to[r] += q[r][i] * load(keys + i * 16);
    } else {
        Vec second[QUERIES];
        add_channels<LANE, 2 * HALF>(q, keys, D, to);
        add_channels<LANE + HALF, 2 * HALF>(q, keys, D, second);
        for (int r = 0; r < QUERIES; r++) to[r] += second[r];
    }
}

static inline void find_scores(const float *const *q, const float *turned, ptrdiff_t D, float *const *scores) {
    for (int j = 0; j < 16; j += LANES) {
        Vec sum[QUERIES];
        add_channels<0, 1>(q, turned + j, D, sum);
        for (int r = 0; r < QUERIES; r++) store(scores[r] + j, sum[r]);
    }
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

// What Q queries take of the values of positions [from, to) of sixteen, PARTS vectors of a head at a time, added to out.
template <int Q, int PARTS>
static inline void add_values(const Attention &a, const float *const *weight, ptrdiff_t from, ptrdiff_t to, float *const *out) {
    const float *weights[Q];
    for (int r = 0; r < Q; r++) weights[r] = weight[r];
    for (ptrdiff_t i = 0; i < a.D; i += PARTS * LANES) {
        Vec sum[Q][PARTS];
        for (int r = 0; r < Q; r++)
            for (int p = 0; p < PARTS; p++) sum[r][p] = load(out[r] + i + p * LANES);
        for (ptrdiff_t j = from; j < to; j++)
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) {
                const Vec value = load(a.near + j * a.D + i + p * LANES);
#pragma GCC unroll 4
                for (int r = 0; r < Q; r++) sum[r][p] += weights[r][j] * value;
            }
        for (int r = 0; r < Q; r++)
            for (int p = 0; p < PARTS; p++) store(out[r] + i + p * LANES, sum[r][p]);
    }
}

template <int Q>
static inline void add_values(const Attention &a, const float *const *weights, ptrdiff_t from, ptrdiff_t to, float *const *out) {
    constexpr int PARTS = Q == 1 ? 64 / LANES : 32 / LANES;  // whose sums fit the registers
    if (a.D % (PARTS * LANES) == 0) add_values<Q, PARTS>(a, weights, from, to, out);
    else add_values<Q, 16 / LANES>(a, weights, from, to, out);
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
    const float *from[QUERIES];
    float *to[QUERIES], *turned = a.near + 16 * a.D;
    for (ptrdiff_t t = begin; t < end; t += 16) {
        take_near(a, a.keys, t, end);
        if (a.rows * a.share >= QUERIES) turn_keys(a.near, a.D, turned);
        int count = 0;
        each([&](const Positions &seen, ptrdiff_t at, float *scores) {
            if (!seen.any_from(t)) return;
            from[count] = a.q + at, to[count] = scores + t;
            if (++count == QUERIES) find_scores(from, turned, a.D, to), count = 0;
        });
        for (int i = 0; i < count; i++) find_scores(a, from[i], to[i]);
        each([&](const Positions &seen, ptrdiff_t, float *scores) {
            if (seen.any_from(t)) scale_scores(a, t, seen, scores + t);
        });
    }
    each([&](const Positions &seen, ptrdiff_t at, float *scores) {
        soften(scores + seen.begin(), (seen.last - seen.begin() + 15) / 16 * 16);
        for (ptrdiff_t i = 0; i < a.D; i++) a.out[at + i] = 0;
    });
    for (ptrdiff_t t = begin; t < end; t += 16) {
        take_near(a, a.values, t, end);
        int count = 0;
        each([&](const Positions &seen, ptrdiff_t at, float *scores) {
            const ptrdiff_t first = seen.first > t ? seen.first - t : 0, last = seen.last < t + 16 ? seen.last - t : 16;
            from[count] = scores + t, to[count] = a.out + at;
            if (first > 0 || last < 16) add_values<1>(a, from + count, first, last, to + count);
            else if (++count == QUERIES) add_values<QUERIES>(a, from, 0, 16, to), count = 0;
        });
        for (int i = 0; i < count; i++) add_values<1>(a, from + i, 0, 16, to + i);
    }
}

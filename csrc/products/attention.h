// Attention of one token over those before it, and the MLP's gate. Included behind dense.h.

// e^x to about 2 units in the last place, 0 below -87: 2^n times a polynomial on half a binade.
static inline Floats exponential(Floats x) {
    x = x < -87.0f ? Floats{} - 87.0f : x > 88.0f ? Floats{} + 88.0f : x;
    const Floats n = nearest(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    const Sums power = (__builtin_convertvector(n, Sums) + 127) << 23;
    return p * (Floats)power;
}

// up *= silu(gate), numbers [first, last), both multiples of 16.
static void gate(const float *gate, float *up, ptrdiff_t first, ptrdiff_t last) {
    for (ptrdiff_t i = first; i < last; i += 16) {
        const Floats g = *(const LooseFloats *)(gate + i);
        LooseFloats *to = (LooseFloats *)(up + i);
        *to = *to * (g / (exponential(-g) + 1));
    }
}

// As f16, which ends at 65504.
static void halve(const float *from, uint16_t *to, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += 16) {
        const Floats v = *(const LooseFloats *)(from + i), limit = Floats{} + 65504.0f;
        halves_of_floats(v > limit ? limit : v < -limit ? -limit : v, to + i);
    }
}

// Scores of one head over the positions from `t` on, sixteen at most; none where there is no position.
static inline Floats scores_of(const Attention &a, const float *q, const uint16_t *keys, ptrdiff_t t) {
    const int n = a.last - t < 16 ? (int)(a.last - t) : 16;
    Floats each[16] = {};
    for (ptrdiff_t i = 0; i < a.D; i += 16) {
        const Floats part = *(const LooseFloats *)(q + i);
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) each[j] += part * floats_of_halves(keys + (t + (j < n ? j : 0)) * a.D + i);
    }
    Floats scores = added_up(each) * a.scaling;
    for (int j = n; j < 16; j++) scores[j] = -HUGE_F32;
    return scores;
}

// n scores, a multiple of 16, become weights that are still to be multiplied by what is returned.
static inline float soften(float *scores, ptrdiff_t n) {
    Floats most = *(LooseFloats *)scores, total{};
    for (ptrdiff_t t = 16; t < n; t += 16) {
        const Floats each = *(LooseFloats *)(scores + t);
        most = each > most ? each : most;
    }
    float highest = most[0];
    for (int i = 1; i < 16; i++) highest = most[i] > highest ? most[i] : highest;
    for (ptrdiff_t t = 0; t < n; t += 16) {
        LooseFloats *at = (LooseFloats *)(scores + t);
        total += *at = exponential(*at - highest);
    }
    return 1 / added_up(total);
}

// What a head takes of the values of positions [from, to), D a multiple of 16 * PARTS, added to out.
template <int PARTS>
static inline void add_values(const Attention &a, const float *weights, const uint16_t *values, ptrdiff_t from, ptrdiff_t to, float *out) {
    for (ptrdiff_t i = 0; i < a.D; i += 16 * PARTS) {
        Floats sum[PARTS];
        for (int p = 0; p < PARTS; p++) sum[p] = *(LooseFloats *)(out + i + 16 * p);
        for (ptrdiff_t t = from; t < to; t++)
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) sum[p] += weights[t - a.first] * floats_of_halves(values + t * a.D + i + 16 * p);
        for (int p = 0; p < PARTS; p++) *(LooseFloats *)(out + i + 16 * p) = sum[p];
    }
}

// Heads [first, last), all that have their keys in common: keys and values are read once, some at a time.
static void attend_together(const Attention &a, ptrdiff_t first, ptrdiff_t last) {
    constexpr ptrdiff_t AT_ONCE = 32;  // positions whose values stay near
    const uint16_t *keys = a.keys + first / a.share * a.room * a.D, *values = a.values + (keys - a.keys);
    const ptrdiff_t padded = (a.last - a.first + 15) / 16 * 16;
    for (ptrdiff_t t = a.first; t < a.last; t += 16)
        for (ptrdiff_t h = first; h < last; h++)
            *(LooseFloats *)(a.scores + h * a.padded + t - a.first) = scores_of(a, a.q + h * a.D, keys, t);
    for (ptrdiff_t h = first; h < last; h++) {
        float *scores = a.scores + h * a.padded, factor = soften(scores, padded);
        for (ptrdiff_t t = 0; t < padded; t++) scores[t] *= factor;
        for (ptrdiff_t i = 0; i < a.D; i++) a.out[h * a.D + i] = 0;
    }
    for (ptrdiff_t t = a.first; t < a.last; t += AT_ONCE)
        for (ptrdiff_t h = first; h < last; h++) {
            const ptrdiff_t to = t + AT_ONCE < a.last ? t + AT_ONCE : a.last;
            if (a.D % 64 == 0) add_values<4>(a, a.scores + h * a.padded, values, t, to, a.out + h * a.D);
            else add_values<1>(a, a.scores + h * a.padded, values, t, to, a.out + h * a.D);
        }
}

// Heads [first, last).
static void attend(const Attention &a, ptrdiff_t first, ptrdiff_t last) {
    for (ptrdiff_t head = first; head < last; head += a.share) attend_together(a, head, head + a.share);
}

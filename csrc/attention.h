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

static void attend_head(const Attention &a, ptrdiff_t head) {
    const float *q = a.q + head * a.D, *keys = a.keys + head / a.share * a.room * a.D, *values = a.values + (keys - a.keys);
    float *scores = a.scores + head * a.padded, *out = a.out + head * a.D;
    float most = -HUGE_F32;
    for (ptrdiff_t t = a.first; t < a.last; t++) {
        Floats sum{};
        for (ptrdiff_t i = 0; i < a.D; i += 16) sum += *(const LooseFloats *)(q + i) * *(const LooseFloats *)(keys + t * a.D + i);
        scores[t - a.first] = a.scaling * added_up(sum);
        most = scores[t - a.first] > most ? scores[t - a.first] : most;
    }
    const ptrdiff_t n = a.last - a.first;
    for (ptrdiff_t t = n; t % 16; t++) scores[t] = -HUGE_F32;
    Floats total{};
    for (ptrdiff_t t = 0; t < n; t += 16) {
        LooseFloats *at = (LooseFloats *)(scores + t);
        *at = exponential(*at - most);
        for (ptrdiff_t i = n - t; i < 16; i++) (*at)[i] = 0;
        total += *at;
    }
    const float factor = 1 / added_up(total);
    for (ptrdiff_t i = 0; i < a.D; i += 16) {
        Floats sum{};
        for (ptrdiff_t t = 0; t < n; t++) sum += scores[t] * *(const LooseFloats *)(values + (a.first + t) * a.D + i);
        *(LooseFloats *)(out + i) = sum * factor;
    }
}

// Heads [first, last).
static void attend(const Attention &a, ptrdiff_t first, ptrdiff_t last) {
    for (ptrdiff_t head = first; head < last; head++) attend_head(a, head);
}

// How keys and values are kept: float16, or integers of 8 or 4 bits under float16 scales. Included behind dense.h.
// The same numbers as numerics/key_value_codes.py: a row has the codes of all blocks, then their scales, then (4 bits) their minima.

// x as f16, which ends at 65504, to a place of two bytes; what it then is.
static inline float put_half(float x, uint8_t *to) {
    const float limit = 65504.0f, within = x > limit ? limit : x < -limit ? -limit : x;
    uint16_t bits[16];
    halves_of_floats(Floats{} + within, bits);
    __builtin_memcpy(to, bits, 2);
    return floats_of_halves(bits)[0];
}

static inline float half_at(const uint8_t *at) {
    uint16_t bits[16] = {};
    __builtin_memcpy(bits, at, 2);
    return floats_of_halves(bits)[0];
}

struct Extremes {
    float least, most;
};

static inline Extremes extremes_of(const float *x, ptrdiff_t n) {
    Extremes e{x[0], x[0]};
    for (ptrdiff_t i = 1; i < n; i++) e = {x[i] < e.least ? x[i] : e.least, x[i] > e.most ? x[i] : e.most};
    return e;
}

// The nearest integer from low to high; low for NaN.
static inline int code_of(float x, float low, float high) { return (int)nearest(x > low ? x < high ? x : high : low); }

static void keep_in_8_bits(const float *x, ptrdiff_t D, uint8_t *row) {
    const ptrdiff_t block = kept_block(KV_Q8, D);
    for (ptrdiff_t begin = 0; begin < D; begin += block) {
        const Extremes e = extremes_of(x + begin, block);
        const float scale = safe(put_half((-e.least > e.most ? -e.least : e.most) / 127, row + D + begin / block * 2));
        for (ptrdiff_t i = begin; i < begin + block; i++) row[i] = (uint8_t)code_of(x[i] / scale, -127, 127);
    }
}

static void keep_in_4_bits(const float *x, ptrdiff_t D, uint8_t *row) {
    const ptrdiff_t block = kept_block(KV_Q4, D), count = D / block;
    for (ptrdiff_t begin = 0; begin < D; begin += block) {
        const Extremes e = extremes_of(x + begin, block);
        uint8_t *scale_at = row + D / 2 + begin / block * 2;
        const float low = put_half(e.least, scale_at + 2 * count), scale = safe(put_half((e.most - low) / 15, scale_at));
        for (ptrdiff_t i = begin; i < begin + block; i += 2)
            row[i / 2] = (uint8_t)(code_of((x[i] - low) / scale, 0, 15) | code_of((x[i + 1] - low) / scale, 0, 15) << 4);
    }
}

// A head's key or value of one token as a row of bytes; D a multiple of 16.
static void keep(const float *x, int type, ptrdiff_t D, uint8_t *row) {
    if (type == KV_Q8) return keep_in_8_bits(x, D, row);
    if (type == KV_Q4) return keep_in_4_bits(x, D, row);
    for (ptrdiff_t i = 0; i < D; i += 16) {
        const Floats v = *(const LooseFloats *)(x + i), limit = Floats{} + 65504.0f;
        halves_of_floats(v > limit ? limit : v < -limit ? -limit : v, (uint16_t *)row + i);
    }
}

// And back.
static inline void take_kept(const uint8_t *row, int type, ptrdiff_t D, float *__restrict to) {
    if (type == KV_F16) {
        for (ptrdiff_t i = 0; i < D; i += 16) *(LooseFloats *)(to + i) = floats_of_halves((const uint16_t *)row + i);
        return;
    }
    const ptrdiff_t block = kept_block(type, D), count = D / block;
    const uint8_t *scales = row + (type == KV_Q8 ? D : D / 2);
    for (ptrdiff_t begin = 0; begin < D; begin += block, scales += 2) {
        const float scale = half_at(scales), low = type == KV_Q4 ? half_at(scales + 2 * count) : 0;
        if (type == KV_Q8)
            for (ptrdiff_t i = begin; i < begin + block; i++) to[i] = (float)(int8_t)row[i] * scale;
        else
            for (ptrdiff_t i = begin; i < begin + block; i += 2)
                to[i] = (float)(row[i / 2] & 15) * scale + low, to[i + 1] = (float)(row[i / 2] >> 4) * scale + low;
    }
}

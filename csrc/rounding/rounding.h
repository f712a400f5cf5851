// The rounding kernels (here their arithmetic), written once in vectors of LANES numbers (an extension of GCC and Clang), which the compiler
// makes of whatever registers it may use. Each instruction set's file includes this inside its own namespace. Nothing of
// the standard library is used here: the linker merges inline functions of that across files, and might keep the copy
// that an older CPU cannot run.

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float Loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // unaligned, in memory
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef int8_t LooseBytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t LooseHalves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

constexpr float TINY = 1.17549435e-38f, HUGE_F32 = 3.40282347e38f;

static inline Vec load(const float *x) { return *(const Loose *)x; }
static inline void store(float *to, Vec x) { *(Loose *)to = x; }
static inline Vec all(float x) { return x - Vec{}; }
static inline bool finite(float x) { return x - x == 0; }
static inline Ints finite(Vec x) { return x - x == 0; }
static inline float magnitude(float x) { return __builtin_fabsf(x); }
static inline Vec magnitude(Vec x) { return x < 0 ? -x : x; }
static inline float safe(float scale) { return scale == 0 ? 1.0f : scale; }
static inline Vec safe(Vec scale) { return scale == 0 ? all(1) : scale; }
static inline bool same_sign(float x, float y) { return (x > 0 && y > 0) || (x < 0 && y < 0); }
static inline Ints same_sign(Vec x, Vec y) { return ((x > 0) & (y > 0)) | ((x < 0) & (y < 0)); }

// The first `wide` of LANES numbers to and from memory; the others are 0.
static inline Vec some(const float *x, int wide) {
    if (wide == LANES) return load(x);
    Vec v{};
    for (int l = 0; l < wide; l++) v[l] = x[l];
    return v;
}

static inline void put(float *to, Vec x, int wide) {
    if (wide == LANES) return store(to, x);
    for (int l = 0; l < wide; l++) to[l] = x[l];
}

// The same for numbers that lie in memory as bfloat16.
static inline Vec some(const uint16_t *x, int wide) {
    Halves h{};
    if (wide == LANES) {
        h = *(const LooseHalves *)x;
    } else {
        for (int l = 0; l < wide; l++) h[l] = x[l];
    }
    return (Vec)(__builtin_convertvector(h, Words) << 16);
}

static inline void put(uint16_t *to, Vec x, int wide) {
    Words u = (Words)x;
    Halves h = __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, Halves);
    if (wide == LANES) {
        *(LooseHalves *)to = h;
    } else {
        for (int l = 0; l < wide; l++) to[l] = h[l];
    }
}

// Nearest integers, ties to even, for |x| < 2^22.
template <class T>
static inline T nearest(T x) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
    return (x + magic) - magic;
}

static inline uint32_t bits_of(float x) { uint32_t u; __builtin_memcpy(&u, &x, 4); return u; }
static inline Words bits_of(Vec x) { return (Words)x; }
static inline float float_of(uint32_t u) { float x; __builtin_memcpy(&x, &u, 4); return x; }
static inline Vec float_of(Words u) { return (Vec)u; }

// x with its low `drop` mantissa bits rounded away, ties to even.
template <class T>
static inline T shortened(T x, int drop) {
    uint32_t mask = (1u << drop) - 1;
    auto u = bits_of(x);
    return float_of((u + (mask >> 1) + ((u >> drop) & 1)) & ~mask);
}

template <class T>
static inline T to_half(T x) {  // |x| <= 65504
    constexpr float step = 5.9604644775390625e-08f;  // 2^-24, of the subnormal numbers
    T tiny = nearest(x / step) * step;
    return magnitude(x) >= 6.103515625e-05f ? shortened(x, 13) : tiny;
}

// Magnitudes are kept between 0 (or the encoding's smallest normal number) and its largest; exact zeros stay.
template <class T>
static inline T stored(T x, int encoding, bool above_smallest) {
    if (encoding == E8M0) return x;
    float low = 0, high = HUGE_F32;
    if (encoding == F16) high = 65504.0f;
    if (encoding == BF16) high = 3.38953139e38f;
    if (above_smallest) low = encoding == F16 ? 6.103515625e-05f : TINY;
    T bounded = magnitude(x), least = T{} + low, most = T{} + high;
    bounded = bounded < least ? least : bounded;
    bounded = bounded > most ? most : bounded;
    bounded = x < 0 ? -bounded : bounded;
    T rounded = encoding == F16 ? to_half(bounded) : encoding == BF16 ? shortened(bounded, 16) : bounded;
    return x == 0 ? x : rounded;
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

static Vec stored_scale(Vec x, int encoding) {
    if (encoding != E8M0) return stored(x, encoding, true);
    for (int l = 0; l < LANES; l++) x[l] = stored_scale((float)x[l], encoding);
    return x;
}

// Inner loops are compiled once for each kind: the three kinds of Zero, and codebooks.
constexpr int CODEBOOK = 3;

// The values of the codes nearest to x = w / s (+ z) and, in `decoded`, the weights that they decode to.
template <int kind>
static inline Vec rounded(const Format &f, Vec x, Vec s, Vec z, Vec &decoded) {
    if constexpr (kind == CODEBOOK) {
        Vec value = all(f.level[0]);
        for (int k = 0; k + 1 < f.levels; k++) value = x > all(f.middle[k]) ? all(f.level[k + 1]) : value;
        decoded = value * s;
        return value;
    }
    Vec lo = all(f.lo), hi = all(f.hi);
    x = x < lo ? lo : x;
    Vec value = nearest(x > hi ? hi : x);
    decoded = kind == SYM ? value * s : kind == ASYM ? (value - z) * s : value * s + z;
    return value;
}

// LANES numbers w under scales s (d: to divide by) and zeros z.
static inline Vec round_to(const Format &f, Vec w, Vec s, Vec d, Vec z, Vec &decoded) {
    if (f.levels) return rounded<CODEBOOK>(f, w / d, s, z, decoded);
    if (f.zero == SYM) return rounded<SYM>(f, w / d, s, z, decoded);
    return f.zero == ASYM ? rounded<ASYM>(f, w / d + z, s, z, decoded) : rounded<MIN>(f, (w - z) / d, s, z, decoded);
}

// The same by the inverse of d, as searches do, for division is slow; a weight half way may go the other way.
template <int kind>
static inline Vec round_by(const Format &f, Vec w, Vec s, Vec inverse, Vec z, Vec &decoded) {
    Vec x = kind == MIN ? (w - z) * inverse : kind == ASYM ? w * inverse + z : w * inverse;
    return rounded<kind>(f, x, s, z, decoded);
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

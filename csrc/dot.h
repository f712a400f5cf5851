// What the products need of an instruction set: sums of four byte products, and a table of sixteen bytes looked up.

typedef uint8_t Octets __attribute__((vector_size(64)));
typedef int32_t Sums __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

#if defined(__AVX512F__)

constexpr bool WIDE = true;  // whether a register holds 64 octets

static inline Floats floats_of_halves(const uint16_t *at) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at)); }

static inline void halves_of_floats(Floats v, uint16_t *to) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(__ARM_FEATURE_DOTPROD)

constexpr bool WIDE = false;

static inline Floats floats_of_halves(const uint16_t *at) {
    Floats v;
    for (int i = 0; i < 4; i++) {
        const float32x4_t four = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(at + 4 * i)));
        __builtin_memcpy((char *)&v + 16 * i, &four, 16);
    }
    return v;
}

static inline void halves_of_floats(Floats v, uint16_t *to) {
    for (int i = 0; i < 4; i++) {
        float32x4_t four;
        __builtin_memcpy(&four, (const char *)&v + 16 * i, 16);
        vst1_u16(to + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(four)));
    }
}

#else

constexpr bool WIDE = false;

typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32), aligned(2), may_alias));

// f16 to float32: its bits in the place of a float's, then the difference of the exponents' biases.
static inline Floats floats_of_halves(const uint16_t *at) {
    Bits h = __builtin_convertvector(*(const Shorts *)at, Bits);
    Floats size = (Floats)((h & 0x7fff) << 13) * 5.192296858534828e33f;  // 2^112
    return (Floats)((Bits)size | (h & 0x8000) << 16);
}

// And back, to the nearest: below 2^-14 a sum with 1/2 rounds, for its last bit counts as much as f16's there.
static inline void halves_of_floats(Floats v, uint16_t *to) {
    Bits size = (Bits)v & 0x7fffffff, tiny = (Bits)((Floats)size + 0.5f) - 0x3f000000;
    Bits h = ((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10);
    h = size < 0x38800000 ? tiny : size > 0x7f800000 ? Bits{} + 0x7e00 : h;
    *(Shorts *)to = __builtin_convertvector(h | ((Bits)v >> 16 & 0x8000), Shorts);
}

#endif

#if defined(__AVX512VNNI__)

// acc + the four products of each lane: octets of w, and the four signed bytes that x is made of.
static inline Sums dot(Sums acc, Octets w, int32_t x) {
    return (Sums)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
}

static inline Octets look_up(Octets table, Octets index) {
    return (Octets)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
}

#elif defined(__AVX512BW__)

static inline Sums dot(Sums acc, Octets w, int32_t x) {
    __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(_mm512_set1_epi32(x), 8), 8), odd = _mm512_srai_epi16(_mm512_set1_epi32(x), 8);
    __m512i low = _mm512_and_si512((__m512i)w, _mm512_set1_epi16(255)), high = _mm512_srli_epi16((__m512i)w, 8);
    return acc + (Sums)_mm512_madd_epi16(low, even) + (Sums)_mm512_madd_epi16(high, odd);
}

static inline Octets look_up(Octets table, Octets index) {
    return (Octets)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
}

#elif defined(__AVX2__)

struct Pair { __m256i low, high; };
static inline Pair halves(Octets v) { Pair h; __builtin_memcpy(&h, &v, 64); return h; }
template <class T> static inline T whole(__m256i low, __m256i high) { Pair h{low, high}; T v; __builtin_memcpy(&v, &h, 64); return v; }

static inline __m256i dot_half(__m256i acc, __m256i w, __m256i x) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(acc, w, x);
#else
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), odd = _mm256_srai_epi16(x, 8);
    __m256i low = _mm256_and_si256(w, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(w, 8);
    return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(low, even), _mm256_madd_epi16(high, odd)));
#endif
}

static inline Sums dot(Sums acc, Octets w, int32_t x) {
    Pair a = halves((Octets)acc), b = halves(w);
    __m256i each = _mm256_set1_epi32(x);
    return whole<Sums>(dot_half(a.low, b.low, each), dot_half(a.high, b.high, each));
}

static inline Octets look_up(Octets table, Octets index) {
    Pair t = halves(table), i = halves(index);
    return whole<Octets>(_mm256_shuffle_epi8(t.low, i.low), _mm256_shuffle_epi8(t.high, i.high));
}

#elif defined(__ARM_FEATURE_DOTPROD)

struct Quarters {
    uint8x16_t of[4];
    Quarters(Octets v) { __builtin_memcpy(of, &v, 64); }
    Octets whole() const { Octets v; __builtin_memcpy(&v, of, 64); return v; }
};

// Both sides are signed here: octets are read as 128 less, and 128 times what they multiply is added.
static inline Sums dot(Sums acc, Octets w, int32_t x) {
    const int8x16_t each = vreinterpretq_s8_s32(vdupq_n_s32(x));
    const int32x4_t back = vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(1), each), 7);
    Quarters a((Octets)acc), b(w);
    for (int i = 0; i < 4; i++) {
        const int8x16_t less = vreinterpretq_s8_u8(veorq_u8(b.of[i], vdupq_n_u8(128)));
        a.of[i] = vreinterpretq_u8_s32(vdotq_s32(vaddq_s32(vreinterpretq_s32_u8(a.of[i]), back), less, each));
    }
    return (Sums)a.whole();
}

static inline Octets look_up(Octets table, Octets index) {
    Quarters t(table), at(index);
    for (int i = 0; i < 4; i++) at.of[i] = vqtbl1q_u8(t.of[i], at.of[i]);
    return at.whole();
}

#else

__attribute__((noinline)) static Sums dot(Sums acc, Octets w, int32_t x) {
    int8_t four[4];
    uint8_t each[64];
    int32_t sums[16];
    __builtin_memcpy(four, &x, 4);
    __builtin_memcpy(each, &w, 64);
    for (int lane = 0; lane < 16; lane++) {
        const uint8_t *v = each + 4 * lane;
        sums[lane] = v[0] * four[0] + v[1] * four[1] + v[2] * four[2] + v[3] * four[3];
    }
    Sums products;
    __builtin_memcpy(&products, sums, 64);
    return acc + products;
}

__attribute__((noinline)) static Octets look_up(Octets table, Octets index) {
    uint8_t from[64], at[64];
    __builtin_memcpy(from, &table, 64);
    __builtin_memcpy(at, &index, 64);
    for (int i = 0; i < 64; i++) at[i] = from[at[i]];
    __builtin_memcpy(&index, at, 64);
    return index;
}

#endif

// What the products need of an instruction set: sums of four byte products, a table of sixteen bytes looked up, and f16.

typedef uint8_t Octets __attribute__((vector_size(4 * LANES)));  // four for each lane
// Sixteen numbers, where sums must be taken in the same order on registers of any length.
typedef int32_t Sums __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
typedef Floats LooseFloats __attribute__((aligned(4), may_alias));

// f16, in words of 32 bits, to float32: its bits in the place of a float's, then the difference of the exponents' biases.
template <class F, class W>
static inline F widened(W h) {
    const F size = (F)((h & 0x7fff) << 13) * 5.192296858534828e33f;  // 2^112
    return (F)((W)size | (h & 0x8000) << 16);
}

#if defined(__AVX512F__)

static inline Floats floats_of_halves(const uint16_t *at) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at)); }

static inline void halves_of_floats(Floats v, uint16_t *to) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(__F16C__)

static inline Floats floats_of_halves(const uint16_t *at) {
    Floats v;
    for (int i = 0; i < 2; i++) {
        const __m256 eight = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(at + 8 * i)));
        __builtin_memcpy((char *)&v + 32 * i, &eight, 32);
    }
    return v;
}

static inline void halves_of_floats(Floats v, uint16_t *to) {
    for (int i = 0; i < 2; i++) {
        __m256 eight;
        __builtin_memcpy(&eight, (const char *)&v + 32 * i, 32);
        _mm_storeu_si128((__m128i *)(to + 8 * i), _mm256_cvtps_ph(eight, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
}

#elif defined(__ARM_FEATURE_DOTPROD)

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

typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32), aligned(2), may_alias));

static inline Floats floats_of_halves(const uint16_t *at) {
    return widened<Floats>(__builtin_convertvector(*(const Shorts *)at, Bits));
}

// And back, to the nearest: below 2^-14 a sum with 1/2 rounds, for its last bit counts as much as f16's there.
static inline void halves_of_floats(Floats v, uint16_t *to) {
    Bits size = (Bits)v & 0x7fffffff, tiny = (Bits)((Floats)size + 0.5f) - 0x3f000000;
    Bits h = ((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10);
    h = size < 0x38800000 ? tiny : size > 0x7f800000 ? Bits{} + 0x7e00 : h;
    *(Shorts *)to = __builtin_convertvector(h | ((Bits)v >> 16 & 0x8000), Shorts);
}

#endif

// LANES f16.
static inline Vec halves_at(const uint16_t *at) {
#if defined(__AVX512F__)
    return floats_of_halves(at);
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
#else
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
    return widened<Vec>(__builtin_convertvector(*(const Halves *)at, Words));
#endif
}

// LANES integers as bytes (of codes, which fit), and bytes as integers. The compiler's own conversion from bytes takes one at a time.
#if defined(__AVX512F__)

static inline Bytes bytes_of(Ints v) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)v); }
static inline Ints ints_of(const int8_t *at) { return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)); }
static inline Ints ints_of(const uint8_t *at) { return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at)); }

#elif defined(__AVX2__)

static inline Bytes bytes_of(Ints v) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
    return (Bytes)bytes;
}
static inline Ints ints_of(const int8_t *at) { return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at)); }
static inline Ints ints_of(const uint8_t *at) { return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at)); }

#else

typedef uint8_t LooseOctetsOfLanes __attribute__((vector_size(LANES), aligned(1), may_alias));
static inline Bytes bytes_of(Ints v) { return __builtin_convertvector(v, Bytes); }
static inline Ints ints_of(const int8_t *at) { return __builtin_convertvector(*(const LooseBytes *)at, Ints); }
static inline Ints ints_of(const uint8_t *at) { return __builtin_convertvector(*(const LooseOctetsOfLanes *)at, Ints); }

#endif

// LANES bfloat16: the upper halves of float32.
static inline Vec bfloats_at(const uint16_t *at) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at));
    return (Vec)_mm256_slli_epi32(wide, 16);
#else
    return (Vec)(__builtin_convertvector(*(const LooseHalves *)at, Words) << 16);
#endif
}

// dot: acc + the four products of each lane: octets of a, signed bytes of b. SMALL: no octet is above 127.

#if defined(__AVX512VNNI__)

constexpr bool SMALL_ARE_FASTER = false;

template <bool SMALL>
static inline Ints dot(Ints acc, Octets a, Octets b) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
}

#elif defined(__AVX512BW__)

constexpr bool SMALL_ARE_FASTER = true;

template <bool SMALL>
static inline Ints dot(Ints acc, Octets a, Octets b) {
    const __m512i each = (__m512i)b, octets = (__m512i)a;
    if (SMALL) return acc + (Ints)_mm512_madd_epi16(_mm512_maddubs_epi16(octets, each), _mm512_set1_epi16(1));
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(each, 8), 8), odd = _mm512_srai_epi16(each, 8);
    const __m512i low = _mm512_and_si512(octets, _mm512_set1_epi16(255)), high = _mm512_srli_epi16(octets, 8);
    return acc + (Ints)_mm512_madd_epi16(low, even) + (Ints)_mm512_madd_epi16(high, odd);
}

#elif defined(__AVXVNNI__)

constexpr bool SMALL_ARE_FASTER = false;

template <bool SMALL>
static inline Ints dot(Ints acc, Octets a, Octets b) {
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
}

#elif defined(__AVX2__)

constexpr bool SMALL_ARE_FASTER = true;

template <bool SMALL>
static inline Ints dot(Ints acc, Octets a, Octets b) {
    const __m256i each = (__m256i)b, octets = (__m256i)a;
    if (SMALL) return acc + (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(octets, each), _mm256_set1_epi16(1));
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(each, 8), 8), odd = _mm256_srai_epi16(each, 8);
    const __m256i low = _mm256_and_si256(octets, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(octets, 8);
    return acc + (Ints)_mm256_madd_epi16(low, even) + (Ints)_mm256_madd_epi16(high, odd);
}

#elif defined(__ARM_FEATURE_DOTPROD)

constexpr bool SMALL_ARE_FASTER = true;

// Both sides are signed here: octets are read as 128 less, and 128 times what they multiply is added.
template <bool SMALL>
static inline Ints dot(Ints acc, Octets a, Octets b) {
    const int8x16_t each = (int8x16_t)b;
    const uint8x16_t octets = (uint8x16_t)a;
    if (SMALL) return (Ints)vdotq_s32((int32x4_t)acc, vreinterpretq_s8_u8(octets), each);
    const int32x4_t back = vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(1), each), 7);
    const int8x16_t less = vreinterpretq_s8_u8(veorq_u8(octets, vdupq_n_u8(128)));
    return (Ints)vdotq_s32(vaddq_s32((int32x4_t)acc, back), less, each);
}

#else

constexpr bool SMALL_ARE_FASTER = false;

static Ints plain_dot(Ints acc, Octets a, Octets b) __attribute__((noinline));
static Ints plain_dot(Ints acc, Octets a, Octets b) {
    uint8_t octets[4 * LANES];
    int8_t bytes[4 * LANES];
    int32_t sums[LANES];
    __builtin_memcpy(octets, &a, sizeof octets);
    __builtin_memcpy(bytes, &b, sizeof bytes);
    __builtin_memcpy(sums, &acc, sizeof sums);
    for (int i = 0; i < 4 * LANES; i++) sums[i / 4] += octets[i] * bytes[i];
    __builtin_memcpy(&acc, sums, sizeof sums);
    return acc;
}

template <bool SMALL>
static inline Ints dot(Ints acc, Octets a, Octets b) {
    return plain_dot(acc, a, b);
}

#endif

// The same four signed bytes x in every lane.
template <bool SMALL>
static inline Ints dot(Ints acc, Octets a, int32_t x) {
    return dot<SMALL>(acc, a, (Octets)(Ints{} + x));
}

// Words: two numbers of 16 bits in a lane. Where fours of bytes must be widened before they multiply, inputs of two bytes that
// share their weights multiply as words: one product in place of two. Of each four columns the first and third lie in one lane,
// the second and fourth in the next, as the even and the odd bytes of weights do, masked and shifted.
typedef int16_t Pairs __attribute__((vector_size(4 * LANES)));
typedef uint16_t Positive __attribute__((vector_size(4 * LANES)));

static inline Pairs even_of(Octets v) { return (Pairs)v & 255; }
static inline Pairs odd_of(Octets v) { return (Pairs)((Positive)v >> 8); }

// The same two words in every lane; the upper byte of each, and what is left: x = 256 upper + lower, both signed.
static inline Pairs words_at(const int8_t *at) {
    int32_t x;
    __builtin_memcpy(&x, at, 4);
    return (Pairs)(Ints{} + x);
}
static inline Pairs upper_of(Pairs x) { return (x + 128) >> 8; }
static inline Pairs lower_of(Pairs x) { return x << 8 >> 8; }

// Two kinds of sums: acc + the two products of each lane; acc + the products of octets up to 15 and signed bytes, two and two
// in 16 bits, where eight such sums have room.
#if defined(__AVX2__) && !defined(__AVXVNNI__) && !defined(__AVX512BW__)

constexpr bool WORDS = true;

static inline Ints dot(Ints acc, Pairs w, Pairs x) { return acc + (Ints)_mm256_madd_epi16((__m256i)w, (__m256i)x); }
static inline Pairs dot_tiny(Pairs acc, Octets a, Octets b) { return acc + (Pairs)_mm256_maddubs_epi16((__m256i)a, (__m256i)b); }

#else

constexpr bool WORDS = false;

static inline Ints dot(Ints acc, Pairs w, Pairs x) {
    return acc + ((Ints)w << 16 >> 16) * ((Ints)x << 16 >> 16) + ((Ints)w >> 16) * ((Ints)x >> 16);
}
static inline Pairs dot_tiny(Pairs acc, Octets a, Octets b) {
    return acc + even_of(a) * ((Pairs)b << 8 >> 8) + odd_of(a) * ((Pairs)b >> 8);
}

#endif

// The same four bytes in every lane.
static inline Octets everywhere(const int8_t *at) {
    int32_t four;
    __builtin_memcpy(&four, at, 4);
    return (Octets)(Ints{} + four);
}

// acc + eight products at most.
template <bool TINY, bool SMALL>
struct TileSum {
    Ints acc;
    Pairs tiny;
    explicit TileSum(Ints acc = Ints{}) : acc(acc), tiny{} {}

    void add(Octets w, Octets x) {
        if constexpr (TINY) tiny = dot_tiny(tiny, w, x);
        else acc = dot<SMALL>(acc, w, x);
    }
    Ints total() const {
        if constexpr (TINY) return dot(acc, tiny, Pairs{} + 1);
        else return acc;
    }
};

#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool PLAIN = false;
#else
constexpr bool PLAIN = true;  // without instructions for any of this: what would take minutes to compile is left out
#endif

// What a table of sixteen floats has for each index.
static inline Vec level_at(const float *table, Ints index) {
#if defined(__AVX512F__)
    return (Vec)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
#elif defined(__AVX2__)
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
    return (Vec)_mm256_blendv_ps(low, high, (__m256)((__m256i)(index << 28)));  // by bit 3, where the sign is
#else
    Vec v;
    for (int l = 0; l < LANES; l++) v[l] = table[index[l] & 15];
    return v;
#endif
}

// What a table of sixteen, repeated, has for each index.
static inline Octets look_up(Octets table, Octets index) {
#if defined(__AVX512BW__)
    return (Octets)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
#elif defined(__AVX2__)
    return (Octets)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
#elif defined(__ARM_FEATURE_DOTPROD)
    return (Octets)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index);
#else
    uint8_t from[4 * LANES], at[4 * LANES];
    __builtin_memcpy(from, &table, sizeof from);
    __builtin_memcpy(at, &index, sizeof at);
    for (uint8_t &i : at) i = from[i];
    __builtin_memcpy(&index, at, sizeof at);
    return index;
#endif
}

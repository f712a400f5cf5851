// The native kernels, one struct of function pointers for each instruction set.
//
// Axes as in the Python package: w [N, K], groups of g along K, scale [N, G]. Loops that keep rows side by side take
// their matrices transposed, [K, N], so that neighbours in memory are neighbours in rows. Every function works on the
// rows [first, last) alone, so rows can be shared out among threads, and does the same float32 operations in the same
// order under every instruction set: no fused multiply-add, sums in halves. Results are therefore equal bit for bit.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace bitwright {

enum Zero { SYM, ASYM, MIN };
enum Encoding { F32, F16, BF16, E8M0 };

// A Scheme as the rounding kernels take it.
struct Format {
    int zero;               // Zero; both kinds of integer zero points are ASYM
    int encoding;           // of a scale by itself
    float lo, hi;           // codes
    float first;            // lowest code that may be a zero point
    float span;             // hi - lo
    float reach;            // the value that the largest |w| is mapped to; 0: the scale is the mean |w|
    bool turned;            // whether a scale is below 0 where the largest |w| is above
    int levels;             // length of the codebook; 0: the code is its own value
    float level[16];        // its values, rising
    float middle[16];       // half way between neighbours; +inf behind the last
    int8_t code[16];        // the code of each value
    float value[16];        // the value of each code
};

// Choose the scale (and zero) of every group by trying narrower ranges and least squares; methods/search.py.
struct Search {
    const float *w;         // [N, K]
    const float *weight;    // [K] importance
    const float *shrink;    // [steps] factors on the range, or on its part below 0
    const float *factor;    // [steps] shrink / reach; with an offset, factors on the part above 0
    float *scale, *zero;    // [N, G] out; zero null if the format has none
    ptrdiff_t K, g, steps;
    bool quick;             // without a second rounding, under the scale of least squares
};

// Refine the scales of super-blocks of 256: integers and f16s; methods/superblocks.py.
struct Refine {
    const float *w;         // [N, K]
    const float *weight;    // [K] importance
    const float *move;      // [moves, 2] candidate steps of the integers of a group's scale and minimum
    float *scale, *zero;    // [N, G] in and out; zero null if the format has none
    float *outer, *outer_zero;  // [N, S] in and out
    float low, high;        // the lowest and the highest integer
    ptrdiff_t K, g, moves, rounds;
};

constexpr int MOST_RUN = 32;  // weights whose entries of a codebook are chosen together, at most

// A codebook of combinations of d neighbouring weights; numerics/lattice.py, whose names these are.
struct Lattice {
    const float *points;    // [V, P, d]
    const uint8_t *codes;   // [V, P, d]
    const float *middle;    // [V, L - 1] half way between the L values in one place
    const int32_t *near;    // [V, places, candidates] entries near each combination of such values; places: L^d
    const float *level;     // [top + 1] the value of each code
    int V, P, d, L, candidates;
    ptrdiff_t places;
    int width, run, top;    // weights of a whole run; weights that share a variant; the highest code
    bool has_signs, even;
};

// Weights over their scales, in whole runs.
struct Runs {
    const float *x;         // [R, width]
    const float *weight;    // [R, width] importance, or null
    uint8_t *codes;         // [R, width] out
};

// Round to nearest under given scales; codec.py.
struct Encode {
    const float *w;         // [N, K]
    const float *scale, *zero;  // [N, G]; zero null if the format has none
    int8_t *codes;          // [N, K] out
    ptrdiff_t K, g;
    const float *weight;    // [K] importance, and as in `Missed`, or all three null
    float *lost, *whole;
};

// Energy of each row's error, and of the row; numerics/loss.py.
struct Missed {
    const float *w;         // [N, K]
    const float *weight;    // [K] importance
    const int8_t *codes;    // [N, K]
    const float *scale, *zero;  // [N, G]; zero null if the format has none
    float *lost, *whole;    // [N] out
    ptrdiff_t K, g;
};

// GPTQ: round columns in turn, propagating each error to the later ones; methods/gptq.py.
struct Columns {
    float *target;             // [n, N] in: w with the errors of earlier columns; out: each column's target
    const float *original;  // [n, N]
    const float *propagation;    // [n, n]
    const float *scale, *zero;  // [G, N]
    const int64_t *group;   // [n] the group of each column
    int8_t *codes;          // [n, N] out
    float *errors;          // [n, N] out: original - decoded
    ptrdiff_t n, N;
};

// One pass of coordinate descent over whole groups; methods/coordinate_descent.py.
struct Sweep {
    float *decoded;         // [n, N] in and out
    float *pull;            // [n, N] in and out: (E H)', minus half the loss's gradient
    int8_t *codes;          // [n, N] in and out
    float *scale;           // [G, N] in and out
    const float *zero;      // [G, N] or null
    const float *H;         // [n, n], without the ridge
    const float *curvature; // [n] the diagonal of H with the ridge, floored
    float ridge;
    bool solve;             // whether scales may change
    ptrdiff_t n, N, g, begin;  // begin: the first column's place in K
};

// One step of AutoRound on a matrix: its variables against the gradient, then the decoded weights; methods/autoround.py.
struct Tune {
    const float *w, *base;  // [N, K]
    float *offset, *square; // [N, K] in and out; square: of the offset's gradient, a running mean
    const float *start;     // [N, G] scales before any stretch
    float *scale;           // [N, G] in and out: as they are stored now
    float *stretch, *stretch_square;  // [N, G] in and out
    const float *zero;      // [N, G] or null
    const void *gradient;   // [N, K] of the decoded weights, or null: only decode
    void *decoded;          // [N, K] out
    bool half;              // the two are bfloat16, otherwise float32
    bool movable;           // whether scales may change
    float rate, scale_rate, fresh;  // steps; the share of the new gradient in the running mean
    ptrdiff_t K, g;
};

constexpr int BLOCK = 256;  // columns that are summed in 32-bit integers, at most

// A quantized matrix as it multiplies: panels of 16 rows, see matmul.h. The stored number is c - point, or c - offset, or
// (with a minimum) c alone; scale and minimum are f16 multiples of each row's unit.
struct Weights {
    const uint8_t *panels;  // [N / 16, K / 32, 64 bits]; N is padded to a multiple of 64, K of 32
    const uint16_t *scale, *minimum;  // [N / 16, G, 16] f16; minimum null if there is none
    const uint8_t *point;   // [N / 16, G, 16] or null
    const float *unit;      // [N]
    uint8_t high[16], low[16];  // what each code multiplies as
    bool table;             // whether codes are looked up there
    int bits, bytes;        // of a code as stored, as it multiplies
    int offset;
    ptrdiff_t N, K, tiles, groups;
    int block, repeat;      // columns of a block; blocks of a group
};

// Where rows of a quantized matrix go as floats.
struct Decoded {
    const float *level;     // [16] what codes of a codebook stand for
    float factor;           // what units are multiplied with, as those levels are not integers
    void *to;               // [K, apart] out: column by column
    bool half;              // as bfloat16, otherwise float32
    ptrdiff_t first, apart; // the row that comes first in a column; from one column to the next
};

// Inputs [M, K] in bytes, `height` rows at a time: [M / height, K / 4, height, 4], K padded to a multiple of 32. An
// instruction set may keep inputs of two bytes in another order, in the room of both: see WORDS in dot.h.
struct Inputs {
    const void *source;     // [M, K] float32, or bfloat16 if half
    bool half;
    int8_t *high, *low;     // low null if bytes is 1, otherwise right behind high
    int32_t *sum;           // [M / height, blocks, height]
    float *scale;           // [M / height, spans, height]
    ptrdiff_t M, K, padded, blocks, spans;
    int height, bytes, block, repeat;  // repeat: blocks of a span
};

// y = x w' with float weights.
struct Dense {
    const float *x;         // [M, K]
    const void *w;          // [N, K] of `type`: F32, F16 or BF16
    int type;
    float *y;               // [M, N]
    ptrdiff_t M, N, K;
};

constexpr int CODE_ROWS = 96;  // rows of codes that multiply one block of panels in one go

// Float32 to codes under one scale; nn/static.py: Quantize.
struct Entry {
    const float *x;
    int8_t *codes;          // out
    float scale, zero, low, high;
};

// Samples rounded by their own ranges; nn/integer.py: codes_of_rows.
struct Samples {
    const float *x;         // [samples, n]
    uint8_t *octets;        // [samples, n] out, code + 128
    float *scale, *zero;    // [samples] out; zero null if codes are symmetric
    float low, high;        // codes
    float inverse;          // the scale of symmetric codes is the largest |x| times this
    ptrdiff_t n;
};

// Images [B, H, W, C] in any order of memory, to octets with a border and the channels last.
struct Images {
    const uint8_t *x;
    ptrdiff_t step[4];      // of B, H, W, C
    uint8_t flip;           // what makes octets of x: 128 for codes, 0 for octets
    uint8_t fixed;          // the border's octet
    const uint8_t *border;  // [B] the same, where each image has its own; or null
    uint8_t *octets;        // [B, height, width, C], images `image` apart
    ptrdiff_t B, H, W, C, top, left, height, width, image;
};

// Products of octets and signed bytes, for a linear layer or a convolution; integer.h. Outputs come in `groups`, each of
// n, padded to panels of 16; up to four panels that lie side by side are a block. Blocks follow one another in all arrays.
struct Codes {
    const int8_t *w;        // a block: [groups_of_k, taps, steps, panels, 16, 4]; alone: [panels, taps, 16]
    const int32_t *start;   // a block: [groups_of_k, panels, 16]: -128 Σ w
    const float *scale;     // as start
    const float *constant, *sums;  // a block: [panels, 16]: what is added; Σ w as decoded
    const uint8_t *octets;
    const ptrdiff_t *tap;   // where each stretch of octets begins, [groups_of_k, taps]
    const float *scales, *zeros;  // of each sample's octets, where they differ; zeros may be null
    float *y;               // [M, N] out, or
    int8_t *codes;          // [M, N] out, low..high
    float low, high;
    bool alone;             // each channel is a group
    int groups_of_k, taps, steps;
    ptrdiff_t M, N, n, C;   // C: channels of a group
    ptrdiff_t rows, columns, image, down, right;  // M is images x rows x columns; octets from one to the next
};

// Largest codes of windows, channels last.
struct Pooling {
    const int8_t *x;        // [B, H, W, C]
    int8_t *y;              // [B, rows, columns, C] out
    ptrdiff_t H, W, C, rows, columns;
    ptrdiff_t kernel[2], stride[2], dilation[2], top, left;
};

// a factor[0] + b factor[1] + factor[2], rounded to codes; nn/static.py: StaticAdd.
struct Total {
    const int8_t *a, *b;
    int8_t *y;              // out
    float factor[3], low, high;
};

// One step of a recurrent layer, in float: what its gates make of the input and of the state; nn/recurrent.py.
struct Gates {
    const float *x, *h;     // [B, gates, H]: of the input, of the state
    const float *before;    // [B, H] the state
    float *c;               // [B, H] in and out: the LSTM's cell; null: a GRU
    float *y;               // [B, H] out: the new state
    ptrdiff_t H;
};

// How the vector of a head is kept, as a row of bytes; numerics/key_value_codes.py.
enum KeyValue { KV_F16, KV_Q8, KV_Q4 };

// Channels of D that have a scale (and a minimum, in 4 bits) in common; bytes of a row.
inline ptrdiff_t kept_block(int type, ptrdiff_t D) {
    const ptrdiff_t usual = type == KV_Q8 ? 32 : 64;
    return D % usual ? D : usual;
}
inline ptrdiff_t kept_width(int type, ptrdiff_t D) {
    if (type == KV_F16) return 2 * D;
    return type == KV_Q8 ? D + 2 * (D / kept_block(type, D)) : D / 2 + 4 * (D / kept_block(type, D));
}

// Attention of some tokens that follow one another in a sequence, for the heads that have one key head in common. Token r
// sees the positions up to position + r, with a window only so many of them.
struct Attention {
    const float *q;         // [rows, apart]: share x D numbers of each row
    const uint8_t *keys, *values;  // [positions, width] rows of bytes, as `type` says
    float *scores;          // room for [rows, share, padded]; padded a multiple of 16, at least 16 more than the positions seen
    float *near;            // room for [2, 16, D]
    float *out;             // as q
    float scaling;
    int type;               // KeyValue
    ptrdiff_t rows, apart, share, D, width, position, window, padded;  // D a multiple of 16; window 0: none
};

struct Kernels {
    const char *name;
    void (*search)(const Format &, const Search &, float *scratch, ptrdiff_t first, ptrdiff_t last);
    void (*refine)(const Format &, const Refine &, float *scratch, ptrdiff_t first, ptrdiff_t last);
    void (*nearest_runs)(const Lattice &, const Runs &, ptrdiff_t first, ptrdiff_t last);
    void (*encode)(const Format &, const Encode &, ptrdiff_t first, ptrdiff_t last);
    void (*missed)(const Format &, const Missed &, ptrdiff_t first, ptrdiff_t last);
    void (*widen)(const uint16_t *from, float *to, ptrdiff_t n);  // bfloat16 as float32
    void (*round_columns)(const Format &, const Columns &, float *scratch, ptrdiff_t first, ptrdiff_t last);
    void (*sweep)(const Format &, const Sweep &, float *scratch, ptrdiff_t first, ptrdiff_t last);
    void (*tune)(const Format &, const Tune &, float *scratch, ptrdiff_t first, ptrdiff_t last);
    void (*round_inputs)(const Inputs &, float *scratch, ptrdiff_t first, ptrdiff_t last);
    void (*multiply)(const Weights &, const Inputs &, float *y, ptrdiff_t first, ptrdiff_t last);
    void (*decode)(const Weights &, const Decoded &, ptrdiff_t first, ptrdiff_t last);
    void (*dense)(const Dense &, ptrdiff_t first, ptrdiff_t last);
    void (*attend)(const Attention &);
    void (*keep)(const float *x, int type, ptrdiff_t D, uint8_t *row);  // a head's key or value as `Attention` reads it
    void (*gate)(const float *gate, float *up, ptrdiff_t first, ptrdiff_t last);
    void (*normalize)(const float *x, const float *weight, ptrdiff_t n, float epsilon, float *to);  // root mean square; to may be x
    void (*enter_codes)(const Entry &, ptrdiff_t first, ptrdiff_t last);
    void (*round_samples)(const Samples &, ptrdiff_t first, ptrdiff_t last);
    void (*place_codes)(const Images &, ptrdiff_t first, ptrdiff_t last);
    void (*multiply_codes)(const Codes &, ptrdiff_t first, ptrdiff_t last);
    void (*pool_codes)(const Pooling &, ptrdiff_t first, ptrdiff_t last);
    void (*add_codes)(const Total &, ptrdiff_t first, ptrdiff_t last);
    void (*gates)(const Gates &, ptrdiff_t first, ptrdiff_t last);
};

extern const Kernels scalar_kernels, avx2_kernels, avx_vnni_kernels, avx512_kernels, avx512_vnni_kernels, neon_kernels;

// The instruction sets that were compiled in and that this CPU has, best first; a null ends the list.
const Kernels *const *available();

constexpr int MOST_LANES = 16;  // numbers side by side; no instruction set has more

}  // namespace bitwright

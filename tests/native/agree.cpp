// Whether every instruction set that this processor has gives the bits that "scalar" gives, on random matrices.
// For processors that are at hand only in an emulator, where Python's tests would take days: see `make neon`.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"

using namespace bitwright;

namespace {

std::mt19937 random_bits(0);

template <class T>
std::vector<T> random_bytes(size_t n) {
    std::vector<T> v(n);
    for (size_t i = 0; i < n * sizeof(T); i++) ((uint8_t *)v.data())[i] = (uint8_t)random_bits();
    return v;
}

std::vector<float> random_floats(size_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> v(n);
    for (float &each : v) each = normal(random_bits) * (random_bits() % 16 ? 1.0f : 1e-6f);
    return v;
}

std::vector<uint16_t> random_halves(size_t n) {  // neither infinite nor NaN
    std::vector<uint16_t> v = random_bytes<uint16_t>(n);
    for (uint16_t &each : v) each &= 0xbbff;
    return v;
}

int failures = 0;

// What `scalar` computes against what another does.
void compare(const char *what, const Kernels &k, const void *expected, const void *found, size_t bytes) {
    if (std::memcmp(expected, found, bytes) == 0) return;
    std::printf("%s: %s differs\n", k.name, what);
    failures++;
}

struct Rounded {
    std::vector<int8_t> codes;
    std::vector<int32_t> sum;
    std::vector<float> scale;
    Inputs inputs;

    Rounded(const Kernels &k, const std::vector<float> &x, ptrdiff_t M, ptrdiff_t K, int block, int bytes) {
        const int height = M < 2 ? 1 : M < 3 ? 2 : M < 5 ? 4 : 8;
        const ptrdiff_t padded = (K + 31) / 32 * 32, rows = (M + height - 1) / height * height, blocks = (padded + block - 1) / block;
        const ptrdiff_t repeat = BLOCK / block, spans = (blocks + repeat - 1) / repeat;
        codes.resize(bytes * rows * padded), sum.resize(rows * blocks), scale.resize(rows * spans);
        inputs = {x.data(), false, codes.data(), bytes == 2 ? codes.data() + rows * padded : nullptr, sum.data(), scale.data(), M, K, padded,
                  blocks, spans, height, bytes, block, (int)repeat};
        std::vector<float> scratch(2 * padded);
        k.round_inputs(inputs, scratch.data(), 0, rows);
    }
};

// Both kinds of floats of the last rows.
void decoding(const Kernels &scalar, const Kernels &k, const Weights &w) {
    const ptrdiff_t n = w.N - 64;
    const auto level = random_floats(16);
    for (bool half : {false, true}) {
        std::vector<float> expected(n * w.K), found(n * w.K);
        scalar.decode(w, {level.data(), 2, expected.data(), half, 64, n}, 1, 2);
        k.decode(w, {level.data(), 2, found.data(), half, 64, n}, 1, 2);
        compare("decoding", k, expected.data(), found.data(), 4 * n * w.K);
    }
}

void products(const Kernels &scalar, const Kernels &k, int bits, int offset_kind, int bytes, int wbytes, bool table, int g, ptrdiff_t M) {
    const ptrdiff_t N = 70, K = 300, P = 8, tiles = (K + 31) / 32, G = (K + g - 1) / g;
    const auto panels = random_bytes<uint8_t>(P * tiles * 64 * bits), point = random_bytes<uint8_t>(P * G * 16), tables = random_bytes<uint8_t>(32);
    const auto scale = random_halves(P * G * 16), minimum = random_halves(P * G * 16);
    const auto unit = random_floats(N), x = random_floats(M * K);
    Weights w{panels.data(), scale.data(), offset_kind == 2 ? minimum.data() : nullptr, offset_kind == 1 ? point.data() : nullptr, unit.data(), {}, {},
              table, bits, wbytes, table ? 128 : 1 << (bits - 1), N, K, tiles, G, g < BLOCK ? g : BLOCK, g < BLOCK ? 1 : g / BLOCK};
    std::memcpy(w.high, tables.data(), 16), std::memcpy(w.low, tables.data() + 16, 16);
    const Rounded a(scalar, x, M, K, w.block, bytes), b(k, x, M, K, w.block, bytes);
    if (M == 1 || bytes == 1) compare("rounding inputs", k, a.codes.data(), b.codes.data(), a.codes.size());  // else in an order of its own
    compare("rounding inputs, sums", k, a.sum.data(), b.sum.data(), 4 * a.sum.size());
    compare("rounding inputs, scales", k, a.scale.data(), b.scale.data(), 4 * a.scale.size());
    std::vector<float> expected(M * N), found(M * N);
    scalar.multiply(w, a.inputs, expected.data(), 0, 2);
    k.multiply(w, b.inputs, found.data(), 0, 2);
    compare("a product", k, expected.data(), found.data(), 4 * M * N);
    if (M == 1) decoding(scalar, k, w);
}

void floats(const Kernels &scalar, const Kernels &k, int type, ptrdiff_t M) {
    const ptrdiff_t N = 27, K = 77;
    const auto x = random_floats(M * K), whole = random_floats(N * K);
    const auto half = random_halves(N * K);
    std::vector<float> expected(M * N), found(M * N);
    Dense d{x.data(), type == F32 ? (const void *)whole.data() : half.data(), type, expected.data(), M, N, K};
    scalar.dense(d, 0, N);
    d.y = found.data();
    k.dense(d, 0, N);
    compare("a product of floats", k, expected.data(), found.data(), 4 * M * N);
}

void attention(const Kernels &scalar, const Kernels &k, ptrdiff_t D, ptrdiff_t window, int type, ptrdiff_t rows) {
    const ptrdiff_t share = 3, room = 90, position = 82 - rows, padded = 112, block = D % (type == KV_Q8 ? 32 : 64) ? D : type == KV_Q8 ? 32 : 64;
    const ptrdiff_t width = type == KV_F16 ? 2 * D : type == KV_Q8 ? D + D / block * 2 : D / 2 + D / block * 4;
    const auto q = random_floats(rows * share * D), x = random_floats(2 * room * D);
    std::vector<uint8_t> kept[2];
    const Kernels *both[2] = {&scalar, &k};
    std::vector<float> out[2], gated[2];
    for (int i = 0; i < 2; i++) {
        kept[i].resize(2 * room * width), out[i].resize(q.size());
        for (ptrdiff_t t = 0; t < 2 * room; t++) both[i]->keep(x.data() + t * D, type, D, kept[i].data() + t * width);
        std::vector<float> scores(rows * share * padded), near(32 * D);
        both[i]->attend({q.data(), kept[i].data(), kept[i].data() + room * width, scores.data(), near.data(), out[i].data(), 0.3f, type, rows,
                         share * D, share, D, width, position, window, padded});
        gated[i] = x;
        both[i]->gate(x.data() + room * D, gated[i].data(), 0, room * D);
    }
    compare("what is kept", k, kept[0].data(), kept[1].data(), kept[0].size());
    compare("the gate", k, gated[0].data(), gated[1].data(), 4 * gated[0].size());
    compare("attention", k, out[0].data(), out[1].data(), 4 * out[0].size());
}

}  // namespace

int main() {
    const Kernels *const *all = available();
    int count = 0;
    while (all[count + 1]) count++;
    const Kernels &scalar = *all[count];
    for (int i = 0; i < count; i++) {
        const Kernels &k = *all[i];
        for (ptrdiff_t M : {1, 2, 3, 7, 9})
            for (int g : {16, 32, 128, 256, 512})
                for (int bytes : {1, 2}) {
                    for (int bits = 1; bits <= 8; bits++)
                        for (int offset = 0; offset < 3; offset++) products(scalar, k, bits, offset, bytes, 1, false, g, M);
                    for (int bits : {1, 3, 4}) products(scalar, k, bits, 0, bytes, 1, true, g, M);
                    products(scalar, k, 4, 0, bytes, 2, true, g, M);
                }
        for (int type : {F32, F16, BF16})
            for (ptrdiff_t M : {1, 3, 9}) floats(scalar, k, type, M);
        for (ptrdiff_t D : {16, 48, 64, 128})
            for (int type : {KV_F16, KV_Q8, KV_Q4})
                for (ptrdiff_t rows : {1, 3}) attention(scalar, k, D, 0, type, rows), attention(scalar, k, D, 20, type, rows);
        std::printf("%s: compared with %s\n", k.name, scalar.name);
    }
    if (!count) std::printf("no instruction set here but %s\n", scalar.name);
    return failures || !count;
}

// Numbers of a few bits side by side in bytes, as llama.cpp's blocks hold codes: eight bytes are handled as one number.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace bitwright {

inline uint64_t eight(const uint8_t *at) {
    uint64_t x;
    std::memcpy(&x, at, 8);
    return x;
}

// body(n, bits) with those as constants where they are common ones: a stretch of 0 stands for any other.
template <class Body>
inline void with_constants(ptrdiff_t n, int bits, const Body &body) {
    auto with_bits = [&](auto stretch) {
        if (bits == 4) body(stretch, std::integral_constant<int, 4>{});
        if (bits == 2) body(stretch, std::integral_constant<int, 2>{});
        if (bits == 1) body(stretch, std::integral_constant<int, 1>{});
    };
    if (n == 16) with_bits(std::integral_constant<int, 16>{});
    else if (n == 32) with_bits(std::integral_constant<int, 32>{});
    else with_bits(std::integral_constant<int, 0>{});
}

constexpr uint64_t EACH_BYTE = 0x0101010101010101u;

// Rows of m · 8 / bits numbers -> rows of m bytes, `apart` bytes from row to row, in stretches of n, a multiple of 8: the first
// n numbers of a stretch are the lowest bits of its bytes, the next n stand above them. Only a number's lowest bits are taken,
// of which those set in `turn` are turned over.
inline void put_beside(const uint8_t *numbers, uint8_t *bytes, ptrdiff_t apart, ptrdiff_t rows, ptrdiff_t m, ptrdiff_t n, int bits,
                       uint8_t turn) {
    with_constants(n, bits, [=](auto stretch, auto width) {
        const uint64_t mask = ((1u << width) - 1) * EACH_BYTE, turned = turn * EACH_BYTE;
        const ptrdiff_t step = stretch ? stretch : n;
        const uint8_t *from = numbers;
        for (ptrdiff_t row = 0; row < rows; row++)
            for (uint8_t *to = bytes + row * apart, *end = to + m; to < end; to += step, from += step * (8 / width))
                for (ptrdiff_t i = 0; i < step; i += 8) {
                    uint64_t all = 0;
                    for (int run = 0; run < 8 / width; run++)
                        all |= ((eight(from + run * step + i) ^ turned) & mask) << (width * run);
                    std::memcpy(to + i, &all, 8);
                }
    });
}

// The other way; `less` is taken from each number, modulo 256.
inline void take_apart(const uint8_t *bytes, ptrdiff_t apart, uint8_t *numbers, ptrdiff_t rows, ptrdiff_t m, ptrdiff_t n, int bits,
                       uint8_t less) {
    with_constants(n, bits, [=](auto stretch, auto width) {
        const uint64_t mask = ((1u << width) - 1) * EACH_BYTE, top = 128 * EACH_BYTE, minus = less * EACH_BYTE;
        const ptrdiff_t step = stretch ? stretch : n;
        uint8_t *to = numbers;
        for (ptrdiff_t row = 0; row < rows; row++)
            for (const uint8_t *from = bytes + row * apart, *end = from + m; from < end; from += step)
                for (int shift = 0; shift < 8; shift += width, to += step)
                    for (ptrdiff_t i = 0; i < step; i += 8) {
                        uint64_t some = eight(from + i) >> shift & mask;
                        some = ((some | top) - minus) ^ top;  // no byte borrows from the next: less is at most 128
                        std::memcpy(to + i, &some, 8);
                    }
    });
}

// Rows of n bytes from where they lie so far apart to where they will: numbers of a few bytes at once, not one call a row.
inline void move_rows(const uint8_t *from, ptrdiff_t from_apart, uint8_t *to, ptrdiff_t to_apart, ptrdiff_t rows, ptrdiff_t n) {
    for (ptrdiff_t row = 0; row < rows; row++, from += from_apart, to += to_apart) {
        ptrdiff_t i = 0;
        for (; i + 16 <= n; i += 16) std::memcpy(to + i, from + i, 16);
        if (n & 8) std::memcpy(to + i, from + i, 8), i += 8;
        if (n & 4) std::memcpy(to + i, from + i, 4), i += 4;
        if (n & 2) std::memcpy(to + i, from + i, 2), i += 2;
        if (n & 1) to[i] = from[i];
    }
}

}  // namespace bitwright

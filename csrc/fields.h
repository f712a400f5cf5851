// Numbers of a few bits side by side in bytes, as llama.cpp's blocks hold codes: eight bytes are handled as one number.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace bitwright {

inline uint64_t eight(const uint8_t *at) {
    uint64_t x;
    std::memcpy(&x, at, 8);
    return x;
}

// Rows of `runs` runs of n numbers each -> rows of n bytes: byte i holds the lowest bits of the i-th number of each run, the
// first run lowest. n is a multiple of 8. N: it again, where the compiler is to know it; 0 otherwise.
template <int N = 0>
inline void put_beside(const uint8_t *numbers, uint8_t *bytes, ptrdiff_t rows, int runs, ptrdiff_t n, int bits) {
    const uint64_t mask = ((1u << bits) - 1) * 0x0101010101010101u;
    if (N) n = N;
    for (ptrdiff_t row = 0; row < rows; row++, numbers += runs * n, bytes += n)
        for (ptrdiff_t i = 0; i < n; i += 8) {
            uint64_t all = eight(numbers + i) & mask;
            for (int run = 1; run < runs; run++) all |= (eight(numbers + run * n + i) & mask) << (bits * run);
            std::memcpy(bytes + i, &all, 8);
        }
}

// The other way: rows of m bytes, `apart` bytes from row to row, hold stretches of n bytes; of each stretch all lowest numbers
// come first, then all above them. Rows of m · 8 / bits numbers.
template <int N = 0>
inline void take_apart(const uint8_t *bytes, ptrdiff_t apart, uint8_t *numbers, ptrdiff_t rows, ptrdiff_t m, ptrdiff_t n,
                       int bits) {
    const uint64_t mask = ((1u << bits) - 1) * 0x0101010101010101u;
    if (N) n = N;
    for (ptrdiff_t row = 0; row < rows; row++, bytes += apart)
        for (ptrdiff_t stretch = 0; stretch < m; stretch += n)
            for (int shift = 0; shift < 8; shift += bits, numbers += n)
                for (ptrdiff_t i = 0; i < n; i += 8) {
                    uint64_t some = eight(bytes + stretch + i) >> shift & mask;
                    std::memcpy(numbers + i, &some, 8);
                }
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

// Codes of a tile, an octet a weight, out of planes of 4, 2 and 1 bits; what panels, tiles and strips are: matmul.h.

typedef Octets LooseOctets __attribute__((aligned(1), may_alias));
typedef uint8_t Points __attribute__((vector_size(LANES)));
typedef Points LoosePoints __attribute__((aligned(1), may_alias));

constexpr int STRIPS = 16 / LANES;  // of a panel

constexpr int TILE = 32, TILE_STEPS = 8, AHEAD = 4096;  // AHEAD: bytes that are fetched before they are needed

static inline Octets octets(const uint8_t *at) { return *(const LooseOctets *)at; }

// A strip's part of the 8 vectors of a tile, an octet a weight, to every STEP-th place; `tile` points to the strip in the
// first.
template <int BITS, int STEP>
static inline void unpack_tile(const uint8_t *tile, Octets *to) {
    if (BITS == 8) {
        for (int i = 0; i < 8; i++) to[i * STEP] = octets(tile + 64 * i);
        return;
    }
    int below = 0;  // bits that stand already
    if (BITS & 4) {
        for (int i = 0; i < 4; i++) {
            Octets v = octets(tile + 64 * i);
            to[2 * i * STEP] = v & 15, to[(2 * i + 1) * STEP] = v >> 4;
        }
        tile += 256, below = 4;
    }
    if (BITS & 2) {
        for (int i = 0; i < 2; i++) {
            Octets v = octets(tile + 64 * i);
            for (int j = 0; j < 4; j++) {
                Octets part = (v >> (2 * j) & 3) << below;
                Octets &place = to[(4 * i + j) * STEP];
                place = below ? place | part : part;
            }
        }
        tile += 128, below += 2;
    }
    if (BITS & 1) {
        Octets v = octets(tile);
        for (int j = 0; j < 8; j++) {
            Octets part = (v >> j & 1) << below;
            to[j * STEP] = below ? to[j * STEP] | part : part;
        }
    }
}

template <int STEP>
static void unpack_tile(const uint8_t *tile, int bits, Octets *to) {
    switch (bits) {
        case 1: return unpack_tile<1, STEP>(tile, to);
        case 2: return unpack_tile<2, STEP>(tile, to);
        case 3: return unpack_tile<3, STEP>(tile, to);
        case 4: return unpack_tile<4, STEP>(tile, to);
        case 5: return unpack_tile<5, STEP>(tile, to);
        case 6: return unpack_tile<6, STEP>(tile, to);
        case 7: return unpack_tile<7, STEP>(tile, to);
        default: return unpack_tile<8, STEP>(tile, to);
    }
}

// Codes of a tile, an octet a weight, out of planes of 4, 2 and 1 bits; what panels, tiles and strips are: matmul.h.

typedef Octets LooseOctets __attribute__((aligned(1), may_alias));

constexpr int STRIPS = 16 / LANES;  // of a panel

constexpr int TILE = 32, TILE_STEPS = 8, AHEAD = 4096;  // AHEAD: bytes that are fetched before they are needed

static inline Octets octets(const uint8_t *at) { return *(const LooseOctets *)at; }

// A strip's part of the 8 vectors of a tile, an octet a weight; `tile` points to the strip in the first.
template <int BITS>
static inline void unpack_tile(const uint8_t *tile, Octets *to) {
    if (BITS == 8) {
        for (int i = 0; i < 8; i++) to[i] = octets(tile + 64 * i);
        return;
    }
    int below = 0;  // bits that stand already
    if (BITS & 4) {
        for (int i = 0; i < 4; i++) {
            Octets v = octets(tile + 64 * i);
            to[2 * i] = v & 15, to[2 * i + 1] = v >> 4;
        }
        tile += 256, below = 4;
    }
    if (BITS & 2) {
        for (int i = 0; i < 2; i++) {
            Octets v = octets(tile + 64 * i);
            for (int j = 0; j < 4; j++) {
                Octets part = (v >> (2 * j) & 3) << below;
                Octets &place = to[4 * i + j];
                place = below ? place | part : part;
            }
        }
        tile += 128, below += 2;
    }
    if (BITS & 1) {
        Octets v = octets(tile);
        for (int j = 0; j < 8; j++) {
            Octets part = (v >> j & 1) << below;
            to[j] = below ? to[j] | part : part;
        }
    }
}

// Packed integer matrices times many rows on the tile unit (AMX): a group's 16 outputs x 32 inputs times 16 rows is one
// instruction. Sums of a group are exact in int32 and join in the order of matmul.inl, so the bits are those of every other
// instruction set. Bound by the vectors that scale and add each group's sums: four operations a row, instead of thirteen.

#include <cstring>
#include <vector>

namespace KVIK_NS {
using namespace kvik;

constexpr int kTileRows = 16;

// What each tile register holds: 0, 1, 6, 7 sums [rows][16] int32; 2 and 3 activations [rows][32], first and second term;
// 4 and 5 quants [8][16][4]: a row has four consecutive inputs of 16 outputs.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {64, 64, 32, 32, 64, 64, 64, 64};
    uint8_t rows[16];
    explicit TileShapes(int m) {
        const uint8_t r = uint8_t(m);
        const uint8_t all[16] = {r, r, r, r, 8, 8, r, r};
        std::memcpy(rows, all, sizeof rows);
        // GCC 12's own function tells the compiler that it reads eight bytes of them
        __asm__ volatile("ldtilecfg %0" ::"m"(*this));
    }
    TileShapes(const TileShapes&) = delete;
};

// Layouts with two scales a group have quants for each half of its inputs, filled up with zeros.
template <Layout L>
constexpr int kHalves = L == Layout::int6_k ? 2 : 1;
template <Layout L>
constexpr size_t kUnpacked = size_t(kHalves<L>) * kRows * kGroup;

// The quants of a group a byte each, without their offset.
template <Layout L>
static inline void unpack_group(const uint8_t* quants, int8_t* out) {
    const Group<bits_of(L)> group(quants);
    const __m512i offset = _mm512_set1_epi8(int8_t(uint8_t(offset_of(L)))), none = _mm512_setzero_si512();
    KVIK_UNROLL
    for (int j = 0; j < 8; ++j) {
        const __m512i w = offset_of(L) ? _mm512_sub_epi8(group.w[j], offset) : group.w[j];
        _mm512_store_si512(out + 64 * j, kHalves<L> == 2 && j >= 4 ? none : w);
        if constexpr (kHalves<L> == 2) _mm512_store_si512(out + kRows * kGroup + 64 * j, j < 4 ? none : w);
    }
}

// Eight bits with a minimum have no offset and need the instruction for unsigned quants.
#define KVIK_MULTIPLY(sum, a, b)        \
    if constexpr (has_minimum(L))       \
        _tile_dpbsud(sum, a, b);        \
    else                                \
        _tile_dpbssd(sum, a, b)

using Sums = int32_t[kTileRows * kLanes];

// sums: of the first term, of the second; then, where a group has halves, both of the second half.
template <Layout L, bool Fine>
static inline void multiply_group(const int8_t* quants, const int8_t* q, const int8_t* fine, long ld, Sums* sums) {
    _tile_loadd(4, quants, 64);
    _tile_loadd(2, q, ld);
    _tile_zero(0);
    KVIK_MULTIPLY(0, 2, 4);
    _tile_stored(0, sums[0], 64);
    if constexpr (Fine) {
        _tile_loadd(3, fine, ld);
        _tile_zero(1);
        KVIK_MULTIPLY(1, 3, 4);
        _tile_stored(1, sums[1], 64);
    }
    if constexpr (kHalves<L> == 2) {
        _tile_loadd(5, quants + kRows * kGroup, 64);
        _tile_zero(6);
        KVIK_MULTIPLY(6, 2, 5);
        _tile_stored(6, sums[2], 64);
        if constexpr (Fine) {
            _tile_zero(7);
            KVIK_MULTIPLY(7, 3, 5);
            _tile_stored(7, sums[3], 64);
        }
    }
}

template <bool Fine>
static inline F sum_of(const Sums* sums, int m) {
    const I first{_mm512_load_si512(sums[0] + m * kLanes)};
    if constexpr (Fine) return to_float(two_terms(first, {_mm512_load_si512(sums[1] + m * kLanes)}));
    return to_float(first);
}

// Of 16 rows in each group: the scales, then the sums of the activations.
using Sides = float[2][kTileRows];

static inline void gather_sides(const Activations& a, int row, int rows, int groups, Sides* sides) {
    const size_t lg = size_t(a.ld / kGroup);
    for (int m = 0; m < kTileRows; ++m) {
        const size_t at = size_t(row + (m < rows ? m : rows - 1)) * lg;
        for (int g = 0; g < groups; ++g) {
            sides[g][0][m] = a.scale[at + size_t(g)];
            sides[g][1][m] = a.sum[at + size_t(g)];
        }
    }
}

// Up to 16 rows from `row` on: as many as the tiles are shaped for. Writes rows `first` to `last` of them. ahead: weights asked
// for meanwhile, or null.
template <Layout L, bool Fine>
static inline void tile_rows(const int8_t* quants, const uint8_t* w, int groups, const Activations& a, int row,
                             const Sides* sides, int first, int last, float* out, int ldo, bool accumulate, const uint8_t* ahead) {
    const long ld = a.ld;
    const int8_t *q = a.q + row * ld, *fine = Fine ? a.fine + row * ld : nullptr;
    constexpr size_t bytes = unit_bytes(L) / unit_groups(L);
    alignas(64) Sums sums[2][4];
    F acc[kTileRows];
    KVIK_UNROLL
    for (int m = 0; m < kTileRows; ++m) acc[m] = zero();
    multiply_group<L, Fine>(quants, q, fine, ld, sums[0]);
    for (int g = 0; g < groups; ++g) {
        // the next group's tiles run while this one's sums are added
        if (g + 1 < groups)
            multiply_group<L, Fine>(quants + size_t(g + 1) * kUnpacked<L>, q + (g + 1) * kGroup,
                                    Fine ? fine + (g + 1) * kGroup : nullptr, ld, sums[(g + 1) & 1]);
        const Sums* done = sums[g & 1];
        const float *scale = sides[g][0], *sum = sides[g][1];
        const Scales s = scales_at<L>(w, g);
        KVIK_UNROLL
        for (int m = 0; m < kTileRows; ++m) {
            acc[m] = fma(mul(sum_of<Fine>(done, m), set1(scale[m])), s.scale, acc[m]);
            if constexpr (kHalves<L> == 2) acc[m] = fma(mul(sum_of<Fine>(done + 2, m), set1(scale[m])), s.second, acc[m]);
            if constexpr (has_minimum(L)) acc[m] = fma(s.minimum, set1(sum[m]), acc[m]);
        }
        if (ahead)
            for (size_t line = 0; line < bytes; line += 64) prefetch(ahead + size_t(g) * bytes + line);
    }
    KVIK_UNROLL
    for (int m = 0; m < kTileRows; ++m) {
        if (m < first || m >= last) continue;
        float* o = out + (row + m) * long(ldo);
        store(o, accumulate ? add(load(o), acc[m]) : acc[m]);
    }
}

// Kept between calls for its memory only.
struct TileScratch {
    std::vector<uint8_t> bytes;
    uint8_t* reserve(size_t wanted) {
        if (bytes.size() < wanted + 64) bytes.resize(wanted + 64);
        return bytes.data() + (-reinterpret_cast<uintptr_t>(bytes.data()) & 63);
    }
};

// Rows are walked in chunks whose activations stay in the second-level cache. The last tile overlaps the one before it rather
// than have fewer rows.
template <Layout L, bool Fine>
static __attribute__((noinline)) void matmul_tiles(const Matrix& w, const Activations& a, int rows, int block_begin, int block_end,
                                                   float* out, int ldo, bool accumulate) {
    thread_local TileScratch quants_scratch, sides_scratch;
    const int groups = w.groups(), row_bytes = (Fine ? 2 : 1) * a.ld + groups * 8;
    const int high = rows < kTileRows ? rows : kTileRows;  // of a tile
    int chunk = (512 * 1024 / row_bytes) & ~(kTileRows - 1);
    if (chunk < kTileRows) chunk = kTileRows;
    if (chunk > rows) chunk = rows;
    int8_t* quants = reinterpret_cast<int8_t*>(quants_scratch.reserve(size_t(groups) * kUnpacked<L>));
    Sides* sides = reinterpret_cast<Sides*>(
        sides_scratch.reserve(size_t(chunk + kTileRows - 1) / kTileRows * size_t(groups) * sizeof(Sides)));
    const size_t stride = w.row_block_bytes();
    const TileShapes shapes(high);
    for (int begin = 0; begin < rows; begin += chunk) {
        const int end = begin + chunk < rows ? begin + chunk : rows;
        const auto from = [&](int row) { return row + high <= rows ? row : rows - high; };
        Sides* side = sides;
        for (int row = begin; row < end; row += kTileRows, side += groups) gather_sides(a, from(row), high, groups, side);
        for (int b = block_begin; b < block_end; ++b) {
            const uint8_t* data = w.data + size_t(b) * stride;
            const uint8_t* ahead = b + 1 < w.row_blocks() ? data + stride : nullptr;
            for (int g = 0; g < groups; ++g) unpack_group<L>(quants_at<L>(data, g), quants + size_t(g) * kUnpacked<L>);
            __asm__ volatile("" ::: "memory");  // the tiles' loads tell the compiler nothing of what they read
            side = sides;
            for (int row = begin; row < end; row += kTileRows, side += groups, ahead = nullptr) {
                const int at = from(row);
                tile_rows<L, Fine>(quants, data, groups, a, at, side, row - at, high, out + b * kRows, ldo, accumulate, ahead);
            }
        }
    }
    _tile_release();
}

}  // namespace KVIK_NS

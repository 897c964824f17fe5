#define KVIK_NS kvik_amx
#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define KVIK_AVX512 1
#include "kernels.h"
#include "simd.h"
#include "dots.inl"
#include "reading.inl"
#include "tiles.inl"

namespace kvik_amx {
using namespace kvik;

// Fewer rows are faster on the vectors.
constexpr int32_t kLeastTileRows = 12;

template <Layout L>
static void tiles_of(const Matrix& w, const Activations& a, int32_t rows, int32_t begin, int32_t end, float* out, int32_t ldo,
                     bool accumulate) {
    a.fine ? matmul_tiles<L, true>(w, a, rows, begin, end, out, ldo, accumulate)
           : matmul_tiles<L, false>(w, a, rows, begin, end, out, ldo, accumulate);
}

static void matmul(const Matrix& w, const Activations& a, int32_t rows, int32_t begin, int32_t end, float* out, int32_t ldo,
                   bool accumulate) {
    const auto run = [&](auto kernel) { kernel(w, a, rows, begin, end, out, ldo, accumulate); };
    if (rows < kLeastTileRows) return run(avx512_kernels()->matmul);
    switch (w.layout) {
        case Layout::int8: return run(tiles_of<Layout::int8>);
        case Layout::int8_min: return run(tiles_of<Layout::int8_min>);
        case Layout::int4: return run(tiles_of<Layout::int4>);
        case Layout::int4_min: return run(tiles_of<Layout::int4_min>);
        case Layout::int5: return run(tiles_of<Layout::int5>);
        case Layout::int5_min: return run(tiles_of<Layout::int5_min>);
        case Layout::int4_k: return run(tiles_of<Layout::int4_k>);
        case Layout::int5_k: return run(tiles_of<Layout::int5_k>);
        case Layout::int6_k: return run(tiles_of<Layout::int6_k>);
        default: return run(avx512_kernels()->matmul);
    }
}

// Linux hands the tile registers only to processes that ask.
static bool permitted() {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

static Kernels table() {
    Kernels all = *avx512_kernels();
    all.name = "amx";
    all.matmul = matmul;
    return all;
}
}  // namespace kvik_amx

namespace kvik {
const Kernels* amx_kernels() {
    static const bool have = avx512_kernels() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
                             kvik_amx::permitted();
    if (!have) return nullptr;
    static const Kernels kTable = kvik_amx::table();
    return &kTable;
}
}  // namespace kvik
#else
#include "kernels.h"
namespace kvik {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace kvik
#endif

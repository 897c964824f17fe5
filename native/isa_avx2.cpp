#define KVIK_NS kvik_avx2
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define KVIK_AVX2 1
#define KVIK_ISA_NAME "avx2"
#include "isa.inl"
namespace kvik {
const Kernels* avx2_kernels() {
    const bool have = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return have ? &kvik_avx2::kTable : nullptr;
}
}  // namespace kvik
#else
#include "kernels.h"
namespace kvik {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace kvik
#endif

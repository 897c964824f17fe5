#define KVIK_NS kvik_avx512
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define KVIK_AVX512 1
#define KVIK_ISA_NAME "avx512"
#include "isa.inl"
namespace kvik {
const Kernels* avx512_kernels() {
    const bool have = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
    return have ? &kvik_avx512::kTable : nullptr;
}
}  // namespace kvik
#else
#include "kernels.h"
namespace kvik {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace kvik
#endif

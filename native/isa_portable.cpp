#define KVIK_NS kvik_portable
#define KVIK_ISA_NAME "portable"
#include "isa.inl"
namespace kvik {
const Kernels& portable_kernels() { return kvik_portable::kTable; }
}  // namespace kvik

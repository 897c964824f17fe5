// The body of every isa_*.cpp: compiles the kernels for one instruction set and fills their table.
#include "kernels.h"
#include "simd.h"
#include "dots.inl"
#include "page_dots.inl"
#include "reading.inl"
#include "matmul.inl"
#include "elementwise.inl"
#include "pages.inl"
#include "attention.inl"
#include "packed_attention.inl"
#include "parts.inl"
#include "attend.inl"
#include "sampler_kernels.inl"
#include "reduction.inl"

namespace KVIK_NS {
static const kvik::Kernels kTable = {KVIK_ISA_NAME, matmul, round_bf16, embed, rms_norm, layer_norm, head_norm, activate,
                                     add_rows, add_bias, route, combine, quantize, rope, hadamard, append, pack_group, pack_page,
                                     read_slot, attend, attend_reset, attend_join, attend_finish, checksum, read_all, &kSampler,
                                     &kReduction};
}

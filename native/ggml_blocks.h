// The blocks of GGUF's tensor types, group by group, as the native layouts hold them (kernels.h).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace kvik {

// Tensor types as GGUF numbers them.
enum class Source : int32_t {
    F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30
};
// elements and bytes of a block; {0, 0} for a type this build cannot read
struct SourceBlock {
    int32_t elements, bytes;
};
SourceBlock source_block(Source type);

// The layout that holds the type without loss.
Layout exact_layout(Source type);

// One group of 32 weights, as the layouts of kernels.h have them: quants, and in f16 scale and minimum, which in the K
// types are multiplied by `steps` (of the scale and the minimum; in Q6_K of the scales of either half).
struct GroupOf32 {
    uint8_t quants[kGroup];
    uint16_t scale, minimum;
    uint8_t steps[2];
};

// Quants and f16 fields as the file has them; sub: of a block of more than 32. False where a field is not finite.
bool read_group(Source type, const uint8_t* p, int sub, GroupOf32& g);

// One group as f32, of any type. False where a weight or scale is not finite.
bool read_floats(Source type, const uint8_t* p, int sub, float* out);

// Weight k of a group in an integer layout.
float weight_of(Layout layout, const GroupOf32& g, int k);

}  // namespace kvik

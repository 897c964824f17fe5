// From the tensors of a file to the native layouts (kernels.h). Same-structure types are rearranged bit for bit; everything
// else goes through f32 and is rounded: to nearest, 4-bit groups to the best scale and minimum found.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ggml_blocks.h"

namespace kvik {

struct PackResult {
    int64_t bad_row = -1;    // first row with a NaN or infinite weight or scale (in the result's order), or -1
    double largest_error = 0;  // largest |packed - source|; 0 where the conversion is exact
};

// source: n rows of k elements of `type`, exactly source_bytes long. permuted_heads: rows of each head stored with rotary
// pairs interleaved (row 2i + j of the head is row i + j * D/2 here); 0: as they are. target: packed_bytes() long.
// Throws std::invalid_argument where sizes disagree.
PackResult pack(Source type, const uint8_t* source, size_t source_bytes, int32_t n, int32_t k, int32_t permuted_heads,
                Layout layout, uint8_t* target, size_t target_bytes, int32_t threads);

size_t packed_bytes(Layout layout, int32_t n, int32_t k);

}  // namespace kvik

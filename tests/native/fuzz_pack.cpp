// Feeds the native packing with records from standard input, for AddressSanitizer: every byte of a model file that native
// code reads passes through `pack`. A record: six int32 (type, n, k, heads, layout, length), then `length` bytes.
#include <cstdint>
#include <cstdio>
#include <memory>
#include <stdexcept>

#include "pack.h"

int main() {
    int32_t head[6];
    long packed = 0, refused = 0, not_finite = 0;
    while (std::fread(head, sizeof head, 1, stdin) == 1) {
        if (head[5] < 0) return 2;
        const size_t length = size_t(head[5]);
        std::unique_ptr<uint8_t[]> source(new uint8_t[length]);  // exactly as long as the tensor: one byte more is an error
        if (length && std::fread(source.get(), length, 1, stdin) != 1) return 2;
        if (head[4] < 0 || head[4] >= kvik::kLayouts) return 2;
        const auto layout = kvik::Layout(head[4]);
        const bool sane = head[1] > 0 && head[2] > 0 && head[1] < 4096 && head[2] < 4096;
        const size_t size = sane ? kvik::packed_bytes(layout, head[1], head[2]) : 0;
        std::unique_ptr<uint8_t[]> target(new uint8_t[size]);
        try {
            const auto result =
                kvik::pack(kvik::Source(head[0]), source.get(), length, head[1], head[2], head[3], layout, target.get(), size, 2);
            ++(result.bad_row >= 0 ? not_finite : packed);
        } catch (const std::invalid_argument&) {
            ++refused;
        }
    }
    std::printf("%ld %ld %ld\n", packed, not_finite, refused);
    return 0;
}

#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#define KVIK_NS kvik_pack  // the portable conversions of simd.h
#include "simd.h"

namespace kvik {

namespace {

using kvik_pack::bf16_to_float;
using kvik_pack::float_to_half;
using kvik_pack::half_to_float;

uint16_t read16(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    return h;
}
void write16(uint8_t* p, uint16_t h) { std::memcpy(p, &h, 2); }

// One group of 32 weights: value = scale * (quant - offset) + minimum, scale and minimum exact in f16.
struct GroupOf32 {
    uint8_t quants[kGroup];
    uint16_t scale, minimum;
};

// Quants and f16 fields as the file has them. False where a field is not finite.
bool read_group(Source type, const uint8_t* p, GroupOf32& g) {
    g.scale = read16(p);
    g.minimum = 0;
    if (type == Source::Q8_0) {
        for (int i = 0; i < kGroup; ++i) g.quants[i] = uint8_t(p[2 + i] ^ 0x80);
    } else {
        const uint8_t* q = p + 2;
        if (type == Source::Q4_1) {
            g.minimum = read16(p + 2);
            q = p + 4;
        }
        for (int i = 0; i < 16; ++i) {
            g.quants[i] = q[i] & 15;
            g.quants[i + 16] = q[i] >> 4;
        }
    }
    return std::isfinite(half_to_float(g.scale)) && std::isfinite(half_to_float(g.minimum));
}

// One group as f32. False where a weight or scale is not finite.
bool read_floats(Source type, const uint8_t* p, float* out) {
    if (type == Source::F32 || type == Source::F16 || type == Source::BF16) {
        bool finite = true;
        for (int i = 0; i < kGroup; ++i) {
            if (type == Source::F32)
                std::memcpy(out + i, p + 4 * i, 4);
            else
                out[i] = type == Source::F16 ? half_to_float(read16(p + 2 * i)) : bf16_to_float(read16(p + 2 * i));
            finite &= std::isfinite(out[i]);
        }
        return finite;
    }
    GroupOf32 g;
    const bool finite = read_group(type, p, g);
    const float scale = half_to_float(g.scale), low = half_to_float(g.minimum);
    const int offset = type == Source::Q8_0 ? 128 : (type == Source::Q4_0 ? 8 : 0);
    for (int i = 0; i < kGroup; ++i) out[i] = scale * float(g.quants[i] - offset) + low;
    return finite;
}

uint16_t float_to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

uint8_t nearest(float x, float inverse, int low, int high) {
    return uint8_t(std::clamp(int(std::lrintf(x * inverse)), low, high) - low);
}

// f32 to quants; int4 and int8_min span [min, max], int8 is symmetric. False where a scale leaves f16's range.
bool round_group(Layout layout, const float* x, GroupOf32& g) {
    const auto [least, most] = std::minmax_element(x, x + kGroup);
    if (layout == Layout::int8) {
        const float top = std::max(std::fabs(*least), std::fabs(*most));
        g.scale = float_to_half(top / 127.0f);
        g.minimum = 0;
        const float s = half_to_float(g.scale);
        for (int i = 0; i < kGroup; ++i) g.quants[i] = uint8_t(nearest(x[i], s > 0 ? 1.0f / s : 0.0f, -127, 127) + 1);
        return std::isfinite(s);
    }
    const int levels = layout == Layout::int4_min ? 15 : 255;
    g.minimum = float_to_half(*least);
    const float low = half_to_float(g.minimum);
    g.scale = float_to_half((*most - low) / float(levels));
    const float s = half_to_float(g.scale);
    for (int i = 0; i < kGroup; ++i) g.quants[i] = nearest(x[i] - low, s > 0 ? 1.0f / s : 0.0f, 0, levels);
    return std::isfinite(s) && std::isfinite(low);
}

bool same_structure(Source type, Layout layout) {
    switch (type) {
        case Source::Q4_0: return layout == Layout::int4 || layout == Layout::int8;
        case Source::Q4_1: return layout == Layout::int4_min || layout == Layout::int8_min;
        case Source::Q8_0: return layout == Layout::int8;
        default: return false;
    }
}

// Writes lane `lane` of a block of 16 rows x 32 inputs.
void write_group(Layout layout, const GroupOf32& g, int lane, uint8_t* block) {
    const bool four = layout == Layout::int4 || layout == Layout::int4_min;
    const bool minimum = layout == Layout::int4_min || layout == Layout::int8_min;
    if (four) {
        for (int k = 0; k < 16; ++k)
            block[64 * (k / 4) + 4 * lane + k % 4] = uint8_t(g.quants[k] | (g.quants[k + 16] << 4));
    } else {
        for (int k = 0; k < kGroup; ++k) block[64 * (k / 4) + 4 * lane + k % 4] = g.quants[k];
    }
    uint8_t* scales = block + (four ? 256 : 512);
    write16(scales + 2 * lane, g.scale);
    if (minimum) write16(scales + 32 + 2 * lane, g.minimum);
}

void write_floats(Layout layout, const float* x, int lane, uint8_t* block) {
    for (int k = 0; k < kGroup; ++k) {
        const int i = k * kRows + lane;
        if (layout == Layout::f32)
            std::memcpy(block + 4 * i, x + k, 4);
        else
            write16(block + 2 * i, layout == Layout::bf16 ? float_to_bf16(x[k]) : float_to_half(x[k]));
    }
}

float read_back(Layout layout, const GroupOf32& g, const float* x, int k) {
    if (layout == Layout::f32) return x[k];
    if (layout == Layout::bf16) return bf16_to_float(float_to_bf16(x[k]));
    if (layout == Layout::f16) return half_to_float(float_to_half(x[k]));
    const int offset = layout == Layout::int8 ? 128 : (layout == Layout::int4 ? 8 : 0);
    return half_to_float(g.scale) * float(g.quants[k] - offset) + half_to_float(g.minimum);
}

struct Job {
    Source type;
    const uint8_t* source;
    int32_t n, k, permuted_heads;
    Layout layout;
    uint8_t* target;
    size_t row_bytes;

    int32_t source_row(int32_t r) const {
        if (!permuted_heads) return r;
        const int32_t d = n / permuted_heads, half = d / 2, at = r % d;
        return r - at + (at < half ? 2 * at : 2 * (at - half) + 1);
    }
    // One group of one row into its block; false where it is not finite.
    bool group(int32_t r, int32_t g, const uint8_t* p, uint8_t* block, double& error) const {
        GroupOf32 quants{};
        if (same_structure(type, layout)) {
            const bool finite = read_group(type, p, quants);
            if (type == Source::Q4_0 && layout == Layout::int8)
                for (uint8_t& q : quants.quants) q = uint8_t(q + 120);  // quant - 8 = quant + 120 - 128
            write_group(layout, quants, r % kRows, block);
            return finite;
        }
        const int32_t have = std::min(kGroup, k - g * kGroup);
        float x[kGroup] = {};
        bool finite = true;
        if (have == kGroup) {
            finite = read_floats(type, p, x);
        } else {  // only types of single elements have a short last group
            uint8_t whole[4 * kGroup] = {};
            std::memcpy(whole, p, size_t(have) * size_t(source_block(type).bytes));
            finite = read_floats(type, whole, x);
        }
        if (!finite) return false;
        if (is_integer(layout)) {
            finite = round_group(layout, x, quants);
            write_group(layout, quants, r % kRows, block);
        } else {
            write_floats(layout, x, r % kRows, block);
        }
        for (int32_t i = 0; i < have; ++i) error = std::max(error, std::fabs(double(read_back(layout, quants, x, i)) - double(x[i])));
        return finite && std::isfinite(error);
    }
    void row_block(int32_t b, int64_t& bad_row, double& error) const {
        const int32_t groups = (k + kGroup - 1) / kGroup;
        const SourceBlock unit = source_block(type);
        uint8_t* block = target + size_t(b) * size_t(groups) * block_bytes(layout);
        std::memset(block, 0, size_t(groups) * block_bytes(layout));
        for (int32_t r = b * kRows; r < std::min(n, (b + 1) * kRows); ++r) {
            const uint8_t* p = source + size_t(source_row(r)) * row_bytes;
            for (int32_t g = 0; g < groups; ++g)
                if (!group(r, g, p + size_t(g) * kGroup / size_t(unit.elements) * size_t(unit.bytes),
                           block + size_t(g) * block_bytes(layout), error) &&
                    (bad_row < 0 || r < bad_row))
                    bad_row = r;
        }
    }
};

}  // namespace

SourceBlock source_block(Source type) {
    switch (type) {
        case Source::F32: return {1, 4};
        case Source::F16:
        case Source::BF16: return {1, 2};
        case Source::Q4_0: return {32, 18};
        case Source::Q4_1: return {32, 20};
        case Source::Q8_0: return {32, 34};
    }
    return {0, 0};
}

Layout exact_layout(Source type) {
    switch (type) {
        case Source::F16: return Layout::f16;
        case Source::BF16: return Layout::bf16;
        case Source::Q4_0: return Layout::int4;
        case Source::Q4_1: return Layout::int4_min;
        case Source::Q8_0: return Layout::int8;
        case Source::F32: break;
    }
    return Layout::f32;
}

size_t packed_bytes(Layout layout, int32_t n, int32_t k) { return Matrix{layout, nullptr, n, k}.bytes(); }

PackResult pack(Source type, const uint8_t* source, size_t source_bytes, int32_t n, int32_t k, int32_t permuted_heads,
                Layout layout, uint8_t* target, size_t target_bytes, int32_t threads) {
    const SourceBlock unit = source_block(type);
    if (unit.elements == 0) throw std::invalid_argument("tensor type cannot be packed");
    if (n <= 0 || k <= 0 || k % unit.elements != 0) throw std::invalid_argument("tensor shape does not fit its type");
    const size_t row_bytes = size_t(k) / size_t(unit.elements) * size_t(unit.bytes);
    if (source_bytes != size_t(n) * row_bytes) throw std::invalid_argument("tensor bytes do not fit its shape");
    if (target_bytes != packed_bytes(layout, n, k)) throw std::invalid_argument("packed bytes do not fit the shape");
    if (permuted_heads < 0 || (permuted_heads && (n % permuted_heads != 0 || (n / permuted_heads) % 2 != 0)))
        throw std::invalid_argument("rows cannot be divided into heads");
    const Job job{type, source, n, k, permuted_heads, layout, target, row_bytes};
    const int32_t blocks = (n + kRows - 1) / kRows;
    threads = std::clamp(threads, 1, blocks);
    std::vector<PackResult> results(size_t(threads), PackResult{});
    std::atomic<int32_t> next{0};
    const auto work = [&](PackResult& r) {
        for (int32_t b; (b = next.fetch_add(1)) < blocks;) job.row_block(b, r.bad_row, r.largest_error);
    };
    std::vector<std::thread> helpers;
    try {
        for (int32_t t = 1; t < threads; ++t) helpers.emplace_back(work, std::ref(results[size_t(t)]));
    } catch (const std::system_error&) {
        // no more threads to be had: those that started and this one do it all
    }
    work(results[0]);
    for (std::thread& h : helpers) h.join();
    PackResult all;
    for (const PackResult& r : results) {
        if (r.bad_row >= 0 && (all.bad_row < 0 || r.bad_row < all.bad_row)) all.bad_row = r.bad_row;
        all.largest_error = std::max(all.largest_error, r.largest_error);
    }
    return all;
}

}  // namespace kvik

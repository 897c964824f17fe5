#include "ggml_blocks.h"

#include <cmath>
#include <cstring>

#define KVIK_NS kvik_blocks  // the portable conversions of simd.h
#include "simd.h"

namespace kvik {

using kvik_blocks::bf16_to_float;
using kvik_blocks::half_to_float;

namespace {

uint16_t read16(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    return h;
}

// 6-bit scales and minimums of the 8 groups of a Q4_K or Q5_K block, packed into 12 bytes.
void read_steps(const uint8_t* p, int sub, uint8_t* steps) {
    if (sub < 4) {
        steps[0] = p[sub] & 63;
        steps[1] = p[sub + 4] & 63;
    } else {
        steps[0] = uint8_t((p[sub + 4] & 15) | (p[sub - 4] >> 6) << 4);
        steps[1] = uint8_t((p[sub + 4] >> 4) | (p[sub] >> 6) << 4);
    }
}

// Group `sub` of a block of a K type, 256 weights.
void read_k_group(Source type, const uint8_t* p, int sub, GroupOf32& g) {
    if (type == Source::Q6_K) {  // two halves of 128: 64 bytes of low nibbles, 32 of upper pairs of bits
        const uint8_t *low = p + 64 * (sub / 4) + 32 * (sub % 2), *high = p + 128 + 32 * (sub / 4);
        for (int i = 0; i < kGroup; ++i)
            g.quants[i] = uint8_t((sub % 4 < 2 ? low[i] & 15 : low[i] >> 4) | (high[i] >> 2 * (sub % 4) & 3) << 4);
        std::memcpy(g.steps, p + 192 + 2 * sub, 2);
        g.scale = read16(p + 208);
        g.minimum = 0;
        return;
    }
    g.scale = read16(p);
    g.minimum = read16(p + 2);
    read_steps(p + 4, sub, g.steps);
    const uint8_t* low = p + (type == Source::Q5_K ? 48 : 16) + 32 * (sub / 2);
    for (int i = 0; i < kGroup; ++i) {
        g.quants[i] = sub % 2 ? low[i] >> 4 : low[i] & 15;
        if (type == Source::Q5_K) g.quants[i] |= uint8_t((p[16 + i] >> sub & 1) << 4);
    }
}

}  // namespace

SourceBlock source_block(Source type) {
    switch (type) {
        case Source::F32: return {1, 4};
        case Source::F16:
        case Source::BF16: return {1, 2};
        case Source::Q4_0: return {32, 18};
        case Source::Q4_1: return {32, 20};
        case Source::Q5_0: return {32, 22};
        case Source::Q5_1: return {32, 24};
        case Source::Q8_0: return {32, 34};
        case Source::Q4_K: return {256, 144};
        case Source::Q5_K: return {256, 176};
        case Source::Q6_K: return {256, 210};
    }
    return {0, 0};
}

Layout exact_layout(Source type) {
    switch (type) {
        case Source::F16: return Layout::f16;
        case Source::BF16: return Layout::bf16;
        case Source::Q4_0: return Layout::int4;
        case Source::Q4_1: return Layout::int4_min;
        case Source::Q5_0: return Layout::int5;
        case Source::Q5_1: return Layout::int5_min;
        case Source::Q8_0: return Layout::int8;
        case Source::Q4_K: return Layout::int4_k;
        case Source::Q5_K: return Layout::int5_k;
        case Source::Q6_K: return Layout::int6_k;
        case Source::F32: break;
    }
    return Layout::f32;
}

bool read_group(Source type, const uint8_t* p, int sub, GroupOf32& g) {
    if (source_block(type).elements == 256) {
        read_k_group(type, p, sub, g);
        return std::isfinite(half_to_float(g.scale)) && std::isfinite(half_to_float(g.minimum));
    }
    g.scale = read16(p);
    g.minimum = 0;
    const uint8_t* q = p + 2;
    if (type == Source::Q8_0) {
        for (int i = 0; i < kGroup; ++i) g.quants[i] = uint8_t(q[i] ^ 0x80);
        return std::isfinite(half_to_float(g.scale));
    }
    if (type == Source::Q4_1 || type == Source::Q5_1) {
        g.minimum = read16(q);
        q += 2;
    }
    uint32_t high = 0;
    if (type == Source::Q5_0 || type == Source::Q5_1) {
        std::memcpy(&high, q, 4);
        q += 4;
    }
    for (int i = 0; i < 16; ++i) {
        g.quants[i] = uint8_t((q[i] & 15) | (high >> i & 1) << 4);
        g.quants[i + 16] = uint8_t(q[i] >> 4 | (high >> (i + 16) & 1) << 4);
    }
    return std::isfinite(half_to_float(g.scale)) && std::isfinite(half_to_float(g.minimum));
}

float weight_of(Layout layout, const GroupOf32& g, int k) {
    float scale = half_to_float(g.scale), low = half_to_float(g.minimum);
    if (layout == Layout::int6_k) {
        scale *= float(int8_t(g.steps[k / 16]));
    } else if (is_k(layout)) {
        scale *= float(g.steps[0]);
        low = -low * float(g.steps[1]);
    }
    return scale * float(g.quants[k] - offset_of(layout)) + low;
}

bool read_floats(Source type, const uint8_t* p, int sub, float* out) {
    if (source_block(type).elements == 1) {
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
    const bool finite = read_group(type, p, sub, g);
    for (int i = 0; i < kGroup; ++i) out[i] = weight_of(exact_layout(type), g, i);
    return finite;
}

}  // namespace kvik

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
using kvik_pack::float_to_bf16;
using kvik_pack::float_to_half;
using kvik_pack::half_to_float;

void write16(uint8_t* p, uint16_t h) { std::memcpy(p, &h, 2); }

uint8_t nearest(float x, float inverse, int low, int high) {
    return uint8_t(std::clamp(int(std::lrintf(x * inverse)), low, high) - low);
}

// Nearest quants of 0 to `levels` for a scale and a minimum; returns the squared error.
double quantize_with(const float* x, int levels, uint16_t scale, uint16_t minimum, uint8_t* quants) {
    const float s = half_to_float(scale), low = half_to_float(minimum), inverse = s != 0 ? 1.0f / s : 0.0f;
    float error = 0;
    for (int i = 0; i < kGroup; ++i) {
        const float q = std::clamp(std::nearbyint((x[i] - low) * inverse), 0.0f, float(levels));
        const float difference = s * q + low - x[i];
        error += difference * difference;
        quants[i] = uint8_t(q);
    }
    return double(error);
}

// Scale and minimum in f16 that leave little squared error: ranges narrower and wider than [min, max] are tried, each
// followed by the least squares of the quants it gives. False where they leave f16's range.
bool search_group(const float* x, int levels, GroupOf32& g) {
    const auto [least, most] = std::minmax_element(x, x + kGroup);
    double sum_x = 0, best = std::numeric_limits<double>::infinity();
    for (int i = 0; i < kGroup; ++i) sum_x += double(x[i]);
    g.scale = g.minimum = 0;
    uint8_t quants[kGroup];
    const auto consider = [&](double scale, double low) {
        const uint16_t s = float_to_half(float(scale)), m = float_to_half(float(low));
        if (!std::isfinite(half_to_float(s)) || !std::isfinite(half_to_float(m))) return;
        const double error = quantize_with(x, levels, s, m, quants);
        if (error >= best) return;
        best = error;
        g.scale = s;
        g.minimum = m;
        std::memcpy(g.quants, quants, sizeof quants);
    };
    const double range = double(*most) - double(*least);
    consider(range / levels, double(*least));
    for (int step = -2; step <= 6; ++step) {  // scales for levels - 1 to levels + 3 steps of the range
        const double scale = range / (levels + 0.5 * step);
        if (!(scale > 0)) break;
        const double low = double(*least) + 0.5 * (range - scale * levels);
        double n = kGroup, sum_q = 0, sum_qq = 0, sum_qx = 0;
        const float inverse = float(1 / scale);
        for (int i = 0; i < kGroup; ++i) {
            const float q = std::clamp(std::nearbyint((x[i] - float(low)) * inverse), 0.0f, float(levels));
            sum_q += double(q);
            sum_qq += double(q * q);
            sum_qx += double(q * x[i]);
        }
        const double determinant = n * sum_qq - sum_q * sum_q;
        if (!(determinant > 0)) continue;
        const double fitted = (n * sum_qx - sum_q * sum_x) / determinant;
        consider(fitted, (sum_x - fitted * sum_q) / n);
    }
    return std::isfinite(best);
}

// f32 to quants; int4_min and int8_min span the weights, int8 is symmetric. False where a scale leaves f16's range.
bool round_group(Layout layout, const float* x, GroupOf32& g) {
    if (layout == Layout::int4_min) return search_group(x, 15, g);
    const auto [least, most] = std::minmax_element(x, x + kGroup);
    if (layout == Layout::int8) {
        const float top = std::max(std::fabs(*least), std::fabs(*most));
        g.scale = float_to_half(top / 127.0f);
        g.minimum = 0;
        const float s = half_to_float(g.scale);
        for (int i = 0; i < kGroup; ++i) g.quants[i] = uint8_t(nearest(x[i], s > 0 ? 1.0f / s : 0.0f, -127, 127) + 1);
        return std::isfinite(s);
    }
    g.minimum = float_to_half(*least);
    g.scale = float_to_half((*most - half_to_float(g.minimum)) / 255.0f);
    if (!std::isfinite(half_to_float(g.scale)) || !std::isfinite(half_to_float(g.minimum))) return false;
    quantize_with(x, 255, g.scale, g.minimum, g.quants);
    return true;
}

bool same_structure(Source type, Layout layout) {
    switch (type) {
        case Source::Q4_0:
        case Source::Q5_0: return layout == exact_layout(type) || layout == Layout::int8;
        case Source::Q4_1:
        case Source::Q5_1: return layout == exact_layout(type) || layout == Layout::int8_min;
        case Source::Q8_0:
        case Source::Q4_K:
        case Source::Q5_K:
        case Source::Q6_K: return layout == exact_layout(type);
        default: return false;
    }
}

// The integer layouts that weights of any type can be rounded to; the others are only for their own types.
bool can_round_to(Layout layout) {
    return !is_integer(layout) || layout == Layout::int8 || layout == Layout::int8_min || layout == Layout::int4_min;
}

// Writes lane `lane` of group `sub` of a unit.
void write_group(Layout layout, const GroupOf32& g, int lane, uint8_t* unit, int sub) {
    const int bits = bits_of(layout);
    uint8_t* block = unit + size_t(sub) * quant_bytes(layout);
    for (int k = 0; k < kGroup; ++k) {
        const int at = 4 * lane + k % 4, j = k / 4, high = g.quants[k] >> 4;
        if (bits == 8) {
            block[64 * j + at] = g.quants[k];
            continue;
        }
        block[64 * (j % 4) + at] |= uint8_t((g.quants[k] & 15) << (j < 4 ? 0 : 4));
        if (bits == 5) block[256 + at] |= uint8_t(high << j);
        if (bits == 6) block[256 + 64 * (j / 4) + at] |= uint8_t(high << 2 * (j % 4));
    }
    uint8_t* scales = unit + size_t(unit_groups(layout)) * quant_bytes(layout);
    if (is_k(layout)) {
        uint8_t* own = scales + step_bytes(layout) * size_t(sub);
        if (layout == Layout::int6_k) {
            own[lane] = g.steps[0];
            own[16 + lane] = g.steps[1];
        } else {
            own[lane] = uint8_t((g.steps[0] & 15) | (g.steps[1] & 15) << 4);
            own[16 + lane % 8] |= uint8_t((g.steps[0] >> 4 | g.steps[1] >> 4 << 2) << 4 * (lane / 8));
        }
        scales += 8 * step_bytes(layout);
    }
    write16(scales + 2 * lane, g.scale);
    if (has_minimum(layout)) write16(scales + 32 + 2 * lane, g.minimum);
}

void write_floats(Layout layout, const float* x, int lane, uint8_t* unit) {
    for (int k = 0; k < kGroup; ++k) {
        const int line = k * kRows + lane;
        if (layout == Layout::f32)
            std::memcpy(unit + 4 * line, x + k, 4);
        else if (layout == Layout::f16)
            write16(unit + 2 * line, float_to_half(x[k]));
        else
            write16(unit + 2 * (k / 2 * 2 * kRows + 2 * lane + k % 2), float_to_bf16(x[k]));
    }
}

float read_back(Layout layout, const GroupOf32& g, const float* x, int k) {
    if (layout == Layout::f32) return x[k];
    if (layout == Layout::bf16) return bf16_to_float(float_to_bf16(x[k]));
    if (layout == Layout::f16) return half_to_float(float_to_half(x[k]));
    return weight_of(layout, g, k);
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
    bool group(int32_t r, int32_t g, const uint8_t* p, uint8_t* unit, double& error) const {
        GroupOf32 quants{};
        const int from = g % std::max(1, source_block(type).elements / kGroup), sub = g % unit_groups(layout);
        if (same_structure(type, layout)) {
            const bool finite = read_group(type, p, from, quants);
            const int raise = offset_of(layout) - offset_of(exact_layout(type));  // q - 8 = (q + 120) - 128
            for (uint8_t& q : quants.quants) q = uint8_t(q + raise);
            write_group(layout, quants, r % kRows, unit, sub);
            return finite;
        }
        const int32_t have = std::min(kGroup, k - g * kGroup);
        float x[kGroup] = {};
        bool finite = true;
        if (have == kGroup) {
            finite = read_floats(type, p, from, x);
        } else {  // only types of single elements have a short last group
            uint8_t whole[4 * kGroup] = {};
            std::memcpy(whole, p, size_t(have) * size_t(source_block(type).bytes));
            finite = read_floats(type, whole, 0, x);
        }
        if (!finite) return false;
        if (is_integer(layout)) {
            finite = round_group(layout, x, quants);
            write_group(layout, quants, r % kRows, unit, sub);
        } else {
            write_floats(layout, x, r % kRows, unit);
        }
        for (int32_t i = 0; i < have; ++i) error = std::max(error, std::fabs(double(read_back(layout, quants, x, i)) - double(x[i])));
        return finite && std::isfinite(error);
    }
    void row_block(int32_t b, int64_t& bad_row, double& error) const {
        const Matrix m{layout, nullptr, n, k};
        const SourceBlock unit = source_block(type);
        uint8_t* block = target + size_t(b) * m.row_block_bytes();
        std::memset(block, 0, m.row_block_bytes());
        for (int32_t r = b * kRows; r < std::min(n, (b + 1) * kRows); ++r) {
            const uint8_t* p = source + size_t(source_row(r)) * row_bytes;
            for (int32_t g = 0; g < m.groups(); ++g)
                if (!group(r, g, p + size_t(g) * kGroup / size_t(unit.elements) * size_t(unit.bytes),
                           block + size_t(g / unit_groups(layout)) * unit_bytes(layout), error) &&
                    (bad_row < 0 || r < bad_row))
                    bad_row = r;
        }
    }
};

}  // namespace

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
    if (!same_structure(type, layout) && !can_round_to(layout))
        throw std::invalid_argument("weights of this type cannot be rounded to this layout");
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

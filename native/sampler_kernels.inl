// The sampler's passes over the vocabulary, on the words of simd.h and, for the noise, sixteen lanes of uint32.
// Sums have one order and integers have one result, so all instruction sets agree in every bit.

#include "sampler.h"
#include "sampler_math.h"

namespace KVIK_NS {
using namespace kvik;

constexpr int32_t kSumBlock = 1024;  // terms added in f32 before their sum joins the total in f64
constexpr float kNone = -__builtin_inff();

// x[at] on, filled up from n on.
static inline F load_some(const float* x, int32_t n, int32_t at, float filling = kNone) {
    if (at + kLanes <= n) return load(x + at);
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = at + i < n ? x[at + i] : filling;
    return load(lanes);
}

static float row_max(const float* x, int32_t n, float* maxima, bool* suspect) {
    const F nothing = zero();
    F best = set1(kNone), odd = zero();  // odd stays 0 unless 0 * x is NaN
    for (int32_t begin = 0; begin < n; begin += kStripBlock, maxima += kLanes) {
        const int32_t end = begin + kStripBlock < n ? begin + kStripBlock : n;
        F m0 = set1(kNone), m1 = m0, m2 = m0, m3 = m0;
        int32_t i = begin;
        for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
            const F a = load(x + i), b = load(x + i + kLanes), c = load(x + i + 2 * kLanes), d = load(x + i + 3 * kLanes);
            m0 = max(a, m0), m1 = max(b, m1), m2 = max(c, m2), m3 = max(d, m3);
            odd = fma(add(add(a, b), add(c, d)), nothing, odd);  // a sum that overflows only costs the slow check
        }
        for (; i < end; i += kLanes) {
            m0 = max(load_some(x, end, i), m0);
            odd = fma(load_some(x, end, i, 0.0f), nothing, odd);
        }
        m0 = max(max(m0, m1), max(m2, m3));
        store(maxima, m0);
        best = max(best, m0);
    }
    const float sum = reduce_add(odd);
    *suspect = !(sum == 0.0f);
    return reduce_max(best);
}

static double exp_sum(const float* x, int32_t n, float top, float scale, float cut, float* weights) {
    const F t = set1(top), s = set1(scale), c = set1(cut);
    const int32_t padded = (n + kNoiseGroup - 1) / kNoiseGroup * kNoiseGroup;
    double total = 0.0;
    for (int32_t begin = 0; begin < padded; begin += kSumBlock) {
        const int32_t end = begin + kSumBlock < padded ? begin + kSumBlock : padded;
        F sum[4] = {zero(), zero(), zero(), zero()};
        for (int32_t i = begin; i < end; i += 4 * kLanes)
            for (int j = 0; j < 4; ++j) {
                const int32_t at = i + j * kLanes;
                const F v = i + 4 * kLanes <= n ? load(x + at) : load_some(x, n, at);
                const F w = where_less(v, c, zero(), exp(mul(sub(v, t), s)));
                if (weights) store(weights + at, w);
                sum[j] = add(sum[j], w);
            }
        total += double(reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3]))));
    }
    return total;
}

static int32_t collect(const float* x, int32_t n, float least, float most, int32_t* out) {
    const F low = set1(least), high = set1(most);
    int32_t count = 0;
    for (int32_t i = 0; i < n; i += kLanes) {
        const F v = load_some(x, n, i);
        uint32_t mask = mask_ge(v, low) & mask_ge(high, v);
        if (i + kLanes > n) mask &= (1u << (n - i)) - 1u;
        for (; mask; mask &= mask - 1) out[count++] = i + __builtin_ctz(mask);
    }
    return count;
}

static uint64_t exact_weights(const float* x, int32_t n, double scale, double top, uint64_t* weights) {
    uint64_t total = 0;
    int32_t at = 0;
    // bounded by itself: in one loop compilers make the bound a branch to a constant, and vectorise nothing
    for (double d[4 * kLanes]; at + 4 * kLanes <= n; at += 4 * kLanes) {
        for (int i = 0; i < 4 * kLanes; ++i) d[i] = bounded(double(x[at + i]) * scale - top);
        for (int i = 0; i < 4 * kLanes; ++i) weights[at + i] = bounded_weight(d[i]);
        for (int i = 0; i < 4 * kLanes; ++i) total += weights[at + i];
    }
    for (; at < n; ++at) total += weights[at] = exact_weight(double(x[at]) * scale - top);
    return total;
}

static uint64_t weight_above(const float* x, const uint64_t* weights, int32_t n, float cut) {
    uint64_t total = 0;
    for (int32_t i = 0; i < n; ++i) total += x[i] > cut ? weights[i] : 0;
    return total;
}

#if defined(KVIK_AVX512)
struct U {
    __m512i v;
};
static inline U uset1(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
static inline U uload(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
static inline U uadd(U a, U b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline U uxor(U a, U b, U c) { return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0x96)}; }
struct Product {
    U low, high;
};
static inline Product multiply(U a, U m) {
    const __m512i even = _mm512_mul_epu32(a.v, m.v), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), m.v);
    return {{_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))},
            {_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)}};
}
static inline F top_24(U a) { return {_mm512_cvtepi32_ps(_mm512_srli_epi32(a.v, 8))}; }
#elif defined(KVIK_AVX2)
struct U {
    __m256i a, b;
};
static inline U uset1(uint32_t x) { return {_mm256_set1_epi32(int(x)), _mm256_set1_epi32(int(x))}; }
static inline U uload(const uint32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
static inline U uadd(U x, U y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
static inline U uxor(U x, U y, U z) {
    return {_mm256_xor_si256(_mm256_xor_si256(x.a, y.a), z.a), _mm256_xor_si256(_mm256_xor_si256(x.b, y.b), z.b)};
}
struct Product {
    U low, high;
};
struct HalfProduct {
    __m256i low, high;
};
static inline HalfProduct multiply_half(__m256i a, __m256i m) {
    const __m256i even = _mm256_mul_epu32(a, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
    return {_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa),
            _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa)};
}
static inline Product multiply(U x, U m) {
    const HalfProduct a = multiply_half(x.a, m.a), b = multiply_half(x.b, m.b);
    return {{a.low, b.low}, {a.high, b.high}};
}
static inline F top_24(U x) {
    return {_mm256_cvtepi32_ps(_mm256_srli_epi32(x.a, 8)), _mm256_cvtepi32_ps(_mm256_srli_epi32(x.b, 8))};
}
#else
struct U {
    uint32_t v[kLanes];
};
static inline U uset1(uint32_t x) {
    U r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = x;
    return r;
}
static inline U uload(const uint32_t* p) {
    U r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
static inline U uadd(U a, U b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
    return a;
}
static inline U uxor(U a, U b, U c) {
    for (int i = 0; i < kLanes; ++i) a.v[i] ^= b.v[i] ^ c.v[i];
    return a;
}
struct Product {
    U low, high;
};
static inline Product multiply(U a, U m) {
    Product r;
    for (int i = 0; i < kLanes; ++i) {
        const uint64_t p = uint64_t(a.v[i]) * m.v[i];
        r.low.v[i] = uint32_t(p);
        r.high.v[i] = uint32_t(p >> 32);
    }
    return r;
}
static inline F top_24(U a) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = float(int32_t(a.v[i] >> 8));
    return r;
}
#endif

static int32_t race(const float* weights, int32_t n, float limit, uint64_t seed, uint32_t sample, uint32_t position,
                    int32_t* out) {
    uint32_t first[kLanes];
    for (uint32_t i = 0; i < kLanes; ++i) first[i] = i;
    const U a = uset1(kPhiloxA), b = uset1(kPhiloxB), step = uset1(16);
    const F scale = set1(limit * 0x1p24f);
    U block = uload(first);
    int32_t count = 0;
    for (int32_t at = 0; at < n; at += kNoiseGroup, block = uadd(block, step)) {
        U c0 = block, c1 = uset1(position), c2 = uset1(sample), c3 = uset1(0);
        uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
        for (int round = 0; round < kPhiloxRounds; ++round) {
            const Product p = multiply(c0, a), q = multiply(c2, b);
            c0 = uxor(q.high, c1, uset1(k0));
            c1 = q.low;
            c2 = uxor(p.high, c3, uset1(k1));
            c3 = p.low;
            k0 += kPhiloxKeyA;
            k1 += kPhiloxKeyB;
        }
        const U words[4] = {c0, c1, c2, c3};
        for (int j = 0; j < 4; ++j) {
            const int32_t begin = at + j * kLanes;
            uint32_t mask = mask_ge(mul(load(weights + begin), scale), top_24(words[j]));
            if (begin + kLanes > n) mask &= begin < n ? (1u << (n - begin)) - 1u : 0u;
            for (; mask; mask &= mask - 1) out[count++] = begin + __builtin_ctz(mask);
        }
    }
    return count;
}

static const SamplerKernels kSampler = {row_max, exp_sum, collect, exact_weights, weight_above, race};

}  // namespace KVIK_NS

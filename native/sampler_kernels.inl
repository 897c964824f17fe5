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

// Sixteen uint32. With vector instructions they are two lists of 64-bit lanes, the even ones and the odd ones, of which the low
// half counts: that is what vpmuludq reads and, shifted or not, writes, so that no round rearranges anything.
#if defined(KVIK_AVX512)
struct U {
    __m512i even, odd;
};
static inline U uset1(uint32_t x) {
    const __m512i all = _mm512_set1_epi64(int64_t(x));
    return {all, all};
}
static inline U uload(const uint32_t* p) {
    const __m512i all = _mm512_loadu_si512(p);
    return {all, _mm512_srli_epi64(all, 32)};
}
static inline U uadd(U a, U b) { return {_mm512_add_epi32(a.even, b.even), _mm512_add_epi32(a.odd, b.odd)}; }
static inline U uxor(U a, U b, U c) {
    return {_mm512_ternarylogic_epi32(a.even, b.even, c.even, 0x96), _mm512_ternarylogic_epi32(a.odd, b.odd, c.odd, 0x96)};
}
struct Product {
    U low, high;
};
static inline Product multiply(U a, U m) {
    const __m512i even = _mm512_mul_epu32(a.even, m.even), odd = _mm512_mul_epu32(a.odd, m.odd);
    return {{even, odd}, {_mm512_srli_epi64(even, 32), _mm512_srli_epi64(odd, 32)}};
}
static inline F top_24(U a) {
    const __m512i all = _mm512_mask_blend_epi32(0xaaaa, a.even, _mm512_slli_epi64(a.odd, 32));
    return {_mm512_cvtepi32_ps(_mm512_srli_epi32(all, 8))};
}
// the float whose bits are x, rounded
static inline F as_float(F x) { return {_mm512_castsi512_ps(_mm512_cvtps_epi32(x.v))}; }
// sum + w in lanes where a < b
static inline F add_less(F sum, F a, F b, F w) {
    return {_mm512_mask_add_ps(sum.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), sum.v, w.v)};
}
#elif defined(KVIK_AVX2)
struct U {  // of lanes 0 to 7 and of lanes 8 to 15
    __m256i even[2], odd[2];
};
static inline U uset1(uint32_t x) {
    const __m256i all = _mm256_set1_epi64x(int64_t(x));
    return {{all, all}, {all, all}};
}
static inline U uload(const uint32_t* p) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8));
    return {{a, b}, {_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32)}};
}
static inline U uadd(U x, U y) {
    U r;
    for (int i = 0; i < 2; ++i) {
        r.even[i] = _mm256_add_epi32(x.even[i], y.even[i]);
        r.odd[i] = _mm256_add_epi32(x.odd[i], y.odd[i]);
    }
    return r;
}
static inline U uxor(U x, U y, U z) {
    U r;
    for (int i = 0; i < 2; ++i) {
        r.even[i] = _mm256_xor_si256(_mm256_xor_si256(x.even[i], y.even[i]), z.even[i]);
        r.odd[i] = _mm256_xor_si256(_mm256_xor_si256(x.odd[i], y.odd[i]), z.odd[i]);
    }
    return r;
}
struct Product {
    U low, high;
};
static inline Product multiply(U x, U m) {
    Product r;
    for (int i = 0; i < 2; ++i) {
        r.low.even[i] = _mm256_mul_epu32(x.even[i], m.even[i]);
        r.low.odd[i] = _mm256_mul_epu32(x.odd[i], m.odd[i]);
        r.high.even[i] = _mm256_srli_epi64(r.low.even[i], 32);
        r.high.odd[i] = _mm256_srli_epi64(r.low.odd[i], 32);
    }
    return r;
}
static inline __m256 top_24(__m256i even, __m256i odd) {
    return _mm256_cvtepi32_ps(_mm256_srli_epi32(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa), 8));
}
static inline F top_24(U x) { return {top_24(x.even[0], x.odd[0]), top_24(x.even[1], x.odd[1])}; }
static inline F as_float(F x) {
    return {_mm256_castsi256_ps(_mm256_cvtps_epi32(x.a)), _mm256_castsi256_ps(_mm256_cvtps_epi32(x.b))};
}
static inline F add_less(F sum, F a, F b, F w) { return add(sum, where_less(a, b, w, zero())); }
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
static inline F top_24(U a) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = float(int32_t(a.v[i] >> 8));
    return r;
}
static inline F as_float(F x) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = __builtin_bit_cast(float, int32_t(__builtin_rintf(x.v[i])));
    return r;
}
static inline F add_less(F sum, F a, F b, F w) { return add(sum, where_less(a, b, w, zero())); }
#endif

// e^((x - top) * scale) by one multiplication with log2 e and a polynomial of degree 5 for 2^f on [-0.5, 0.5] (relative error
// 2.4e-7); a difference of 30 costs up to 5e-6 of the term by its rounding. Below 2^-126 it stays there.
static inline F quick_exp(F x, F top, F scale) {
    const F y = max(mul(sub(x, top), scale), set1(-126.0f));
    const F n = round_even(y), f = sub(y, n);
    F p = set1(1.326472731e-03f);
    p = fma(p, f, set1(9.671512991e-03f));
    p = fma(p, f, set1(5.550733581e-02f));
    p = fma(p, f, set1(2.402224243e-01f));
    p = fma(p, f, set1(6.931470037e-01f));
    p = fma(p, f, set1(1.0f));
    return scale2(p, n);
}

constexpr float kLog2E32 = 1.44269504088896341f;

static double exp_sum(const float* x, int32_t n, float top, float scale, float cut) {
    const F t = set1(top), s = set1(scale * kLog2E32), c = set1(cut);
    double total = 0.0;
    for (int32_t begin = 0; begin < n; begin += kSumBlock) {
        const int32_t end = begin + kSumBlock < n ? begin + kSumBlock : n;
        F sum[4] = {zero(), zero(), zero(), zero()};
        for (int32_t i = begin; i < end; i += 4 * kLanes) {
            const bool whole = i + 4 * kLanes <= n;
            KVIK_UNROLL
            for (int j = 0; j < 4; ++j) {
                const F v = whole ? load(x + i + j * kLanes) : load_some(x, n, i + j * kLanes);
                sum[j] = add(sum[j], where_less(v, c, zero(), quick_exp(v, t, s)));
            }
        }
        total += double(reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3]))));
    }
    return total;
}

// The total is exp_sum's to the last bit.
static double exp_sums(const float* x, int32_t n, float top, float scale, const float bounds[kBounds], double below[kBounds]) {
    const F t = set1(top), s = set1(scale * kLog2E32), lowest = set1(-3.402823466e38f);
    F bound[kBounds];
    double total = 0.0;
    for (int b = 0; b < kBounds; ++b) bound[b] = set1(bounds[b]), below[b] = 0.0;
    for (int32_t begin = 0; begin < n; begin += kSumBlock) {
        const int32_t end = begin + kSumBlock < n ? begin + kSumBlock : n;
        F sum[4] = {zero(), zero(), zero(), zero()}, under[kBounds];
        KVIK_UNROLL
        for (int b = 0; b < kBounds; ++b) under[b] = zero();
        for (int32_t i = begin; i < end; i += 4 * kLanes) {
            const bool whole = i + 4 * kLanes <= n;
            KVIK_UNROLL
            for (int j = 0; j < 4; ++j) {
                const F v = whole ? load(x + i + j * kLanes) : load_some(x, n, i + j * kLanes);
                const F w = where_less(v, lowest, zero(), quick_exp(v, t, s));
                sum[j] = add(sum[j], w);
                KVIK_UNROLL
                for (int b = 0; b < kBounds; ++b) under[b] = add_less(under[b], v, bound[b], w);
            }
        }
        total += double(reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3]))));
        for (int b = 0; b < kBounds; ++b) below[b] += double(reduce_add(under[b]));
    }
    return total;
}

static inline int32_t note(uint32_t mask, int32_t at, int32_t* out, int32_t count) {
    for (; mask; mask &= mask - 1) out[count++] = at + __builtin_ctz(mask);
    return count;
}

static int32_t collect(const float* x, int32_t n, const float* maxima, float least, int32_t* out) {
    const F low = set1(least);
    int32_t count = 0;
    for (int32_t begin = 0; begin < n; begin += kStripBlock, maxima += kLanes) {
        if (!mask_ge(load(maxima), low)) continue;
        const int32_t end = begin + kStripBlock < n ? begin + kStripBlock : n;
        int32_t i = begin;
        for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
            const F a = load(x + i), b = load(x + i + kLanes), c = load(x + i + 2 * kLanes), d = load(x + i + 3 * kLanes);
            if (!mask_ge(max(max(a, b), max(c, d)), low)) continue;
            count = note(mask_ge(a, low), i, out, count);
            count = note(mask_ge(b, low), i + kLanes, out, count);
            count = note(mask_ge(c, low), i + 2 * kLanes, out, count);
            count = note(mask_ge(d, low), i + 3 * kLanes, out, count);
        }
        for (; i < end; ++i)
            if (x[i] >= least) out[count++] = i;
    }
    return count;
}

static uint64_t exact_weights(const double* d, int32_t n, uint64_t* weights) {
    uint64_t total = 0;
    int32_t at = 0;
    // bounded by itself: in one loop compilers make the bound a branch to a constant, and vectorise nothing
    for (double b[4 * kLanes]; at + 4 * kLanes <= n; at += 4 * kLanes) {
        for (int i = 0; i < 4 * kLanes; ++i) b[i] = bounded(d[at + i]);
        for (int i = 0; i < 4 * kLanes; ++i) weights[at + i] = bounded_weight(b[i]);
        for (int i = 0; i < 4 * kLanes; ++i) total += weights[at + i];
    }
    for (; at < n; ++at) total += weights[at] = exact_weight(d[at]);
    return total;
}

static int64_t exact_moments(const double* d, int32_t n) {
    int64_t total = 0;
    for (int32_t i = 0; i < n; ++i) total += bounded_moment(bounded(d[i]));
    return total;
}

static void masked(const float* x, int32_t n, const uint32_t* allowed, float* out) {
    constexpr int kWord = 32;
    int32_t at = 0;
    for (; at + kWord <= n; at += kWord) {
        const uint32_t word = allowed[at / kWord];
        for (int i = 0; i < kWord; ++i) out[at + i] = word >> i & 1u ? x[at + i] : kNone;
    }
    for (; at < n; ++at) out[at] = allowed[at / kWord] >> (at % kWord) & 1u ? x[at] : kNone;
}

static void log_probabilities(const float* x, int32_t n, double best, double log_sum, float* out) {
    for (int32_t i = 0; i < n; ++i) out[i] = float((double(x[i]) - best) - log_sum);
}

// The four words of any 16 Philox blocks.
struct Words {
    U w[4];
};

#if defined(KVIK_AVX512) || defined(KVIK_AVX2)
// Philox under the key of a race, whose counter has position and sample as its words 1 and 2.
struct Noise {
    U position, sample, keys[kPhiloxRounds][2];
    explicit Noise(const Race& r) : position(uset1(r.position)), sample(uset1(r.sample)) {
        uint32_t k0 = uint32_t(r.seed), k1 = uint32_t(r.seed >> 32);
        for (auto& key : keys) {
            key[0] = uset1(k0);
            key[1] = uset1(k1);
            k0 += kPhiloxKeyA;
            k1 += kPhiloxKeyB;
        }
    }
};

static inline Words philox(U block, const Noise& noise) {
    const U a = uset1(kPhiloxA), b = uset1(kPhiloxB);
    U c0 = block, c1 = noise.position, c2 = noise.sample, c3 = uset1(0);
    KVIK_UNROLL
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const Product p = multiply(c0, a), q = multiply(c2, b);
        c0 = uxor(q.high, c1, noise.keys[round][0]);
        c1 = q.low;
        c2 = uxor(p.high, c3, noise.keys[round][1]);
        c3 = p.low;
    }
    return {{c0, c1, c2, c3}};
}
#else
// One block after another: GCC 12 gets rounds of sixteen wrong when it vectorises them for SSE2.
struct Noise {
    NoiseKey key;
    explicit Noise(const Race& r) : key{r.seed, r.sample, r.position} {}
};

static inline Words philox(U block, const Noise& noise) {
    Words made;
    for (int i = 0; i < kLanes; ++i) {
        const NoiseWords one = noise_words(noise.key, block.v[i], 0);
        for (int j = 0; j < 4; ++j) made.w[j].v[i] = one.w[j];
    }
    return made;
}
#endif

// An upper bound of e^((x - top) * scale) * limit * 2^24, at most 1.13 times as much: a float's bits, read as a number, are its
// logarithm but for a straight line within each octave.
struct Weigher {
    F top, slope, offset;
    explicit Weigher(const Race& r)
        : top(set1(r.top)), slope(set1(r.scale * (kLog2E32 * 0x1p23f))),
          offset(set1(float((log2_above(r.limit) + 24.0 + 127.0) * 0x1p23))) {}
    // above log2(limit), by the same straight line
    static double log2_above(float limit) {
        int exponent;
        const float m = __builtin_frexpf(limit, &exponent);  // limit = m * 2^exponent, m in [0.5, 1)
        return double(exponent) - 1.0 + (2.0 * double(m) - 1.0) + 0.0861;  // log2(1 + f) - f is at most 0.0861
    }
    F operator()(F x) const { return as_float(max(fma(sub(x, top), slope, offset), zero())); }
};

static int32_t race(const float* x, int32_t n, const Race& r, int32_t* out) {
    uint32_t first[kLanes];
    for (uint32_t i = 0; i < kLanes; ++i) first[i] = i;
    const U step = uset1(16);
    const Weigher weight(r);
    const Noise noise(r);
    const F cut = set1(r.cut);
    U block = uload(first);
    int32_t count = 0;
    for (int32_t at = 0; at < n; at += kNoiseGroup, block = uadd(block, step)) {
        const Words words = philox(block, noise);
        KVIK_UNROLL
        for (int j = 0; j < 4; ++j) {
            const int32_t begin = at + j * kLanes;
            const F v = load_some(x, n, begin);
            const uint32_t mask = mask_ge(weight(v), top_24(words.w[j])) & mask_ge(v, cut);
            if (mask) count = note(mask, begin, out, count);
        }
    }
    return count;
}

static int32_t race_listed(const float* x, const int32_t* ids, int32_t n, const Race& r, int32_t* out) {
    const Weigher weight(r);
    const Noise noise(r);
    int32_t count = 0;
    for (int32_t at = 0; at < n; at += kLanes) {
        uint32_t blocks[kLanes];
        float values[kLanes], drawn[4][kLanes];
        for (int32_t i = 0; i < kLanes; ++i) {
            const int32_t id = ids[at + i < n ? at + i : n - 1];
            blocks[i] = uint32_t(id >> 6) * 16u + uint32_t(id & 15);
            values[i] = x[id];
        }
        const Words words = philox(uload(blocks), noise);
        for (int j = 0; j < 4; ++j) store(drawn[j], top_24(words.w[j]));
        float own[kLanes];
        for (int32_t i = 0; i < kLanes; ++i) own[i] = drawn[ids[at + i < n ? at + i : n - 1] >> 4 & 3][i];
        uint32_t mask = mask_ge(weight(load(values)), load(own));
        if (at + kLanes > n) mask &= (1u << (n - at)) - 1u;
        for (; mask; mask &= mask - 1) out[count++] = ids[at + __builtin_ctz(mask)];
    }
    return count;
}

static const SamplerKernels kSampler = {row_max, exp_sum, exp_sums, collect, exact_weights, exact_moments,
                                        race, race_listed, masked, log_probabilities};

}  // namespace KVIK_NS

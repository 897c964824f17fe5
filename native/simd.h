// Sixteen lanes of f32, written three times: AVX-512, AVX2 and portable C++. A kernel written on these words has the
// same bits on all three, because every lane does the same IEEE operations in the same order: multiply-add is always
// fused, reductions always fold halves. Included only by isa_*.cpp, once each, in a namespace of its own.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace KVIK_NS {

constexpr int kLanes = 16;

// For loops over registers: unless they are unrolled early, GCC keeps a copy of the array in memory.
#define KVIK_UNROLL _Pragma("GCC unroll 16")

// f16 and bf16, one value at a time: IEEE, round to nearest even.
static inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16;
    uint32_t exponent = (h >> 10) & 31u;
    uint32_t mantissa = h & 0x3ffu;
    uint32_t bits;
    if (exponent == 31u) {
        bits = sign | 0x7f800000u | (mantissa << 13);
        if (mantissa) bits |= 0x400000u;  // conversion instructions quiet a signalling NaN
    } else if (exponent != 0u) {
        bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
    } else if (mantissa == 0u) {
        bits = sign;
    } else {
        exponent = 113u;
        while ((mantissa & 0x400u) == 0u) {
            mantissa <<= 1;
            --exponent;
        }
        bits = sign | (exponent << 23) | ((mantissa & 0x3ffu) << 13);
    }
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t float_to_half(float f) {
    uint32_t x;
    std::memcpy(&x, &f, 4);
    const uint16_t sign = uint16_t((x >> 16) & 0x8000u);
    x &= 0x7fffffffu;
    if (x > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((x >> 13) & 0x1ffu));
    if (x >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds past 65504
    if (x < 0x38800000u) {                                   // subnormal or zero
        if (x < 0x33000000u) return sign;
        const uint32_t shift = 126u - (x >> 23);  // 14 to 24
        const uint32_t m = (x & 0x7fffffu) | 0x800000u;
        uint32_t h = m >> shift;
        const uint32_t rest = m & ((1u << shift) - 1u), tie = 1u << (shift - 1u);
        if (rest > tie || (rest == tie && (h & 1u))) ++h;
        return uint16_t(sign | h);
    }
    uint32_t h = (x - 0x38000000u) >> 13;
    const uint32_t rest = x & 0x1fffu;
    if (rest > 0x1000u || (rest == 0x1000u && (h & 1u))) ++h;
    return uint16_t(sign | h);
}

static inline float bf16_to_float(uint16_t h) {
    const uint32_t bits = uint32_t(h) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t float_to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// While it lives, subnormal inputs and results count as zero.
struct FlushSubnormals {
#if defined(__SSE2__)
    const unsigned before = _mm_getcsr();
    FlushSubnormals() { _mm_setcsr(before | 0x8040u); }
    ~FlushSubnormals() { _mm_setcsr(before); }
#else
    FlushSubnormals() {}  // the bits of subnormals differ there
#endif
    FlushSubnormals(const FlushSubnormals&) = delete;
};

#if defined(KVIK_AVX512) || defined(KVIK_AVX2)
// 24 bytes of 6-bit steps (kernels.h) as two lists of 16 bytes.
struct StepBytes {
    __m128i scale, minimum;
};
static inline StepBytes step_bytes_at(const uint8_t* p) {
    const __m128i nibble = _mm_set1_epi8(15), both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 16));
    const __m128i high = _mm_and_si128(_mm_unpacklo_epi64(packed, _mm_srli_epi16(packed, 4)), nibble);
    const __m128i scale = _mm_slli_epi16(_mm_and_si128(high, _mm_set1_epi8(3)), 4);
    const __m128i minimum = _mm_slli_epi16(_mm_and_si128(high, _mm_set1_epi8(12)), 2);
    return {_mm_or_si128(_mm_and_si128(both, nibble), scale),
            _mm_or_si128(_mm_and_si128(_mm_srli_epi16(both, 4), nibble), minimum)};
}
#endif

#if defined(KVIK_AVX512)

struct F {
    __m512 v;
};
static inline F zero() { return {_mm512_setzero_ps()}; }
static inline F set1(float x) { return {_mm512_set1_ps(x)}; }
static inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
static inline F load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline F load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
static inline F load_u8(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
static inline void store_f16(uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
struct Steps {
    F scale, minimum;
};
static inline Steps load_steps(const uint8_t* p) {
    const StepBytes s = step_bytes_at(p);
    return {{_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(s.scale))}, {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(s.minimum))}};
}
static inline F load_i8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// Two bf16 a lane.
struct Pairs {
    __m512i v;
};
static inline Pairs load_pairs(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static inline Pairs set1_pairs(const uint16_t* p) {
    int32_t both;
    std::memcpy(&both, p, 4);
    return {_mm512_set1_epi32(both)};
}
static inline F first(Pairs p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(p.v, 16))}; }
static inline F second(Pairs p) {
    return {_mm512_castsi512_ps(_mm512_and_si512(p.v, _mm512_set1_epi32(int32_t(0xffff0000u))))};
}
static inline F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline F abs(F a) { return {_mm512_abs_ps(a.v)}; }
static inline F round_even(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// p * 2^n for whole n in [-126, 127]
static inline F scale2(F p, F n) {
    const __m512i e = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
    return {_mm512_mul_ps(p.v, _mm512_castsi512_ps(e))};
}
// lanes where a < b take x, the others y
static inline F where_less(F a, F b, F x, F y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
// one bit a lane where a >= b
static inline uint32_t mask_ge(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
static inline void store_i8(int8_t* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

static inline __m256 low_half(F a) { return _mm512_castps512_ps256(a.v); }
static inline __m256 high_half(F a) {
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
}
#define KVIK_HALVES 1

#elif defined(KVIK_AVX2)

struct F {
    __m256 a, b;
};
static inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
static inline F load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
static inline __m256 widen_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline F load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
static inline void store_f16(uint16_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8),
                     _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline __m128i load_8(const void* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
struct Steps {
    F scale, minimum;
};
static inline F widen_u8(__m128i x) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)))};
}
static inline F load_u8(const uint8_t* p) { return widen_u8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline Steps load_steps(const uint8_t* p) {
    const StepBytes s = step_bytes_at(p);
    return {widen_u8(s.scale), widen_u8(s.minimum)};
}
static inline F load_i8(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_8(p))), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_8(p + 8)))};
}
// Two bf16 a lane.
struct Pairs {
    __m256i a, b;
};
static inline Pairs load_pairs(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
static inline Pairs set1_pairs(const uint16_t* p) {
    int32_t both;
    std::memcpy(&both, p, 4);
    return {_mm256_set1_epi32(both), _mm256_set1_epi32(both)};
}
static inline F first(Pairs p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(p.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(p.b, 16))};
}
static inline F second(Pairs p) {
    const __m256i mask = _mm256_set1_epi32(int32_t(0xffff0000u));
    return {_mm256_castsi256_ps(_mm256_and_si256(p.a, mask)), _mm256_castsi256_ps(_mm256_and_si256(p.b, mask))};
}
static inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline F abs(F x) {
    const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
static inline F round_even(F x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline __m256 power2(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline F scale2(F p, F n) { return {_mm256_mul_ps(p.a, power2(n.a)), _mm256_mul_ps(p.b, power2(n.b))}; }
static inline F where_less(F a, F b, F x, F y) {
    return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_LT_OQ))};
}
static inline uint32_t mask_ge(F x, F y) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ))) |
           uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ))) << 8;
}
static inline void store_i8(int8_t* p, F x) {
    const __m256i i = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    const __m256i j = _mm256_permute4x64_epi64(i, 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi16(_mm256_castsi256_si128(j), _mm256_extracti128_si256(j, 1)));
}
static inline __m256 low_half(F x) { return x.a; }
static inline __m256 high_half(F x) { return x.b; }
#define KVIK_HALVES 1

#else  // portable: the definition

struct F {
    float v[kLanes];
};
#define KVIK_LANES(expression)                   \
    F r;                                         \
    for (int i = 0; i < kLanes; ++i) r.v[i] = (expression); \
    return r
static inline F set1(float x) { KVIK_LANES(x); }
static inline F zero() { return set1(0.0f); }
static inline F load(const float* p) { KVIK_LANES(p[i]); }
static inline void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
static inline F load_f16(const uint16_t* p) { KVIK_LANES(half_to_float(p[i])); }
static inline F load_bf16(const uint16_t* p) { KVIK_LANES(bf16_to_float(p[i])); }
static inline F load_u8(const uint8_t* p) { KVIK_LANES(float(p[i])); }
static inline void store_f16(uint16_t* p, F a) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(a.v[i]);
}
// 24 bytes of 6-bit steps; see kernels.h.
struct Steps {
    F scale, minimum;
};
static inline Steps load_steps(const uint8_t* p) {
    Steps s;
    for (int i = 0; i < kLanes; ++i) {
        const int high = p[16 + i % 8] >> 4 * (i / 8);
        s.scale.v[i] = float((p[i] & 15) | (high & 3) << 4);
        s.minimum.v[i] = float(p[i] >> 4 | (high & 12) << 2);
    }
    return s;
}
static inline F load_i8(const int8_t* p) { KVIK_LANES(float(p[i])); }
// Two bf16 a lane.
struct Pairs {
    uint16_t v[2 * kLanes];
};
static inline Pairs load_pairs(const uint8_t* p) {
    Pairs r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
static inline Pairs set1_pairs(const uint16_t* p) {
    Pairs r;
    for (int i = 0; i < 2 * kLanes; ++i) r.v[i] = p[i % 2];
    return r;
}
static inline F first(const Pairs& p) { KVIK_LANES(bf16_to_float(p.v[2 * i])); }
static inline F second(const Pairs& p) { KVIK_LANES(bf16_to_float(p.v[2 * i + 1])); }
static inline F add(F a, F b) { KVIK_LANES(a.v[i] + b.v[i]); }
static inline F sub(F a, F b) { KVIK_LANES(a.v[i] - b.v[i]); }
static inline F mul(F a, F b) { KVIK_LANES(a.v[i] * b.v[i]); }
static inline F div(F a, F b) { KVIK_LANES(a.v[i] / b.v[i]); }
static inline F fma(F a, F b, F c) { KVIK_LANES(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
// as the instructions do: the second operand where the comparison fails, NaN included
static inline F max(F a, F b) { KVIK_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline F min(F a, F b) { KVIK_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline F abs(F a) { KVIK_LANES(__builtin_fabsf(a.v[i])); }
static inline F round_even(F a) { KVIK_LANES(__builtin_rintf(a.v[i])); }
static inline F scale2(F p, F n) {
    F r;
    for (int i = 0; i < kLanes; ++i) {
        const uint32_t bits = uint32_t(int32_t(n.v[i]) + 127) << 23;
        float power;
        std::memcpy(&power, &bits, 4);
        r.v[i] = p.v[i] * power;
    }
    return r;
}
static inline F where_less(F a, F b, F x, F y) { KVIK_LANES(a.v[i] < b.v[i] ? x.v[i] : y.v[i]); }
static inline uint32_t mask_ge(F a, F b) {
    uint32_t m = 0;
    for (int i = 0; i < kLanes; ++i) m |= uint32_t(a.v[i] >= b.v[i]) << i;
    return m;
}
static inline void store_i8(int8_t* p, F a) {
    for (int i = 0; i < kLanes; ++i) p[i] = int8_t(__builtin_rintf(a.v[i]));
}
#undef KVIK_LANES
#endif

static inline float max_of(float a, float b) { return a > b ? a : b; }

// Fold 16 lanes: lane i with lane i + 8, then + 4, + 2, + 1.
#if defined(KVIK_HALVES)
static inline float reduce_add(F x) {
    const __m256 h = _mm256_add_ps(low_half(x), high_half(x));
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
static inline float reduce_max(F x) {
    const __m256 h = _mm256_max_ps(low_half(x), high_half(x));
    const __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}
#undef KVIK_HALVES
#else
static inline float reduce_add(F a) {
    float h[8];
    for (int i = 0; i < 8; ++i) h[i] = a.v[i] + a.v[i + 8];
    const float q0 = h[0] + h[4], q1 = h[1] + h[5], q2 = h[2] + h[6], q3 = h[3] + h[7];
    return (q0 + q2) + (q1 + q3);
}
static inline float reduce_max(F a) {
    float top = a.v[0];
    for (int i = 1; i < kLanes; ++i) top = max_of(a.v[i], top);
    return top;
}
#endif

// e^x, relative error below 3e-7 (degree-6 polynomial for 2^f on [-0.5, 0.5] and a two-part ln 2);
// exactly 0 below -87, clamped at 88.
static inline F exp(F x) {
    const F low = set1(-87.0f);
    const F y = min(max(x, low), set1(88.0f));
    const F n = round_even(mul(y, set1(1.44269504088896341f)));
    F r = fma(n, set1(-0.693359375f), y);
    r = fma(n, set1(2.12194440e-4f), r);
    F p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(mul(r, r), p, add(r, set1(1.0f)));
    return where_less(x, low, zero(), scale2(p, n));
}
static inline float exp1(float x) {
    float lanes[kLanes];
    store(lanes, exp(set1(x)));
    return lanes[0];
}

static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace KVIK_NS

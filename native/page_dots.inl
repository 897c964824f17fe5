// Exact integer dots of packed pages: 64-byte lines of 16 lanes x 4 unsigned bytes against rounded numbers of 15 bits. AVX-512
// takes such a number as two signed terms of 8 bits, 256 a + b, for which its instruction is made; the others as one of 16 bits.
// The sums are the same.

namespace KVIK_NS {
using namespace kvik;

constexpr float kMostSteps = 127 * 256;  // of a rounded number: its first term is in [-127, 127]

#if defined(KVIK_AVX512)

struct Ints {
    __m512i v;
};
static inline Ints no_ints() { return {_mm512_setzero_si512()}; }
static inline Ints to_ints(F x) { return {_mm512_cvtps_epi32(x.v)}; }
static inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline void store(int32_t* p, Ints a) { _mm512_storeu_si512(p, a.v); }

struct Line {
    __m512i v;
};
static inline Line load_line(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static inline Line low_nibbles(Line x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
static inline Line high_nibbles(Line x) { return low_nibbles({_mm512_srli_epi16(x.v, 4)}); }
// signed bytes plus 128
static inline Line lifted(Line x) { return {_mm512_xor_si512(x.v, _mm512_set1_epi8(-128))}; }

struct Dot {
    __m512i a, b;
};
static inline Dot no_dot() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
static inline F dot_of(const Dot& s, int32_t less) {
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(s.a, 8), s.b), _mm512_set1_epi32(less)))};
}
// Four times 16 rounded numbers: their first terms to `terms`, their second ones n bytes behind, as the packing instructions
// leave them: number 16 v + 4 i + j at 16 i + 4 v + j.
constexpr int kFourBytes = 16;  // from four numbers to the next four of the same 16
constexpr int sixteen_at(int v) { return v / 4 * 64 + v % 4 * 4; }  // where the v-th 16 begin
static inline void store_terms(uint8_t* terms, int n, const F* x) {
    const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(x[0].v), _mm512_cvtps_epi32(x[1].v));
    const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(x[2].v), _mm512_cvtps_epi32(x[3].v));
    const __m512i half = _mm512_set1_epi16(128), byte = _mm512_set1_epi16(255);
    _mm512_storeu_si512(terms, _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(low, half), 8),
                                                  _mm512_srai_epi16(_mm512_add_epi16(high, half), 8)));
    _mm512_storeu_si512(terms + n, _mm512_packus_epi16(_mm512_and_si512(low, byte), _mm512_and_si512(high, byte)));
}
// sum += the bytes times the four numbers at `terms`
static inline void add_dot(Dot& s, Line w, const uint8_t* terms, int n) {
    s.a = dot4(s.a, w.v, reinterpret_cast<const int8_t*>(terms));
    s.b = dot4(s.b, w.v, reinterpret_cast<const int8_t*>(terms + n));
}

#elif defined(KVIK_AVX2)

struct Ints {
    __m256i v[2];
};
static inline Ints no_ints() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
static inline Ints to_ints(F x) { return {{_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}}; }
static inline Ints add(Ints a, Ints b) { return {{_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1])}}; }
static inline void store(int32_t* p, Ints a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.v[1]);
}

struct Line {
    __m256i v[2];
};
static inline Line load_line(const uint8_t* p) {
    return {{_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))}};
}
static inline Line low_nibbles(Line x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {{_mm256_and_si256(x.v[0], mask), _mm256_and_si256(x.v[1], mask)}};
}
static inline Line lifted(Line x) {
    const __m256i sign = _mm256_set1_epi8(-128);
    return {{_mm256_xor_si256(x.v[0], sign), _mm256_xor_si256(x.v[1], sign)}};
}
static inline Line high_nibbles(Line x) { return low_nibbles({{_mm256_srli_epi16(x.v[0], 4), _mm256_srli_epi16(x.v[1], 4)}}); }

using Dot = Ints;
static inline Dot no_dot() { return no_ints(); }
static inline F dot_of(const Dot& s, int32_t less) {
    const __m256i off = _mm256_set1_epi32(less);
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(s.v[0], off)), _mm256_cvtepi32_ps(_mm256_sub_epi32(s.v[1], off))};
}
// Four times 16 numbers of 16 bits, of each four the first, third, second and fourth.
constexpr int kFourBytes = 8;
constexpr int sixteen_at(int v) { return 32 * v; }
static inline void store_sixteen(uint8_t* terms, F x) {
    const __m256i i = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13,
                                           10, 11, 14, 15);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(terms), _mm256_shuffle_epi8(i, order));
}
static inline void store_terms(uint8_t* terms, int, const F* x) {
    for (int v = 0; v < 4; ++v) store_sixteen(terms + sixteen_at(v), x[v]);
}
static inline void add_dot(Dot& s, Line w, const uint8_t* terms, int) {
    int32_t even, odd;
    std::memcpy(&even, terms, 4);
    std::memcpy(&odd, terms + 4, 4);
    const __m256i e = _mm256_set1_epi32(even), o = _mm256_set1_epi32(odd), mask = _mm256_set1_epi16(255);
    for (int i = 0; i < 2; ++i) {
        const __m256i x = _mm256_madd_epi16(_mm256_and_si256(w.v[i], mask), e);
        s.v[i] = _mm256_add_epi32(s.v[i], _mm256_add_epi32(x, _mm256_madd_epi16(_mm256_srli_epi16(w.v[i], 8), o)));
    }
}

#else  // portable: the definition

struct Ints {
    int32_t v[kLanes];
};
static inline Ints no_ints() { return {}; }
static inline Ints to_ints(F x) {
    Ints r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = int32_t(__builtin_rintf(x.v[i]));
    return r;
}
static inline Ints add(Ints a, const Ints& b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
    return a;
}
static inline void store(int32_t* p, const Ints& a) { std::memcpy(p, a.v, sizeof a.v); }

struct Line {
    uint8_t v[4 * kLanes];
};
static inline Line load_line(const uint8_t* p) {
    Line r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
static inline Line low_nibbles(Line x) {
    for (uint8_t& byte : x.v) byte &= 15;
    return x;
}
static inline Line lifted(Line x) {
    for (uint8_t& byte : x.v) byte ^= 0x80;
    return x;
}
static inline Line high_nibbles(Line x) {
    for (uint8_t& byte : x.v) byte = uint8_t(byte >> 4);
    return x;
}

using Dot = Ints;
static inline Dot no_dot() { return {}; }
static inline F dot_of(const Dot& s, int32_t less) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = float(s.v[i] - less);
    return r;
}
constexpr int kFourBytes = 8;
constexpr int sixteen_at(int v) { return 32 * v; }
static inline void store_terms(uint8_t* terms, int, const F* x) {
    int16_t whole[4 * kLanes];
    for (int i = 0; i < 4 * kLanes; ++i) whole[i] = int16_t(__builtin_rintf(x[i / kLanes].v[i % kLanes]));
    std::memcpy(terms, whole, sizeof whole);
}
static inline void add_dot(Dot& s, const Line& w, const uint8_t* terms, int) {
    int16_t x[4];
    std::memcpy(x, terms, sizeof x);
    for (int i = 0; i < 4 * kLanes; ++i) s.v[i / 4] += int32_t(w.v[i]) * x[i % 4];
}

#endif

}  // namespace KVIK_NS

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
// 16 of n rounded numbers, from `at` on: first all first terms, then all second ones.
static inline void store_bytes(uint8_t* p, __m512i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x)); }
static inline void store_terms(uint8_t* terms, int at, int n, F x) {
    const __m512i i = _mm512_cvtps_epi32(x.v);
    store_bytes(terms + at, _mm512_srai_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(128)), 8));
    store_bytes(terms + n + at, i);
}
constexpr int kTermBytes = 1;  // from a number to the next
// sum += the bytes times the four numbers from `at` on
static inline void add_dot(Dot& s, Line w, const uint8_t* terms, int at, int n) {
    s.a = dot4(s.a, w.v, reinterpret_cast<const int8_t*>(terms + at));
    s.b = dot4(s.b, w.v, reinterpret_cast<const int8_t*>(terms + n + at));
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
// 16 numbers of 16 bits, of each four the first, third, second and fourth.
static inline void store_terms(uint8_t* terms, int at, int, F x) {
    const __m256i i = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13,
                                           10, 11, 14, 15);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(terms + 2 * at), _mm256_shuffle_epi8(i, order));
}
constexpr int kTermBytes = 2;
static inline void add_dot(Dot& s, Line w, const uint8_t* terms, int at, int) {
    int32_t even, odd;
    std::memcpy(&even, terms + 2 * at, 4);
    std::memcpy(&odd, terms + 2 * at + 4, 4);
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
static inline void store_terms(uint8_t* terms, int at, int, F x) {
    int16_t whole[kLanes];
    for (int i = 0; i < kLanes; ++i) whole[i] = int16_t(__builtin_rintf(x.v[i]));
    std::memcpy(terms + 2 * at, whole, sizeof whole);
}
constexpr int kTermBytes = 2;
static inline void add_dot(Dot& s, const Line& w, const uint8_t* terms, int at, int) {
    int16_t x[4];
    std::memcpy(x, terms + 2 * at, sizeof x);
    for (int i = 0; i < 4 * kLanes; ++i) s.v[i / 4] += int32_t(w.v[i]) * x[i % 4];
}

#endif

}  // namespace KVIK_NS

// The integer dot product of one group: 16 outputs x 32 inputs against 32 activations, exact in int32. Quants as in
// kernels.h, of 4, 5, 6 or 8 bits: word j (0 to 7) of a group holds inputs 4j to 4j + 3 of 16 outputs.

namespace KVIK_NS {
using namespace kvik;

// The quant of one output (lane) and input (k) of a group.
static inline int quant_of(int bits, const uint8_t* p, int lane, int k) {
    const int at = 4 * lane + k % 4, j = k / 4;
    if (bits == 8) return p[64 * j + at];
    const uint8_t byte = p[64 * (j % 4) + at];
    const int low = j < 4 ? byte & 15 : byte >> 4;
    if (bits == 5) return low | (p[256 + at] >> j & 1) << 4;
    if (bits == 6) return low | (p[256 + 64 * (j / 4) + at] >> 2 * (j % 4) & 3) << 4;
    return low;
}

#if defined(KVIK_AVX512)

struct I {
    __m512i v;
};
static inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
// 256 * a + b
static inline I two_terms(I a, I b) { return {_mm512_add_epi32(_mm512_slli_epi32(a.v, 8), b.v)}; }

// c + four unsigned quants a lane times the same four activations, which the instruction broadcasts as it loads them.
// GCC 12 would load them in pairs and broadcast from a register: a quarter slower.
static inline __m512i dot4(__m512i c, __m512i w, const int8_t* a) {
    struct Four {
        int8_t bytes[4];
    };
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(c) : "v"(w), "m"(*reinterpret_cast<const Four*>(a)));
    return c;
}

// bytes of `high` shifted so that bit From lies at bit 4
template <int From>
static inline __m512i to_bit4(__m512i high) {
    if constexpr (From < 4)
        return _mm512_slli_epi16(high, 4 - From);
    else
        return _mm512_srli_epi16(high, From - 4);
}

template <int Bits>
struct Group {
    __m512i w[8];
    explicit Group(const uint8_t* p) {
        if constexpr (Bits == 8) {
            KVIK_UNROLL
            for (int j = 0; j < 8; ++j) w[j] = _mm512_loadu_si512(p + 64 * j);
        } else {
            const __m512i mask = _mm512_set1_epi8(15);
            KVIK_UNROLL
            for (int j = 0; j < 4; ++j) {
                const __m512i b = _mm512_loadu_si512(p + 64 * j);
                w[j] = _mm512_and_si512(b, mask);
                w[j + 4] = _mm512_and_si512(_mm512_srli_epi16(b, 4), mask);
            }
            if constexpr (Bits == 5) {
                const __m512i high = _mm512_loadu_si512(p + 256);
                put<0, 0>(high), put<1, 1>(high), put<2, 2>(high), put<3, 3>(high);
                put<4, 4>(high), put<5, 5>(high), put<6, 6>(high), put<7, 7>(high);
            } else if constexpr (Bits == 6) {
                const __m512i first = _mm512_loadu_si512(p + 256), second = _mm512_loadu_si512(p + 320);
                put<0, 0>(first), put<1, 2>(first), put<2, 4>(first), put<3, 6>(first);
                put<4, 0>(second), put<5, 2>(second), put<6, 4>(second), put<7, 6>(second);
            }
        }
    }
    // the bits of word J above its nibble, which begin at bit From
    template <int J, int From>
    void put(__m512i high) {
        const __m512i mask = _mm512_set1_epi8(Bits == 5 ? 0x10 : 0x30);
        w[J] = _mm512_ternarylogic_epi32(w[J], to_bit4<From>(high), mask, 0xf8);  // w | (high & mask)
    }
    // sum of (quant - Offset) * activation over words Begin to End; isum: of these activations
    template <int Offset, int Begin = 0, int End = 8>
    I dot(const int8_t* a, int32_t isum) const {
        __m512i c = Offset ? _mm512_set1_epi32(-Offset * isum) : _mm512_setzero_si512();
        __m512i d = _mm512_setzero_si512();
        KVIK_UNROLL
        for (int j = Begin; j < End; j += 2) {
            c = dot4(c, w[j], a + 4 * j);
            d = dot4(d, w[j + 1], a + 4 * j + 4);
        }
        return {_mm512_add_epi32(c, d)};
    }
};

#elif defined(KVIK_AVX2)

struct I {
    __m256i a, b;
};
static inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline I two_terms(I x, I y) {
    return {_mm256_add_epi32(_mm256_slli_epi32(x.a, 8), y.a), _mm256_add_epi32(_mm256_slli_epi32(x.b, 8), y.b)};
}

template <int Bits>
struct Group {
    const uint8_t* p;
    explicit Group(const uint8_t* block) : p(block) {}

    static __m256i load256(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
    static __m256i shifted(__m256i high, int from) {
        return from < 4 ? _mm256_slli_epi16(high, 4 - from) : _mm256_srli_epi16(high, from - 4);
    }
    // word j of 8 outputs, unsigned
    static __m256i word(const uint8_t* p, int j) {
        if constexpr (Bits == 8) return load256(p + 64 * j);
        const __m256i mask = _mm256_set1_epi8(15), b = load256(p + 64 * (j % 4));
        __m256i w = _mm256_and_si256(j < 4 ? b : _mm256_srli_epi16(b, 4), mask);
        if constexpr (Bits == 5)
            w = _mm256_or_si256(w, _mm256_and_si256(shifted(load256(p + 256), j), _mm256_set1_epi8(0x10)));
        if constexpr (Bits == 6)
            w = _mm256_or_si256(
                w, _mm256_and_si256(shifted(load256(p + 256 + 64 * (j / 4)), 2 * (j % 4)), _mm256_set1_epi8(0x30)));
        return w;
    }

    // 8 outputs; without VNNI the 16-bit sums must not overflow
    template <int Offset, int Begin, int End>
    static __m256i half(const uint8_t* p, const int32_t* x, int32_t isum) {
        const __m256i ones = _mm256_set1_epi16(1);
        __m256i sum = _mm256_setzero_si256();
        if constexpr (Bits < 8) {
            // 8 words of 4 bits give at most 8 * 2 * 15 * 127 = 30480, 4 of 5 bits 31496, 2 of 6 bits 32004
            constexpr int together = Bits == 4 ? 8 : (Bits == 5 ? 4 : 2);
            KVIK_UNROLL
            for (int from = Begin; from < End; from += together) {
                __m256i s = _mm256_setzero_si256();
                KVIK_UNROLL
                for (int j = from; j < (from + together < End ? from + together : End); ++j)
                    s = _mm256_add_epi16(s, _mm256_maddubs_epi16(word(p, j), _mm256_set1_epi32(x[j])));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(s, ones));
            }
            return Offset ? _mm256_sub_epi32(sum, _mm256_set1_epi32(Offset * isum)) : sum;
        } else {
            // |quant - 128| <= 128 against the activation with the quant's sign: 2 * 128 * 127 = 32512 fits
            const __m256i flip = _mm256_set1_epi8(-128);
            KVIK_UNROLL
            for (int j = Begin; j < End; ++j) {
                const __m256i b = _mm256_xor_si256(word(p, j), flip);
                const __m256i m =
                    _mm256_maddubs_epi16(_mm256_abs_epi8(b), _mm256_sign_epi8(_mm256_set1_epi32(x[j]), b));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(m, ones));
            }
            return Offset == 128 ? sum : _mm256_add_epi32(sum, _mm256_set1_epi32((128 - Offset) * isum));
        }
    }
    template <int Offset, int Begin = 0, int End = 8>
    I dot(const int8_t* a, int32_t isum) const {
        int32_t x[8];
        std::memcpy(x, a, 32);
        return {half<Offset, Begin, End>(p, x, isum), half<Offset, Begin, End>(p + 32, x, isum)};
    }
};

#else

struct I {
    int32_t v[kLanes];
};
static inline F to_float(I a) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = float(a.v[i]);
    return r;
}
static inline I two_terms(I a, I b) {
    I r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = 256 * a.v[i] + b.v[i];
    return r;
}

template <int Bits>
struct Group {
    uint8_t quants[kGroup][kLanes];
    explicit Group(const uint8_t* p) {
        for (int k = 0; k < kGroup; ++k)
            for (int i = 0; i < kLanes; ++i) quants[k][i] = uint8_t(quant_of(Bits, p, i, k));
    }
    template <int Offset, int Begin = 0, int End = 8>
    I dot(const int8_t* a, int32_t isum) const {
        I r;
        for (int i = 0; i < kLanes; ++i) r.v[i] = -Offset * isum;
        for (int k = 4 * Begin; k < 4 * End; ++k)
            for (int i = 0; i < kLanes; ++i) r.v[i] += quants[k][i] * a[k];
        return r;
    }
};

#endif

}  // namespace KVIK_NS

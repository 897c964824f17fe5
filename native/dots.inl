// The integer dot product of one group: 16 outputs x 32 inputs against 32 activations, exact in int32. Quants as in
// kernels.h, of 4, 5, 6 or 8 bits: word j (0 to 7) of a group holds inputs 4j to 4j + 3 of 16 outputs.

namespace KVIK_NS {
using namespace kvik;

// One row's integers of one group, and what its sums need.
struct RowGroup {
    const int8_t *q, *fine;
    int32_t isum, fine_isum;
};

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
    template <int Offset, int Begin, int End>
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
    template <int Offset, int Begin, int End, bool Fine, int M>
    void dots(int, const RowGroup* r, F* out) const {
        KVIK_UNROLL
        for (int m = 0; m < M; ++m) {
            I sum = dot<Offset, Begin, End>(r[m].q, r[m].isum);
            if constexpr (Fine) sum = two_terms(sum, dot<Offset, Begin, End>(r[m].fine, r[m].fine_isum));
            out[m] = to_float(sum);
        }
    }
};

#elif defined(KVIK_AVX2)

// Sixteen outputs are two parts of eight here, and one look at eight outputs' quants serves several rows: they are
// unpacked once, and the multiplier, which does one instruction a cycle, has no other work.
struct P {
    __m256 v;
};
constexpr int kParts = 2;
static inline P part_zero() { return {_mm256_setzero_ps()}; }
static inline P part_of(F x, int part) { return {part ? x.b : x.a}; }
static inline F whole(const P* x) { return {x[0].v, x[1].v}; }
static inline P scaled(P x, float y) { return {_mm256_mul_ps(x.v, _mm256_set1_ps(y))}; }
static inline P fma(P x, P y, P z) { return {_mm256_fmadd_ps(x.v, y.v, z.v)}; }
static inline P fma(P x, float y, P z) { return {_mm256_fmadd_ps(x.v, _mm256_set1_ps(y), z.v)}; }

template <int Bits>
struct Group {
    const uint8_t* p;
    explicit Group(const uint8_t* block) : p(block) {}

    static __m256i load256(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
    // The same four bytes in every lane. GCC 12 would share a broadcast between parts, and spill it in between.
    static __m256i four(const void* at) {
        struct Four {
            int8_t bytes[4];
        };
        __m256i x;
        __asm__("vpbroadcastd %1, %0" : "=x"(x) : "m"(*static_cast<const Four*>(at)));
        return x;
    }
    // GCC 12 would put sums off until all their summands are there, and those into memory meanwhile.
    static void now(__m256i& sum) { __asm__("" : "+x"(sum)); }
    static __m256i shifted(__m256i high, int from) {
        return from < 4 ? _mm256_slli_epi16(high, 4 - from) : _mm256_srli_epi16(high, from - 4);
    }
    // word j of 8 outputs, unsigned
    static __m256i word(const uint8_t* p, int j) {
        const __m256i mask = _mm256_set1_epi8(15), b = load256(p + 64 * (j % 4));
        __m256i w = _mm256_and_si256(j < 4 ? b : _mm256_srli_epi16(b, 4), mask);
        if constexpr (Bits == 5)
            w = _mm256_or_si256(w, _mm256_and_si256(shifted(load256(p + 256), j), _mm256_set1_epi8(0x10)));
        if constexpr (Bits == 6)
            w = _mm256_or_si256(
                w, _mm256_and_si256(shifted(load256(p + 256 + 64 * (j / 4)), 2 * (j % 4)), _mm256_set1_epi8(0x30)));
        return w;
    }

    // sums of quant * x for M rows' int8 x; the 16-bit sums must not overflow
    template <int Begin, int End, int M>
    static inline void sums(const uint8_t* p, const int8_t* const* x, __m256i* sum) {
        // 8 words of 4 bits give at most 8 * 2 * 15 * 127 = 30480, 4 of 5 bits 31496, 2 of 6 bits 32004
        constexpr int together = Bits == 4 ? 8 : (Bits == 5 ? 4 : 2);
        KVIK_UNROLL
        for (int from = Begin; from < End; from += together) {
            __m256i s[M];
            KVIK_UNROLL
            for (int j = from; j < (from + together < End ? from + together : End); ++j) {
                const __m256i w = word(p, j);
                KVIK_UNROLL
                for (int m = 0; m < M; ++m) {
                    const __m256i t = _mm256_maddubs_epi16(w, four(x[m] + 4 * j));
                    s[m] = j == from ? t : _mm256_add_epi16(s[m], t);
                    now(s[m]);
                }
            }
            KVIK_UNROLL
            for (int m = 0; m < M; ++m) {
                const __m256i t = _mm256_madd_epi16(s[m], _mm256_set1_epi16(1));
                sum[m] = from == Begin ? t : _mm256_add_epi32(sum[m], t);
            }
        }
    }

    // One row's 32 activations as 16 bits, both terms together: word j holds inputs 4j and 4j + 2, then 4j + 1 and 4j + 3.
    template <bool Fine>
    static inline void widen(const RowGroup& r, int32_t* even, int32_t* odd) {
        const __m256i q = load256(r.q);
        __m256i e = _mm256_slli_epi16(q, 8), o;
        if constexpr (Fine) {
            const __m256i f = load256(r.fine);
            e = _mm256_add_epi16(e, _mm256_srai_epi16(_mm256_slli_epi16(f, 8), 8));
            o = _mm256_add_epi16(_mm256_and_si256(q, _mm256_set1_epi16(int16_t(0xff00))), _mm256_srai_epi16(f, 8));
        } else {
            e = _mm256_srai_epi16(e, 8);
            o = _mm256_srai_epi16(q, 8);
        }
        _mm256_store_si256(reinterpret_cast<__m256i*>(even), e);
        _mm256_store_si256(reinterpret_cast<__m256i*>(odd), o);
    }

    // Sums of (quant - 128) * x over words Begin to End in 16-bit products, which takes both terms of x at once:
    // 32 products of at most 128 * 32767 fit in 32 bits.
    template <int Begin, int End, bool Fine, int M>
    static inline void wide_sums(const uint8_t* p, const RowGroup* r, __m256i* sum) {
        alignas(32) int32_t even[M][8], odd[M][8];
        KVIK_UNROLL
        for (int m = 0; m < M; ++m) widen<Fine>(r[m], even[m], odd[m]);
        KVIK_UNROLL
        for (int j = Begin; j < End; ++j) {
            const __m256i b = _mm256_xor_si256(load256(p + 64 * j), _mm256_set1_epi8(-128));
            const __m256i w0 = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), w1 = _mm256_srai_epi16(b, 8);
            KVIK_UNROLL
            for (int m = 0; m < M; ++m) {
                const __m256i s = _mm256_madd_epi16(w0, four(even[m] + j)), t = _mm256_madd_epi16(w1, four(odd[m] + j));
                sum[m] = j == Begin ? s : _mm256_add_epi32(sum[m], s);
                now(sum[m]);
                sum[m] = _mm256_add_epi32(sum[m], t);
                now(sum[m]);
            }
        }
    }

    // sums of (quant - Offset) * activation of a part's outputs for M rows
    template <int Offset, int Begin, int End, bool Fine, int M>
    inline void dots(int part, const RowGroup* r, P* out) const {
        __asm__ volatile("" ::: "memory");  // each part broadcasts for itself
        const uint8_t* at = p + 32 * part;
        __m256i sum[M], rest[M];
        constexpr int offset = Bits == 8 ? Offset - 128 : Offset;
        if constexpr (Bits == 8) {
            wide_sums<Begin, End, Fine, M>(at, r, sum);
        } else {
            const int8_t* x[M];
            KVIK_UNROLL
            for (int m = 0; m < M; ++m) x[m] = r[m].q;
            sums<Begin, End, M>(at, x, sum);
            if constexpr (Fine) {
                KVIK_UNROLL
                for (int m = 0; m < M; ++m) x[m] = r[m].fine;
                sums<Begin, End, M>(at, x, rest);
                KVIK_UNROLL
                for (int m = 0; m < M; ++m) sum[m] = _mm256_add_epi32(_mm256_slli_epi32(sum[m], 8), rest[m]);
            }
        }
        KVIK_UNROLL
        for (int m = 0; m < M; ++m) {
            const int32_t isum = Fine ? 256 * r[m].isum + r[m].fine_isum : r[m].isum;
            if constexpr (offset != 0) sum[m] = _mm256_sub_epi32(sum[m], _mm256_set1_epi32(offset * isum));
            out[m] = {_mm256_cvtepi32_ps(sum[m])};
        }
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
    template <int Offset, int Begin, int End>
    I dot(const int8_t* a, int32_t isum) const {
        I r;
        for (int i = 0; i < kLanes; ++i) r.v[i] = -Offset * isum;
        for (int k = 4 * Begin; k < 4 * End; ++k)
            for (int i = 0; i < kLanes; ++i) r.v[i] += quants[k][i] * a[k];
        return r;
    }
    template <int Offset, int Begin, int End, bool Fine, int M>
    void dots(int, const RowGroup* r, F* out) const {
        for (int m = 0; m < M; ++m) {
            I sum = dot<Offset, Begin, End>(r[m].q, r[m].isum);
            if constexpr (Fine) sum = two_terms(sum, dot<Offset, Begin, End>(r[m].fine, r[m].fine_isum));
            out[m] = to_float(sum);
        }
    }
};

#endif

#if !defined(KVIK_AVX2)
// The sixteen outputs are one part, and rows come one by one.
using P = F;
constexpr int kParts = 1;
static inline P part_zero() { return zero(); }
static inline P part_of(const F& x, int) { return x; }
static inline F whole(const P* x) { return *x; }
static inline P scaled(const P& x, float y) { return mul(x, set1(y)); }
static inline P fma(const P& x, float y, const P& z) { return fma(x, set1(y), z); }
#endif

}  // namespace KVIK_NS

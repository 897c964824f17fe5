// Packed matrix times rows of activations. One block of 16 outputs is read once per tile of up to 8 rows.
// The integer dot product of a group is exact in int32; groups are then summed in order by fused multiply-adds,
// so a row's result depends on nothing but the row and the matrix.

namespace KVIK_NS {
using namespace kvik;

// ---- integer dot product: 16 outputs x 32 inputs against 32 activations -------------------------------------------

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

template <int Bits>
struct Group {
    __m512i w[8];
    explicit Group(const uint8_t* p) {
        if constexpr (Bits == 4) {
            const __m512i mask = _mm512_set1_epi8(15);
            KVIK_UNROLL
            for (int j = 0; j < 4; ++j) {
                const __m512i b = _mm512_loadu_si512(p + 64 * j);
                w[j] = _mm512_and_si512(b, mask);
                w[j + 4] = _mm512_and_si512(_mm512_srli_epi16(b, 4), mask);
            }
        } else {
            KVIK_UNROLL
            for (int j = 0; j < 8; ++j) w[j] = _mm512_loadu_si512(p + 64 * j);
        }
    }
    // sum of (quant - Offset) * activation
    template <int Offset>
    I dot(const int8_t* a, int32_t isum) const {
        __m512i c = Offset ? _mm512_set1_epi32(-Offset * isum) : _mm512_setzero_si512();
        __m512i d = _mm512_setzero_si512();
        KVIK_UNROLL
        for (int j = 0; j < 8; j += 2) {
            c = dot4(c, w[j], a + 4 * j);
            d = dot4(d, w[j + 1], a + 4 * j + 4);
        }
        return {_mm512_add_epi32(c, d)};
    }
};
constexpr int kTile = 8;

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

    // 8 outputs; without VNNI the 16-bit sums must not overflow: 4-bit quants give at most 8 * 2 * 15 * 127 = 30480
    template <int Offset>
    static __m256i half(const uint8_t* p, const int32_t* x, int32_t isum) {
        const __m256i ones = _mm256_set1_epi16(1);
        if constexpr (Bits == 4) {
            const __m256i mask = _mm256_set1_epi8(15);
            __m256i s = _mm256_setzero_si256();
            KVIK_UNROLL
            for (int j = 0; j < 4; ++j) {
                const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 64 * j));
                s = _mm256_add_epi16(s, _mm256_maddubs_epi16(_mm256_and_si256(b, mask), _mm256_set1_epi32(x[j])));
                s = _mm256_add_epi16(s, _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(b, 4), mask),
                                                             _mm256_set1_epi32(x[j + 4])));
            }
            const __m256i sum = _mm256_madd_epi16(s, ones);
            return Offset ? _mm256_sub_epi32(sum, _mm256_set1_epi32(Offset * isum)) : sum;
        } else {
            // |quant - 128| <= 128 against the activation with the quant's sign: 2 * 128 * 127 = 32512 fits
            const __m256i flip = _mm256_set1_epi8(-128);
            __m256i sum = _mm256_setzero_si256();
            KVIK_UNROLL
            for (int j = 0; j < 8; ++j) {
                const __m256i b =
                    _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 64 * j)), flip);
                const __m256i m =
                    _mm256_maddubs_epi16(_mm256_abs_epi8(b), _mm256_sign_epi8(_mm256_set1_epi32(x[j]), b));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(m, ones));
            }
            return Offset == 128 ? sum : _mm256_add_epi32(sum, _mm256_set1_epi32((128 - Offset) * isum));
        }
    }
    template <int Offset>
    I dot(const int8_t* a, int32_t isum) const {
        int32_t x[8];
        std::memcpy(x, a, 32);
        return {half<Offset>(p, x, isum), half<Offset>(p + 32, x, isum)};
    }
};
constexpr int kTile = 2;

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
    const uint8_t* p;
    explicit Group(const uint8_t* block) : p(block) {}
    template <int Offset>
    I dot(const int8_t* a, int32_t isum) const {
        I r;
        for (int i = 0; i < kLanes; ++i) r.v[i] = -Offset * isum;
        for (int j = 0; j < (Bits == 4 ? 4 : 8); ++j)
            for (int i = 0; i < kLanes; ++i)
                KVIK_UNROLL
                for (int b = 0; b < 4; ++b) {
                    const uint8_t w = p[64 * j + 4 * i + b];
                    if constexpr (Bits == 4)
                        r.v[i] += (w & 15) * a[4 * j + b] + (w >> 4) * a[16 + 4 * j + b];
                    else
                        r.v[i] += w * a[4 * j + b];
                }
        return r;
    }
};
constexpr int kTile = 4;

#endif

// ---- tiles of M rows ----------------------------------------------------------------------------------------------

constexpr size_t kAhead = 10240;  // bytes of weights asked for before they are needed

template <Layout L>
struct Traits {
    static constexpr int bits = (L == Layout::int4 || L == Layout::int4_min) ? 4 : 8;
    static constexpr bool minimum = L == Layout::int4_min || L == Layout::int8_min;
    static constexpr int offset = minimum ? 0 : (bits == 4 ? 8 : 128);
    static constexpr size_t quants = bits == 4 ? 256 : 512;
};

template <Layout L, int M, bool Fine>
static inline void tile_integer(const uint8_t* w, int groups, const Activations& a, int row, float* out, int ldo,
                                bool accumulate) {
    using T = Traits<L>;
    const int lg = a.ld / kGroup;
    const int8_t* q = a.q + size_t(row) * a.ld;
    const float* scale = a.scale + size_t(row) * lg;
    const float* sum = a.sum + size_t(row) * lg;
    const int32_t* isum = a.isum + size_t(row) * lg;
    const int8_t* fine = Fine ? a.fine + size_t(row) * a.ld : nullptr;
    const int32_t* fine_isum = Fine ? a.fine_isum + size_t(row) * lg : nullptr;
    F acc[M];
    KVIK_UNROLL
    for (int m = 0; m < M; ++m) acc[m] = zero();
    for (int g = 0; g < groups; ++g, w += block_bytes(L)) {
        for (size_t line = 0; line < block_bytes(L); line += 64) prefetch(w + kAhead + line);
        const Group<T::bits> group(w);
        const F s = load_f16(reinterpret_cast<const uint16_t*>(w + T::quants));
        KVIK_UNROLL
        for (int m = 0; m < M; ++m) {
            const size_t at = size_t(m) * a.ld + g * kGroup;
            I dot = group.template dot<T::offset>(q + at, isum[m * lg + g]);
            if constexpr (Fine)
                dot = two_terms(dot, group.template dot<T::offset>(fine + at, fine_isum[m * lg + g]));
            acc[m] = fma(mul(to_float(dot), set1(scale[m * lg + g])), s, acc[m]);
        }
        if constexpr (T::minimum) {
            const F low = load_f16(reinterpret_cast<const uint16_t*>(w + T::quants + 32));
            KVIK_UNROLL
            for (int m = 0; m < M; ++m) acc[m] = fma(low, set1(sum[m * lg + g]), acc[m]);
        }
    }
    KVIK_UNROLL
    for (int m = 0; m < M; ++m) {
        float* o = out + size_t(m) * ldo;
        store(o, accumulate ? add(load(o), acc[m]) : acc[m]);
    }
}

template <Layout L>
static inline F load_line(const uint8_t* w, int k) {
    if constexpr (L == Layout::bf16)
        return load_bf16(reinterpret_cast<const uint16_t*>(w) + size_t(k) * kRows);
    else if constexpr (L == Layout::f16)
        return load_f16(reinterpret_cast<const uint16_t*>(w) + size_t(k) * kRows);
    else
        return load(reinterpret_cast<const float*>(w) + size_t(k) * kRows);
}

template <Layout L, int M>
static inline void tile_real(const uint8_t* w, int groups, const Activations& a, int row, float* out, int ldo,
                             bool accumulate) {
    const float* x = a.x + size_t(row) * a.ld;
    F even[M], odd[M];
    KVIK_UNROLL
    for (int m = 0; m < M; ++m) even[m] = odd[m] = zero();
    for (int g = 0; g < groups; ++g, w += block_bytes(L), x += kGroup) {
        for (size_t line = 0; line < block_bytes(L); line += 64) prefetch(w + 2 * kAhead + line);
        for (int k = 0; k < kGroup; k += 2) {
            const F w0 = load_line<L>(w, k), w1 = load_line<L>(w, k + 1);
            KVIK_UNROLL
            for (int m = 0; m < M; ++m) {
                even[m] = fma(w0, set1(x[size_t(m) * a.ld + k]), even[m]);
                odd[m] = fma(w1, set1(x[size_t(m) * a.ld + k + 1]), odd[m]);
            }
        }
    }
    KVIK_UNROLL
    for (int m = 0; m < M; ++m) {
        float* o = out + size_t(m) * ldo;
        const F y = add(even[m], odd[m]);
        store(o, accumulate ? add(load(o), y) : y);
    }
}

template <Layout L, int M, bool Fine>
static inline void tile(const uint8_t* w, int groups, const Activations& a, int row, float* out, int ldo,
                        bool accumulate) {
    if constexpr (is_integer(L))
        tile_integer<L, M, Fine>(w, groups, a, row, out, ldo, accumulate);
    else
        tile_real<L, M>(w, groups, a, row, out, ldo, accumulate);
}

template <Layout L, int M, bool Fine>
static void tile_of(int rest, const uint8_t* w, int groups, const Activations& a, int row, float* out, int ldo,
                    bool accumulate) {
    if (rest == M)
        tile<L, M, Fine>(w, groups, a, row, out, ldo, accumulate);
    else if constexpr (M > 1)
        tile_of<L, M - 1, Fine>(rest, w, groups, a, row, out, ldo, accumulate);
}

// Rows are walked in chunks whose activations stay in the second-level cache while several blocks of weights pass.
template <Layout L, bool Fine>
static void matmul_layout(const Matrix& w, const Activations& a, int rows, int block_begin, int block_end, float* out,
                          int ldo, bool accumulate) {
    const int groups = w.groups();
    const size_t stride = size_t(groups) * block_bytes(L);
    const int row_bytes = is_integer(L) ? (Fine ? 2 : 1) * (a.ld + a.ld / kGroup * 12) : a.ld * 4;
    int chunk = (256 * 1024 / row_bytes) & ~7;
    if (chunk < 8) chunk = 8;
    for (int begin = 0; begin < rows; begin += chunk) {
        const int end = begin + chunk < rows ? begin + chunk : rows;
        for (int b = block_begin; b < block_end; ++b) {
            const uint8_t* data = w.data + size_t(b) * stride;
            float* column = out + b * kRows;
            int row = begin;
            for (; row + kTile <= end; row += kTile)
                tile<L, kTile, Fine>(data, groups, a, row, column + size_t(row) * ldo, ldo, accumulate);
            if (row < end)
                tile_of<L, kTile, Fine>(end - row, data, groups, a, row, column + size_t(row) * ldo, ldo, accumulate);
        }
    }
}

template <Layout L>
static void matmul_precision(const Matrix& w, const Activations& a, int rows, int block_begin, int block_end, float* out,
                             int ldo, bool accumulate) {
    if constexpr (is_integer(L))
        if (a.fine) return matmul_layout<L, true>(w, a, rows, block_begin, block_end, out, ldo, accumulate);
    matmul_layout<L, false>(w, a, rows, block_begin, block_end, out, ldo, accumulate);
}

static void matmul(const Matrix& w, const Activations& a, int32_t rows, int32_t begin, int32_t end, float* out,
                   int32_t ldo, bool accumulate) {
    switch (w.layout) {
        case Layout::f32: return matmul_precision<Layout::f32>(w, a, rows, begin, end, out, ldo, accumulate);
        case Layout::f16: return matmul_precision<Layout::f16>(w, a, rows, begin, end, out, ldo, accumulate);
        case Layout::bf16: return matmul_precision<Layout::bf16>(w, a, rows, begin, end, out, ldo, accumulate);
        case Layout::int8: return matmul_precision<Layout::int8>(w, a, rows, begin, end, out, ldo, accumulate);
        case Layout::int8_min: return matmul_precision<Layout::int8_min>(w, a, rows, begin, end, out, ldo, accumulate);
        case Layout::int4: return matmul_precision<Layout::int4>(w, a, rows, begin, end, out, ldo, accumulate);
        case Layout::int4_min: return matmul_precision<Layout::int4_min>(w, a, rows, begin, end, out, ldo, accumulate);
    }
}

// One row of the matrix, as f32: the embedding of a token.
static void embed(const Matrix& w, int32_t token, float* out) {
    const int groups = w.groups(), lane = token % kRows;
    const uint8_t* p = w.data + size_t(token / kRows) * groups * block_bytes(w.layout);
    for (int g = 0; g < groups; ++g, p += block_bytes(w.layout), out += kGroup) {
        if (!is_integer(w.layout)) {
            for (int k = 0; k < kGroup; ++k) {
                const int i = k * kRows + lane;
                if (w.layout != Layout::f32) {
                    uint16_t h;
                    std::memcpy(&h, p + 2 * i, 2);
                    out[k] = w.layout == Layout::bf16 ? bf16_to_float(h) : half_to_float(h);
                } else {
                    std::memcpy(out + k, p + 4 * i, 4);
                }
            }
            continue;
        }
        const bool four = w.layout == Layout::int4 || w.layout == Layout::int4_min;
        const bool minimum = w.layout == Layout::int4_min || w.layout == Layout::int8_min;
        const uint8_t* scales = p + (four ? 256 : 512);
        uint16_t h;
        std::memcpy(&h, scales + 2 * lane, 2);
        const float scale = half_to_float(h);
        float low = 0.0f;
        if (minimum) {
            std::memcpy(&h, scales + 32 + 2 * lane, 2);
            low = half_to_float(h);
        }
        const int offset = minimum ? 0 : (four ? 8 : 128);
        for (int k = 0; k < kGroup; ++k) {
            const uint8_t byte = p[64 * ((four ? k & 15 : k) / 4) + 4 * lane + k % 4];
            const int quant = four ? (k < 16 ? byte & 15 : byte >> 4) : byte;
            out[k] = __builtin_fmaf(scale, float(quant - offset), low);
        }
    }
}

}  // namespace KVIK_NS

// Packed matrix times rows of activations. One row block of 16 outputs is read once per tile of up to kTile rows; the first
// tile asks for the weights ahead, the others find them near.
// The integer dot product of a group is exact in int32; groups are then summed in order by fused multiply-adds,
// so a row's result depends on nothing but the row and the matrix.

namespace KVIK_NS {
using namespace kvik;

#if defined(KVIK_AVX512)
constexpr int kTile = 8;
#elif defined(KVIK_AVX2)
constexpr int kTile = 8;
#else
constexpr int kTile = 4;
#endif
constexpr size_t kAhead = 10240;  // bytes of weights asked for before they are needed

// ---- integer layouts: groups rounded to int8 -----------------------------------------------------------------------

// Row `row` of the activations in group g: all of its inputs, or of int6_k the first or last 16.
enum class Span { all, low, high };
template <Span S, bool Fine>
static inline RowGroup row_group(const Activations& a, int row, int g) {
    const size_t at = size_t(row) * a.ld + g * kGroup, i = size_t(row) * (a.ld / kGroup) + g;
    RowGroup r{a.q + at, Fine ? a.fine + at : nullptr, a.isum[i], Fine ? a.fine_isum[i] : 0};
    if constexpr (S == Span::low) {
        r.isum = a.half_isum[i];
        if constexpr (Fine) r.fine_isum = a.fine_half_isum[i];
    } else if constexpr (S == Span::high) {
        r.isum -= a.half_isum[i];
        if constexpr (Fine) r.fine_isum -= a.fine_half_isum[i];
    }
    return r;
}

// One group of a part's outputs for M rows: acc += scale of the row * scale of the outputs * integer sum.
template <Layout L, int M, bool Fine, Span S>
static inline void add_group(const Group<bits_of(L)>& group, const Activations& a, int row, int g, int part, const F& scale,
                             P* acc) {
    constexpr int begin = S == Span::high ? 4 : 0, end = S == Span::low ? 4 : 8;
    RowGroup r[M];
    P dot[M];
    KVIK_UNROLL
    for (int m = 0; m < M; ++m) r[m] = row_group<S, Fine>(a, row + m, g);
    group.template dots<offset_of(L), begin, end, Fine, M>(part, r, dot);
    const int lg = a.ld / kGroup;
    KVIK_UNROLL
    for (int m = 0; m < M; ++m)
        acc[m] = fma(scaled(dot[m], a.scale[size_t(row + m) * lg + g]), part_of(scale, part), acc[m]);
}

template <Layout L, int M, bool Fine>
static inline void tile_integer(const uint8_t* w, int groups, const Activations& given, int row, float* out, int ldo,
                                bool accumulate, bool ahead) {
    const Activations a = given;  // not loaded again for every group
    constexpr int together = kParts == 1 ? 1 : M;  // rows that share a look at the quants
    const int lg = a.ld / kGroup;
    P acc[kParts][M];
    KVIK_UNROLL
    for (int i = 0; i < kParts; ++i)
        KVIK_UNROLL
        for (int m = 0; m < M; ++m) acc[i][m] = part_zero();
    for (int g = 0; g < groups; ++g) {
        const uint8_t* quants = quants_at<L>(w, g);
        if (ahead)
            for (size_t line = 0; line < unit_bytes(L) / unit_groups(L); line += 64) prefetch(quants + kAhead + line);
        const Group<bits_of(L)> group(quants);
        const Scales s = scales_at<L>(w, g);
        KVIK_UNROLL
        for (int i = 0; i < kParts; ++i) {
            KVIK_UNROLL
            for (int m = 0; m < M; m += together) {
                if constexpr (L == Layout::int6_k) {
                    add_group<L, together, Fine, Span::low>(group, a, row + m, g, i, s.scale, acc[i] + m);
                    add_group<L, together, Fine, Span::high>(group, a, row + m, g, i, s.second, acc[i] + m);
                } else {
                    add_group<L, together, Fine, Span::all>(group, a, row + m, g, i, s.scale, acc[i] + m);
                }
            }
            if constexpr (has_minimum(L)) {
                KVIK_UNROLL
                for (int m = 0; m < M; ++m)
                    acc[i][m] = fma(part_of(s.minimum, i), a.sum[size_t(row + m) * lg + g], acc[i][m]);
            }
        }
    }
    KVIK_UNROLL
    for (int m = 0; m < M; ++m) {
        P parts[kParts];
        KVIK_UNROLL
        for (int i = 0; i < kParts; ++i) parts[i] = acc[i][m];
        const F y = whole(parts);
        float* o = out + size_t(m) * ldo;
        store(o, accumulate ? add(load(o), y) : y);
    }
}

// ---- f32, f16: inputs as they are ----------------------------------------------------------------------------------

template <Layout L>
static inline F load_line(const uint8_t* w, int k) {
    if constexpr (L == Layout::f16)
        return load_f16(reinterpret_cast<const uint16_t*>(w) + size_t(k) * kRows);
    else
        return load(reinterpret_cast<const float*>(w) + size_t(k) * kRows);
}

template <Layout L, int M>
static inline void tile_real(const uint8_t* w, int groups, const Activations& a, int row, float* out, int ldo,
                             bool accumulate, bool ahead) {
    const float* x = a.x + size_t(row) * a.ld;
    F even[M], odd[M];
    KVIK_UNROLL
    for (int m = 0; m < M; ++m) even[m] = odd[m] = zero();
    for (int g = 0; g < groups; ++g, w += unit_bytes(L), x += kGroup) {
        if (ahead)
            for (size_t line = 0; line < unit_bytes(L); line += 64) prefetch(w + 2 * kAhead + line);
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

// ---- bf16: inputs rounded to bf16, in one term or two ---------------------------------------------------------------

// Per pair of inputs the second product is added first, then the first, each fused and rounded: what VDPBF16PS does
// (Intel SDM vol. 2, VDPBF16PS), subnormals flushed.
template <bool Instruction>
static inline F dot2(F c, Pairs w, const uint16_t* a) {
#if defined(KVIK_AVX512)
    if constexpr (Instruction) {
        struct Two {
            uint16_t halves[2];
        };
        __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(c.v) : "v"(w.v), "m"(*reinterpret_cast<const Two*>(a)));
        return c;
    }
#endif
    const Pairs x = set1_pairs(a);
    return fma(first(w), first(x), fma(second(w), second(x), c));
}

template <int M, bool Fine, bool Instruction>
static inline void tile_bf16(const uint8_t* w, int groups, const Activations& a, int row, float* out, int ldo,
                             bool accumulate, bool ahead) {
    const uint16_t* x = a.bf16 + size_t(row) * a.ld;
    const uint16_t* rest = Fine ? a.bf16_fine + size_t(row) * a.ld : nullptr;
    F even[M], odd[M];
    KVIK_UNROLL
    for (int m = 0; m < M; ++m) even[m] = odd[m] = zero();
    for (int g = 0; g < groups; ++g, w += unit_bytes(Layout::bf16)) {
        if (ahead)
            for (size_t line = 0; line < unit_bytes(Layout::bf16); line += 64) prefetch(w + 2 * kAhead + line);
        for (int k = 0; k < kGroup; k += 4) {
            const Pairs w0 = load_pairs(w + 32 * k), w1 = load_pairs(w + 32 * k + 64);
            KVIK_UNROLL
            for (int m = 0; m < M; ++m) {
                const size_t at = size_t(m) * a.ld + g * kGroup + k;
                even[m] = dot2<Instruction>(even[m], w0, x + at);
                odd[m] = dot2<Instruction>(odd[m], w1, x + at + 2);
                if constexpr (Fine) {
                    even[m] = dot2<Instruction>(even[m], w0, rest + at);
                    odd[m] = dot2<Instruction>(odd[m], w1, rest + at + 2);
                }
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

#if defined(KVIK_AVX512)
static const bool kHasDot2 = __builtin_cpu_supports("avx512bf16");
#else
constexpr bool kHasDot2 = false;
#endif

// ---- tiles of M rows -----------------------------------------------------------------------------------------------

template <Layout L, int M, bool Fine, bool Instruction>
static inline void tile(const uint8_t* w, int groups, const Activations& a, int row, float* out, int ldo,
                        bool accumulate, bool ahead) {
    if constexpr (is_integer(L))
        tile_integer<L, M, Fine>(w, groups, a, row, out, ldo, accumulate, ahead);
    else if constexpr (L == Layout::bf16)
        tile_bf16<M, Fine, Instruction>(w, groups, a, row, out, ldo, accumulate, ahead);
    else
        tile_real<L, M>(w, groups, a, row, out, ldo, accumulate, ahead);
}

template <Layout L, int M, bool Fine, bool Instruction>
static void tile_of(int rest, const uint8_t* w, int groups, const Activations& a, int row, float* out, int ldo,
                    bool accumulate, bool ahead) {
    if (rest == M)
        tile<L, M, Fine, Instruction>(w, groups, a, row, out, ldo, accumulate, ahead);
    else if constexpr (M > 1)
        tile_of<L, M - 1, Fine, Instruction>(rest, w, groups, a, row, out, ldo, accumulate, ahead);
}

// Rows are walked in chunks whose activations stay in the second-level cache while several blocks of weights pass.
template <Layout L, bool Fine, bool Instruction = false>
static __attribute__((noinline)) void matmul_layout(const Matrix& w, const Activations& a, int rows, int block_begin,
                                                    int block_end, float* out, int ldo, bool accumulate) {
    const int groups = w.groups();
    const size_t stride = w.row_block_bytes();
    const int bytes = is_integer(L) ? a.ld + a.ld / kGroup * 12 : a.ld * (L == Layout::bf16 ? 2 : 4);
    int chunk = (256 * 1024 / ((Fine ? 2 : 1) * bytes)) & ~7;
    if (chunk < 8) chunk = 8;
    for (int begin = 0; begin < rows; begin += chunk) {
        const int end = begin + chunk < rows ? begin + chunk : rows;
        for (int b = block_begin; b < block_end; ++b) {
            const uint8_t* data = w.data + size_t(b) * stride;
            float* column = out + b * kRows;
            int row = begin;
            for (; row + kTile <= end; row += kTile)
                tile<L, kTile, Fine, Instruction>(data, groups, a, row, column + size_t(row) * ldo, ldo, accumulate,
                                                  row == begin);
            if (row < end)
                tile_of<L, kTile, Fine, Instruction>(end - row, data, groups, a, row, column + size_t(row) * ldo, ldo,
                                                     accumulate, row == begin);
        }
    }
}

template <Layout L>
static void matmul_precision(const Matrix& w, const Activations& a, int rows, int block_begin, int block_end, float* out,
                             int ldo, bool accumulate) {
    if constexpr (is_integer(L)) {
        if (a.fine) return matmul_layout<L, true>(w, a, rows, block_begin, block_end, out, ldo, accumulate);
    } else if constexpr (L == Layout::bf16) {
        const FlushSubnormals as_the_instruction_does;
        if (a.bf16_fine)
            return kHasDot2 ? matmul_layout<L, true, true>(w, a, rows, block_begin, block_end, out, ldo, accumulate)
                            : matmul_layout<L, true>(w, a, rows, block_begin, block_end, out, ldo, accumulate);
        if (kHasDot2) return matmul_layout<L, false, true>(w, a, rows, block_begin, block_end, out, ldo, accumulate);
        return matmul_layout<L, false>(w, a, rows, block_begin, block_end, out, ldo, accumulate);
    }
    matmul_layout<L, false>(w, a, rows, block_begin, block_end, out, ldo, accumulate);
}

static void matmul(const Matrix& w, const Activations& a, int32_t rows, int32_t begin, int32_t end, float* out,
                   int32_t ldo, bool accumulate) {
    const auto run = [&](auto kernel) { kernel(w, a, rows, begin, end, out, ldo, accumulate); };
    switch (w.layout) {
        case Layout::f32: return run(matmul_precision<Layout::f32>);
        case Layout::f16: return run(matmul_precision<Layout::f16>);
        case Layout::bf16: return run(matmul_precision<Layout::bf16>);
        case Layout::int8: return run(matmul_precision<Layout::int8>);
        case Layout::int8_min: return run(matmul_precision<Layout::int8_min>);
        case Layout::int4: return run(matmul_precision<Layout::int4>);
        case Layout::int4_min: return run(matmul_precision<Layout::int4_min>);
        case Layout::int5: return run(matmul_precision<Layout::int5>);
        case Layout::int5_min: return run(matmul_precision<Layout::int5_min>);
        case Layout::int4_k: return run(matmul_precision<Layout::int4_k>);
        case Layout::int5_k: return run(matmul_precision<Layout::int5_k>);
        case Layout::int6_k: return run(matmul_precision<Layout::int6_k>);
    }
}

// x to bf16, nearest even, and where wanted what that leaves over to bf16 again.
static void round_bf16(const float* x, int32_t n, uint16_t* out, uint16_t* fine) {
    for (int i = 0; i < n; ++i) out[i] = float_to_bf16(x[i]);
    if (!fine) return;
    for (int i = 0; i < n; ++i) fine[i] = float_to_bf16(x[i] - bf16_to_float(out[i]));
}

// One row of the matrix, as f32: the embedding of a token.
static void embed(const Matrix& w, int32_t token, float* out) {
    const Layout l = w.layout;
    const int lane = token % kRows;
    const uint8_t* row = w.data + size_t(token / kRows) * w.row_block_bytes();
    const auto half = [](const uint8_t* p) {
        uint16_t h;
        std::memcpy(&h, p, 2);
        return h;
    };
    for (int g = 0; g < w.groups(); ++g, out += kGroup) {
        const uint8_t* unit = row + size_t(g / unit_groups(l)) * unit_bytes(l);
        if (!is_integer(l)) {
            for (int k = 0; k < kGroup; ++k) {
                if (l == Layout::f32)
                    std::memcpy(out + k, unit + 4 * (k * kRows + lane), 4);
                else if (l == Layout::f16)
                    out[k] = half_to_float(half(unit + 2 * (k * kRows + lane)));
                else
                    out[k] = bf16_to_float(half(unit + 2 * (k / 2 * 2 * kRows + 2 * lane + k % 2)));
            }
            continue;
        }
        const uint8_t* p = unit + size_t(g % unit_groups(l)) * quant_bytes(l);
        float scales[2], low = 0.0f;
        if (is_k(l)) {
            const uint8_t* all = unit + 8 * quant_bytes(l);
            const uint8_t *own = all + step_bytes(l) * size_t(g % 8), *ends = all + 8 * step_bytes(l);
            const float d = half_to_float(half(ends + 2 * lane));
            if (l == Layout::int6_k) {
                for (int i = 0; i < 2; ++i) scales[i] = d * float(int8_t(own[16 * i + lane]));
            } else {
                const int high = own[16 + lane % 8] >> 4 * (lane / 8);
                scales[0] = scales[1] = d * float((own[lane] & 15) | (high & 3) << 4);
                low = -half_to_float(half(ends + 32 + 2 * lane)) * float(own[lane] >> 4 | (high & 12) << 2);
            }
        } else {
            scales[0] = scales[1] = half_to_float(half(p + quant_bytes(l) + 2 * lane));
            if (has_minimum(l)) low = half_to_float(half(p + quant_bytes(l) + 32 + 2 * lane));
        }
        for (int k = 0; k < kGroup; ++k)
            out[k] = __builtin_fmaf(scales[k / 16], float(quant_of(bits_of(l), p, lane, k) - offset_of(l)), low);
    }
    // A group with a minimum has no exact 0 for the inputs that fill it up.
    for (int k = w.k; k < w.groups() * kGroup; ++k) out[k - w.groups() * kGroup] = 0.0f;
}

}  // namespace KVIK_NS

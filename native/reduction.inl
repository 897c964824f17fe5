// Passes over rows of logits (reduction.h), on the words of simd.h; sums have one order, so all instruction sets agree.

#include "reduction.h"

namespace KVIK_NS {
using namespace kvik;

// Whether a row is without NaN and +infinity.
static bool none_above(const float* x, int32_t n) {
    bool good = true;
    for (int32_t i = 0; i < n; ++i) good &= x[i] <= 3.402823466e38f;
    return good;
}

static RowPart reduce_part(const float* x, int32_t n) {
    constexpr int kEach = 4;  // words under way
    F best[kEach], odd = zero(), sum[kEach];
    KVIK_UNROLL
    for (int j = 0; j < kEach; ++j) best[j] = set1(kNone), sum[j] = zero();
    int32_t i = 0;
    for (; i + kEach * kLanes <= n; i += kEach * kLanes) {
        KVIK_UNROLL
        for (int j = 0; j < kEach; ++j) {
            const F v = load(x + i + j * kLanes);
            best[j] = max(v, best[j]);
            odd = fma(v, zero(), odd);
        }
    }
    for (; i < n; i += kLanes) {
        best[0] = max(load_some(x, n, i), best[0]);
        odd = fma(load_some(x, n, i, 0.0f), zero(), odd);
    }
    const float top = reduce_max(max(max(best[0], best[1]), max(best[2], best[3])));
    if (!(reduce_add(odd) == 0.0f) && !none_above(x, n)) return {top, __builtin_nanf("")};
    if (top == kNone) return {top, 0.0f};
    const F t = set1(top);
    for (i = 0; i + kEach * kLanes <= n; i += kEach * kLanes) {
        KVIK_UNROLL
        for (int j = 0; j < kEach; ++j) sum[j] = add(sum[j], exp(sub(load(x + i + j * kLanes), t)));
    }
    for (int j = 0; i < n; i += kLanes, ++j) sum[j] = add(sum[j], exp(sub(load_some(x, n, i), t)));
    return {top, reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])))};
}

static int32_t above(const float* x, int32_t n, float least, int32_t* out) {
    const F low = set1(least);
    int32_t count = 0, i = 0;
    for (; i + kLanes <= n; i += kLanes) count = note(mask_ge(load(x + i), low), i, out, count);
    for (; i < n; ++i)
        if (x[i] >= least) out[count++] = i;
    return count;
}

// The largest of a row, the lowest place it has, and whether that is all that may be said of the row.
struct RowBest {
    float top;
    int32_t place;
    bool plain;  // no NaN, no infinity
};

static RowBest best_of(const float* x, int32_t n) {
    F m0 = set1(kNone), m1 = m0, odd = zero();
    int32_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        const F a = load(x + i), b = load(x + i + kLanes);
        m0 = max(a, m0), m1 = max(b, m1);
        odd = fma(add(a, b), zero(), odd);  // a sum that overflows only costs the slow way
    }
    for (; i < n; i += kLanes) {
        m0 = max(load_some(x, n, i), m0);
        odd = fma(load_some(x, n, i, 0.0f), zero(), odd);
    }
    const float top = reduce_max(max(m0, m1));
    const F t = set1(top);
    int32_t place = 0;
    for (i = 0; i + kLanes <= n; i += kLanes)
        if (const uint32_t mask = mask_ge(load(x + i), t)) {
            place = i + __builtin_ctz(mask);
            return {top, place, reduce_add(odd) == 0.0f};
        }
    for (place = i; place + 1 < n && !(x[place] >= top);) ++place;
    return {top, place, reduce_add(odd) == 0.0f};
}

// Sums of e^dp, e^dq and e^dp (dp - dq), dp and dq from the rows' largest logits.
struct Masses {
    double p, q, gap;
};

constexpr double kLeast = -700.0;  // of exact_exp

// Eight lanes of f64.
#if defined(KVIK_AVX512)
struct D {
    __m512d v;
};
static inline D dset1(double x) { return {_mm512_set1_pd(x)}; }
static inline D dload(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
static inline void dstore(double* p, D a) { _mm512_storeu_pd(p, a.v); }
static inline D dadd(D a, D b) { return {_mm512_add_pd(a.v, b.v)}; }
static inline D dsub(D a, D b) { return {_mm512_sub_pd(a.v, b.v)}; }
static inline D dmax(D a, D b) { return {_mm512_max_pd(a.v, b.v)}; }
static inline D dfma(D a, D b, D c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
// p * 2^n, n the low bits of `shifted`
static inline D dscale(D p, D shifted) {
    const __m512i n = _mm512_slli_epi64(_mm512_castpd_si512(shifted.v), 52);
    return {_mm512_castsi512_pd(_mm512_add_epi64(_mm512_castpd_si512(p.v), n))};
}
#elif defined(KVIK_AVX2)
struct D {
    __m256d a, b;
};
static inline D dset1(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
static inline D dload(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))}; }
static inline void dstore(double* p, D x) {
    _mm256_storeu_pd(p, x.a);
    _mm256_storeu_pd(p + 4, x.b);
}
static inline D dadd(D x, D y) { return {_mm256_add_pd(x.a, y.a), _mm256_add_pd(x.b, y.b)}; }
static inline D dsub(D x, D y) { return {_mm256_sub_pd(x.a, y.a), _mm256_sub_pd(x.b, y.b)}; }
static inline D dmax(D x, D y) { return {_mm256_max_pd(x.a, y.a), _mm256_max_pd(x.b, y.b)}; }
static inline D dfma(D x, D y, D z) { return {_mm256_fmadd_pd(x.a, y.a, z.a), _mm256_fmadd_pd(x.b, y.b, z.b)}; }
static inline __m256d dscale(__m256d p, __m256d shifted) {
    const __m256i n = _mm256_slli_epi64(_mm256_castpd_si256(shifted), 52);
    return _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(p), n));
}
static inline D dscale(D p, D shifted) { return {dscale(p.a, shifted.a), dscale(p.b, shifted.b)}; }
#else
struct D {
    double v[8];
};
#define KVIK_DLANES(expression)                      \
    D r;                                             \
    for (int i = 0; i < 8; ++i) r.v[i] = expression; \
    return r
static inline D dset1(double x) { KVIK_DLANES(x); }
static inline D dload(const float* p) { KVIK_DLANES(double(p[i])); }
static inline void dstore(double* p, D a) { std::memcpy(p, a.v, sizeof a.v); }
static inline D dadd(D a, D b) { KVIK_DLANES(a.v[i] + b.v[i]); }
static inline D dsub(D a, D b) { KVIK_DLANES(a.v[i] - b.v[i]); }
static inline D dmax(D a, D b) { KVIK_DLANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline D dfma(D a, D b, D c) { KVIK_DLANES(__builtin_fma(a.v[i], b.v[i], c.v[i])); }
static inline D dscale(D p, D shifted) {
    KVIK_DLANES(__builtin_bit_cast(double, __builtin_bit_cast(uint64_t, p.v[i]) + (__builtin_bit_cast(uint64_t, shifted.v[i]) << 52)));
}
#undef KVIK_DLANES
#endif

// e^x for x <= 0, as at -700 below it; relative error below 3e-13 (Taylor's polynomial of degree 10 on [-ln 2 / 2, ln 2 / 2]).
static inline D dexp(D x) {
    const D round = dset1(0x1.8p52);  // adding it rounds to a whole number, held in the low bits; its own are 0
    x = dmax(x, dset1(kLeast));
    const D shifted = dfma(x, dset1(kLog2E), round), n = dsub(shifted, round);
    const D r = dfma(n, dset1(-kLn2Low), dfma(n, dset1(-kLn2High), x));
    D p = dset1(inverse_factorial(10));
    p = dfma(p, r, dset1(inverse_factorial(9)));
    p = dfma(p, r, dset1(inverse_factorial(8)));
    p = dfma(p, r, dset1(inverse_factorial(7)));
    p = dfma(p, r, dset1(inverse_factorial(6)));
    p = dfma(p, r, dset1(inverse_factorial(5)));
    p = dfma(p, r, dset1(inverse_factorial(4)));
    p = dfma(p, r, dset1(inverse_factorial(3)));
    p = dfma(p, r, dset1(inverse_factorial(2)));
    p = dfma(p, r, dset1(1.0));
    p = dfma(p, r, dset1(1.0));
    return dscale(p, shifted);
}

// Sixteen lanes, folded in halves at the end; what the last word lacks weighs e^-700.
static Masses masses(const float* p, const float* q, int32_t n, double p_top, double q_top) {
    constexpr int kHalf = kLanes / 2;
    const D pt = dset1(p_top), qt = dset1(q_top);
    D sp[2], sq[2], sg[2];
    for (int h = 0; h < 2; ++h) sp[h] = sq[h] = sg[h] = dset1(0.0);
    float p_rest[kLanes], q_rest[kLanes];
    for (int32_t at = 0; at < n; at += kLanes) {
        const float *x = p + at, *y = q + at;
        if (at + kLanes > n) {
            store(p_rest, load_some(p, n, at, -3.402823466e38f));
            store(q_rest, load_some(q, n, at, -3.402823466e38f));
            x = p_rest, y = q_rest;
        }
        KVIK_UNROLL
        for (int h = 0; h < 2; ++h) {
            const D dp = dsub(dload(x + h * kHalf), pt), dq = dsub(dload(y + h * kHalf), qt);
            const D ep = dexp(dp);
            sp[h] = dadd(sp[h], ep);
            sq[h] = dadd(sq[h], dexp(dq));
            sg[h] = dfma(ep, dsub(dp, dq), sg[h]);
        }
    }
    double lanes[3][kLanes];
    for (int h = 0; h < 2; ++h) {
        dstore(lanes[0] + h * kHalf, sp[h]);
        dstore(lanes[1] + h * kHalf, sq[h]);
        dstore(lanes[2] + h * kHalf, sg[h]);
    }
    for (auto& sum : lanes)
        for (int half = kHalf; half; half /= 2)
            for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    return {lanes[0][0], lanes[1][0], lanes[2][0]};
}

// The same where some logits are -infinity: what p gives nothing adds nothing, what only p gives something makes infinity.
static Masses masses_with_none(const float* p, const float* q, int32_t n, double p_top, double q_top) {
    Masses m{0.0, 0.0, 0.0};
    for (int32_t i = 0; i < n; ++i) {
        const double dp = double(p[i]) - p_top, dq = double(q[i]) - q_top;
        const double ep = p[i] == kNone ? 0.0 : exact_exp(dp > kLeast ? dp : kLeast);
        m.p += ep;
        if (q[i] != kNone) m.q += exact_exp(dq > kLeast ? dq : kLeast);
        if (ep > 0.0) m.gap += q[i] == kNone ? __builtin_inf() : ep * (dp - dq);
    }
    return m;
}

static Divergence diverge(const float* base, const float* other, int32_t n, int32_t target) {
    const RowBest p = best_of(base, n), q = best_of(other, n);
    Divergence d{};
    d.base_finite = p.plain || (none_above(base, n) && p.top != kNone);
    d.other_finite = q.plain || (none_above(other, n) && q.top != kNone);
    if (!d.base_finite || !d.other_finite) return d;
    const double p_top = double(p.top), q_top = double(q.top);
    const Masses m = (p.plain && q.plain ? masses : masses_with_none)(base, other, n, p_top, q_top);
    const double p_log = exact_log(m.p), q_log = exact_log(m.q);
    d.kl = m.gap / m.p - p_log + q_log;
    d.base_logprob = double(base[target]) - p_top - p_log;
    d.other_logprob = double(other[target]) - q_top - q_log;
    d.base_best = p.place;
    d.other_best = q.place;
    return d;
}

static const ReductionKernels kReduction = {reduce_part, above, diverge};

}  // namespace KVIK_NS

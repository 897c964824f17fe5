// Passes over rows of logits (reduction.h), on the words of simd.h; sums have one order, so all instruction sets agree.

#include "reduction.h"

namespace KVIK_NS {
using namespace kvik;

// x - x, or x * 0, is not 0 for NaN and infinity; -infinity alone is allowed.
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

// sixteen lanes of f64, folded in halves at the end
static Masses masses(const float* p, const float* q, int32_t n, double p_top, double q_top) {
    double sp[kLanes] = {}, sq[kLanes] = {}, sg[kLanes] = {};
    for (int32_t at = 0; at < n; at += kLanes) {
        const int32_t lanes = n - at < kLanes ? n - at : kLanes;
        double dp[kLanes], dq[kLanes], gap[kLanes];
        if (lanes == kLanes) {
            for (int i = 0; i < kLanes; ++i) dp[i] = double(p[at + i]) - p_top;
            for (int i = 0; i < kLanes; ++i) dq[i] = double(q[at + i]) - q_top;
            for (int i = 0; i < kLanes; ++i) gap[i] = dp[i] - dq[i];
        } else {
            for (int i = 0; i < kLanes; ++i) {
                dp[i] = i < lanes ? double(p[at + i]) - p_top : kLeast;
                dq[i] = i < lanes ? double(q[at + i]) - q_top : kLeast;
                gap[i] = dp[i] - dq[i];
            }
        }
        // bounded by itself: in one loop compilers make the bound a branch to a constant, and vectorise nothing
        for (int i = 0; i < kLanes; ++i) dp[i] = dp[i] > kLeast ? dp[i] : kLeast;
        for (int i = 0; i < kLanes; ++i) dq[i] = dq[i] > kLeast ? dq[i] : kLeast;
        for (int i = 0; i < kLanes; ++i) dp[i] = exact_exp(dp[i]);
        for (int i = 0; i < kLanes; ++i) dq[i] = exact_exp(dq[i]);
        for (int i = 0; i < kLanes; ++i) sp[i] += dp[i];
        for (int i = 0; i < kLanes; ++i) sq[i] += dq[i];
        for (int i = 0; i < kLanes; ++i) sg[i] += dp[i] * gap[i];
    }
    for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) sp[i] += sp[i + half], sq[i] += sq[i + half], sg[i] += sg[i + half];
    return {sp[0], sq[0], sg[0]};
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

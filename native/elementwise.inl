// Row-wise kernels: norms, activations, routing to experts, rotation, rounding of activations, and the checksum of packed files.
// Rows are padded to 32 floats with zeros; norms take the length without padding, the others with it.

namespace KVIK_NS {
using namespace kvik;

// 1 / sqrt(mean(x^2) + eps) of n numbers; `padded`, a multiple of 16, of them are read.
static inline F inverse_rms(const float* x, int padded, int32_t n, float eps) {
    F even = zero(), odd = zero();
    int i = 0;
    for (; i + 2 * kLanes <= padded; i += 2 * kLanes) {
        const F a = load(x + i), b = load(x + i + kLanes);
        even = fma(a, a, even);
        odd = fma(b, b, odd);
    }
    if (i < padded) even = fma(load(x + i), load(x + i), even);
    const float mean = reduce_add(add(even, odd)) / float(n);
    return set1(1.0f / __builtin_sqrtf(mean + eps));
}

static void rms_norm(const float* x, const float* weight, int32_t n, float eps, float* out) {
    const int padded = (n + kGroup - 1) / kGroup * kGroup;
    const F r = inverse_rms(x, padded, n, eps);
    for (int i = 0; i < padded; i += kLanes) store(out + i, mul(mul(load(x + i), r), load(weight + i)));
}

static void head_norm(float* x, int32_t heads, int32_t head_size, const float* weight, float eps) {
    for (int h = 0; h < heads; ++h, x += head_size) {
        const F r = inverse_rms(x, head_size, head_size, eps);
        for (int i = 0; i < head_size; i += kLanes) store(x + i, mul(mul(load(x + i), r), load(weight + i)));
    }
}

// Lanes from n on become 0.
static inline F first_lanes(F x, int n) {
    alignas(64) static const float index[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return n >= kLanes ? x : where_less(load(index), set1(float(n)), x, zero());
}

// Two passes: deviations from the mean are summed, so that a large mean costs no digits.
static void layer_norm(const float* x, const float* weight, const float* bias, int32_t n, float eps, float* out) {
    const int padded = (n + kGroup - 1) / kGroup * kGroup;
    F even = zero(), odd = zero();
    for (int i = 0; i < padded; i += 2 * kLanes) {
        even = add(even, load(x + i));
        odd = add(odd, load(x + i + kLanes));
    }
    const F mean = set1(reduce_add(add(even, odd)) / float(n));
    even = odd = zero();
    for (int i = 0; i < padded; i += 2 * kLanes) {
        const F a = first_lanes(sub(load(x + i), mean), n - i), b = first_lanes(sub(load(x + i + kLanes), mean), n - i - kLanes);
        even = fma(a, a, even);
        odd = fma(b, b, odd);
    }
    const F r = set1(1.0f / __builtin_sqrtf(reduce_add(add(even, odd)) / float(n) + eps));
    for (int i = 0; i < padded; i += kLanes)
        store(out + i, fma(mul(sub(load(x + i), mean), r), load(weight + i), load(bias + i)));
}

template <Activation A>
static inline F activated(F x) {
    const F one = set1(1.0f);
    if constexpr (A == Activation::silu) return div(x, add(one, exp(sub(zero(), x))));
    // x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks & Gimpel 2016), written as x / (1 + e^(-2u)):
    // 1 + tanh loses its digits where tanh is near -1. Error: below 4e-7 of the result from x = -1.5 on, below 4e-8 under it;
    // 0 below -10, where the result is under 2e-37.
    const F u = fma(mul(mul(x, x), x), set1(0.044715f), x);
    const F y = div(x, add(one, exp(mul(u, set1(-1.5957691216057308f)))));
    return where_less(x, set1(-10.0f), zero(), y);
}

template <Activation A>
static void activate_as(const float* x, const float* factor, int32_t n, float* out) {
    for (int i = 0; i < n; i += kLanes) {
        const F y = activated<A>(load(x + i));
        store(out + i, factor ? mul(y, load(factor + i)) : y);
    }
}

static void activate(Activation activation, const float* x, const float* factor, int32_t n, float* out) {
    switch (activation) {
        case Activation::silu: return activate_as<Activation::silu>(x, factor, n, out);
        case Activation::gelu_tanh: return activate_as<Activation::gelu_tanh>(x, factor, n, out);
    }
}

static void add_bias(const float* bias, int32_t n, int32_t rows, float* out, int32_t ldo) {
    for (int r = 0; r < rows; ++r, out += ldo)
        for (int i = 0; i < n; i += kLanes) store(out + i, add(load(out + i), load(bias + i)));
}

// Whatever the scores are, NaN included, the experts chosen are distinct and exist.
static void route(const float* scores, int32_t count, int32_t used, bool normalize, int32_t* experts, float* p) {
    alignas(64) float e[kMaxExperts];
    const int padded = (count + kLanes - 1) / kLanes * kLanes;
    constexpr float kNone = -3.0e38f;
    for (int i = 0; i < padded; ++i) e[i] = i < count ? scores[i] : kNone;
    F top = set1(kNone);
    for (int i = 0; i < padded; i += kLanes) top = max(top, load(e + i));
    const F maximum = set1(reduce_max(top));
    F sum = zero();
    for (int i = 0; i < padded; i += kLanes) {
        const F y = exp(sub(load(e + i), maximum));
        store(e + i, y);
        sum = add(sum, y);
    }
    const F total = set1(reduce_add(sum));
    for (int i = 0; i < padded; i += kLanes) store(e + i, div(load(e + i), total));
    constexpr float kTaken = -1.0f;  // below every probability
    float kept = 0.0f;
    for (int k = 0; k < used; ++k) {
        int best = 0;
        while (e[best] == kTaken) ++best;
        for (int i = best + 1; i < count; ++i)
            if (e[i] > e[best]) best = i;
        experts[k] = best;
        p[k] = e[best];
        kept += p[k];
        e[best] = kTaken;
    }
    if (normalize)
        for (int k = 0; k < used; ++k) p[k] /= kept;
}

static void combine(const float* y, int32_t ld, const int32_t* places, const float* p, int32_t used, int32_t n, bool accumulate,
                    float* out) {
    for (int i = 0; i < n; i += kLanes) {
        F sum = mul(load(y + size_t(places[0]) * size_t(ld) + i), set1(p[0]));
        for (int k = 1; k < used; ++k) sum = fma(load(y + size_t(places[k]) * size_t(ld) + i), set1(p[k]), sum);
        store(out + i, accumulate ? add(load(out + i), sum) : sum);
    }
}

static void add_rows(const float* a, const float* b, int32_t n, float* out) {
    for (int i = 0; i < n; i += kLanes) store(out + i, add(load(a + i), load(b + i)));
}

// Symmetric int8 by groups of 32: scale = max|x| / 127, nearest even. The second term rounds what the first left over, in
// steps of scale / 256.
constexpr float kNoise = 1e-30f;  // a group below it counts as zeros: 127 / top would overflow

static void quantize(const float* x, int32_t n, const Int8Rows& out) {
    const F most = set1(127.0f), least = set1(-127.0f), steps = set1(256.0f);
    int8_t *q = out.q, *fine = out.fine;
    for (int g = 0; g * kGroup < n; ++g, x += kGroup, q += kGroup) {
        const F a = load(x), b = load(x + kLanes);
        const float top = reduce_max(max(abs(a), abs(b)));
        const F inverse = set1(top > kNoise ? 127.0f / top : 0.0f);
        const F scaled_a = mul(a, inverse), scaled_b = mul(b, inverse);
        const F whole_a = round_even(scaled_a), whole_b = round_even(scaled_b);
        store_i8(q, whole_a);
        store_i8(q + kLanes, whole_b);
        out.half_isum[g] = int32_t(reduce_add(whole_a));  // of small integers: exact
        int32_t total = out.isum[g] = out.half_isum[g] + int32_t(reduce_add(whole_b));
        out.scale[g] = top / 127.0f;
        if (fine) {
            const F rest_a = round_even(max(min(mul(sub(scaled_a, whole_a), steps), most), least));
            const F rest_b = round_even(max(min(mul(sub(scaled_b, whole_b), steps), most), least));
            store_i8(fine, rest_a);
            store_i8(fine + kLanes, rest_b);
            fine += kGroup;
            out.fine_half_isum[g] = int32_t(reduce_add(rest_a));
            out.fine_isum[g] = out.fine_half_isum[g] + int32_t(reduce_add(rest_b));
            out.scale[g] *= 1.0f / 256.0f;
            total = 256 * total + out.fine_isum[g];
        }
        out.sum[g] = out.scale[g] * float(total);
    }
}

// Dimensions i and i + D/2 of each head rotate together. head_size is a multiple of 32, or the scalar tail serves.
static void rope(float* x, int32_t heads, int32_t head_size, const float* cosine, const float* sine) {
    const int half = head_size / 2;
    for (int h = 0; h < heads; ++h, x += head_size) {
        int i = 0;
        for (; i + kLanes <= half; i += kLanes) {
            const F c = load(cosine + i), s = load(sine + i), a = load(x + i), b = load(x + half + i);
            store(x + i, sub(mul(a, c), mul(b, s)));
            store(x + half + i, fma(a, s, mul(b, c)));
        }
        for (; i < half; ++i) {
            const float a = x[i], b = x[half + i];
            x[i] = a * cosine[i] - b * sine[i];
            x[half + i] = __builtin_fmaf(a, sine[i], b * cosine[i]);
        }
    }
}

// The normalized Walsh-Hadamard transform, its own inverse, of every block as wide as the largest power of two that divides
// head_size: pairs 1 apart, then 2, 4, … (QuaRot: Ashkboos et al. 2024).
static void hadamard(float* x, int32_t heads, int32_t head_size) {
    const int width = head_size & -head_size;
    const F factor = set1(1.0f / __builtin_sqrtf(float(width)));
    for (float* end = x + heads * head_size; x < end; x += width) {
        for (int step = 1; step < width; step *= 2)
            for (int i = 0; i < width; i += 2 * step)
                for (int j = i; j < i + step; ++j) {
                    const float a = x[j], b = x[j + step];
                    x[j] = a + b;
                    x[j + step] = a - b;
                }
        for (int i = 0; i < width; i += kLanes) store(x + i, mul(load(x + i), factor));
    }
}

// Reads n bytes (a multiple of 256) as fast as the weights are read; the sum keeps the reading from being skipped.
static float read_all(const uint8_t* p, size_t n) {
    F a = zero(), b = zero(), c = zero(), d = zero();
    for (size_t i = 0; i < n; i += 256) {
        for (size_t line = 0; line < 256; line += 64) prefetch(p + i + line + kAhead);
        const float* x = reinterpret_cast<const float*>(p + i);
        a = add(a, load(x));
        b = add(b, load(x + kLanes));
        c = add(c, load(x + 2 * kLanes));
        d = add(d, load(x + 3 * kLanes));
    }
    return reduce_add(add(add(a, b), add(c, d)));
}

static inline uint64_t mix(uint64_t h) {  // SplitMix64's finalizer (Steele et al. 2014)
    h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9ull;
    h = (h ^ (h >> 27)) * 0x94d049bb133111ebull;
    return h ^ (h >> 31);
}

// Not cryptographic: finds damage. Eight independent lanes of 64-bit words, so that it runs at memory speed.
static uint64_t checksum(const uint8_t* p, size_t n) {
    uint64_t lane[8];
    for (int i = 0; i < 8; ++i) lane[i] = mix(uint64_t(i) + 1);
    size_t at = 0;
    for (; at + 64 <= n; at += 64)
        for (int i = 0; i < 8; ++i) {
            uint64_t word;
            std::memcpy(&word, p + at + 8 * size_t(i), 8);
            const uint64_t sum = lane[i] + word;
            lane[i] = ((sum << 29) | (sum >> 35)) * 0x9e3779b97f4a7c15ull;
        }
    uint64_t h = mix(n);
    for (int i = 0; i < 8; ++i) h = mix(h ^ lane[i]) + uint64_t(i);
    for (; at < n; ++at) h = mix(h ^ p[at]);
    return h;
}

}  // namespace KVIK_NS

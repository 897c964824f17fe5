// Row-wise kernels: norm, gate, rotation, rounding of activations, and the checksum of packed files.
// Rows are padded to 32 floats with zeros; n counts the padded length unless it says otherwise.

namespace KVIK_NS {
using namespace kvik;

static void rms_norm(const float* x, const float* weight, int32_t n, float eps, float* out) {
    const int padded = (n + kGroup - 1) / kGroup * kGroup;
    F even = zero(), odd = zero();
    for (int i = 0; i < padded; i += 2 * kLanes) {
        const F a = load(x + i), b = load(x + i + kLanes);
        even = fma(a, a, even);
        odd = fma(b, b, odd);
    }
    const float mean = reduce_add(add(even, odd)) / float(n);
    const F r = set1(1.0f / __builtin_sqrtf(mean + eps));
    for (int i = 0; i < padded; i += kLanes) store(out + i, mul(mul(load(x + i), r), load(weight + i)));
}

static void silu_gate(const float* gate, const float* up, int32_t n, float* out) {
    const F one = set1(1.0f);
    for (int i = 0; i < n; i += kLanes) {
        const F g = load(gate + i);
        store(out + i, mul(div(g, add(one, exp(sub(zero(), g)))), load(up + i)));
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

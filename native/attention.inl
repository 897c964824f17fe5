// Attention over pages. A partition of 64 slots is computed from nothing (maximum, exponentials, weighted values) and then
// joined to the running state, in order of slot: the same sums whether a query comes alone or in a tile, and whether its
// partitions are computed by one thread or by many. (Online softmax: Milakov & Gimelshein 2018.)

namespace KVIK_NS {
using namespace kvik;

static constexpr size_t kv_element(KV t) { return size_t(kv_bits(t)) / 8; }

constexpr float kNothing = -3.0e38f;  // maximum of no scores

static inline F load_kv(const uint8_t* p, size_t i, KV type) {
    return type == KV::f16 ? load_f16(reinterpret_cast<const uint16_t*>(p) + i) : load(reinterpret_cast<const float*>(p) + i);
}

static void append(const Cache& c, int32_t slot, const float* k, const float* v) {
    uint8_t* block = c.base + size_t(c.blocks[slot / kBlockTokens]) * kAddressBytes + c.at;
    const int at = slot % kBlockTokens, d = c.full.head_size;
    uint8_t* values = block + c.full.values();
    if (c.full.k == KV::f16) {
        uint16_t* keys = reinterpret_cast<uint16_t*>(block);
        uint16_t h[kLanes];
        for (int i = 0; i < d; i += kLanes) {
            store_f16(h, load(k + i));
            for (int j = 0; j < kLanes; ++j) keys[(i + j) * kBlockTokens + at] = h[j];
            store_f16(reinterpret_cast<uint16_t*>(values) + at * d + i, load(v + i));
        }
    } else {
        float* keys = reinterpret_cast<float*>(block);
        for (int i = 0; i < d; ++i) keys[i * kBlockTokens + at] = k[i];
        std::memcpy(reinterpret_cast<float*>(values) + at * d, v, size_t(d) * 4);
    }
}

// Scores of Q queries against B blocks of 16 keys, summed in order of dimension. `ahead`: null, or what to ask for meanwhile,
// a line for a line.
template <int Q, int B, KV Type>
static inline void scores(const uint8_t* const* keys, const uint8_t* const* ahead, const float* q, int d, float* out) {
    constexpr int step = Type == KV::f16 ? 2 : 1;  // dimensions a line
    F sum[Q][B];
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)
        KVIK_UNROLL
        for (int b = 0; b < B; ++b) sum[i][b] = zero();
    for (int j = 0; j < d; j += step) {
        if (ahead)
            KVIK_UNROLL
            for (int b = 0; b < B; ++b) prefetch(ahead[b] + size_t(j) * kBlockTokens * kv_element(Type));
        KVIK_UNROLL
        for (int at = j; at < j + step; ++at)
            KVIK_UNROLL
            for (int b = 0; b < B; ++b) {
                const F k = load_kv(keys[b], size_t(at) * kBlockTokens, Type);
                KVIK_UNROLL
                for (int i = 0; i < Q; ++i) sum[i][b] = fma(k, set1(q[i * d + at]), sum[i][b]);
            }
    }
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)
        KVIK_UNROLL
        for (int b = 0; b < B; ++b) store(out + i * kPartition + b * kBlockTokens, sum[i][b]);
}

// acc[Q][V * 16] = sum over tokens, in order, of weight * value, V lanes of 16 dimensions at once.
template <int Q, int V, KV Type>
static inline void weigh(const uint8_t* const* values, const uint8_t* const* ahead, int tokens, int d, int at, const float* p,
                         float* acc, int stride) {
    F sum[Q][V];
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)
        KVIK_UNROLL
        for (int j = 0; j < V; ++j) sum[i][j] = zero();
    for (int from = 0; from < tokens; from += kBlockTokens) {
        const int n = tokens - from < kBlockTokens ? tokens - from : kBlockTokens;
        const uint8_t* row = values[from / kBlockTokens] + size_t(at) * kv_element(Type);
        const uint8_t* next = ahead ? ahead[from / kBlockTokens] + size_t(at) * kv_element(Type) : nullptr;
        for (int t = 0; t < n; ++t) {
            const size_t first = size_t(t) * size_t(d);
            if (next)
                for (size_t i = 0; i < V * kLanes * kv_element(Type); i += 64) prefetch(next + first * kv_element(Type) + i);
            KVIK_UNROLL
            for (int j = 0; j < V; ++j) {
                const F v = load_kv(row, first + size_t(j) * kLanes, Type);
                KVIK_UNROLL
                for (int i = 0; i < Q; ++i) sum[i][j] = fma(v, set1(p[i * kPartition + from + t]), sum[i][j]);
            }
        }
    }
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)
        KVIK_UNROLL
        for (int j = 0; j < V; ++j) store(acc + i * stride + at + j * kLanes, sum[i][j]);
}

// How many blocks of keys, or lanes of values, go with Q queries: as many sums as the registers hold.
constexpr int kQueryTile = 6;
#if defined(KVIK_AVX512)
constexpr int beside(int) { return 4; }
#else
constexpr int beside(int q) { return q > 3 ? 1 : (q > 1 ? 2 : 4); }
#endif

template <int Q, KV Type>
static void scores_of(int n, const uint8_t* const* keys, const uint8_t* const* ahead, int blocks, const float* q, int d,
                      float* out) {
    if (n == Q) {
        constexpr int B = beside(Q);
        const auto next = [&](int b) { return ahead ? ahead + b : nullptr; };
        int b = 0;
        for (; b + B <= blocks; b += B) scores<Q, B, Type>(keys + b, next(b), q, d, out + b * kBlockTokens);
        for (; b < blocks; ++b) scores<Q, 1, Type>(keys + b, next(b), q, d, out + b * kBlockTokens);
    } else if constexpr (Q > 1) {
        scores_of<Q - 1, Type>(n, keys, ahead, blocks, q, d, out);
    }
}
template <int Q, KV Type>
static void weigh_of(int n, const uint8_t* const* values, const uint8_t* const* ahead, int tokens, int d, const float* p,
                     float* acc, int stride) {
    if (n == Q) {
        constexpr int V = beside(Q);
        int at = 0;
        for (; at + V * kLanes <= d; at += V * kLanes) weigh<Q, V, Type>(values, ahead, tokens, d, at, p, acc, stride);
        for (; at < d; at += kLanes) weigh<Q, 1, Type>(values, ahead, tokens, d, at, p, acc, stride);
    } else if constexpr (Q > 1) {
        weigh_of<Q - 1, Type>(n, values, ahead, tokens, d, p, acc, stride);
    }
}

template <KV Type>
static void widen(const uint8_t* from, int n, float* to) {
    for (int i = 0; i < n; i += kLanes) store(to + i, load_kv(from, size_t(i), Type));
}

// A partition's blocks, as far as they are there, and where its slots begin.
struct Pages {
    const uint8_t* keys[kPartition / kBlockTokens];
    const uint8_t* values[kPartition / kBlockTokens];
    const uint8_t* next[kPartition / kBlockTokens];  // keys to ask for
    int count = 0, base = 0, tokens = 0;
    bool ahead = false;
};

// Scores to exponentials, in place; what a query may not see becomes 0. Maximum and sum to out[0], out[1].
static inline void exponentials(const Pages& at, int slot, int window, float* s, float* out) {
    const int end = slot + 1 - at.base < at.tokens ? slot + 1 - at.base : at.tokens;
    const int start = window && slot + 1 - window > at.base ? slot + 1 - window - at.base : 0;
    for (int t = 0; t < (start < at.tokens ? start : at.tokens); ++t) s[t] = kNothing;
    for (int t = end > 0 ? end : 0; t < at.count * kBlockTokens; ++t) s[t] = kNothing;
    F top = set1(kNothing);
    for (int b = 0; b < at.count; ++b) top = max(top, load(s + b * kBlockTokens));
    const float maximum = reduce_max(top);
    F sum = zero();
    for (int b = 0; b < at.count; ++b) {
        const F e = maximum > kNothing ? exp(sub(load(s + b * kBlockTokens), set1(maximum))) : zero();
        store(s + b * kBlockTokens, e);
        sum = add(sum, e);
    }
    out[0] = maximum;
    out[1] = reduce_add(sum);
}

// One partition for all queries: out [queries][state_stride] holds the weighted values, the maximum and the sum. The first
// queries ask for what is read next: with the keys for the values, with the values for the next partition's keys.
template <KV Type>
static void partition(const Pages& at, const Queries& a, int shift, int d, const float* q, float* p, float* out) {
    const int queries = a.rows * a.group, stride = state_stride(d);
    for (int i = 0; i < queries; i += kQueryTile) {
        const int n = queries - i < kQueryTile ? queries - i : kQueryTile;
        scores_of<kQueryTile, Type>(n, at.keys, at.ahead && i == 0 ? at.values : nullptr, at.count, q + i * d, d,
                                    p + i * kPartition);
    }
    for (int i = 0; i < queries; ++i)
        exponentials(at, a.slots[i / a.group] - shift, a.window, p + i * kPartition, out + i * stride + d);
    for (int i = 0; i < queries; i += kQueryTile) {
        const int n = queries - i < kQueryTile ? queries - i : kQueryTile;
        weigh_of<kQueryTile, Type>(n, at.values, at.ahead && i == 0 ? at.next : nullptr, at.tokens, d, p + i * kPartition,
                                   out + i * stride, stride);
    }
}

static void attend_reset(float* state, int32_t queries, int32_t d) {
    for (int i = 0; i < queries; ++i, state += state_stride(d)) {
        for (int j = 0; j < d; ++j) state[j] = 0.0f;
        state[d] = kNothing;
        state[d + 1] = 0.0f;
    }
}

static void attend_join(float* state, const float* partial, int32_t queries, int32_t d) {
    const int stride = state_stride(d);
    for (int from = 0; from < queries; from += kLanes) {
        const int n = queries - from < kLanes ? queries - from : kLanes;
        alignas(64) float factors[kLanes] = {};
        for (int i = 0; i < n; ++i) {
            const float was = state[(from + i) * stride + d], is = partial[(from + i) * stride + d];
            factors[i] = was < is ? was - is : is - was;
        }
        store(factors, exp(load(factors)));
        for (int i = 0; i < n; ++i) {
            float* s = state + (from + i) * stride;
            const float* x = partial + (from + i) * stride;
            if (x[d] <= kNothing) continue;  // nothing this query may see
            // one of the two factors is e^0 = 1
            const bool higher = s[d] < x[d];
            const float old = higher ? factors[i] : 1.0f, fresh = higher ? 1.0f : factors[i];
            const F o = set1(old), f = set1(fresh);
            for (int j = 0; j < d; j += kLanes) store(s + j, fma(load(x + j), f, mul(load(s + j), o)));
            s[d] = higher ? x[d] : s[d];
            s[d + 1] = __builtin_fmaf(x[d + 1], fresh, s[d + 1] * old);
        }
    }
}

static void attend_finish(const float* state, int32_t rows, int32_t group, int32_t d, float* out, int32_t ldo) {
    for (int r = 0; r < rows; ++r)
        for (int h = 0; h < group; ++h, state += state_stride(d)) {
            const F inverse = set1(1.0f / state[d + 1]);
            for (int j = 0; j < d; j += kLanes) store(out + size_t(r) * ldo + h * d + j, mul(load(state + j), inverse));
        }
}

// The blocks of partition n from the first that some row sees: those before it may be gone.
static inline Pages pages_of(const Queries& a, const Cache& c, int n) {
    Pages at;
    const int last = a.slots[a.rows - 1] - c.shift, begin = n * kPartition;
    const int unseen = a.window ? a.slots[0] - c.shift + 1 - a.window - begin : 0;
    const int skip = unseen > 0 ? unseen / kBlockTokens : 0;
    at.base = begin + skip * kBlockTokens;
    const int whole = begin + kPartition - at.base;
    at.tokens = last + 1 - at.base < whole ? last + 1 - at.base : whole;
    at.count = (at.tokens + kBlockTokens - 1) / kBlockTokens;
    for (int b = 0; b < at.count; ++b) {
        at.keys[b] = c.base + size_t(c.blocks[at.base / kBlockTokens + b]) * kAddressBytes + c.at;
        at.values[b] = at.keys[b] + c.full.values();
    }
    return at;
}

static inline void ask(const Pages& at, size_t bytes) {
    for (int b = 0; b < at.count; ++b)
        for (size_t i = 0; i < bytes; i += 64) prefetch(at.keys[b] + i);
}

static void attend(const Queries& a, const Cache& c) {
    const int d = c.full.head_size, queries = a.rows * a.group;
    float* p = a.scratch;
    float* q = p + kMaxQueries * kPartition;
    float* wide = q + kMaxQueries * d;
    alignas(64) float local[kMaxQueries * state_stride(kMaxHeadSize)];
    const F scale = set1(a.scale);
    for (int r = 0; r < a.rows; ++r)
        for (int i = 0; i < a.group * d; i += kLanes)
            store(q + r * a.group * d + i, mul(load(a.q + size_t(r) * a.ld + i), scale));
    // Keys and values are widened to f32 once where many queries share them: the same numbers, fewer conversions.
    const bool widened = c.full.k == KV::f16 && queries > 2 * kQueryTile;
    const size_t page = size_t(d) * kBlockTokens, page_bytes = page * kv_element(c.full.k);
    const int32_t begin = partitions_of(a.slots[0] - c.shift, a.slots[0] - c.shift, a.window, 0).begin;
    Pages at = pages_of(a, c, begin + a.first_partition), next;
    ask(at, widened ? 2 * page_bytes : page_bytes);
    for (int n = a.first_partition; n < a.last_partition; ++n, at = next) {
        next = n + 1 < a.last_partition ? pages_of(a, c, begin + n + 1) : at;
        float* out = a.partials ? a.partials + size_t(n - a.first_partition) * queries * state_stride(d) : local;
        if (widened) {
            for (int b = 0; b < at.count; ++b) {
                float* to = wide + 2 * page * size_t(b);
                widen<KV::f16>(at.keys[b], int(2 * page), to);
                at.keys[b] = reinterpret_cast<const uint8_t*>(to);
                at.values[b] = reinterpret_cast<const uint8_t*>(to + page);
            }
            if (n + 1 < a.last_partition) ask(next, 2 * page_bytes);
            partition<KV::f32>(at, a, c.shift, d, q, p, out);
        } else {
            at.ahead = true;
            // where the next partition has fewer blocks any other will do
            for (int b = 0; b < at.count; ++b) at.next[b] = next.keys[b < next.count ? b : 0];
            if (c.full.k == KV::f16)
                partition<KV::f16>(at, a, c.shift, d, q, p, out);
            else
                partition<KV::f32>(at, a, c.shift, d, q, p, out);
        }
        if (!a.partials) attend_join(a.state, out, queries, d);
    }
}

}  // namespace KVIK_NS

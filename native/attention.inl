// Attention over pages. A partition of 64 slots is computed from nothing (maximum, exponentials, weighted values) and then
// joined to the running state, in order of slot: the same sums whether a query comes alone or in a tile, and whether its
// partitions are computed by one thread or by many. (Online softmax: Milakov & Gimelshein 2018.)

namespace KVIK_NS {
using namespace kvik;

constexpr float kNothing = -3.0e38f;  // maximum of no scores

static inline F load_kv(const uint8_t* p, size_t i, KV type) {
    return type == KV::f16 ? load_f16(reinterpret_cast<const uint16_t*>(p) + i) : load(reinterpret_cast<const float*>(p) + i);
}

static void append(const Cache& c, int32_t slot, const float* k, const float* v) {
    uint8_t* block = c.base + size_t(c.blocks[slot / kBlockTokens]) * c.block_stride;
    const int at = slot % kBlockTokens, d = c.head_size;
    uint8_t* values = block + size_t(d) * kBlockTokens * kv_element(c.type);
    if (c.type == KV::f16) {
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

// Scores of Q queries against B blocks of 16 keys; sums over even and odd dimensions kept apart.
template <int Q, int B, KV Type>
static inline void scores(const uint8_t* const* keys, const float* q, int d, float* out) {
    F even[Q][B], odd[Q][B];
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)
        KVIK_UNROLL
        for (int b = 0; b < B; ++b) even[i][b] = odd[i][b] = zero();
    for (int j = 0; j < d; j += 2) {
        F k0[B], k1[B];
        KVIK_UNROLL
        for (int b = 0; b < B; ++b) {
            k0[b] = load_kv(keys[b], size_t(j) * kBlockTokens, Type);
            k1[b] = load_kv(keys[b], size_t(j + 1) * kBlockTokens, Type);
        }
        KVIK_UNROLL
        for (int i = 0; i < Q; ++i) {
            const F q0 = set1(q[i * d + j]), q1 = set1(q[i * d + j + 1]);
            KVIK_UNROLL
            for (int b = 0; b < B; ++b) {
                even[i][b] = fma(k0[b], q0, even[i][b]);
                odd[i][b] = fma(k1[b], q1, odd[i][b]);
            }
        }
    }
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)
        KVIK_UNROLL
        for (int b = 0; b < B; ++b) store(out + i * kPartition + b * kBlockTokens, add(even[i][b], odd[i][b]));
}

// acc[Q][lanes * 16] = sum over tokens of weight * value, V lanes of 16 dimensions at once.
template <int Q, int V, KV Type>
static inline void weigh(const uint8_t* const* values, int tokens, int d, int at, const float* p, float* acc, int stride) {
    F sum[Q][V];
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)
        KVIK_UNROLL
        for (int j = 0; j < V; ++j) sum[i][j] = zero();
    for (int t = 0; t < tokens; ++t) {
        const uint8_t* row = values[t / kBlockTokens];
        const size_t first = size_t(t % kBlockTokens) * size_t(d) + size_t(at);
        F v[V];
        KVIK_UNROLL
        for (int j = 0; j < V; ++j) v[j] = load_kv(row, first + size_t(j) * kLanes, Type);
        KVIK_UNROLL
        for (int i = 0; i < Q; ++i) {
            const F w = set1(p[i * kPartition + t]);
            KVIK_UNROLL
            for (int j = 0; j < V; ++j) sum[i][j] = fma(v[j], w, sum[i][j]);
        }
    }
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)
        KVIK_UNROLL
        for (int j = 0; j < V; ++j) store(acc + i * stride + at + j * kLanes, sum[i][j]);
}

template <int Q, KV Type>
static void weigh_all(const uint8_t* const* values, int tokens, int d, const float* p, float* acc, int stride) {
    int at = 0;
    for (; at + 4 * kLanes <= d; at += 4 * kLanes) weigh<Q, 4, Type>(values, tokens, d, at, p, acc, stride);
    for (; at < d; at += kLanes) weigh<Q, 1, Type>(values, tokens, d, at, p, acc, stride);
}

// What fits in the registers.
#if defined(KVIK_AVX512)
constexpr int kQueryTile = 6, kScoreBlocks = 2;
#else
constexpr int kQueryTile = 3, kScoreBlocks = 1;
#endif

template <int Q, KV Type>
static void scores_of(int n, const uint8_t* const* keys, int blocks, const float* q, int d, float* out) {
    if (n == Q) {
        int b = 0;
        for (; b + kScoreBlocks <= blocks; b += kScoreBlocks)
            scores<Q, kScoreBlocks, Type>(keys + b, q, d, out + b * kBlockTokens);
        for (; b < blocks; ++b) scores<Q, 1, Type>(keys + b, q, d, out + b * kBlockTokens);
    } else if constexpr (Q > 1) {
        scores_of<Q - 1, Type>(n, keys, blocks, q, d, out);
    }
}
template <int Q, KV Type>
static void weigh_of(int n, const uint8_t* const* values, int tokens, int d, const float* p, float* acc, int stride) {
    if (n == Q) return weigh_all<Q, Type>(values, tokens, d, p, acc, stride);
    if constexpr (Q > 1) weigh_of<Q - 1, Type>(n, values, tokens, d, p, acc, stride);
}

template <KV Type>
static void widen(const uint8_t* from, int n, float* to) {
    for (int i = 0; i < n; i += kLanes) store(to + i, load_kv(from, size_t(i), Type));
}

// One partition for all queries: out [queries][state_stride] holds the weighted values, the maximum and the sum.
template <KV Type>
static void partition(const uint8_t* const* blocks, int blocks_here, int base, int tokens, const Queries& a, int d,
                      const float* q, float* p, float* out) {
    const int queries = a.rows * a.group, stride = state_stride(d);
    const uint8_t* values[kPartition / kBlockTokens];
    for (int b = 0; b < blocks_here; ++b) values[b] = blocks[b] + size_t(d) * kBlockTokens * kv_element(Type);
    for (int i = 0; i < queries; i += kQueryTile) {
        const int n = queries - i < kQueryTile ? queries - i : kQueryTile;
        scores_of<kQueryTile, Type>(n, blocks, blocks_here, q + i * d, d, p + i * kPartition);
    }
    for (int i = 0; i < queries; ++i) {
        float* s = p + i * kPartition;
        const int slot = a.slots[i / a.group];
        const int end = slot + 1 - base < tokens ? slot + 1 - base : tokens;
        const int start = a.window && slot + 1 - a.window > base ? slot + 1 - a.window - base : 0;
        for (int t = 0; t < (start < tokens ? start : tokens); ++t) s[t] = kNothing;
        for (int t = end > 0 ? end : 0; t < blocks_here * kBlockTokens; ++t) s[t] = kNothing;
        F top = set1(kNothing);
        for (int b = 0; b < blocks_here; ++b) top = max(top, load(s + b * kBlockTokens));
        const float maximum = reduce_max(top);
        F sum = zero();
        for (int b = 0; b < blocks_here; ++b) {
            const F e = maximum > kNothing ? exp(sub(load(s + b * kBlockTokens), set1(maximum))) : zero();
            store(s + b * kBlockTokens, e);
            sum = add(sum, e);
        }
        out[i * stride + d] = maximum;
        out[i * stride + d + 1] = reduce_add(sum);
    }
    for (int i = 0; i < queries; i += kQueryTile) {
        const int n = queries - i < kQueryTile ? queries - i : kQueryTile;
        weigh_of<kQueryTile, Type>(n, values, tokens, d, p + i * kPartition, out + i * stride, stride);
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
    for (int i = 0; i < queries; ++i, state += state_stride(d), partial += state_stride(d)) {
        if (partial[d] <= kNothing) continue;  // nothing this query may see
        // one of the two factors is e^0 = 1
        const float top = max_of(state[d], partial[d]), factor = exp1(state[d] < partial[d] ? state[d] - top : partial[d] - top);
        const float old = state[d] < partial[d] ? factor : 1.0f, fresh = state[d] < partial[d] ? 1.0f : factor;
        const F o = set1(old), f = set1(fresh);
        for (int j = 0; j < d; j += kLanes) store(state + j, fma(load(partial + j), f, mul(load(state + j), o)));
        state[d] = top;
        state[d + 1] = __builtin_fmaf(partial[d + 1], fresh, state[d + 1] * old);
    }
}

static void attend_finish(const float* state, int32_t rows, int32_t group, int32_t d, float* out, int32_t ldo) {
    for (int r = 0; r < rows; ++r)
        for (int h = 0; h < group; ++h, state += state_stride(d)) {
            const F inverse = set1(1.0f / state[d + 1]);
            for (int j = 0; j < d; j += kLanes) store(out + size_t(r) * ldo + h * d + j, mul(load(state + j), inverse));
        }
}

static void attend(const Queries& a, const Cache& c) {
    const int d = c.head_size, queries = a.rows * a.group;
    float* p = a.scratch;
    float* q = p + kMaxQueries * kPartition;
    float* wide = q + kMaxQueries * d;
    float* fresh = a.partials;
    alignas(64) float local[kMaxQueries * state_stride(kMaxHeadSize)];
    const F scale = set1(a.scale);
    for (int r = 0; r < a.rows; ++r)
        for (int i = 0; i < a.group * d; i += kLanes)
            store(q + r * a.group * d + i, mul(load(a.q + size_t(r) * a.ld + i), scale));
    const int last = a.slots[a.rows - 1];
    // Keys and values are widened to f32 once where many queries share them: the same numbers, fewer conversions.
    const bool widened = c.type == KV::f16 && queries > 2 * kQueryTile;
    const size_t page = size_t(d) * kBlockTokens;
    const auto ask = [&](int n) {  // for the pages of a partition
        const int first = n * kPartition / kBlockTokens, end = last / kBlockTokens + 1;
        for (int b = first; b < (first + 4 < end ? first + 4 : end); ++b) {
            if (c.blocks[b] < 0) continue;
            const uint8_t* next = c.base + size_t(c.blocks[b]) * c.block_stride;
            for (size_t i = 0; i < 2 * page * kv_element(c.type); i += 64) prefetch(next + i);
        }
    };
    ask(a.first_partition);
    for (int n = a.first_partition; n < a.last_partition; ++n) {
        const int base = n * kPartition;
        const int tokens = last + 1 - base < kPartition ? last + 1 - base : kPartition;
        const int blocks_here = (tokens + kBlockTokens - 1) / kBlockTokens;
        const uint8_t* blocks[kPartition / kBlockTokens];
        // Blocks before the window may be gone: weighed with 0, any that are there will do, and the last one always is.
        const int32_t* ids = c.blocks + base / kBlockTokens;
        for (int b = 0; b < blocks_here; ++b)
            blocks[b] = c.base + size_t(ids[b] < 0 ? ids[blocks_here - 1] : ids[b]) * c.block_stride;
        if (n + 1 < a.last_partition) ask(n + 1);
        float* out = fresh ? fresh + size_t(n - a.first_partition) * queries * state_stride(d) : local;
        if (widened) {
            const uint8_t* copies[kPartition / kBlockTokens];
            for (int b = 0; b < blocks_here; ++b) {
                float* to = wide + 2 * page * size_t(b);
                widen<KV::f16>(blocks[b], int(2 * page), to);
                copies[b] = reinterpret_cast<const uint8_t*>(to);
            }
            partition<KV::f32>(copies, blocks_here, base, tokens, a, d, q, p, out);
        } else if (c.type == KV::f16) {
            partition<KV::f16>(blocks, blocks_here, base, tokens, a, d, q, p, out);
        } else {
            partition<KV::f32>(blocks, blocks_here, base, tokens, a, d, q, p, out);
        }
        if (!fresh) attend_join(a.state, out, queries, d);
    }
}

}  // namespace KVIK_NS

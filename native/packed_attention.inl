// Attention over packed pages: queries and weights rounded to integers, exact dots with what the pages hold. The queries of a
// tile go together, step by step: what one of them waits for the others compute beside.

namespace KVIK_NS {
using namespace kvik;

// Queries or weights rounded to integers of 15 bits, in steps of their own.
struct Rounded {
    float step[kQueryTile];
    float beside[kQueryTile];  // queries: what the keys' minimums add to the scores
    int32_t less[kQueryTile];  // what is taken off the sums: that of 128 (int8), of the values' zeros
    alignas(64) uint8_t terms[kQueryTile * 2 * kMaxHeadSize];
};
constexpr int kQueryTerms = kMaxHeadSize, kWeightTerms = kPartition;  // bytes from a query's first terms to its second ones

static inline float rounding_step(float most) { return most > kNoise ? most / kMostSteps : 0.0f; }
static inline float steps_in(float most) { return most > kNoise ? kMostSteps / most : 0.0f; }

// Queries times the scales of the page's channels.
template <int Q, KV Type>
static inline void round_queries(const PageShape& s, const uint8_t* share, const float* q, Rounded& out) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(share + s.key_scales());
    const uint16_t* minimums = reinterpret_cast<const uint16_t*>(share + s.key_minimums());
    const int d = s.head_size;
    F top[Q], low[Q], sum[Q], factor[Q];
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i) top[i] = low[i] = sum[i] = zero();
    for (int j = 0; j < d; j += kLanes) {
        const F scale = load_f16(scales + j);
        KVIK_UNROLL
        for (int i = 0; i < Q; ++i) top[i] = max(abs(mul(load(q + i * d + j), scale)), top[i]);
        if constexpr (Type == KV::int4) {
            const F minimum = load_f16(minimums + j);
            KVIK_UNROLL
            for (int i = 0; i < Q; ++i) low[i] = fma(load(q + i * d + j), minimum, low[i]);
        }
    }
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i) {
        const float most = reduce_max(top[i]);
        factor[i] = set1(steps_in(most));
        out.step[i] = rounding_step(most);
        out.beside[i] = Type == KV::int4 ? reduce_add(low[i]) : 0.0f;
    }
    for (int j = 0; j < d; j += 4 * kLanes) {
        F scale[4];
        KVIK_UNROLL
        for (int v = 0; v < 4; ++v) scale[v] = j + v * kLanes < d ? load_f16(scales + j + v * kLanes) : zero();
        KVIK_UNROLL
        for (int i = 0; i < Q; ++i) {
            F whole[4];
            KVIK_UNROLL
            for (int v = 0; v < 4; ++v) {
                if (j + v * kLanes >= d) {
                    whole[v] = zero();
                    continue;
                }
                const F steps = mul(mul(load(q + i * d + j + v * kLanes), scale[v]), factor[i]);
                whole[v] = round_even(within(steps, -kMostSteps, kMostSteps));
                if constexpr (Type == KV::int8) sum[i] = add(sum[i], whole[v]);
            }
            store_terms(out.terms + i * 2 * kQueryTerms + sixteen_at(j / kLanes), kQueryTerms, whole);
        }
    }
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)  // of integers below 2^24: exact
        out.less[i] = Type == KV::int8 ? 128 * int32_t(reduce_add(sum[i])) : 0;
}

// `ahead`: null, or the blocks to ask for, a line with each of these.
template <int Q, int B, KV Type>
static inline void packed_scores(const uint8_t* const* keys, const uint8_t* const* ahead, const Rounded& q, int d, float* out) {
    constexpr int step = Type == KV::int8 ? 4 : 8;  // channels a line
    Dot sum[Q][B];
    const uint8_t *at[B], *soon[B];
    KVIK_UNROLL
    for (int b = 0; b < B; ++b) {
        at[b] = keys[b];
        soon[b] = ahead ? ahead[b] : keys[b];
    }
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)
        KVIK_UNROLL
        for (int b = 0; b < B; ++b) sum[i][b] = no_dot();
    size_t j = 0;
    for (int v = 0; v < d / kLanes; ++v) {
        const uint8_t* terms = q.terms + sixteen_at(v);
        KVIK_UNROLL
        for (int l = 0; l < kLanes / step; ++l, j += 64, terms += step / 4 * kFourBytes) {
            KVIK_UNROLL
            for (int b = 0; b < B; ++b) prefetch(soon[b] + j);
            KVIK_UNROLL
            for (int b = 0; b < B; ++b) {
                const Line line = load_line(at[b] + j);
                const Line low = Type == KV::int8 ? line : low_nibbles(line);
                KVIK_UNROLL
                for (int i = 0; i < Q; ++i) add_dot(sum[i][b], low, terms + i * 2 * kQueryTerms, kQueryTerms);
                if constexpr (Type == KV::int4) {
                    const Line high = high_nibbles(line);
                    KVIK_UNROLL
                    for (int i = 0; i < Q; ++i) add_dot(sum[i][b], high, terms + i * 2 * kQueryTerms + kFourBytes, kQueryTerms);
                }
            }
        }
    }
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)
        KVIK_UNROLL
        for (int b = 0; b < B; ++b) {
            const F s = dot_of(sum[i][b], q.less[i]);
            const F score = Type == KV::int8 ? mul(s, set1(q.step[i])) : fma(s, set1(q.step[i]), set1(q.beside[i]));
            store(out + i * kPartition + b * kBlockTokens, score);
        }
}

// Page by page: the queries are rounded with the scales of each.
template <int Q, KV Type>
static void packed_scores_of(int n, const PageShape& s, const Part& at, const uint8_t* const* ahead, const float* q, float* out) {
    if (n == Q) {
        constexpr int B = beside_packed(Q);
        Rounded rounded;
        for (int b = 0; b < at.count;) {
            round_queries<Q, Type>(s, at.pages[b], q, rounded);
            int end = b + 1;
            while (end < at.count && at.pages[end] == at.pages[b]) ++end;
            for (; b + B <= end; b += B)
                packed_scores<Q, B, Type>(at.keys + b, ahead ? ahead + b : ahead, rounded, s.head_size, out + b * kBlockTokens);
            for (; b < end; ++b)
                packed_scores<Q, 1, Type>(at.keys + b, ahead ? ahead + b : ahead, rounded, s.head_size, out + b * kBlockTokens);
        }
    } else if constexpr (Q > 1) {
        packed_scores_of<Q - 1, Type>(n, s, at, ahead, q, out);
    }
}

// Weights of the queries times the scales of the tokens.
template <int Q, KV Type>
static inline void round_weights(const PageShape& s, const Part& at, const float* p, Rounded& out) {
    F scale[kBlocks], offset[kBlocks], top[Q], total[Q], factor[Q];  // total of integers: exact, or below 2^25
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i) top[i] = total[i] = zero();
    for (int b = 0; b < at.count; ++b) {
        const size_t token = size_t(at.slots[b] & (s.tokens - 1));
        offset[b] = Type == KV::int4 ? load_u8(at.pages[b] + s.value_zeros() + token) : set1(128.0f);
        scale[b] = load_f16(reinterpret_cast<const uint16_t*>(at.pages[b] + s.value_scales()) + token);
        KVIK_UNROLL
        for (int i = 0; i < Q; ++i) top[i] = max(mul(load(p + i * kPartition + b * kBlockTokens), scale[b]), top[i]);
    }
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i) {
        const float most = reduce_max(top[i]);
        factor[i] = set1(steps_in(most));
        out.step[i] = rounding_step(most);
    }
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i) {
        F whole[kBlocks];
        KVIK_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
            if (b >= at.count) {
                whole[b] = zero();
                continue;
            }
            const F steps = mul(mul(load(p + i * kPartition + b * kBlockTokens), scale[b]), factor[i]);
            whole[b] = round_even(within(steps, 0.0f, kMostSteps));
            total[i] = fma(whole[b], offset[b], total[i]);
        }
        store_terms(out.terms + i * 2 * kWeightTerms, kWeightTerms, whole);
    }
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i) out.less[i] = int32_t(reduce_add(total[i]));
}

template <int Q, int V, KV Type>
static inline void packed_weigh(const Part& at, const uint8_t* const* ahead, const Rounded& p, int d, int from, float* acc, int stride) {
    constexpr int words = Type == KV::int8 ? 4 : 2;  // lines that a block has of 16 channels
    Dot sum[Q][V];
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)
        KVIK_UNROLL
        for (int j = 0; j < V; ++j) sum[i][j] = no_dot();
    const size_t word = size_t(d / kLanes) * 64;
    for (int b = 0; b < at.count; ++b) {
        const uint8_t* lines = at.values[b] + size_t(from / kLanes) * 64;
        const uint8_t* soon = ahead ? ahead[b] + size_t(from / kLanes) * 64 : lines;
        const uint8_t* terms = p.terms + sixteen_at(b);
        for (int w = 0; w < words; ++w, lines += word, soon += word, terms += 4 / words * kFourBytes) {
            KVIK_UNROLL
            for (int j = 0; j < V; ++j) prefetch(soon + j * 64);
            KVIK_UNROLL
            for (int j = 0; j < V; ++j) {
                const Line line = load_line(lines + j * 64);
                const Line low = Type == KV::int8 ? lifted(line) : low_nibbles(line);
                KVIK_UNROLL
                for (int i = 0; i < Q; ++i) add_dot(sum[i][j], low, terms + i * 2 * kWeightTerms, kWeightTerms);
                if constexpr (Type == KV::int4) {
                    const Line high = high_nibbles(line);
                    KVIK_UNROLL
                    for (int i = 0; i < Q; ++i) add_dot(sum[i][j], high, terms + i * 2 * kWeightTerms + kFourBytes, kWeightTerms);
                }
            }
        }
    }
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)
        KVIK_UNROLL
        for (int j = 0; j < V; ++j)
            store(acc + i * stride + from + j * kLanes, mul(dot_of(sum[i][j], p.less[i]), set1(p.step[i])));
}

template <int Q, KV Type>
static void packed_weigh_of(int n, const PageShape& s, const Part& at, const uint8_t* const* ahead, const float* p, float* acc,
                            int stride) {
    if (n == Q) {
        constexpr int V = beside_packed(Q);
        Rounded rounded;
        round_weights<Q, Type>(s, at, p, rounded);
        const int d = s.head_size;
        int j = 0;
        for (; j + V * kLanes <= d; j += V * kLanes) packed_weigh<Q, V, Type>(at, ahead, rounded, d, j, acc, stride);
        for (; j < d; j += kLanes) packed_weigh<Q, 1, Type>(at, ahead, rounded, d, j, acc, stride);
    } else if constexpr (Q > 1) {
        packed_weigh_of<Q - 1, Type>(n, s, at, ahead, p, acc, stride);
    }
}

}  // namespace KVIK_NS

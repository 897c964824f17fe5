// Attention over pages. Of a partition of 64 slots the packed ones, then the full ones, are computed from nothing (maximum,
// exponentials, weighted values) and joined to the running state, in order of slot: the same sums whether a query comes alone
// or in a tile, and whether its partitions are computed by one thread or by many. (Online softmax: Milakov & Gimelshein 2018.)

namespace KVIK_NS {
using namespace kvik;

constexpr float kNothing = -3.0e38f;  // maximum of no scores
constexpr int kBlocks = kPartition / kBlockTokens;

// Where the packed or the full slots of a partition lie that some row of the tile sees: blocks of 16 slots.
struct Part {
    const uint8_t* keys[kBlocks];
    const uint8_t* values[kBlocks];
    const uint8_t* pages[kBlocks];  // packed: the page's share that the block lies in
    int32_t slots[kBlocks];         // each one's first
    int count = 0, tokens = 0;      // blocks; tokens in them that are written
    bool packed = false, sinks = false;
    int place = 0;                  // partition and state, as the partials are numbered
};

// What to ask for while something else is read, a line for a line: `per` lines of block b with each line of that.
struct Ahead {
    const uint8_t* const* at = nullptr;
    int lines = 0, per = 1;  // of a block
    Ahead() = default;
    Ahead(const uint8_t* const* blocks, size_t bytes, size_t beside)
        : at(blocks), lines(int(bytes / 64)), per(int((bytes + beside - 1) / beside)) {}
    Ahead from(int b) const {
        Ahead rest = *this;
        if (at) rest.at += b;
        return rest;
    }
    void ask(int b, int line) const {
        for (int i = line * per; i < (line + 1) * per && i < lines; ++i) prefetch(at[b] + size_t(i) * 64);
    }
};

// How many blocks of keys, or lanes of values, go with Q queries: as many sums as the registers hold.
constexpr int kQueryTile = 6;
#if defined(KVIK_AVX512)
constexpr int beside(int) { return 4; }
constexpr int beside_packed(int q) { return q > 3 ? 2 : 4; }
#else
constexpr int beside(int q) { return q > 3 ? 1 : (q > 1 ? 2 : 4); }
constexpr int beside_packed(int q) { return q > 3 ? 1 : (q > 1 ? 2 : 4); }
#endif

// ---- full blocks -----------------------------------------------------------------------------------------------------

// Scores of Q queries against B blocks of 16 keys, summed in order of dimension.
template <int Q, int B, KV Type>
static inline void scores(const uint8_t* const* keys, const Ahead& ahead, const float* q, int d, float* out) {
    constexpr int step = 32 / kv_bits(Type);  // dimensions a line
    F sum[Q][B];
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)
        KVIK_UNROLL
        for (int b = 0; b < B; ++b) sum[i][b] = zero();
    for (int j = 0; j < d; j += step) {
        if (ahead.at)
            KVIK_UNROLL
            for (int b = 0; b < B; ++b) ahead.ask(b, j / step);
        KVIK_UNROLL
        for (int at = j; at < j + step; ++at)
            KVIK_UNROLL
            for (int b = 0; b < B; ++b) {
                const F k = load_kv<Type>(keys[b], size_t(at) * kBlockTokens);
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
static inline void weigh(const uint8_t* const* values, const Ahead& ahead, int tokens, int d, int at, const float* p, float* acc,
                         int stride) {
    constexpr int line = 512 / kv_bits(Type);  // numbers of one
    F sum[Q][V];
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)
        KVIK_UNROLL
        for (int j = 0; j < V; ++j) sum[i][j] = zero();
    for (int from = 0; from < tokens; from += kBlockTokens) {
        const int n = tokens - from < kBlockTokens ? tokens - from : kBlockTokens;
        const uint8_t* row = values[from / kBlockTokens];
        for (int t = 0; t < n; ++t) {
            const int first = t * d + at;
            if (ahead.at)
                for (int i = first; i < first + V * kLanes; i += line) ahead.ask(from / kBlockTokens, i / line);
            KVIK_UNROLL
            for (int j = 0; j < V; ++j) {
                const F v = load_kv<Type>(row, size_t(first) + size_t(j) * kLanes);
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

template <int Q, KV Type>
static void scores_of(int n, const Part& at, const Ahead& ahead, const float* q, int d, float* out) {
    if (n == Q) {
        constexpr int B = beside(Q);
        int b = 0;
        for (; b + B <= at.count; b += B) scores<Q, B, Type>(at.keys + b, ahead.from(b), q, d, out + b * kBlockTokens);
        for (; b < at.count; ++b) scores<Q, 1, Type>(at.keys + b, ahead.from(b), q, d, out + b * kBlockTokens);
    } else if constexpr (Q > 1) {
        scores_of<Q - 1, Type>(n, at, ahead, q, d, out);
    }
}
template <int Q, KV Type>
static void weigh_of(int n, const Part& at, const Ahead& ahead, int d, const float* p, float* acc, int stride) {
    if (n == Q) {
        constexpr int V = beside(Q);
        int i = 0;
        for (; i + V * kLanes <= d; i += V * kLanes) weigh<Q, V, Type>(at.values, ahead, at.tokens, d, i, p, acc, stride);
        for (; i < d; i += kLanes) weigh<Q, 1, Type>(at.values, ahead, at.tokens, d, i, p, acc, stride);
    } else if constexpr (Q > 1) {
        weigh_of<Q - 1, Type>(n, at, ahead, d, p, acc, stride);
    }
}

template <KV Type>
static void widen(const uint8_t* from, int n, float* to) {
    for (int i = 0; i < n; i += kLanes) store(to + i, load_kv<Type>(from, size_t(i)));
}

// ---- packed pages ----------------------------------------------------------------------------------------------------

// Queries or weights rounded to integers of 15 bits, in steps of their own.
struct Rounded {
    float step[kQueryTile];
    float beside[kQueryTile];   // queries: what the keys' minimums add to the scores
    int32_t less[kQueryTile];   // what is taken off the sums: that of the keys' 128, of the values' zeros
    alignas(64) uint8_t terms[kQueryTile * 2 * kMaxHeadSize];
};

// Query i times the scales of the page's channels.
template <KV Type>
static inline void round_query(const PageShape& s, const uint8_t* share, const float* q, int i, Rounded& out) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(share + s.key_scales());
    const uint16_t* minimums = reinterpret_cast<const uint16_t*>(share + s.key_minimums());
    const int d = s.head_size;
    alignas(64) float x[kMaxHeadSize];
    F top = zero(), low = zero();
    for (int j = 0; j < d; j += kLanes) {
        const F y = mul(load(q + j), load_f16(scales + j));
        store(x + j, y);
        top = max(abs(y), top);
        if constexpr (Type == KV::int4) low = fma(load(q + j), load_f16(minimums + j), low);
    }
    const float most = reduce_max(top);
    const F factor = set1(most > kNoise ? kQueryMost / most : 0.0f);
    F sum = zero();
    for (int j = 0; j < d; j += kLanes) {
        const F whole = round_even(within(mul(load(x + j), factor), -kQueryMost, kQueryMost));
        store_query(out.terms + i * 2 * d, j, d, whole);
        sum = add(sum, whole);
    }
    out.step[i] = most > kNoise ? most / kQueryMost : 0.0f;
    out.less[i] = Type == KV::int8 ? 128 * int32_t(reduce_add(sum)) : 0;  // of integers below 2^24: exact
    out.beside[i] = Type == KV::int4 ? reduce_add(low) : 0.0f;
}

template <int Q, int B, KV Type>
static inline void packed_scores(const uint8_t* const* keys, const Ahead& ahead, const Rounded& q, int d, float* out) {
    constexpr int step = Type == KV::int8 ? 4 : 8;  // channels a line
    Dot sum[Q][B];
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)
        KVIK_UNROLL
        for (int b = 0; b < B; ++b) sum[i][b] = no_dot();
    for (int j = 0; j < d; j += step) {
        if (ahead.at)
            KVIK_UNROLL
            for (int b = 0; b < B; ++b) ahead.ask(b, j / step);
        KVIK_UNROLL
        for (int b = 0; b < B; ++b) {
            const Line line = load_line(keys[b] + size_t(j / step) * 64);
            const Line low = Type == KV::int8 ? line : low_nibbles(line);
            KVIK_UNROLL
            for (int i = 0; i < Q; ++i) dot_keys(sum[i][b], low, q.terms + i * 2 * d, j, d);
            if constexpr (Type == KV::int4) {
                const Line high = high_nibbles(line);
                KVIK_UNROLL
                for (int i = 0; i < Q; ++i) dot_keys(sum[i][b], high, q.terms + i * 2 * d, j + 4, d);
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
static void packed_scores_of(int n, const PageShape& s, const Part& at, const Ahead& ahead, const float* q, float* out) {
    if (n == Q) {
        constexpr int B = beside_packed(Q);
        Rounded rounded;
        for (int b = 0; b < at.count;) {
            for (int i = 0; i < Q; ++i) round_query<Type>(s, at.pages[b], q + i * s.head_size, i, rounded);
            int end = b + 1;
            while (end < at.count && at.pages[end] == at.pages[b]) ++end;
            for (; b + B <= end; b += B)
                packed_scores<Q, B, Type>(at.keys + b, ahead.from(b), rounded, s.head_size, out + b * kBlockTokens);
            for (; b < end; ++b)
                packed_scores<Q, 1, Type>(at.keys + b, ahead.from(b), rounded, s.head_size, out + b * kBlockTokens);
        }
    } else if constexpr (Q > 1) {
        packed_scores_of<Q - 1, Type>(n, s, at, ahead, q, out);
    }
}

// Weights of a query times the scales of the tokens.
template <KV Type>
static inline void round_weights(const PageShape& s, const Part& at, const float* p, int i, Rounded& out) {
    F x[kBlocks], top = zero(), total = zero();
    const uint8_t* zeros[kBlocks];
    for (int b = 0; b < at.count; ++b) {
        const size_t token = size_t(at.slots[b] % s.tokens);
        zeros[b] = at.pages[b] + s.value_zeros() + token;
        x[b] = mul(load(p + b * kBlockTokens), load_f16(reinterpret_cast<const uint16_t*>(at.pages[b] + s.value_scales()) + token));
        top = max(x[b], top);
    }
    const float most = reduce_max(top);
    const F factor = set1(most > kNoise ? kWeightMost / most : 0.0f);
    for (int b = 0; b < at.count; ++b) {
        const F whole = round_even(within(mul(x[b], factor), 0.0f, kWeightMost));
        store_weights(out.terms + i * 2 * kPartition, b * kBlockTokens, kPartition, whole);
        if constexpr (Type == KV::int4) total = fma(whole, load_u8(zeros[b]), total);
    }
    out.step[i] = most > kNoise ? most / kWeightMost : 0.0f;
    out.less[i] = Type == KV::int4 ? int32_t(reduce_add(total)) : 0;
}

template <int Q, int V, KV Type>
static inline void packed_weigh(const Part& at, const Ahead& ahead, const Rounded& p, int d, int from, float* acc, int stride) {
    constexpr int words = Type == KV::int8 ? 4 : 2;  // lines that a block has of 16 channels
    Dot sum[Q][V];
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i)
        KVIK_UNROLL
        for (int j = 0; j < V; ++j) sum[i][j] = no_dot();
    for (int b = 0; b < at.count; ++b)
        for (int w = 0; w < words; ++w) {
            const int first = (w * d + from) / kLanes;
            const uint8_t* lines = at.values[b] + size_t(first) * 64;
            if (ahead.at)
                KVIK_UNROLL
                for (int j = 0; j < V; ++j) ahead.ask(b, first + j);
            const int token = b * kBlockTokens + w * (kBlockTokens / words);
            Line line[V];
            KVIK_UNROLL
            for (int j = 0; j < V; ++j) line[j] = Type == KV::int8 ? load_line(lines + j * 64) : low_nibbles(load_line(lines + j * 64));
            KVIK_UNROLL
            for (int i = 0; i < Q; ++i) {
                const Weights x = load_weights(p.terms + i * 2 * kPartition, token, kPartition);
                KVIK_UNROLL
                for (int j = 0; j < V; ++j) dot_values(sum[i][j], x, line[j]);
            }
            if constexpr (Type == KV::int4) {
                KVIK_UNROLL
                for (int j = 0; j < V; ++j) line[j] = high_nibbles(load_line(lines + j * 64));
                KVIK_UNROLL
                for (int i = 0; i < Q; ++i) {
                    const Weights x = load_weights(p.terms + i * 2 * kPartition, token + 4, kPartition);
                    KVIK_UNROLL
                    for (int j = 0; j < V; ++j) dot_values(sum[i][j], x, line[j]);
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
static void packed_weigh_of(int n, const PageShape& s, const Part& at, const Ahead& ahead, const float* p, float* acc, int stride) {
    if (n == Q) {
        constexpr int V = beside_packed(Q);
        Rounded rounded;
        for (int i = 0; i < Q; ++i) round_weights<Type>(s, at, p + i * kPartition, i, rounded);
        const int d = s.head_size;
        int j = 0;
        for (; j + V * kLanes <= d; j += V * kLanes) packed_weigh<Q, V, Type>(at, ahead, rounded, d, j, acc, stride);
        for (; j < d; j += kLanes) packed_weigh<Q, 1, Type>(at, ahead, rounded, d, j, acc, stride);
    } else if constexpr (Q > 1) {
        packed_weigh_of<Q - 1, Type>(n, s, at, ahead, p, acc, stride);
    }
}

}  // namespace KVIK_NS

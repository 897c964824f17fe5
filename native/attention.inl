// Attention over pages. Of a partition of 64 slots the packed ones, then the full ones, are computed from nothing (maximum,
// exponentials, weighted values) and joined, first to those of its span, in order of slot: the same sums whether a query comes
// alone or in a tile, and whether its spans are computed by one thread or by many. (Online softmax: Milakov & Gimelshein 2018.)

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
    int place = 0;                  // partition and state
};

// What to ask for while something else is read, a line for a line: `per` lines of block b with each line of that.
struct Ahead {
    const uint8_t* const* at = nullptr;
    int count = 0, per = 1;  // of a block
    Ahead() = default;
    Ahead(const uint8_t* const* blocks, size_t bytes, size_t beside)
        : at(blocks), per(bytes > beside ? int((bytes + beside - 1) / beside) : 1) {
        count = int(bytes / 64) / per;
    }
    Ahead from(int b) const {
        Ahead rest = *this;
        if (at) rest.at += b;
        return rest;
    }
    void ask(int b, int line) const {
        if (line >= count) return;
        const uint8_t* p = at[b] + size_t(line * per) * 64;
        prefetch(p);
        for (int i = 1; i < per; ++i) prefetch(p + i * 64);
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

}  // namespace KVIK_NS

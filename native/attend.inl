// Attention of a tile of rows: states; one part after another; what is observed.

namespace KVIK_NS {
using namespace kvik;

// ---- states ----------------------------------------------------------------------------------------------------------

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
            if (n <= kQueryTile) factors[i] = exp1(factors[i]);  // sooner than all together, which wait for these stores
        }
        if (n > kQueryTile) store(factors, exp(load(factors)));
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

// ---- exponentials -----------------------------------------------------------------------------------------------------

// Scores of what the row at `slot` may not see become nothing.
static inline void mask(const Tile& tile, const Part& at, int32_t slot, float* s) {
    const int32_t from = at.sinks ? 0 : tile.seen_from(slot), end = at.sinks && tile.a.sinks <= slot ? tile.a.sinks : slot + 1;
    const int32_t keep = tile.c.keep, packed = tile.packed_end(slot);
    for (int b = 0; b < at.count; ++b) {
        const int32_t base = at.slots[b];
        const bool other = at.sinks ? false : (base >= keep && base < packed) != at.packed;
        const int32_t first = other ? kBlockTokens : from - base, last = other ? kBlockTokens : end - base;
        float* x = s + b * kBlockTokens;
        for (int t = 0; t < (first < kBlockTokens ? first : kBlockTokens); ++t) x[t] = kNothing;
        for (int t = last > 0 ? last : 0; t < kBlockTokens; ++t) x[t] = kNothing;
    }
}

// Scores of Q queries to exponentials, in place; maxima and sums to out [Q][stride]: [0], [1].
template <int Q>
static inline void exponentials(int count, float* s, float* out, int stride) {
    F top[Q], sum[Q];
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i) {
        top[i] = set1(kNothing);
        sum[i] = zero();
    }
    for (int b = 0; b < count; ++b)
        KVIK_UNROLL
        for (int i = 0; i < Q; ++i) top[i] = max(top[i], load(s + i * kPartition + b * kBlockTokens));
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i) {
        const float maximum = reduce_max(top[i]);
        out[i * stride] = maximum;
        top[i] = set1(maximum);
    }
    const F nothing = set1(kNothing);
    for (int b = 0; b < count; ++b)
        KVIK_UNROLL
        for (int i = 0; i < Q; ++i) {
            float* x = s + i * kPartition + b * kBlockTokens;
            const F e = where_less(nothing, top[i], exp(sub(load(x), top[i])), zero());
            store(x, e);
            sum[i] = add(sum[i], e);
        }
    KVIK_UNROLL
    for (int i = 0; i < Q; ++i) out[i * stride + 1] = reduce_add(sum[i]);
}
template <int Q>
static void exponentials_of(int n, int count, float* s, float* out, int stride) {
    if (n == Q) return count == kBlocks ? exponentials<Q>(kBlocks, s, out, stride) : exponentials<Q>(count, s, out, stride);
    if constexpr (Q > 1) exponentials_of<Q - 1>(n, count, s, out, stride);
}

// ---- one part --------------------------------------------------------------------------------------------------------

// What to ask for beside the keys (values) of a part: `full` where those are full blocks, `packed` where they are packed.
struct Asked {
    Ahead full;
    const uint8_t* const* packed = nullptr;
};

static void all_scores(int n, KV type, const PageShape& s, const Part& at, const Asked& ahead, const float* q, float* out) {
    const int d = s.head_size;
    switch (type) {
        case KV::f32: return scores_of<kQueryTile, KV::f32>(n, at, ahead.full, q, d, out);
        case KV::f16: return scores_of<kQueryTile, KV::f16>(n, at, ahead.full, q, d, out);
        case KV::bf16: return scores_of<kQueryTile, KV::bf16>(n, at, ahead.full, q, d, out);
        case KV::int8: return packed_scores_of<kQueryTile, KV::int8>(n, s, at, ahead.packed, q, out);
        case KV::int4: return packed_scores_of<kQueryTile, KV::int4>(n, s, at, ahead.packed, q, out);
    }
}
static void all_weigh(int n, KV type, const PageShape& s, const Part& at, const Asked& ahead, const float* p, float* acc, int stride) {
    const int d = s.head_size;
    switch (type) {
        case KV::f32: return weigh_of<kQueryTile, KV::f32>(n, at, ahead.full, d, p, acc, stride);
        case KV::f16: return weigh_of<kQueryTile, KV::f16>(n, at, ahead.full, d, p, acc, stride);
        case KV::bf16: return weigh_of<kQueryTile, KV::bf16>(n, at, ahead.full, d, p, acc, stride);
        case KV::int8: return packed_weigh_of<kQueryTile, KV::int8>(n, s, at, ahead.packed, p, acc, stride);
        case KV::int4: return packed_weigh_of<kQueryTile, KV::int4>(n, s, at, ahead.packed, p, acc, stride);
    }
}

// Scratch of a tile, as attend_scratch() counts it.
struct Work {
    float *p, *q, *wide;
};

// 16-bit blocks widened to f32 once where many queries share them: the same numbers, fewer conversions.
static KV widened(KV type, const uint8_t** blocks, int count, int d, float* to) {
    if (type != KV::f16 && type != KV::bf16) return type;
    const int n = d * kBlockTokens;
    for (int b = 0; b < count; ++b, to += n) {
        type == KV::f16 ? widen<KV::f16>(blocks[b], n, to) : widen<KV::bf16>(blocks[b], n, to);
        blocks[b] = reinterpret_cast<const uint8_t*>(to);
    }
    return KV::f32;
}

// What a packed page's integers mean, at its end.
static inline void ask_scales(const Tile& tile, const Part& at) {
    for (int b = 0; b < at.count; ++b)
        if (at.packed && (b == 0 || at.pages[b] != at.pages[b - 1]))
            for (size_t i = tile.c.packed.key_scales() / 64 * 64; i < tile.c.packed.share_bytes(); i += 64) prefetch(at.pages[b] + i);
}
static inline void ask_blocks(const uint8_t* const* blocks, int count, size_t bytes) {
    for (int b = 0; b < count; ++b)
        for (size_t i = 0; i < bytes; i += 64) prefetch(blocks[b] + i);
}

// One part for all queries: out [queries][state_stride] holds the weighted values, the maximum and the sum. The first queries
// ask for what is read next. Of packed parts: the next one's keys with these keys, its values with these values. Else, since
// these are more bytes: with the keys for these values, with the values for the next part's keys.
static void attend_part(const Tile& tile, Part& at, const Part& next, const Work& w, float* out) {
    const PageShape &s = tile.shape(at), &other = tile.shape(next);
    const int queries = tile.queries(), d = s.head_size, stride = state_stride(d);
    const int tiles = (queries + kQueryTile - 1) / kQueryTile, most = (queries + tiles - 1) / tiles;  // queries of one, alike
    const bool many = queries > 2 * kQueryTile, masked = !tile.all_see_all(at);
    KV k = s.k, v = s.v;
    Asked beside_keys, beside_values;
    const uint8_t *others[2][kBlocks];
    const uint8_t *const *keys = next.keys, *const *values = next.values;
    ask_scales(tile, next);
    if (next.count < at.count) {  // any other will do where it has fewer
        for (int b = 0; b < at.count; ++b) {
            others[0][b] = b < next.count ? next.keys[b] : at.keys[b];
            others[1][b] = b < next.count ? next.values[b] : at.values[b];
        }
        keys = others[0];
        values = others[1];
    }
    if (many) {
        k = widened(k, at.keys, at.count, d, w.wide);
        v = widened(v, at.values, at.count, d, w.wide + kPartition * d);
        ask_blocks(next.keys, next.count, other.key_block());
        ask_blocks(next.values, next.count, other.value_block());
    } else if (at.packed && next.packed) {
        beside_keys = {Ahead(keys, s.key_block(), s.key_block()), keys};
        beside_values = {Ahead(values, s.value_block(), s.value_block()), values};
    } else {
        beside_keys.full = Ahead(at.values, s.value_block(), s.key_block());
        beside_values.full = Ahead(keys, other.key_block(), s.value_block());
    }
    for (int i = 0; i < queries; i += most) {
        const int n = queries - i < most ? queries - i : most;
        all_scores(n, k, s, at, i == 0 ? beside_keys : Asked(), w.q + i * d, w.p + i * kPartition);
    }
    for (int i = 0; i < queries; i += most) {
        const int n = queries - i < most ? queries - i : most;
        for (int j = i; masked && j < i + n; ++j)
            if (!tile.sees_all(at, tile.slot(j))) mask(tile, at, tile.slot(j), w.p + j * kPartition);
        exponentials_of<kQueryTile>(n, at.count, w.p + i * kPartition, out + i * stride + d, stride);
    }
    for (int i = 0; i < queries; i += most) {
        const int n = queries - i < most ? queries - i : most;
        all_weigh(n, v, s, at, i == 0 ? beside_values : Asked(), w.p + i * kPartition, out + i * stride, stride);
    }
}

// ---- observation -----------------------------------------------------------------------------------------------------

// Of each part the observed queries' exponentials [queries][64]; behind those of all what they are relative to [queries].
struct Observed {
    const Tile& tile;
    const int first, count;  // queries
    float *const begin, *const maximums;
    int parts = 0;
    explicit Observed(const Tile& t)
        : tile(t), first(t.a.observed_first * t.a.group),
          count(t.a.sums ? (t.a.observed_end - t.a.observed_first) * t.a.group : 0),
          begin(reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(t.a.observed) + 63) / 64 * 64)),
          maximums(count ? exponentials_of(t.places()) : nullptr) {}
    float* exponentials_of(int part) const { return begin + size_t(part) * size_t(count) * kPartition; }
    // where the next part's scores go: where all queries are observed, to stay
    float* place(float* scratch) const { return count == tile.queries() ? exponentials_of(parts) : scratch; }

    void keep(const Part& part, const float* p, const float* out) {
        if (!count) return;
        const int d = tile.c.full.head_size, stride = state_stride(d);
        float *to = exponentials_of(parts), *top = maximums + parts++ * count;
        for (int i = 0; i < count; ++i) {
            const float* from = p + (first + i) * kPartition;
            if (p != to)
                for (int b = 0; b < part.count; ++b) store(to + i * kPartition + b * kBlockTokens, load(from + b * kBlockTokens));
            top[i] = out[(first + i) * stride + d];
        }
    }

    // after the last part: e * e^(maximum - that of all) / sum, in steps of 2^-24, onto the slots' sums
    void add_sums() const {
        constexpr float kOne = 16777216.0f;
        const int d = tile.c.full.head_size, stride = state_stride(d);
        int place = 0;
        for (int n = 0; n < parts; ++n, ++place) {
            const Part part = tile.from(place);
            place = part.place;
            const float* e = exponentials_of(n);
            alignas(64) float factors[kMaxQueries] = {}, inverse[kMaxQueries] = {};
            for (int i = 0; i < count; ++i) {
                const float* state = tile.a.state + (first + i) * stride + d;
                factors[i] = maximums[n * count + i] - state[0];
                inverse[i] = kOne / state[1];
            }
            for (int i = 0; i < count; i += kLanes)
                store(factors + i, within(mul(exp(load(factors + i)), load(inverse + i)), 0.0f, kOne));
            for (int b = 0; b < part.count; ++b) {
                Ints total = no_ints();
                for (int i = 0; i < count; ++i) {
                    const F p = mul(load(e + i * kPartition + b * kBlockTokens), set1(factors[i]));
                    total = add(total, to_ints(max(p, zero())));
                }
                int32_t lanes[kLanes];
                store(lanes, total);
                for (int t = 0; t < kLanes; ++t)
                    if (lanes[t]) __atomic_fetch_add(tile.a.sums + part.slots[b] + t, int64_t(lanes[t]), __ATOMIC_RELAXED);
            }
        }
    }
};

// ---- the tile --------------------------------------------------------------------------------------------------------

static void scale_queries(const Queries& a, int d, const float* from, float* q) {
    const F scale = set1(a.scale);
    for (int r = 0; r < a.rows; ++r)
        for (int i = 0; i < a.group * d; i += kLanes)
            store(q + r * a.group * d + i, mul(load(from + size_t(r) * size_t(a.ld) + i), scale));
}

static void attend(const Queries& a, const Cache& c) {
    const Tile tile(a, c);
    const int d = c.full.head_size, queries = tile.queries(), stride = state_stride(d);
    float* q = a.scratch + kMaxQueries * kPartition;
    Work w{a.scratch, q, q + kMaxQueries * d};
    const int state = queries * stride;
    alignas(64) float local[2 * kMaxQueries * state_stride(kMaxHeadSize)];
    float* const of_part = local + state;
    for (int n = 0; a.partials && n < a.last_span - a.first_span; ++n)
        for (int i = 0; i < queries; ++i) a.partials[n * state + i * stride + d] = kNothing;  // where it has no part
    Observed observed(tile);
    Part at = tile.from(0);
    ask_scales(tile, at);
    ask_blocks(at.keys, at.count, tile.shape(at).key_block());
    if (at.packed) ask_blocks(at.values, at.count, tile.shape(at).value_block());
    const float* scaled = nullptr;
    while (at.count) {
        const int span = tile.span_of(at);
        float* const out = a.partials ? a.partials + size_t(span - a.first_span) * size_t(state) : local;
        for (bool first = true; at.count && tile.span_of(at) == span; first = false) {
            const float* from = at.sinks ? a.sink_q : a.q;
            if (from != scaled) scale_queries(a, d, scaled = from, q);
            const Part next = tile.from(at.place + 1);
            float* to = first ? out : of_part;
            w.p = observed.place(a.scratch);
            attend_part(tile, at, next, w, to);
            observed.keep(at, w.p, to);
            if (!first) attend_join(out, of_part, queries, d);
            at = next;
        }
        if (!a.partials) attend_join(a.state, out, queries, d);
    }
    observed.add_sums();
}

}  // namespace KVIK_NS

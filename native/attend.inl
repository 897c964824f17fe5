// Attention of a tile of rows: which blocks they see, part by part; states; what is observed.

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

// ---- parts -----------------------------------------------------------------------------------------------------------

// A tile of rows and its cache, in slots of the table.
struct Tile {
    const Queries& a;
    const Cache& c;
    const int32_t first, last, start;  // slots of the first and the last row; the first slot that the first row sees
    const int32_t packed_first;        // packed_end of the first row
    const Partitions partitions;
    const int states;

    Tile(const Queries& queries, const Cache& cache)
        : a(queries), c(cache), first(a.slots[0] - c.shift), last(a.slots[a.rows - 1] - c.shift), start(seen_from(first)),
          packed_first(c.packed_end(first)), partitions(partitions_of(first, last, a.window, a.sinks)), states(states_of(c)) {}

    int queries() const { return a.rows * a.group; }
    int places() const { return (a.last_partition - a.first_partition) * states; }
    int32_t slot(int query) const { return a.slots[query / a.group] - c.shift; }
    // the first slot that a row sees through q
    int32_t seen_from(int32_t slot) const {
        const int32_t begin = a.window && slot + 1 > a.window ? slot + 1 - a.window : 0;
        return begin > a.sinks ? begin : a.sinks;
    }
    // whether some row sees slots of the full block from `base` on, of the packed one
    bool sees_full(int32_t base) const {
        if (base + kBlockTokens <= start || base > last || last < a.sinks) return false;
        return base < c.keep || base >= packed_first;
    }
    bool sees_packed(int32_t base) const {
        if (base < c.keep) return false;
        const int32_t page_end = base / c.packed.tokens * c.packed.tokens + c.packed.tokens, earliest = page_end + kRecent - 1;
        const int32_t reader = first > earliest ? first : earliest;  // the first row that reads it packed
        return reader <= last && base + kBlockTokens > seen_from(reader);
    }
    void add_full(Part& at, int32_t base) const {
        const uint8_t* block = full_block(c, base);
        const int b = at.count++;
        at.slots[b] = base;
        at.keys[b] = block;
        at.values[b] = block + c.full.values();
        at.tokens = b * kBlockTokens + (last + 1 - base < kBlockTokens ? last + 1 - base : kBlockTokens);
    }
    void add_packed(Part& at, int32_t base) const {
        const PageShape& s = c.packed;
        const uint8_t* page = packed_page(c, base / s.tokens);
        const size_t within = size_t(base % s.tokens / kBlockTokens);
        const int b = at.count++;
        at.slots[b] = base;
        at.pages[b] = page;
        at.keys[b] = page + within * s.key_block();
        at.values[b] = page + s.values() + within * s.value_block();
        at.tokens = at.count * kBlockTokens;
    }
    Part part(int place) const {
        Part at;
        at.place = place;
        const int n = a.first_partition + place / states;
        at.packed = states > 1 && place % states == 0;
        at.sinks = n < partitions.sinks;
        const int32_t begin = (at.sinks ? n : partitions.begin + n - partitions.sinks) * kPartition;
        for (int32_t base = begin; base < begin + kPartition; base += kBlockTokens) {
            if (at.sinks) {
                if (!at.packed && base < a.sinks && base <= last) add_full(at, base);
            } else if (at.packed) {
                if (sees_packed(base)) add_packed(at, base);
            } else if (sees_full(base)) {
                add_full(at, base);
            }
        }
        return at;
    }
    // the next part from `place` on that has blocks; none: count is 0
    Part from(int place) const {
        for (; place < places(); ++place) {
            const Part at = part(place);
            if (at.count) return at;
        }
        return {};
    }
    const PageShape& shape(const Part& at) const { return at.packed ? c.packed : c.full; }
};

// Scores to exponentials, in place; what the query may not see becomes 0. Maximum and sum to out[0], out[1].
static inline void exponentials(const Tile& tile, const Part& at, int32_t slot, float* s, float* out) {
    const int32_t from = at.sinks ? 0 : tile.seen_from(slot), end = at.sinks && tile.a.sinks <= slot ? tile.a.sinks : slot + 1;
    const int32_t keep = tile.c.keep, packed = tile.c.packed_end(slot);
    F top = set1(kNothing);
    for (int b = 0; b < at.count; ++b) {
        const int32_t base = at.slots[b];
        const bool other = at.sinks ? false : (base >= keep && base < packed) != at.packed;
        const int32_t first = other ? kBlockTokens : from - base, last = other ? kBlockTokens : end - base;
        float* x = s + b * kBlockTokens;
        for (int t = 0; t < (first < kBlockTokens ? first : kBlockTokens); ++t) x[t] = kNothing;
        for (int t = last > 0 ? last : 0; t < kBlockTokens; ++t) x[t] = kNothing;
        top = max(top, load(x));
    }
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

// ---- one part --------------------------------------------------------------------------------------------------------

static void all_scores(int n, KV type, const PageShape& s, const Part& at, const Ahead& ahead, const float* q, float* out) {
    const int d = s.head_size;
    switch (type) {
        case KV::f32: return scores_of<kQueryTile, KV::f32>(n, at, ahead, q, d, out);
        case KV::f16: return scores_of<kQueryTile, KV::f16>(n, at, ahead, q, d, out);
        case KV::bf16: return scores_of<kQueryTile, KV::bf16>(n, at, ahead, q, d, out);
        case KV::int8: return packed_scores_of<kQueryTile, KV::int8>(n, s, at, ahead, q, out);
        case KV::int4: return packed_scores_of<kQueryTile, KV::int4>(n, s, at, ahead, q, out);
    }
}
static void all_weigh(int n, KV type, const PageShape& s, const Part& at, const Ahead& ahead, const float* p, float* acc, int stride) {
    const int d = s.head_size;
    switch (type) {
        case KV::f32: return weigh_of<kQueryTile, KV::f32>(n, at, ahead, d, p, acc, stride);
        case KV::f16: return weigh_of<kQueryTile, KV::f16>(n, at, ahead, d, p, acc, stride);
        case KV::bf16: return weigh_of<kQueryTile, KV::bf16>(n, at, ahead, d, p, acc, stride);
        case KV::int8: return packed_weigh_of<kQueryTile, KV::int8>(n, s, at, ahead, p, acc, stride);
        case KV::int4: return packed_weigh_of<kQueryTile, KV::int4>(n, s, at, ahead, p, acc, stride);
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
// ask for what is read next: with the keys for the values, with the values for the next part's keys.
static void attend_part(const Tile& tile, Part& at, const Part& next, const Work& w, float* out) {
    const PageShape &s = tile.shape(at), &other = tile.shape(next);
    const int queries = tile.queries(), d = s.head_size, stride = state_stride(d);
    const bool many = queries > 2 * kQueryTile;
    KV k = s.k, v = s.v;
    Ahead values, keys;
    const uint8_t* blocks[kBlocks];
    ask_scales(tile, next);
    if (many) {
        k = widened(k, at.keys, at.count, d, w.wide);
        v = widened(v, at.values, at.count, d, w.wide + kPartition * d);
        ask_blocks(next.keys, next.count, other.key_block());
        ask_blocks(next.values, next.count, other.value_block());
    } else {
        values = Ahead(at.values, s.value_block(), s.key_block());
        // where the next part has fewer blocks any other will do
        for (int b = 0; b < at.count; ++b) blocks[b] = next.count ? next.keys[b < next.count ? b : 0] : at.keys[b];
        keys = Ahead(blocks, other.key_block(), s.value_block());
    }
    for (int i = 0; i < queries; i += kQueryTile) {
        const int n = queries - i < kQueryTile ? queries - i : kQueryTile;
        all_scores(n, k, s, at, i == 0 ? values : Ahead(), w.q + i * d, w.p + i * kPartition);
    }
    for (int i = 0; i < queries; ++i) exponentials(tile, at, tile.slot(i), w.p + i * kPartition, out + i * stride + d);
    for (int i = 0; i < queries; i += kQueryTile) {
        const int n = queries - i < kQueryTile ? queries - i : kQueryTile;
        all_weigh(n, v, s, at, i == 0 ? keys : Ahead(), w.p + i * kPartition, out + i * stride, stride);
    }
}

// ---- observation -----------------------------------------------------------------------------------------------------

// Of each part the observed queries' exponentials [queries][64], then what they are relative to [queries].
struct Observed {
    const Tile& tile;
    const int first, count;  // queries
    float* at;
    explicit Observed(const Tile& t)
        : tile(t), first(t.a.observed_first * t.a.group),
          count(t.a.sums ? (t.a.observed_end - t.a.observed_first) * t.a.group : 0), at(t.a.observed) {}

    void keep(const Part& part, const float* p, const float* out) {
        const int d = tile.c.full.head_size, stride = state_stride(d);
        for (int i = 0; i < count; ++i) {
            const float* from = p + (first + i) * kPartition;
            float* to = at + i * kPartition;
            for (int b = 0; b < part.count; ++b) store(to + b * kBlockTokens, load(from + b * kBlockTokens));
            at[count * kPartition + i] = out[(first + i) * stride + d];
        }
        at += size_t(count) * (kPartition + 1);
    }

    // after the last part: e * e^(maximum - that of all) / sum, in steps of 2^-24, onto the slots' sums
    void add_sums() {
        constexpr float kOne = 16777216.0f;
        const int d = tile.c.full.head_size, stride = state_stride(d);
        float* from = tile.a.observed;
        for (int place = 0; count; from += size_t(count) * (kPartition + 1), ++place) {
            const Part part = tile.from(place);
            if (!part.count) return;
            place = part.place;
            alignas(64) float factors[kMaxQueries + kLanes] = {}, inverse[kMaxQueries + kLanes] = {};
            for (int i = 0; i < count; ++i) {
                const float* state = tile.a.state + (first + i) * stride + d;
                factors[i] = from[count * kPartition + i] - state[0];
                inverse[i] = kOne / state[1];
            }
            for (int i = 0; i < count; i += kLanes) store(factors + i, mul(exp(load(factors + i)), load(inverse + i)));
            for (int b = 0; b < part.count; ++b) {
                Ints total = no_ints();
                for (int i = 0; i < count; ++i) {
                    const F p = mul(load(from + i * kPartition + b * kBlockTokens), set1(factors[i]));
                    total = add(total, to_ints(min(max(p, zero()), set1(kOne))));
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
    const Work w{a.scratch, q, q + kMaxQueries * d};
    alignas(64) float local[kMaxQueries * state_stride(kMaxHeadSize)];
    if (a.partials)
        for (int i = 0; i < tile.places() * queries; ++i) {
            a.partials[i * stride + d] = kNothing;
            a.partials[i * stride + d + 1] = 0.0f;
        }
    Observed observed(tile);
    Part at = tile.from(0);
    ask_scales(tile, at);
    ask_blocks(at.keys, at.count, tile.shape(at).key_block());
    for (const float* scaled = nullptr; at.count;) {
        const float* from = at.sinks ? a.sink_q : a.q;
        if (from != scaled) scale_queries(a, d, scaled = from, q);
        const Part next = tile.from(at.place + 1);
        float* out = a.partials ? a.partials + size_t(at.place) * size_t(queries) * size_t(stride) : local;
        attend_part(tile, at, next, w, out);
        observed.keep(at, w.p, out);
        if (!a.partials) attend_join(a.state, out, queries, d);
        at = next;
    }
    observed.add_sums();
}

}  // namespace KVIK_NS

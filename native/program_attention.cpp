// What rows do with the cache: how attention is divided, then append, pack and attend.
#include <algorithm>
#include <cstring>
#include <utility>

#include "program.h"

namespace kvik {

namespace {

// A tile of attention above the total's so many'th part for each thread is divided.
constexpr int64_t kFineness = 4;

}  // namespace

// ---- where things lie ------------------------------------------------------------------------------------------------

Tables Program::tables_of(int32_t s) const {
    const int32_t first = first_table_[size_t(s)];
    return {pass_.tables.blocks, pass_.tables.spans + first, pass_.tables.shifts + first};
}

int32_t Program::shift_of(int32_t s, int32_t layer, int32_t head) const {
    const CacheLayout& l = layout_of(s);
    return tables_of(s).shifts[l.group_of[size_t(layer * kv_heads_ + head)] * l.tables_each()];
}

Cache Program::cache(const CacheLayout& l, const Tables& tables, int32_t layer, int32_t head) const {
    const size_t unit = size_t(layer * kv_heads_ + head);
    const int32_t table = l.group_of[unit] * l.tables_each();
    const bool packs = l.packs_for(l.seen(windows_[size_t(layer)]));
    return {kv_, tables.blocks + tables.spans[table], packs ? tables.blocks + tables.spans[table + 1] : nullptr, l.at[unit],
            l.packed_at[unit], l.full, l.packed, tables.shifts[table], l.keep};
}

Cache Program::cache(int32_t s, int32_t layer, int32_t head) const { return cache(layout_of(s), tables_of(s), layer, head); }

// Which of the rows row..row + rows of a sequence are observed, counted from `row`.
Program::RowRange Program::observed_rows(int32_t s, int32_t row, int32_t rows) const {
    if (observation_of_.empty() || observation_of_[size_t(s)] < 0) return {0, 0};
    const ObservationView& o = pass_.observations[observation_of_[size_t(s)]];
    const int64_t slot = pass_.slots[row];
    const int64_t first = std::clamp<int64_t>(o.first - slot, 0, rows), end = std::clamp<int64_t>(o.end - slot, first, rows);
    return {int32_t(first), int32_t(end)};
}

// ---- planning --------------------------------------------------------------------------------------------------------

// Whether the tables of both layers have the same shifts, in every sequence, head by head.
bool Program::same_shifts(int32_t layer, int32_t other) const {
    for (int32_t s = 0; s < pass_.sequences; ++s) {
        if (!layout_of(s).apart) continue;
        for (int32_t h = 0; h < kv_heads_; ++h)
            if (shift_of(s, layer, h) != shift_of(s, other, h)) return false;
    }
    return true;
}

void Program::plan_attend(const Node& node, AttentionNeeds& needs) {
    const Attention& a = node.attention;
    const auto same = [&](const AttentionPlan& p) { return p.window == a.window && (p.layer == a.layer || same_shifts(p.layer, a.layer)); };
    auto found = std::find_if(plans_.begin(), plans_.end(), same);
    if (found == plans_.end()) found = plans_.insert(found, plan_attention(a, needs));
    const uint32_t at = uint32_t(small_.size()), plan = uint32_t(found - plans_.begin());
    if (!found->packs.empty()) {
        phases_.push_back({Phase::pack, &node, at, at, nullptr, plan});
        tiles_.push_back(uint32_t(found->packs.size()));
    }
    phases_.push_back({Phase::attend, &node, at, at, nullptr, plan});
    tiles_.push_back(uint32_t(found->items.size()));
}

// Items of (tile of rows, KV head), undivided.
std::vector<Program::Item> Program::attention_tiles(const Attention& a) const {
    std::vector<Item> tiles;
    const int32_t group = heads_ / kv_heads_, most = std::max(1, kMaxQueries / group);
    for (int32_t s = 0; s < pass_.sequences; ++s) {
        const CacheLayout& l = layout_of(s);
        const int32_t window = l.seen(a.window), sinks = a.window ? 0 : l.sinks;
        for (int32_t r = pass_.spans[s]; r < pass_.spans[s + 1]; r += most) {
            const int32_t rows = std::min(most, pass_.spans[s + 1] - r), slot = pass_.slots[r];
            for (int32_t h = 0; h < kv_heads_; ++h) {
                const int32_t first = slot - shift_of(s, a.layer, h);
                const Partitions partitions = partitions_of(first, first + rows - 1, window, sinks);
                tiles.push_back({r, rows, h, s, 0, partitions.spans(), partitions, 1, -1, 0});
            }
        }
    }
    return tiles;
}

// A tile with too much of the work for the threads to end together is divided: its spans are shared out and joined, in order, by
// whoever finishes last. One with observed rows is not.
Program::AttentionPlan Program::plan_attention(const Attention& a, AttentionNeeds& needs) const {
    AttentionPlan plan;
    plan.window = a.window;
    plan.layer = a.layer;
    plan_packs(a, plan.packs);
    const int32_t group = heads_ / kv_heads_;
    int64_t total = 0;
    const std::vector<Item> tiles = attention_tiles(a);
    for (const Item& tile : tiles) total += tile.work(group);
    const int64_t enough = pool_.threads() == 1 ? total : std::max<int64_t>(1, total / (kFineness * pool_.threads()));
    for (Item item : tiles) {
        const RowRange observed = observed_rows(item.sequence, item.row, item.rows);
        if (observed.first < observed.end)
            needs.observed = std::max(needs.observed, attend_observed((observed.end - observed.first) * group, item.partitions.count()));
        else
            item.shares = int32_t(std::min<int64_t>(item.partitions.spans(), (item.work(group) + enough - 1) / enough));
        if (item.shares > 1) {
            item.tile = int32_t(needs.countdowns.size());
            item.partials = needs.partials;
            needs.countdowns.push_back(item.shares);
            needs.partials += size_t(item.partitions.spans()) * size_t(item.rows * group) * size_t(state_stride(head_size_));
        }
        for (int32_t i = 0; i < item.shares; ++i) {
            item.first = item.partitions.spans() * i / item.shares;
            item.last = item.partitions.spans() * (i + 1) / item.shares;
            plan.items.push_back(item);
        }
    }
    longest_first(plan.items);
    return plan;
}

void Program::plan_packs(const Attention& a, std::vector<PackItem>& packs) const {
    for (int32_t s = 0; s < pass_.sequences; ++s) {
        const CacheLayout& l = layout_of(s);
        if (!l.packs_for(l.seen(a.window))) continue;
        for (int32_t h = 0; h < kv_heads_; ++h) {
            const int32_t shift = shift_of(s, a.layer, h);
            const NewGroups fresh = new_groups(l, pass_.slots[pass_.spans[s]] - shift, pass_.slots[pass_.spans[s + 1] - 1] - shift);
            for (int32_t g = fresh.begin; g < fresh.end; ++g) packs.push_back({s, h, g});
        }
    }
}

// Every thread's share of the items begins with its longest, so that what is left at the end is short.
void Program::longest_first(std::vector<Item>& items) const {
    const int32_t group = heads_ / kv_heads_;
    const uint32_t threads = pool_.threads(), n = uint32_t(items.size());
    const auto longer = [group](const Item& a, const Item& b) { return a.work(group) > b.work(group); };
    const auto [least, most] = std::minmax_element(items.begin(), items.end(), longer);
    if (threads == 1 || least->work(group) == most->work(group)) return;
    std::stable_sort(items.begin(), items.end(), longer);
    const std::vector<Item> sorted = items;
    uint32_t next = 0;
    for (uint32_t round = 0; next < n; ++round)
        for (uint32_t t = 0; t < threads; ++t) {
            const uint32_t at = Pool::share_begin(n, t, threads) + round;
            if (at < Pool::share_begin(n, t + 1, threads)) items[at] = sorted[next++];
        }
}

// A sink's position within the cache is at most sinks + window - 1 behind the row.
void Program::plan_sinks() {
    sink_positions_.clear();
    for (int32_t s = 0; s < pass_.sequences; ++s) {
        const CacheLayout& l = layout_of(s);
        if (l.sinks == 0) continue;
        sink_positions_.resize(size_t(pass_.rows), 0);
        for (int32_t r = pass_.spans[s]; r < pass_.spans[s + 1]; ++r)
            sink_positions_[size_t(r)] = std::min(pass_.slots[r], l.sinks + l.window - 1);
    }
}

// ---- running ---------------------------------------------------------------------------------------------------------

// Rows from..to of the KV heads first..last and their query heads: norms, rotation, and the append to the cache.
void Program::run_heads(const Attention& a, int32_t from, int32_t to, int32_t first, int32_t last) {
    int32_t s = int32_t(std::upper_bound(pass_.spans, pass_.spans + pass_.sequences + 1, from) - pass_.spans) - 1;
    for (; from < to; ++s) {
        const int32_t end = std::min(to, pass_.spans[s + 1]);
        for (int32_t h = first; h < last; ++h) run_head(a, s, h, from, end);
        from = end;
    }
}

void Program::run_head(const Attention& a, int32_t s, int32_t head, int32_t from, int32_t to) {
    const int32_t group = heads_ / kv_heads_;
    const size_t half = size_t(head_size_ / 2), column = size_t(head) * size_t(head_size_), q_column = size_t(group) * column;
    const Rotations* table = a.table < 0 ? nullptr : &rotations_[size_t(a.table)];
    const CacheLayout& l = layout_of(s);
    const Cache c = cache(s, a.layer, head);
    const bool sinks = l.sinks && windows_[size_t(a.layer)] == 0;
    const RowRange observed = observed_rows(s, from, to - from);
    const auto rotate = [&](float* x, int32_t heads, const std::vector<float>& cosine, const std::vector<float>& sine, int32_t r) {
        if (table) kernels_.rope(x, heads, head_size_, cosine.data() + size_t(r) * half, sine.data() + size_t(r) * half);
        if (l.rotate) kernels_.hadamard(x, heads, head_size_);
    };
    static const std::vector<float> none;
    for (int32_t r = from; r < to; ++r) {
        float *q = row(a.q, r) + q_column, *k = row(a.k, r) + column;
        if (a.q_norm.weight) kernels_.head_norm(q, group, head_size_, a.q_norm.weight, a.q_norm.eps);
        if (a.k_norm.weight) kernels_.head_norm(k, 1, head_size_, a.k_norm.weight, a.k_norm.eps);
        const size_t floats = size_t(group) * size_t(head_size_);
        if (r - from >= observed.first && r - from < observed.end) {
            const ObservationView& o = pass_.observations[observation_of_[size_t(s)]];
            const size_t at = size_t(a.layer) * size_t(o.end - o.first) + size_t(pass_.slots[r] - o.first);
            if (o.queries) std::memcpy(o.queries + at * size_t(heads_ * head_size_) + q_column, q, floats * sizeof(float));
        }
        if (sinks) {
            float* sink = sink_queries_.data.get() + size_t(r) * size_t(ld(a.q)) + q_column;
            std::memcpy(sink, q, floats * sizeof(float));
            rotate(sink, group, table ? table->sink_cosine : none, table ? table->sink_sine : none, r);
        }
        rotate(q, group, table ? table->cosine : none, table ? table->sine : none, r);
        rotate(k, 1, table ? table->cosine : none, table ? table->sine : none, r);
        kernels_.append(c, pass_.slots[r] - c.shift, k, row(a.v, r) + column);
    }
}

void Program::run_attend(const Node& node, const Item& item, uint32_t thread) {
    ThreadState& own = threads_[thread];
    const int32_t group = heads_ / kv_heads_, queries = item.rows * group;
    const size_t column = size_t(item.head) * size_t(group) * size_t(head_size_);
    const Attention& a = node.attention;
    const CacheLayout& l = layout_of(item.sequence);
    const Cache c = cache(item.sequence, a.layer, item.head);
    const size_t partial = size_t(queries) * size_t(state_stride(head_size_));
    Queries q{};
    q.q = row(a.q, item.row) + column;
    q.ld = ld(a.q);
    q.rows = item.rows;
    q.group = group;
    q.slots = pass_.slots + item.row;
    q.window = l.seen(a.window);
    q.sinks = a.window ? 0 : l.sinks;
    if (q.sinks) q.sink_q = sink_queries_.data.get() + size_t(item.row) * size_t(q.ld) + column;
    q.scale = a.scale;
    q.first_span = item.first;
    q.last_span = item.last;
    q.scratch = own.attend.data();
    q.state = own.state.data();
    if (item.tile >= 0) q.partials = partials_.data() + item.partials + size_t(item.first) * partial;
    const RowRange observed = observed_rows(item.sequence, item.row, item.rows);
    if (observed.first < observed.end) {
        const ObservationView& o = pass_.observations[observation_of_[size_t(item.sequence)]];
        if (o.sums) q.sums = o.sums + (size_t(a.layer) * size_t(kv_heads_) + size_t(item.head)) * size_t(o.width);
        q.observed_first = observed.first;
        q.observed_end = observed.end;
        q.observed = own.observed.data();
    }
    kernels_.attend_reset(own.state.data(), queries, head_size_);
    kernels_.attend(q, c);
    if (item.tile >= 0) {
        std::atomic<int32_t>& left = countdown_[size_t(item.tile)];
        if (left.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
        left.store(item.shares, std::memory_order_relaxed);  // for the next layer
        for (size_t n = 0; n < size_t(item.partitions.spans()); ++n)
            kernels_.attend_join(own.state.data(), partials_.data() + item.partials + n * partial, queries, head_size_);
    }
    kernels_.attend_finish(own.state.data(), item.rows, group, head_size_, row(node.out, item.row) + column, ld(node.out));
}

}  // namespace kvik

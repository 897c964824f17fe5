// What a pass needs before the threads start: its ranges checked, its phases listed, its memory there.
#include <algorithm>
#include <utility>

#include "program.h"
#include "require.h"

namespace kvik {

namespace {

uint32_t tiles_for(int32_t n, int32_t each) { return uint32_t((n + each - 1) / each); }

// A tile of attention above the total's so many'th part for each thread is divided.
constexpr int64_t kFineness = 4;

}  // namespace

// A sequence's table in a group: it covers the slots, and blocks may be missing only where no row looks.
void Program::check_table(const PassView& p, int32_t group, int32_t s) const {
    const Group& g = groups_[size_t(group)];
    const int32_t begin = p.block_spans[group * p.sequences + s], end = p.block_spans[group * p.sequences + s + 1];
    require(p.slots[p.spans[s + 1] - 1] < int64_t(end - begin) * kBlockTokens, "slot outside its sequence's blocks");
    const int32_t first = g.window ? std::max(0, p.slots[p.spans[s]] + 1 - g.window) / kBlockTokens : 0;
    for (int32_t b = begin; b < end; ++b)
        require(p.blocks[b] >= (b - begin < first ? -1 : 0) && p.blocks[b] < g.num_blocks, "block id out of range");
}

void Program::check(const PassView& p) const {
    require(p.rows > 0 && p.rows <= max_rows_, "rows of the pass out of range");
    require(p.sequences > 0 && p.spans[0] == 0 && p.spans[p.sequences] == p.rows, "spans do not cover the rows");
    require(p.block_spans[0] == 0, "block spans must begin at 0");
    // All spans before anything they lead to: the last ones are known to end where the arrays do.
    for (int32_t s = 0; s < p.sequences; ++s) require(p.spans[s] < p.spans[s + 1], "spans must ascend");
    for (int32_t t = 0; t < groups() * p.sequences; ++t)
        require(p.block_spans[t] <= p.block_spans[t + 1], "spans must ascend");
    for (int32_t s = 0; s < p.sequences; ++s) {
        for (int32_t r = p.spans[s]; r < p.spans[s + 1]; ++r) {
            require(p.slots[r] >= 0, "slot must not be negative");
            require(r == p.spans[s] || p.slots[r] == p.slots[r - 1] + 1, "slots of a sequence must be consecutive");
            require(p.positions[r] >= 0, "position must not be negative");
            require(p.positions[r] < positions_, "position outside the table of positions");
            require(p.tokens[r] >= 0 && p.tokens[r] < vocabulary_, "token id outside the vocabulary");
        }
    }
    for (int32_t g = 0; g < groups(); ++g)
        for (int32_t s = 0; s < p.sequences; ++s) check_table(p, g, s);
    for (int32_t i = 0; i < p.copy_count; ++i) {
        const int32_t* copy = p.copies + 3 * size_t(i);
        require(copy[0] >= 0 && copy[0] < groups(), "group of a copy out of range");
        const int32_t blocks = groups_[size_t(copy[0])].num_blocks;
        require(copy[1] >= 0 && copy[1] < blocks && copy[2] >= 0 && copy[2] < blocks, "block of a copy out of range");
        require(copy[1] != copy[2], "a block must be copied to another");
    }
    for (int32_t r = 0; r < p.logit_count; ++r)
        require(p.logit_rows[r] >= 0 && p.logit_rows[r] < p.rows, "logit row out of range");
    require(p.reduce_count >= 0 && p.top >= 0 && p.top <= logits_count_, "more best tokens than there are");
    for (int32_t r = 0; r < p.reduce_count; ++r) {
        require(p.reduce_rows[r] >= 0 && p.reduce_rows[r] < p.rows, "row to reduce out of range");
        require(p.targets[r] >= 0 && p.targets[r] < logits_count_, "target outside the vocabulary");
    }
}

// Items of (tile of rows, KV head). A tile with too much of the work for the threads to end together is divided: its
// partitions are shared out and joined, in order, by whoever finishes last.
Program::AttentionPlan Program::plan_attention(int32_t window, size_t& partials, std::vector<int32_t>& countdowns) const {
    AttentionPlan plan;
    plan.window = window;
    const int32_t group = heads_ / kv_heads_, most = std::max(1, kMaxQueries / group);
    int64_t total = 0;
    for (int32_t s = 0; s < pass_.sequences; ++s)
        for (int32_t r = pass_.spans[s]; r < pass_.spans[s + 1]; r += most) {
            const int32_t rows = std::min(most, pass_.spans[s + 1] - r);
            const int32_t begin = window ? std::max(0, pass_.slots[r] + 1 - window) / kPartition : 0;
            const int32_t end = pass_.slots[r + rows - 1] / kPartition + 1;
            plan.items.push_back({r, rows, 0, s, begin, end, begin, end, 1, -1, 0});
            total += plan.items.back().work(group) * kv_heads_;
        }
    const std::vector<Item> tiles = std::exchange(plan.items, {});
    const int64_t enough = pool_.threads() == 1 ? total : std::max<int64_t>(1, total / (kFineness * pool_.threads()));
    for (const Item& tile : tiles) {
        Item item = tile;
        item.shares = int32_t(std::min<int64_t>(tile.end - tile.begin, (tile.work(group) + enough - 1) / enough));
        for (item.head = 0; item.head < kv_heads_; ++item.head) {
            if (item.shares > 1) {
                item.tile = int32_t(countdowns.size());
                item.partials = partials;
                countdowns.push_back(item.shares);
                partials += size_t(tile.end - tile.begin) * size_t(tile.rows * group) * size_t(state_stride(head_size_));
            }
            for (int32_t i = 0; i < item.shares; ++i) {
                item.first = tile.begin + (tile.end - tile.begin) * i / item.shares;
                item.last = tile.begin + (tile.end - tile.begin) * (i + 1) / item.shares;
                plan.items.push_back(item);
            }
        }
    }
    longest_first(plan.items);
    return plan;
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

int32_t Program::rows_of(const Node& node) const {
    switch (node.rows) {
        case Rows::pass: return pass_.rows;
        case Rows::asked: return pass_.logit_count;
        case Rows::reduced: return pass_.reduce_count;
        default: return pass_.rows * node.experts.used;
    }
}

// Whether each thread prepares the linear's input by itself; of experts, that of the expert it is at.
bool Program::lazy(const Node& node) const { return (node.of_experts() ? pass_.rows : rows_of(node)) <= kLazyRows; }

// A small node joins the phase before it: rows that are walked through anyway, or few rows that whoever ends the phase does.
void Program::plan_small(const Node& node) {
    const bool few = pass_.rows <= kLazyRows;
    if (phases_.empty() || (!few && phases_.back().work != Phase::rows)) {
        const uint32_t at = uint32_t(small_.size());
        phases_.push_back({Phase::rows, nullptr, at, at, nullptr});
        tiles_.push_back(tiles_for(pass_.rows, kPrepareRows));
    }
    small_.push_back(&node);
    ++phases_.back().end;
}

void Program::plan_linear(const Node& node) {
    const int32_t rows = rows_of(node);
    if (rows == 0) return;
    const uint32_t at = uint32_t(small_.size());
    if (!lazy(node)) {
        Phase& last = phases_.back();
        if (node.rows == Rows::pass && last.work == Phase::rows) {
            last.prepare = &node;
        } else {
            phases_.push_back({Phase::rows, nullptr, at, at, &node});
            tiles_.push_back(tiles_for(rows, kPrepareRows));
        }
    }
    phases_.push_back({Phase::linear, &node, at, at});
    // Which experts are used is not known yet, only how many there can be.
    tiles_.push_back(node.tile_ends.back() * uint32_t(node.of_experts() ? std::min(node.experts.count, rows) : 1));
    if (node.rows != Rows::reduced) return;
    phases_.push_back({Phase::join, &node, at, at});
    tiles_.push_back(tiles_for(rows, kPrepareRows));
}

void Program::plan(const PassView& pass) {
    pass_ = pass;
    phases_.clear();
    tiles_.clear();
    small_.clear();
    plans_.clear();
    size_t partials = 0;
    std::vector<int32_t> countdowns;
    for (const Node& n : nodes_) {
        const uint32_t at = uint32_t(small_.size());
        if (n.row_by_row() || (n.kind == Kind::rotate && pass.rows <= kLazyRows)) {
            plan_small(n);
        } else if (n.kind == Kind::linear) {
            plan_linear(n);
        } else if (n.kind == Kind::rotate) {
            phases_.push_back({Phase::rotate, &n, at, at});
            tiles_.push_back(tiles_for(pass.rows, kPrepareRows) * uint32_t(kv_heads_));
        } else {
            const int32_t window = n.attention.window;
            const auto same = [&](const AttentionPlan& p) { return p.window == window; };
            auto found = std::find_if(plans_.begin(), plans_.end(), same);
            if (found == plans_.end()) found = plans_.insert(found, plan_attention(window, partials, countdowns));
            phases_.push_back({Phase::attend, &n, at, at});
            tiles_.push_back(uint32_t(found->items.size()));
        }
    }
    reserve(partials, countdowns);
}

void Program::Scratch::reserve(size_t floats, const Roundings& wanted) {
    if (x.size() < floats) x.resize(floats);
    if (wanted.any_bf16() && bf16.size() < floats) {
        bf16.resize(floats);
        bf16_fine.resize(floats);
    }
    for (Rounded* r : {&coarse, &fine}) {
        if (!wanted.has(r == &coarse ? Rounding::int8 : Rounding::int8_fine) || r->q.size() >= floats) continue;
        const size_t groups = floats / kGroup;
        r->q.resize(floats);
        r->scale.resize(groups);
        r->sum.resize(groups);
        r->isum.resize(groups);
        r->half_isum.resize(groups);
        if (r == &coarse) continue;
        r->fine.resize(floats);
        r->fine_isum.resize(groups);
        r->fine_half_isum.resize(groups);
    }
}

// Every allocation of the pass happens here or in the lists of `plan`, none in the threads.
void Program::reserve(size_t partials, const std::vector<int32_t>& countdowns) {
    if (partials_.size() < partials) partials_.resize(partials);
    if (countdown_size_ < countdowns.size()) {
        countdown_size_ = countdowns.size();
        countdown_.reset(new std::atomic<int32_t>[countdown_size_]);
    }
    for (size_t i = 0; i < countdowns.size(); ++i) countdown_[i].store(countdowns[i], std::memory_order_relaxed);
    for (Rotations& t : rotations_) {
        const size_t n = size_t(pass_.rows) * t.inv_freq.size();
        if (t.cosine.size() >= n) continue;
        t.cosine.resize(n);
        t.sine.resize(n);
    }
    routing_.reserve(size_t(pass_.rows) * size_t(most_used_), size_t(most_experts_));
    size_t shared = 0;
    for (const Phase& p : phases_)
        if (p.prepare) shared = std::max(shared, size_t(rows_of(*p.prepare)) * size_t(ld(p.prepare->in.input)));
    shared_.reserve(shared, roundings_);
    if (pass_.reduce_count) reserve_reduced();
    for (ThreadState& t : threads_) {
        t.input.reserve(size_t(kLazyRows) * size_t(widest_), roundings_);
        if (!t.attend.empty()) continue;
        t.attend.resize(attend_scratch(head_size_));
        t.state.resize(size_t(kMaxQueries) * size_t(state_stride(head_size_)));
    }
}

}  // namespace kvik

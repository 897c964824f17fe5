#include "program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace kvik {

namespace {

// Up to this many rows each thread prepares the whole input itself: cheaper than one more meeting of all threads.
constexpr int32_t kLazyRows = 2;
constexpr int32_t kPrepareRows = 8;      // rows of one preparing tile
constexpr size_t kTileBytes = 24 * 1024;  // of weights in one tile of a linear
constexpr size_t kLookAhead = 6 * 1024;   // of the next linear's weights

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
int32_t round_up(int32_t n, int32_t to) { return (n + to - 1) / to * to; }
uint32_t tiles_for(int32_t n, int32_t each) { return uint32_t((n + each - 1) / each); }
void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

}  // namespace

Program::Program(Pool& pool, const Kernels& kernels, int32_t max_rows, int32_t layers, int32_t heads, int32_t kv_heads,
                 int32_t head_size, KV kv_type, uint8_t* kv, int32_t num_blocks, const double* inv_freq,
                 double rope_factor)
    : pool_(pool), kernels_(kernels), max_rows_(max_rows), layers_(layers), heads_(heads), kv_heads_(kv_heads),
      head_size_(head_size), kv_type_(kv_type), kv_(kv), num_blocks_(num_blocks),
      head_bytes_(2 * size_t(head_size) * kBlockTokens * kv_element(kv_type)),
      block_bytes_(head_bytes_ * size_t(layers) * size_t(kv_heads)), inv_freq_(inv_freq, inv_freq + head_size / 2),
      rope_factor_(rope_factor), threads_(pool.threads()) {
    require(max_rows > 0 && layers > 0 && kv_heads > 0 && num_blocks > 0, "sizes must be positive");
    require(heads > 0 && heads % kv_heads == 0, "query heads must be a multiple of KV heads");
    require(heads / kv_heads <= kMaxQueries, "at most 64 query heads a KV head");
    require(int64_t(layers) * kv_heads <= 1 << 20, "too many layers and heads");
    require(head_size > 0 && head_size % 16 == 0 && head_size <= kMaxHeadSize,
            "head size must be a multiple of 16, at most 256");
}

int32_t Program::buffer(int32_t width) {
    require(width > 0, "buffer width must be positive");
    const int32_t ld = round_up(width, kGroup);
    buffers_.push_back({std::unique_ptr<float[]>(new float[size_t(max_rows_) * size_t(ld)]()), ld});
    return int32_t(buffers_.size()) - 1;
}

void Program::embed(const Matrix& table, int32_t out) {
    Node n;
    n.kind = Kind::embed;
    n.table = table;
    n.out = out;
    require(buffers_.at(size_t(out)).ld >= table.groups() * kGroup, "embedding wider than its buffer");
    vocabulary_ = table.n;
    nodes_.push_back(std::move(n));
}

void Program::finish_linear(Node n) {
    const Prologue& in = n.in;
    const int32_t ld = buffers_.at(size_t(in.input)).ld;
    if (in.kind == Prologue::gate) require(buffers_.at(size_t(in.second)).ld == ld, "gate and up differ in width");
    require(in.width > 0 && in.width <= ld, "input width does not fit its buffer");
    if (in.kind == Prologue::norm) require(in.weight != nullptr, "norm without a weight");
    uint32_t tiles = 0;
    size_t most = 1;
    for (const Part& p : n.parts) {
        require(p.matrix.k == in.width, "matrix and input differ in width");
        if (!n.head) require(buffers_.at(size_t(p.out)).ld >= p.matrix.row_blocks() * kRows, "matrix taller than its output");
        most = std::max(most, p.matrix.row_block_bytes());
        if (is_integer(p.matrix.layout)) (p.fine ? n.fine : n.coarse) = true;
        if (p.matrix.layout == Layout::bf16) {
            n.bf16 = true;
            n.bf16_fine |= p.fine;
        }
    }
    n.blocks_a_tile = int32_t(std::max<size_t>(1, kTileBytes / most));
    for (const Part& p : n.parts) n.tile_ends.push_back(tiles += tiles_for(p.matrix.row_blocks(), n.blocks_a_tile));
    widest_ = std::max(widest_, ld);
    any_coarse_ |= n.coarse;
    any_fine_ |= n.fine;
    any_bf16_ |= n.bf16;
    nodes_.push_back(std::move(n));
}

void Program::linear(const Prologue& in, const std::vector<Part>& parts) {
    require(!parts.empty(), "linear without a matrix");
    Node n;
    n.kind = Kind::linear;
    n.in = in;
    n.parts = parts;
    finish_linear(std::move(n));
}

void Program::logits(const Prologue& in, const Matrix& head, bool fine) {
    Node n;
    n.kind = Kind::linear;
    n.in = in;
    require(logits_width_ == 0, "a program has one head");
    n.parts = {Part{head, -1, false, fine}};
    n.head = true;
    logits_width_ = head.row_blocks() * kRows;
    finish_linear(std::move(n));
}

void Program::add(int32_t a, int32_t b, int32_t out) {
    Node n;
    n.kind = Kind::add;
    n.a = a;
    n.b = b;
    n.out = out;
    require(buffers_.at(size_t(a)).ld == buffers_.at(size_t(b)).ld && buffers_.at(size_t(out)).ld == buffers_.at(size_t(a)).ld,
            "summands differ in width");
    nodes_.push_back(std::move(n));
}

void Program::rotate_append(int32_t q, int32_t k, int32_t v, int32_t layer) {
    Node n;
    n.kind = Kind::rotate;
    n.a = q;
    n.b = k;
    n.out = v;
    n.layer = layer;
    require(layer >= 0 && layer < layers_, "layer out of range");
    require(buffers_.at(size_t(q)).ld >= heads_ * head_size_, "queries do not fit");
    require(buffers_.at(size_t(k)).ld >= kv_heads_ * head_size_ && buffers_.at(size_t(v)).ld >= kv_heads_ * head_size_,
            "keys or values do not fit");
    nodes_.push_back(std::move(n));
}

void Program::attend(int32_t q, int32_t out, int32_t layer, int32_t window) {
    Node n;
    n.kind = Kind::attend;
    n.a = q;
    n.out = out;
    n.layer = layer;
    n.window = window;
    require(layer >= 0 && layer < layers_ && window >= 0, "layer or window out of range");
    require(buffers_.at(size_t(q)).ld >= heads_ * head_size_ && buffers_.at(size_t(out)).ld >= heads_ * head_size_,
            "heads do not fit");
    nodes_.push_back(std::move(n));
}

void Program::Scratch::reserve(const Program& p, int32_t rows) {
    const size_t n = size_t(rows) * size_t(p.widest_), g = n / kGroup;
    if (x.size() < n) x.resize(n);
    if (p.any_bf16_ && bf16.size() < n) {
        bf16.resize(n);
        bf16_fine.resize(n);
    }
    for (Rounded* r : {&coarse, &fine}) {
        if (!(r == &coarse ? p.any_coarse_ : p.any_fine_) || r->q.size() >= n) continue;
        r->q.resize(n);
        r->scale.resize(g);
        r->sum.resize(g);
        r->isum.resize(g);
        r->half_isum.resize(g);
        if (r == &coarse) continue;
        r->fine.resize(n);
        r->fine_isum.resize(g);
        r->fine_half_isum.resize(g);
    }
}

// Where the row that begins at float `at` goes.
Int8Rows Program::Rounded::row(size_t at) {
    const size_t g = at / kGroup;
    const bool both = !fine.empty();
    return {q.data() + at, both ? fine.data() + at : nullptr, scale.data() + g, sum.data() + g, isum.data() + g,
            both ? fine_isum.data() + g : nullptr, half_isum.data() + g, both ? fine_half_isum.data() + g : nullptr};
}

void Program::check(const PassView& p) const {
    require(p.rows > 0 && p.rows <= max_rows_, "rows of the pass out of range");
    require(p.sequences > 0 && p.spans[0] == 0 && p.spans[p.sequences] == p.rows, "spans do not cover the rows");
    require(p.block_spans[0] == 0, "block spans must begin at 0");
    for (int32_t s = 0; s < p.sequences; ++s)
        require(p.spans[s] < p.spans[s + 1] && p.block_spans[s] <= p.block_spans[s + 1], "spans must ascend");
    for (int32_t s = 0; s < p.sequences; ++s) {
        const int64_t capacity = int64_t(p.block_spans[s + 1] - p.block_spans[s]) * kBlockTokens;
        for (int32_t r = p.spans[s]; r < p.spans[s + 1]; ++r) {
            require(p.slots[r] >= 0 && p.slots[r] < capacity, "slot outside its sequence's blocks");
            require(r == p.spans[s] || p.slots[r] == p.slots[r - 1] + 1, "slots of a sequence must be consecutive");
            require(p.positions[r] >= 0, "position must not be negative");
            require(p.tokens[r] >= 0 && p.tokens[r] < vocabulary_, "token id outside the vocabulary");
        }
    }
    for (int32_t b = 0; b < p.block_spans[p.sequences]; ++b)
        require(p.blocks[b] >= 0 && p.blocks[b] < num_blocks_, "block id out of range");
    for (int32_t r = 0; r < p.logit_count; ++r)
        require(p.logit_rows[r] >= 0 && p.logit_rows[r] < p.rows, "logit row out of range");
}

// Items of (tile of rows, KV head); where there are too few to keep the threads busy, a tile's partitions are shared out
// and joined, in order, by whoever finishes last.
Program::AttentionPlan Program::plan_attention(int32_t window, size_t& partials, std::vector<int32_t>& countdowns) const {
    AttentionPlan plan;
    plan.window = window;
    const int32_t group = heads_ / kv_heads_, most = std::max(1, kMaxQueries / group);
    int32_t tiles = 0;
    for (int32_t s = 0; s < pass_.sequences; ++s) tiles += int32_t(tiles_for(pass_.spans[s + 1] - pass_.spans[s], most));
    const int32_t busy = 4 * int32_t(pool_.threads());
    for (int32_t s = 0; s < pass_.sequences; ++s)
        for (int32_t r = pass_.spans[s]; r < pass_.spans[s + 1]; r += most) {
            const int32_t rows = std::min(most, pass_.spans[s + 1] - r);
            const int32_t begin = window ? std::max(0, pass_.slots[r] + 1 - window) / kPartition : 0;
            const int32_t end = pass_.slots[r + rows - 1] / kPartition + 1;
            int32_t shares = pool_.threads() == 1 ? 1 : std::min(end - begin, busy / std::max(1, tiles * kv_heads_) + 1);
            if (tiles * kv_heads_ >= busy) shares = 1;
            for (int32_t h = 0; h < kv_heads_; ++h) {
                Item item{r, rows, h, s, begin, end, begin, end, shares, -1, 0};
                if (shares > 1) {
                    item.tile = int32_t(countdowns.size());
                    item.partials = partials;
                    countdowns.push_back(shares);
                    partials += size_t(end - begin) * size_t(rows * group) * size_t(state_stride(head_size_));
                }
                for (int32_t i = 0; i < shares; ++i) {
                    item.first = begin + (end - begin) * i / shares;
                    item.last = begin + (end - begin) * (i + 1) / shares;
                    plan.items.push_back(item);
                }
            }
        }
    return plan;
}

bool Program::lazy(const Node& node) const { return rows_of(node) <= kLazyRows; }

void Program::plan(const PassView& pass) {
    pass_ = pass;
    phases_.clear();
    tiles_.clear();
    plans_.clear();
    size_t partials = 0;
    std::vector<int32_t> countdowns;
    const uint32_t row_tiles = tiles_for(pass.rows, kPrepareRows);
    for (const Node& n : nodes_) {
        switch (n.kind) {
            case Kind::linear:
                if (rows_of(n) == 0) break;
                if (!lazy(n)) {
                    phases_.push_back({&n, true});
                    tiles_.push_back(tiles_for(rows_of(n), kPrepareRows));
                }
                phases_.push_back({&n, false});
                tiles_.push_back(n.tile_ends.back());
                break;
            case Kind::attend: {
                const auto same = [&](const AttentionPlan& p) { return p.window == n.window; };
                auto found = std::find_if(plans_.begin(), plans_.end(), same);
                if (found == plans_.end()) found = plans_.insert(found, plan_attention(n.window, partials, countdowns));
                phases_.push_back({&n, false});
                tiles_.push_back(uint32_t(found->items.size()));
                break;
            }
            case Kind::rotate:
                if (pass.rows <= kLazyRows && !phases_.back().then) {
                    phases_.back().then = &n;
                    break;
                }
                phases_.push_back({&n, false});
                tiles_.push_back(pass.rows <= kLazyRows ? 1 : row_tiles * uint32_t(kv_heads_));
                break;
            default:
                phases_.push_back({&n, false});
                tiles_.push_back(row_tiles);
        }
    }
    // Every allocation of the pass happens here, none in the threads.
    if (partials_.size() < partials) partials_.resize(partials);
    if (countdown_size_ < countdowns.size()) {
        countdown_size_ = countdowns.size();
        countdown_.reset(new std::atomic<int32_t>[countdown_size_]);
    }
    for (size_t i = 0; i < countdowns.size(); ++i) countdown_[i].store(countdowns[i], std::memory_order_relaxed);
    const size_t half = size_t(head_size_ / 2);
    if (cosine_.size() < size_t(pass.rows) * half) {
        cosine_.resize(size_t(pass.rows) * half);
        sine_.resize(size_t(pass.rows) * half);
    }
    if (pass.rows > kLazyRows || pass.logit_count > kLazyRows) shared_.reserve(*this, std::max(pass.rows, pass.logit_count));
    for (ThreadState& t : threads_) {
        t.input.reserve(*this, kLazyRows);
        if (!t.attend.empty()) continue;
        t.attend.resize(attend_scratch(head_size_));
        t.state.resize(size_t(kMaxQueries) * size_t(state_stride(head_size_)));
    }
}

// The rows of the node's input, through its prologue, rounded. Row r of a head is the pass's logit row r.
void Program::prepare_rows(const Node& node, Scratch& s, int32_t from, int32_t to) const {
    const Prologue& in = node.in;
    const int32_t ld = buffers_[size_t(in.input)].ld;
    for (int32_t r = from; r < to; ++r) {
        const int32_t source = node.head ? pass_.logit_rows[r] : r;
        const float* x = row(in.input, source);
        const size_t at = size_t(r) * size_t(ld);
        if (in.kind == Prologue::norm)
            kernels_.rms_norm(x, in.weight, in.width, in.eps, s.x.data() + at);
        else if (in.kind == Prologue::gate)
            kernels_.silu_gate(x, row(in.second, source), ld, s.x.data() + at);
        else
            std::memcpy(s.x.data() + at, x, size_t(ld) * sizeof(float));
        if (node.coarse) kernels_.quantize(s.x.data() + at, ld, s.coarse.row(at));
        if (node.fine) kernels_.quantize(s.x.data() + at, ld, s.fine.row(at));
        if (node.bf16)
            kernels_.round_bf16(s.x.data() + at, ld, s.bf16.data() + at, node.bf16_fine ? s.bf16_fine.data() + at : nullptr);
    }
}

Activations Program::activations(const Node& node, const Scratch& s, bool fine) const {
    const Rounded& r = fine ? s.fine : s.coarse;
    const auto if_fine = [fine](const auto& v) { return fine ? v.data() : nullptr; };
    return {s.x.data(), buffers_[size_t(node.in.input)].ld, r.q.data(), if_fine(r.fine), r.scale.data(), r.sum.data(),
            r.isum.data(), if_fine(r.fine_isum), r.half_isum.data(), if_fine(r.fine_half_isum), s.bf16.data(),
            if_fine(s.bf16_fine)};
}

void Program::run_linear(const Node& node, uint32_t phase, uint32_t tile, uint32_t thread) {
    const Scratch* input = &shared_;
    const int32_t rows = rows_of(node);
    if (lazy(node)) {
        ThreadState& own = threads_[thread];
        const int64_t number = (passes_ << 20) + phase;
        if (own.prepared != number) {
            prepare_rows(node, own.input, 0, rows);
            own.prepared = number;
        }
        input = &own.input;
    }
    size_t part = 0;
    while (tile >= node.tile_ends[part]) ++part;
    const Part& p = node.parts[part];
    const uint32_t first = part ? node.tile_ends[part - 1] : 0;
    const int32_t begin = int32_t(tile - first) * node.blocks_a_tile;
    const int32_t end = std::min(begin + node.blocks_a_tile, p.matrix.row_blocks());
    float* out = node.head ? pass_.logits : row(p.out, 0);
    const int32_t ldo = node.head ? logits_width_ : buffers_[size_t(p.out)].ld;
    kernels_.matmul(p.matrix, activations(node, *input, p.fine), rows, begin, end, out, ldo,
                    p.accumulate);
    if (lazy(node) && tile + 1 == Pool::share_begin(tiles_[phase], thread + 1, pool_.threads())) look_ahead(phase, thread);
}

// With few rows a linear is bound by memory, and memory idles while threads meet: ask for the first lines of this thread's
// share of the next linear before the meeting.
void Program::look_ahead(uint32_t phase, uint32_t thread) const {
    for (size_t next = phase + 1; next < phases_.size(); ++next) {
        const Node& node = *phases_[next].node;
        if (node.kind != Kind::linear) continue;
        const uint32_t tile = Pool::share_begin(tiles_[next], thread, pool_.threads());
        size_t part = 0;
        while (tile >= node.tile_ends[part]) ++part;
        const Matrix& m = node.parts[part].matrix;
        const size_t stride = m.row_block_bytes();
        const size_t at = size_t(tile - (part ? node.tile_ends[part - 1] : 0)) * size_t(node.blocks_a_tile) * stride;
        for (size_t i = 0; i < std::min(kLookAhead, m.bytes() - at); i += 64) __builtin_prefetch(m.data + at + i, 0, 2);
        return;
    }
}

void Program::run_embed(const Node& node, uint32_t tile) {
    const int32_t from = int32_t(tile) * kPrepareRows, to = std::min(from + kPrepareRows, pass_.rows);
    const size_t half = size_t(head_size_ / 2);
    for (int32_t r = from; r < to; ++r) {
        kernels_.embed(node.table, pass_.tokens[r], row(node.out, r));
        for (size_t i = 0; i < half; ++i) {
            const double angle = double(pass_.positions[r]) * inv_freq_[i];
            cosine_[size_t(r) * half + i] = float(std::cos(angle) * rope_factor_);
            sine_[size_t(r) * half + i] = float(std::sin(angle) * rope_factor_);
        }
    }
}

Cache Program::cache(int32_t sequence, int32_t layer, int32_t head) const {
    const size_t at = (size_t(layer) * size_t(kv_heads_) + size_t(head)) * head_bytes_;
    return {kv_ + at, block_bytes_, pass_.blocks + pass_.block_spans[sequence], kv_type_, head_size_};
}

void Program::run_rotate(const Node& node, uint32_t tile) {
    const bool whole = pass_.rows <= kLazyRows;  // every head of the few rows in one go
    const int32_t heads_here = whole ? kv_heads_ : 1, group = heads_ / kv_heads_;
    const int32_t first_head = whole ? 0 : int32_t(tile) % kv_heads_;
    const int32_t from = whole ? 0 : int32_t(tile) / kv_heads_ * kPrepareRows;
    const int32_t to = std::min(from + kPrepareRows, pass_.rows);
    const size_t half = size_t(head_size_ / 2);
    int32_t s = int32_t(std::upper_bound(pass_.spans, pass_.spans + pass_.sequences + 1, from) - pass_.spans) - 1;
    for (int32_t r = from; r < to; ++r) {
        while (r >= pass_.spans[s + 1]) ++s;
        const float *c = cosine_.data() + size_t(r) * half, *n = sine_.data() + size_t(r) * half;
        for (int32_t h = first_head; h < first_head + heads_here; ++h) {
            const int32_t at = h * head_size_;
            kernels_.rope(row(node.a, r) + size_t(group) * size_t(at), group, head_size_, c, n);
            kernels_.rope(row(node.b, r) + at, 1, head_size_, c, n);
            kernels_.append(cache(s, node.layer, h), pass_.slots[r], row(node.b, r) + at, row(node.out, r) + at);
        }
    }
}

void Program::run_attend(const Node& node, const Item& item, uint32_t thread) {
    ThreadState& own = threads_[thread];
    const int32_t group = heads_ / kv_heads_, queries = item.rows * group;
    const size_t column = size_t(item.head) * size_t(group) * size_t(head_size_);
    const size_t partial = size_t(queries) * size_t(state_stride(head_size_));
    Queries q{row(node.a, item.row) + column, buffers_[size_t(node.a)].ld, item.rows, group, pass_.slots + item.row,
              node.window, item.first, item.last, own.attend.data(), own.state.data(), nullptr};
    if (item.tile >= 0) q.partials = partials_.data() + item.partials + size_t(item.first - item.begin) * partial;
    kernels_.attend_reset(own.state.data(), queries, head_size_);
    kernels_.attend(q, cache(item.sequence, node.layer, item.head));
    if (item.tile >= 0) {
        std::atomic<int32_t>& left = countdown_[size_t(item.tile)];
        if (left.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
        left.store(item.shares, std::memory_order_relaxed);  // for the next layer
        for (int32_t n = 0; n < item.end - item.begin; ++n)
            kernels_.attend_join(own.state.data(), partials_.data() + item.partials + size_t(n) * partial, queries, head_size_);
    }
    kernels_.attend_finish(own.state.data(), item.rows, group, head_size_, row(node.out, item.row) + column,
                           buffers_[size_t(node.out)].ld);
}

void Program::run_tile(void* self, uint32_t phase, uint32_t tile, uint32_t thread) {
    Program& p = *static_cast<Program*>(self);
    const Phase& at = p.phases_[phase];
    const Node& n = *at.node;
    const int32_t from = int32_t(tile) * kPrepareRows;
    switch (n.kind) {
        case Kind::embed: return p.run_embed(n, tile);
        case Kind::rotate: return p.run_rotate(n, tile);
        case Kind::linear:
            if (at.prepare) return p.prepare_rows(n, p.shared_, from, std::min(from + kPrepareRows, p.rows_of(n)));
            return p.run_linear(n, phase, tile, thread);
        case Kind::add:
            for (int32_t r = from; r < std::min(from + kPrepareRows, p.pass_.rows); ++r)
                p.kernels_.add(p.row(n.a, r), p.row(n.b, r), p.buffers_[size_t(n.a)].ld, p.row(n.out, r));
            return;
        case Kind::attend:
            for (const AttentionPlan& plan : p.plans_)
                if (plan.window == n.window) return p.run_attend(n, plan.items[tile], thread);
    }
}

void Program::phase_done(void* self, uint32_t phase) {
    Program& p = *static_cast<Program*>(self);
    const Phase& at = p.phases_[phase];
    const double t = now(), spent = t - p.phase_started_;
    p.phase_started_ = t;
    if (at.then) {
        p.run_rotate(*at.then, 0);
        p.phase_started_ = now();
        p.times_.attention += p.phase_started_ - t;
    }
    if (at.node->kind == Kind::linear && !at.prepare)
        p.times_.matrices += spent;
    else if (at.node->kind == Kind::attend || at.node->kind == Kind::rotate)
        p.times_.attention += spent;
    else
        p.times_.rest += spent;
}

void Program::run(const PassView& pass) {
    check(pass);
    require(!nodes_.empty() && nodes_.front().kind == Kind::embed, "a program begins with embed");
    const double begun = now();
    plan(pass);
    ++passes_;
    times_ = {};
    phase_started_ = begun;
    pool_.run(tiles_, run_tile, phase_done, this);
}

}  // namespace kvik

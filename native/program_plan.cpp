// What a pass needs before the threads start: its phases listed, its memory there.
#include <algorithm>

#include "program.h"

namespace kvik {

namespace {

uint32_t tiles_for(int32_t n, int32_t each) { return uint32_t((n + each - 1) / each); }

}  // namespace

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
    AttentionNeeds needs;
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
            plan_attend(n, needs);
        }
    }
    plan_sinks();
    reserve(needs);
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
void Program::reserve(const AttentionNeeds& needs) {
    if (partials_.size() < needs.partials) partials_.resize(needs.partials);
    if (countdown_size_ < needs.countdowns.size()) {
        countdown_size_ = needs.countdowns.size();
        countdown_.reset(new std::atomic<int32_t>[countdown_size_]);
    }
    for (size_t i = 0; i < needs.countdowns.size(); ++i) countdown_[i].store(needs.countdowns[i], std::memory_order_relaxed);
    for (Rotations& t : rotations_) {
        const size_t n = size_t(pass_.rows) * t.inv_freq.size();
        for (std::vector<float>* of : {&t.cosine, &t.sine})
            if (of->size() < n) of->resize(n);
        for (std::vector<float>* of : {&t.sink_cosine, &t.sink_sine})
            if (!sink_positions_.empty() && of->size() < n) of->resize(n);
    }
    routing_.reserve(size_t(pass_.rows) * size_t(most_used_), size_t(most_experts_));
    size_t shared = 0;
    for (const Phase& p : phases_)
        if (p.prepare) shared = std::max(shared, size_t(rows_of(*p.prepare)) * size_t(ld(p.prepare->in.input)));
    shared_.reserve(shared, roundings_);
    if (pass_.reduce_count) reserve_reduced();
    for (ThreadState& t : threads_) {
        t.input.reserve(size_t(kLazyRows) * size_t(widest_), roundings_);
        if (t.observed.size() < needs.observed) t.observed.resize(needs.observed);
        if (!t.attend.empty()) continue;
        t.attend.resize(attend_scratch(head_size_));
        t.state.resize(size_t(kMaxQueries) * size_t(state_stride(head_size_)));
    }
}

}  // namespace kvik

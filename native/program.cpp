#include "program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "require.h"

namespace kvik {

namespace {

constexpr size_t kLookAhead = 6 * 1024;  // of the next linear's weights

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

// ---- rows ------------------------------------------------------------------------------------------------------------

// One row through the op; `out` may be one of its inputs.
void Program::apply(const RowOp& op, int32_t r, float* out) const {
    const float* x = row(op.input, r);
    const float* second = op.two() ? row(op.second, r) : nullptr;
    switch (op.kind) {
        case RowOp::copy: std::memcpy(out, x, size_t(ld(op.input)) * sizeof(float)); return;
        case RowOp::rms_norm: return kernels_.rms_norm(x, op.weight, op.width, op.eps, out);
        case RowOp::layer_norm: return kernels_.layer_norm(x, op.weight, op.bias, op.width, op.eps, out);
        case RowOp::activate:
        case RowOp::gate: return kernels_.activate(op.activation, x, second, ld(op.input), out);
        case RowOp::add: return kernels_.add(x, second, ld(op.input), out);
    }
}

void Program::round_row(const Node& node, Scratch& s, size_t at, int32_t ld) const {
    const float* x = s.x.data() + at;
    const Roundings& want = node.roundings;
    if (want.has(Rounding::int8)) kernels_.quantize(x, ld, s.coarse.row(at));
    if (want.has(Rounding::int8_fine)) kernels_.quantize(x, ld, s.fine.row(at));
    if (want.any_bf16())
        kernels_.round_bf16(x, ld, s.bf16.data() + at, want.has(Rounding::bf16_fine) ? s.bf16_fine.data() + at : nullptr);
}

// Where the row that begins at float `at` goes.
Int8Rows Program::Rounded::row(size_t at) {
    const size_t g = at / kGroup;
    const bool two = !fine.empty();
    return {q.data() + at, two ? fine.data() + at : nullptr, scale.data() + g, sum.data() + g, isum.data() + g,
            two ? fine_isum.data() + g : nullptr, half_isum.data() + g, two ? fine_half_isum.data() + g : nullptr};
}

// The linear's rows from..to, through its row op, rounded, as rows from - first.. of the scratch.
void Program::prepare_rows(const Node& node, Scratch& s, int32_t from, int32_t to, int32_t first) const {
    const int32_t width = ld(node.in.input);
    for (int32_t r = from; r < to; ++r) {
        const size_t at = size_t(r - first) * size_t(width);
        int32_t source = r;
        if (node.rows == Rows::asked) source = pass_.logit_rows[r];
        if (node.rows == Rows::reduced) source = pass_.reduce_rows[r];
        if (node.rows == Rows::gathered) source = routing_.row[size_t(r)];
        apply(node.in, source, s.x.data() + at);
        round_row(node, s, at, width);
    }
}

// What a part reads, from row `first` of the scratch on.
Activations Program::activations(const Part& part, int32_t ld, const Scratch& s, int32_t first) const {
    const Rounding rounding = rounding_of(part);
    const size_t at = size_t(first) * size_t(ld), g = at / kGroup;
    Activations a{};
    a.x = s.x.data() + at;
    a.ld = ld;
    if (rounding == Rounding::bf16 || rounding == Rounding::bf16_fine) {
        a.bf16 = s.bf16.data() + at;
        if (rounding == Rounding::bf16_fine) a.bf16_fine = s.bf16_fine.data() + at;
    } else if (rounding != Rounding::none) {
        const bool fine = rounding == Rounding::int8_fine;
        const Rounded& r = fine ? s.fine : s.coarse;
        a.q = r.q.data() + at;
        a.scale = r.scale.data() + g;
        a.sum = r.sum.data() + g;
        a.isum = r.isum.data() + g;
        a.half_isum = r.half_isum.data() + g;
        if (fine) {
            a.fine = r.fine.data() + at;
            a.fine_isum = r.fine_isum.data() + g;
            a.fine_half_isum = r.fine_half_isum.data() + g;
        }
    }
    return a;
}

void Program::run_embed(const Node& n, int32_t r) {
    float* out = row(n.out, r);
    kernels_.embed(n.table, n.by_position ? pass_.positions[r] : pass_.tokens[r], out);
    if (n.scale != 1.0f)
        for (int32_t i = 0; i < n.table.k; ++i) out[i] *= n.scale;
}

void Program::run_rotations(int32_t from, int32_t to) {
    const auto rotations = [from, to](const Rotations& t, const int32_t* positions, float* cosine, float* sine) {
        const size_t half = t.inv_freq.size();
        for (int32_t r = from; r < to; ++r)
            for (size_t i = 0; i < half; ++i) {
                const double angle = double(positions[r]) * t.inv_freq[i];
                cosine[size_t(r) * half + i] = float(std::cos(angle) * t.factor);
                sine[size_t(r) * half + i] = float(std::sin(angle) * t.factor);
            }
    };
    for (Rotations& t : rotations_) {
        rotations(t, pass_.positions, t.cosine.data(), t.sine.data());
        if (!sink_positions_.empty()) rotations(t, sink_positions_.data(), t.sink_cosine.data(), t.sink_sine.data());
    }
}

void Program::run_small(const Node& n, int32_t from, int32_t to) {
    if (n.kind == Kind::rotate) return run_heads(n.attention, from, to, 0, kv_heads_);
    for (int32_t r = from; r < to; ++r) {
        const size_t assignment = size_t(r) * size_t(n.experts.used);
        if (n.kind == Kind::embed)
            run_embed(n, r);
        else if (n.kind == Kind::map)
            apply(n.in, r, row(n.out, r));
        else if (n.kind == Kind::route)
            kernels_.route(row(n.scores, r), n.experts.count, n.experts.used, n.experts.normalize,
                           routing_.expert.data() + assignment, routing_.p.data() + assignment);
        else
            run_combine(n, r);
    }
}

void Program::run_rows(uint32_t phase, uint32_t tile) {
    const Phase& at = phases_[phase];
    const int32_t from = int32_t(tile) * kPrepareRows;
    if (at.begin != at.end) {
        const int32_t to = std::min(from + kPrepareRows, pass_.rows);
        if (phase == 0) run_rotations(from, to);
        for (uint32_t i = at.begin; i < at.end; ++i) run_small(*small_[i], from, to);
    }
    if (at.prepare) prepare_rows(*at.prepare, shared_, from, std::min(from + kPrepareRows, rows_of(*at.prepare)), 0);
}

// ---- linears ---------------------------------------------------------------------------------------------------------

// False for a tile of an expert beyond those that are used.
bool Program::locate(const Node& node, uint32_t tile, LinearTile& found) const {
    int32_t expert = 0;
    found.row_begin = found.expert = 0;
    found.row_end = rows_of(node);
    if (node.of_experts()) {
        const uint32_t tiles = node.tile_ends.back();
        found.expert = int32_t(tile / tiles);
        tile %= tiles;
        if (found.expert >= routing_.count) return false;
        expert = routing_.chosen[size_t(found.expert)];
        found.row_begin = routing_.begin[size_t(found.expert)];
        found.row_end = routing_.begin[size_t(found.expert) + 1];
    }
    size_t part = 0;
    while (tile >= node.tile_ends[part]) ++part;
    found.part = &node.parts[part];
    found.matrix = node.matrix(*found.part, expert);
    found.block_begin = int32_t(tile - (part ? node.tile_ends[part - 1] : 0)) * node.blocks_a_tile;
    found.block_end = std::min(found.block_begin + node.blocks_a_tile, found.matrix.row_blocks());
    return true;
}

void Program::run_linear(const Node& node, uint32_t phase, uint32_t tile, uint32_t thread) {
    LinearTile at;
    if (!locate(node, tile, at)) return;
    const bool own_input = lazy(node);
    ThreadState& own = threads_[thread];
    if (own_input) {
        const Prepared wanted{passes_, phase, at.expert};
        if (own.prepared != wanted) prepare_rows(node, own.input, at.row_begin, at.row_end, at.row_begin);
        own.prepared = wanted;
    }
    const Part& p = *at.part;
    const int32_t rows = at.row_end - at.row_begin;
    const Scratch& scratch = own_input ? own.input : shared_;
    if (node.rows == Rows::reduced) return run_reduced(at, scratch, ld(node.in.input), own);
    const Activations input = activations(p, ld(node.in.input), scratch, own_input ? 0 : at.row_begin);
    float* out = node.rows == Rows::asked ? pass_.logits : row(p.out, at.row_begin);
    const int32_t ldo = node.rows == Rows::asked ? logits_width_ : ld(p.out);
    kernels_.matmul(at.matrix, input, rows, at.block_begin, at.block_end, out, ldo, p.accumulate);
    if (p.bias) {
        const int32_t column = at.block_begin * kRows;
        kernels_.add_bias(p.bias + column, at.block_end * kRows - column, rows, out + column, ldo);
    }
    if (own_input && tile + 1 == Pool::share_begin(tiles_[phase], thread + 1, pool_.threads())) look_ahead(phase, thread);
}

// With few rows a linear is bound by memory, and memory idles while threads meet: ask for the first lines of this thread's
// share of the next linear before the meeting.
void Program::look_ahead(uint32_t phase, uint32_t thread) const {
    uint32_t next = phase + 1;
    while (next < phases_.size() && phases_[next].work != Phase::linear) ++next;
    if (next >= phases_.size()) return;
    const Node& node = *phases_[next].node;
    LinearTile at;
    if (node.rows == Rows::gathered) return;  // its experts are not chosen yet
    if (!locate(node, Pool::share_begin(tiles_[next], thread, pool_.threads()), at)) return;
    const size_t stride = at.matrix.row_block_bytes(), begin = size_t(at.block_begin) * stride;
    const size_t ask = std::min(kLookAhead, at.matrix.bytes() - begin);
    for (size_t i = 0; i < ask; i += 64) __builtin_prefetch(at.matrix.data + begin + i, 0, 2);
}

// ---- phases ----------------------------------------------------------------------------------------------------------

void Program::run_tile(void* self, uint32_t phase, uint32_t tile, uint32_t thread) {
    Program& p = *static_cast<Program*>(self);
    const Phase& at = p.phases_[phase];
    switch (at.work) {
        case Phase::rows: return p.run_rows(phase, tile);
        case Phase::rotate: {
            const int32_t from = int32_t(tile) / p.kv_heads_ * kPrepareRows, head = int32_t(tile) % p.kv_heads_;
            return p.run_heads(at.node->attention, from, std::min(from + kPrepareRows, p.pass_.rows), head, head + 1);
        }
        case Phase::linear: return p.run_linear(*at.node, phase, tile, thread);
        case Phase::join: return p.run_join(tile, p.threads_[thread]);
        case Phase::pack: {
            const PackItem& item = p.plans_[at.plan].packs[tile];
            return p.kernels_.pack_group(p.cache(item.sequence, at.node->attention.layer, item.head), item.group);
        }
        case Phase::attend: return p.run_attend(*at.node, p.plans_[at.plan].items[tile], thread);
    }
}

void Program::phase_done(void* self, uint32_t phase) {
    Program& p = *static_cast<Program*>(self);
    const Phase& at = p.phases_[phase];
    const auto spent = [&p](double& kind) {
        const double t = now();
        kind += t - p.phase_started_;
        p.phase_started_ = t;
    };
    const bool attention = at.work == Phase::attend || at.work == Phase::rotate || at.work == Phase::pack;
    spent(at.work == Phase::linear ? p.times_.matrices : attention ? p.times_.attention : p.times_.rest);
    for (uint32_t i = at.begin; i < at.end; ++i) {
        const Node& n = *p.small_[i];
        if (at.work != Phase::rows) p.run_small(n, 0, p.pass_.rows);
        if (n.kind == Kind::route) p.routing_.sort(p.pass_.rows, n.experts);
        spent(n.kind == Kind::rotate ? p.times_.attention : p.times_.rest);
    }
}

void Program::run(const PassView& pass) {
    check(pass);
    require(!nodes_.empty() && nodes_.front().kind == Kind::embed, "a program begins with embed");
    const double begun = now();
    copy_blocks(pass);
    plan(pass);
    ++passes_;
    times_ = {};
    phase_started_ = begun;
    pool_.run(tiles_, run_tile, phase_done, this);
}

}  // namespace kvik

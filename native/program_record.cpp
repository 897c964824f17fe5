// Recording: every buffer, matrix and vector is checked here, so that replaying can trust the nodes.
#include <algorithm>
#include <cmath>
#include <new>
#include <utility>

#include "program.h"
#include "require.h"

namespace kvik {

namespace {

// Weights in one tile of a linear. A thread waits half a tile on average for the last one, and claiming a tile costs as
// long as reading about kClaim bytes: the sum of both is least at the square root of their product with the whole.
constexpr double kClaim = 1600;
constexpr size_t kLeastTile = 16 * 1024, kMostTile = 512 * 1024;
size_t tile_bytes(size_t all) { return std::clamp(size_t(std::sqrt(double(all) * kClaim)), kLeastTile, kMostTile); }

int32_t padded(int32_t n) { return (n + kGroup - 1) / kGroup * kGroup; }

}  // namespace

Program::Program(Pool& pool, const Kernels& kernels, int32_t max_rows, int32_t layers, int32_t heads, int32_t kv_heads,
                 int32_t head_size, uint8_t* kv, size_t kv_bytes)
    : pool_(pool), kernels_(kernels), max_rows_(max_rows), layers_(layers), heads_(heads), kv_heads_(kv_heads),
      head_size_(head_size), kv_(kv), kv_bytes_(kv_bytes), threads_(pool.threads()) {
    require(max_rows > 0 && layers > 0 && kv_heads > 0, "sizes must be positive");
    require(heads > 0 && heads % kv_heads == 0, "query heads must be a multiple of KV heads");
    require(heads / kv_heads <= kMaxQueries, "at most 64 query heads a KV head");
    require(int64_t(layers) * kv_heads <= 1 << 20, "too many layers and heads");
    require(head_size > 0 && head_size % 16 == 0 && head_size <= kMaxHeadSize,
            "head size must be a multiple of 16, at most 256");
    windows_.resize(size_t(layers), -1);
}

int32_t Program::buffer(int32_t width, int32_t copies) {
    require(width > 0 && width <= 1 << 26, "buffer width must be in [1, 2^26]");
    require(copies > 0 && copies <= kMaxExperts && int64_t(max_rows_) * copies <= INT32_MAX, "too many rows in a buffer");
    const size_t floats = size_t(max_rows_) * size_t(copies) * size_t(padded(width));
    float* data = static_cast<float*>(std::calloc(floats, sizeof(float)));  // pages no pass touches take no memory
    if (!data) throw std::bad_alloc();
    buffers_.push_back({std::unique_ptr<float[], Free>(data), padded(width), copies});
    return int32_t(buffers_.size()) - 1;
}

int32_t Program::rotations(std::vector<double> inv_freq, double factor) {
    require(int64_t(inv_freq.size()) == head_size_ / 2, "rotary frequencies do not fit the head size");
    rotations_.push_back({std::move(inv_freq), factor, {}, {}, {}, {}});
    return int32_t(rotations_.size()) - 1;
}

void Program::embed(const Matrix& table, bool by_position, float scale, int32_t out) {
    Node n{};
    n.kind = Kind::embed;
    n.table = table;
    n.by_position = by_position;
    n.scale = scale;
    n.out = out;
    require(at(out).ld == padded(table.k), "embedding and its buffer differ in width");
    require(std::isfinite(scale), "the embedding's scale must be finite");
    int32_t& rows = by_position ? positions_ : vocabulary_;
    rows = std::min(rows, table.n);
    nodes_.push_back(std::move(n));
}

// copies: the op runs on rows of that many assignments a row.
void Program::check(const RowOp& op, int32_t copies) {
    require(op.width > 0 && padded(op.width) == at(op.input).ld, "input width does not fit its buffer");
    require(at(op.input).copies >= copies, "input has too few rows");
    if (op.two())
        require(at(op.second).ld == at(op.input).ld && at(op.second).copies >= copies, "the two inputs differ in width or rows");
    if (op.kind == RowOp::rms_norm || op.kind == RowOp::layer_norm)
        require(op.weight != nullptr && (op.kind == RowOp::rms_norm || op.bias != nullptr), "norm without a weight or bias");
    require(op.eps >= 0 && std::isfinite(op.eps), "a norm's eps must be finite and not negative");
}

void Program::map(const RowOp& op, int32_t out) {
    check(op, 1);
    Node n{};
    n.kind = Kind::map;
    n.in = op;
    n.out = out;
    require(at(out).ld == at(op.input).ld, "input and output differ in width");
    nodes_.push_back(std::move(n));
}

void Program::finish_linear(Node n) {
    check(n.in, n.rows == Rows::assigned ? n.experts.used : 1);
    uint32_t tiles = 0;
    size_t most = 1, all = 0;
    std::vector<int32_t> apart{n.in.input};  // threads write the outputs while others read the input
    if (n.in.two()) apart.push_back(n.in.second);
    for (const Part& p : n.parts) {
        const Matrix m = n.matrix(p, 0);
        require(m.k == n.in.width, "matrix and input differ in width");
        if (!n.of_head()) {
            require(at(p.out).ld >= m.row_blocks() * kRows, "matrix taller than its output");
            require(std::find(apart.begin(), apart.end(), p.out) == apart.end(), "input and outputs of a linear must lie apart");
            apart.push_back(p.out);
            require(at(p.out).copies >= (n.of_experts() ? n.experts.used : 1), "output has too few rows");
        }
        most = std::max(most, m.row_block_bytes());
        all += m.bytes();
        n.roundings.add(rounding_of(p));
    }
    n.blocks_a_tile = n.rows == Rows::reduced ? kPartColumns / kRows : int32_t(std::max<size_t>(1, tile_bytes(all) / most));
    for (const Part& p : n.parts) {
        const int32_t blocks = n.matrix(p, 0).row_blocks();
        n.tile_ends.push_back(tiles += uint32_t((blocks + n.blocks_a_tile - 1) / n.blocks_a_tile));
    }
    widest_ = std::max(widest_, at(n.in.input).ld);
    roundings_.add(n.roundings);
    nodes_.push_back(std::move(n));
}

void Program::linear(const RowOp& in, const std::vector<Part>& parts) {
    require(!parts.empty(), "linear without a matrix");
    Node n{};
    n.kind = Kind::linear;
    n.in = in;
    n.parts = parts;
    finish_linear(std::move(n));
}

void Program::logits(const RowOp& in, const Matrix& head, bool fine, int32_t vocabulary) {
    require(logits_width_ == 0, "a program has one head");
    require(vocabulary > 0 && vocabulary <= head.n, "the head has fewer rows than the vocabulary has tokens");
    logits_width_ = head.row_blocks() * kRows;
    logits_count_ = vocabulary;
    for (const Rows rows : {Rows::asked, Rows::reduced}) {
        Node n{};
        n.kind = Kind::linear;
        n.in = in;
        n.rows = rows;
        n.parts = {Part{head, nullptr, -1, false, fine}};
        finish_linear(std::move(n));
    }
}

void Program::check(const Attention& a) {
    require(a.layer >= 0 && a.layer < layers_ && a.window >= 0, "layer or window out of range");
    require(at(a.q).ld >= heads_ * head_size_, "queries do not fit");
}

void Program::rotate_append(const Attention& a) {
    check(a);
    require(at(a.k).ld >= kv_heads_ * head_size_ && at(a.v).ld >= kv_heads_ * head_size_, "keys or values do not fit");
    require(a.q != a.k && a.q != a.v && a.k != a.v, "queries, keys and values must lie apart");
    require(a.table >= -1 && a.table < int32_t(rotations_.size()), "no such table of rotations");
    for (const HeadNorm& norm : {a.q_norm, a.k_norm})
        require(norm.eps >= 0 && std::isfinite(norm.eps), "a norm's eps must be finite and not negative");
    Node n{};
    n.kind = Kind::rotate;
    n.attention = a;
    nodes_.push_back(std::move(n));
}

void Program::attend(const Attention& a, int32_t out) {
    check(a);
    require(at(out).ld >= heads_ * head_size_, "heads do not fit");
    require(std::isfinite(a.scale), "attention's scale must be finite");
    require(layouts_.empty(), "layouts come after the recording");
    int32_t& window = windows_[size_t(a.layer)];
    require(window == -1 || window == a.window, "a layer has two windows");
    window = a.window;
    Node n{};
    n.kind = Kind::attend;
    n.attention = a;
    n.out = out;
    nodes_.push_back(std::move(n));
}

}  // namespace kvik

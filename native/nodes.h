// What a program is made of: plain data, written once while a model is recorded and only read afterwards.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace kvik {

// What happens to a row by itself: on its way into a linear, or from buffer to buffer.
struct RowOp {
    enum Kind : int32_t { copy = 0, rms_norm = 1, layer_norm = 2, activate = 3, gate = 4, add = 5 };
    Kind kind = copy;
    int32_t input = -1, second = -1;  // buffers; gate and add read both
    const float* weight = nullptr;    // norms; padded to 32, as the bias
    const float* bias = nullptr;      // layer_norm
    float eps = 0;
    Activation activation = Activation::silu;
    int32_t width = 0;
    bool two() const { return kind == gate || kind == add; }
};
constexpr int32_t kRowOps = 6;

// One matrix of a linear: out (+)= input @ matrix.T (+ bias)
struct Part {
    Matrix matrix;
    const float* bias;  // padded to 16, or null
    int32_t out;
    bool accumulate;
    bool fine;  // the input rounded to two terms, where the layout rounds it
};

// How a part wants its input rounded. A further rule is a further name, its place in `Scratch`, and a line each in
// Program::round_row and Program::activations.
enum class Rounding : uint32_t { none, int8, int8_fine, bf16, bf16_fine };
inline Rounding rounding_of(const Part& p) {
    if (is_integer(p.matrix.layout)) return p.fine ? Rounding::int8_fine : Rounding::int8;
    if (p.matrix.layout == Layout::bf16) return p.fine ? Rounding::bf16_fine : Rounding::bf16;
    return Rounding::none;
}
struct Roundings {
    uint32_t bits = 0;
    void add(Rounding r) { bits |= 1u << uint32_t(r); }
    void add(Roundings other) { bits |= other.bits; }
    bool has(Rounding r) const { return bits >> uint32_t(r) & 1u; }
    bool any_bf16() const { return has(Rounding::bf16) || has(Rounding::bf16_fine); }
};

// A norm of each head by itself; none where there is no weight.
struct HeadNorm {
    const float* weight = nullptr;
    float eps = 0;
};

// Where queries, keys and values lie, and what happens to them before they are used.
struct Attention {
    int32_t q = -1, k = -1, v = -1;  // buffers; q and k are changed in place
    int32_t table = -1;              // of rotations; -1: none
    HeadNorm q_norm, k_norm;
    int32_t layer = 0, window = 0;
    float scale = 0;
};

// A mixture of experts; see kvik.ops.Experts.
struct ExpertsShape {
    int32_t count = 0, used = 0;
    bool normalize = false;
};

struct Node {
    enum class Kind {
        embed, map, route, combine,  // row by row: what a row becomes depends on that row only
        rotate, attend, linear
    };
    // Rows a linear has: of the pass; those whose logits are asked for, or reduced; a row for each of its experts, in order of
    // expert, read from the pass's rows (gathered) or from buffers in that order (assigned).
    enum class Rows { pass, asked, reduced, gathered, assigned };

    Kind kind;
    RowOp in;            // map, linear
    int32_t out = -1;    // embed, map, attend, combine
    Matrix table{};      // embed
    bool by_position = false;
    float scale = 1.0f;
    Attention attention;   // rotate, attend
    ExpertsShape experts;  // route, combine, a linear of experts
    int32_t scores = -1;   // route
    int32_t y = -1;        // combine
    bool accumulate = false;

    // of a linear
    Rows rows = Rows::pass;
    std::vector<Part> parts;
    std::vector<uint32_t> tile_ends;  // per part: tiles up to and including it; of one expert where there are experts
    int32_t blocks_a_tile = 1;
    Roundings roundings;  // that some part wants

    bool row_by_row() const { return kind <= Kind::combine; }
    bool of_head() const { return rows == Rows::asked || rows == Rows::reduced; }
    bool of_experts() const { return rows == Rows::gathered || rows == Rows::assigned; }
    // A part's matrix, or one expert's share of it.
    Matrix matrix(const Part& p, int32_t expert) const {
        if (!of_experts()) return p.matrix;
        const size_t share = p.matrix.bytes() / size_t(experts.count);
        return {p.matrix.layout, p.matrix.data + size_t(expert) * share, p.matrix.n / experts.count, p.matrix.k};
    }
};

// Which rows of a pass go to which experts. Row r's k-th best expert is assignment r * used + k; an assignment's place is
// its rank by expert, then by row.
struct Routing {
    std::vector<int32_t> expert;  // by assignment
    std::vector<float> p;         // by assignment
    std::vector<int32_t> place;   // by assignment
    std::vector<int32_t> row;     // by place
    std::vector<int32_t> chosen;  // experts that some row uses, ascending
    std::vector<int32_t> begin;   // places of chosen[i]: begin[i] to begin[i + 1]
    std::vector<int32_t> next;    // by expert
    int32_t count = 0;            // of the chosen

    void reserve(size_t assignments, size_t experts);
    void sort(int32_t rows, const ExpertsShape& shape);
};

}  // namespace kvik

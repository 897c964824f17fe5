// Mixtures of experts (Shazeer et al. 2017): four nodes. Rows are routed one by one; an expert's rows are gathered and go
// through its matrices together; each row then adds up its own experts' results, best first. So a row's bits depend on its
// own scores only, and an expert that no row uses is never read.
#include <algorithm>
#include <utility>

#include "program.h"
#include "require.h"

namespace kvik {

void Program::experts(const RowOp& in, int32_t scores, const ExpertsShape& shape, const std::vector<Part>& hidden,
                      Activation activation, const Part& down, int32_t out, bool accumulate) {
    require(shape.count > 0 && shape.count <= kMaxExperts, "experts must be in [1, 1024]");
    require(shape.used > 0 && shape.used <= shape.count, "a row must use at least one and at most all experts");
    require(hidden.size() == 2, "experts have a gate and an up matrix");
    const int32_t width = in.width, inner = down.matrix.k;
    require(width % kRows == 0, "the width of a model with experts must be a multiple of 16");
    require(inner % kRows == 0, "the inner width of an expert must be a multiple of 16");
    require(at(scores).ld >= shape.count, "scores do not fit the experts");
    require(at(out).ld == at(in.input).ld, "input and output of experts differ in width");
    for (const Part& p : hidden)
        require(p.matrix.n == int64_t(shape.count) * inner && !p.accumulate && !p.bias, "an expert matrix has the wrong height");
    require(down.matrix.n == int64_t(shape.count) * width && !down.accumulate && !down.bias,
            "an expert matrix has the wrong height");
    most_used_ = std::max(most_used_, shape.used);
    most_experts_ = std::max(most_experts_, shape.count);

    Node route{};
    route.kind = Kind::route;
    route.scores = scores;
    route.experts = shape;
    nodes_.push_back(std::move(route));

    Node up{};
    up.kind = Kind::linear;
    up.in = in;
    up.rows = Rows::gathered;
    up.experts = shape;
    up.parts = hidden;
    finish_linear(std::move(up));

    Node last{};
    last.kind = Kind::linear;
    last.in.kind = RowOp::gate;
    last.in.input = hidden[0].out;
    last.in.second = hidden[1].out;
    last.in.activation = activation;
    last.in.width = inner;
    last.rows = Rows::assigned;
    last.experts = shape;
    last.parts = {down};
    finish_linear(std::move(last));

    Node sum{};
    sum.kind = Kind::combine;
    sum.in.width = width;
    sum.y = down.out;
    sum.experts = shape;
    sum.out = out;
    sum.accumulate = accumulate;
    nodes_.push_back(std::move(sum));
}

void Routing::reserve(size_t assignments, size_t experts) {
    if (expert.size() < assignments) {
        expert.resize(assignments);
        p.resize(assignments);
        place.resize(assignments);
        row.resize(assignments);
    }
    if (next.size() < experts) {
        next.resize(experts);
        chosen.resize(experts);
        begin.resize(experts + 1);
    }
}

// By counting: places of an expert's rows ascend by row.
void Routing::sort(int32_t rows, const ExpertsShape& shape) {
    const int32_t assignments = rows * shape.used;
    std::fill(next.begin(), next.begin() + shape.count, 0);
    for (int32_t a = 0; a < assignments; ++a) ++next[size_t(expert[size_t(a)])];
    count = 0;
    int32_t at = 0;
    for (int32_t e = 0; e < shape.count; ++e) {
        int32_t& n = next[size_t(e)];
        if (n == 0) continue;
        chosen[size_t(count)] = e;
        begin[size_t(count++)] = at;
        at += std::exchange(n, at);
    }
    begin[size_t(count)] = at;
    for (int32_t a = 0; a < assignments; ++a) {
        place[size_t(a)] = next[size_t(expert[size_t(a)])]++;
        row[size_t(place[size_t(a)])] = a / shape.used;
    }
}

void Program::run_combine(const Node& n, int32_t r) {
    const size_t first = size_t(r) * size_t(n.experts.used);
    kernels_.combine(row(n.y, 0), ld(n.y), routing_.place.data() + first, routing_.p.data() + first, n.experts.used, n.in.width,
                     n.accumulate, row(n.out, r));
}

}  // namespace kvik

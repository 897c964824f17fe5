// The native program as Python records and runs it.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "bindings_arrays.h"
#include "program.h"

using namespace kvik;

namespace {

// The program with what its pointers point to.
struct PyProgram {
    std::unique_ptr<Program> program;
    std::vector<nb::object> kept;

    template <typename T>
    T keep(T array) {
        kept.push_back(nb::cast(array));
        return array;
    }
};

using PyRowOp = std::tuple<int32_t, int32_t, int32_t, std::optional<Array<float>>, std::optional<Array<float>>, float, int32_t, int32_t>;
using PyMatrix = std::tuple<Bytes, int32_t, int32_t, int32_t>;
using PyPart = std::tuple<Bytes, int32_t, int32_t, int32_t, std::optional<Array<float>>, int32_t, bool, bool>;
using PyNorm = std::optional<std::tuple<Array<float>, float>>;

// A vector of at least `width` numbers, padded to `unit`.
const float* vector_of(PyProgram& p, const std::optional<Array<float>>& v, int64_t width, int32_t unit) {
    if (!v) return nullptr;
    require(int64_t(v->size()) >= (width + unit - 1) / unit * unit, "a vector is shorter than what it is for");
    return p.keep(*v).data();
}

RowOp row_op_of(PyProgram& p, const PyRowOp& op) {
    const auto& [kind, input, second, weight, bias, eps, activation, width] = op;
    require(kind >= 0 && kind < kRowOps, "unknown row op");
    check_sizes(width, 1);
    return {RowOp::Kind(kind), input, second, vector_of(p, weight, width, kGroup), vector_of(p, bias, width, kGroup), eps,
            activation_of(activation), width};
}

Part part_of(PyProgram& p, const PyPart& part) {
    const auto& [data, layout, n, k, bias, out, accumulate, fine] = part;
    const Matrix matrix = matrix_of(p.keep(data), layout, n, k);
    return {matrix, vector_of(p, bias, n, kRows), out, accumulate, fine};
}

HeadNorm norm_of(PyProgram& p, const PyNorm& norm, int32_t head_size) {
    if (!norm) return {};
    const auto& [weight, eps] = *norm;
    return {vector_of(p, weight, head_size, kRows), eps};
}

using Ints2 = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints3 = nb::ndarray<const int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Bytes2 = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using MutableBytes2 = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Sums = nb::ndarray<int64_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Floats3 = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
// kvik.ops.pages.PageFormat with formats by number; kvik.ops.Observation and CacheView
using PyPage = std::tuple<int32_t, int32_t, int32_t>;
using PyObservation = std::tuple<int32_t, int32_t, int32_t, std::optional<Sums>, std::optional<Floats3>>;
using PyView = std::tuple<int32_t, Array<int32_t>, Array<int32_t>, Array<int32_t>, int32_t>;

PageShape page_of(const PyPage& page) {
    const auto& [k, v, tokens] = page;
    return {KV(k), KV(v), tokens, 0};
}

View view_of(const PyProgram& p, const PyView& view) {
    const auto& [layout, blocks, spans, shifts, tokens] = view;
    require(shifts.size() == size_t(p.program->num_tables(layout)), "a view has other tables than its layout");
    require(spans.size() == shifts.size() + 1, "spans do not match the tables");
    require(spans.data()[shifts.size()] == int64_t(blocks.size()), "block spans do not cover the blocks");
    return {layout, {blocks.data(), spans.data(), shifts.data()}, tokens};
}

ObservationView observation_of(const PyProgram& p, const PyObservation& observation) {
    const auto& [sequence, first, end, sums, queries] = observation;
    const size_t layers = size_t(p.program->layers()), kv_heads = size_t(p.program->kv_heads());
    const int64_t columns = int64_t(p.program->heads()) * p.program->head_size();
    require(!sums || (sums->shape(0) == layers && sums->shape(1) == kv_heads), "an observation's sums must be by layer and KV head");
    require(!queries || (queries->shape(0) == layers && int64_t(queries->shape(1)) == int64_t(end) - first &&
                         int64_t(queries->shape(2)) == columns),
            "an observation's queries have the wrong shape");
    return {sequence, first, end, sums ? sums->data() : nullptr, sums ? int64_t(sums->shape(2)) : 0, queries ? queries->data() : nullptr};
}

void check_saved(size_t blocks, int32_t steps, size_t rows, size_t columns) {
    require(blocks <= INT32_MAX && steps > 0, "blocks must have a step or more");
    require(rows == blocks && columns == size_t(steps) * kAddressBytes, "saved bytes do not fit the blocks");
}

void run(PyProgram& p, Array<int32_t> tokens, Array<int32_t> positions, Array<int32_t> slots, Array<int32_t> spans,
         Array<int32_t> layouts, Array<int32_t> blocks, Array<int32_t> block_spans, Array<int32_t> shifts,
         Array<int32_t> logit_rows, Copies copies, Array<int32_t> reduce_rows, Array<int32_t> targets, Floats2 logits,
         Doubles logsumexp, Floats target_logits, Ids2 top_ids, Floats2 top_logits,
         const std::vector<PyObservation>& observations) {
    require(positions.size() == tokens.size() && slots.size() == tokens.size(), "tokens, positions and slots differ in length");
    require(spans.size() >= 2 && layouts.size() == spans.size() - 1, "spans do not match");
    require(block_spans.size() == shifts.size() + 1, "block spans do not match the shifts");
    require(block_spans.data()[shifts.size()] == int64_t(blocks.size()), "block spans do not cover the blocks");
    require(copies.shape(1) == 3, "copies must be [C, 3]");
    require(logits.shape(0) >= logit_rows.size() && int32_t(logits.shape(1)) == p.program->logits_width(),
            "logits array has the wrong shape");
    const size_t reduced = reduce_rows.size();
    require(targets.size() == reduced && logsumexp.size() >= reduced && target_logits.size() >= reduced &&
                top_ids.shape(0) >= reduced && top_logits.shape(0) >= reduced && top_ids.shape(1) == top_logits.shape(1),
            "reduced rows and their arrays differ in length");
    require(top_ids.shape(1) <= INT32_MAX, "more best tokens than there are");
    std::vector<ObservationView> observed;
    for (const PyObservation& o : observations) observed.push_back(observation_of(p, o));
    const PassView pass{tokens.data(), positions.data(), slots.data(), int32_t(tokens.size()), spans.data(),
                        int32_t(spans.size()) - 1, layouts.data(), {blocks.data(), block_spans.data(), shifts.data()},
                        int32_t(shifts.size()), logit_rows.data(), int32_t(logit_rows.size()), logits.data(), copies.data(),
                        int32_t(copies.shape(0)), reduce_rows.data(), targets.data(), int32_t(reduced),
                        int32_t(top_ids.shape(1)), logsumexp.data(), target_logits.data(), top_ids.data(), top_logits.data(),
                        observed.data(), int32_t(observed.size())};
    nb::gil_scoped_release release;
    p.program->run(pass);
}

}  // namespace

void bind_program(nb::module_& m) {
    nb::class_<PyProgram>(m, "Program")
        .def("__init__",
             [](PyProgram* self, nb::object pool, const std::string& isa, int32_t max_rows, int32_t layers, int32_t heads,
                int32_t kv_heads, int32_t head_size, MutableBytes kv) {
                 auto program = std::make_unique<Program>(nb::cast<Pool&>(pool), kernels_named(isa), max_rows, layers, heads, kv_heads,
                                                          head_size, kv.data(), kv.size());
                 new (self) PyProgram{std::move(program), {pool, nb::cast(kv)}};
             })
        .def("buffer", [](PyProgram& p, int32_t width, int32_t copies) { return p.program->buffer(width, copies); })
        .def("rotations", [](PyProgram& p, Array<double> inv_freq, double factor) {
            return p.program->rotations({inv_freq.data(), inv_freq.data() + inv_freq.size()}, factor);
        })
        .def("embed", [](PyProgram& p, const PyMatrix& table, bool by_position, float scale, int32_t out) {
            const auto& [data, layout, n, k] = table;
            p.program->embed(matrix_of(p.keep(data), layout, n, k), by_position, scale, out);
        })
        .def("map", [](PyProgram& p, const PyRowOp& op, int32_t out) { p.program->map(row_op_of(p, op), out); })
        .def("linear", [](PyProgram& p, const PyRowOp& in, const std::vector<PyPart>& parts) {
            std::vector<Part> list;
            for (const PyPart& part : parts) list.push_back(part_of(p, part));
            p.program->linear(row_op_of(p, in), list);
        })
        .def("rotate_append", [](PyProgram& p, int32_t q, int32_t k, int32_t v, int32_t layer, int32_t table, const PyNorm& q_norm,
                                 const PyNorm& k_norm) {
            Attention a;
            a.q = q;
            a.k = k;
            a.v = v;
            a.layer = layer;
            a.table = table;
            a.q_norm = norm_of(p, q_norm, p.program->head_size());
            a.k_norm = norm_of(p, k_norm, p.program->head_size());
            p.program->rotate_append(a);
        })
        .def("attend", [](PyProgram& p, int32_t q, int32_t out, int32_t layer, int32_t window, std::optional<float> scale) {
            Attention a;
            a.q = q;
            a.layer = layer;
            a.window = window;
            a.scale = scale ? *scale : 1.0f / std::sqrt(float(p.program->head_size()));
            p.program->attend(a, out);
        })
        .def("experts", [](PyProgram& p, const PyRowOp& in, int32_t scores, int32_t count, int32_t used, bool normalize,
                           int32_t activation, const PyPart& gate, const PyPart& up, const PyPart& down, int32_t out,
                           bool accumulate) {
            p.program->experts(row_op_of(p, in), scores, {count, used, normalize}, {part_of(p, gate), part_of(p, up)},
                               activation_of(activation), part_of(p, down), out, accumulate);
        })
        .def("logits", [](PyProgram& p, const PyRowOp& in, const PyMatrix& head, bool fine, int32_t vocabulary) {
            const auto& [data, layout, n, k] = head;
            p.program->logits(row_op_of(p, in), matrix_of(p.keep(data), layout, n, k), fine, vocabulary);
        })
        .def("register", [](PyProgram& p, const PyPage& full, const std::optional<PyPage>& packed, std::vector<int32_t> group_of,
                            int32_t keep, bool rotate, int32_t sinks, int32_t window) {
            CacheLayout layout;
            layout.full = page_of(full);
            layout.packs = packed.has_value();
            if (packed) layout.packed = page_of(*packed);
            layout.group_of = std::move(group_of);
            layout.keep = keep;
            layout.rotate = rotate;
            layout.sinks = sinks;
            layout.window = window;
            return p.program->add_layout(std::move(layout));
        })
        .def("run", &run)
        .def("evict", [](PyProgram& p, const PyView& source, const PyView& target, Ints3 kept, Ints2 counts) {
            const size_t layers = size_t(p.program->layers()), heads = size_t(p.program->kv_heads());
            require(kept.shape(0) == layers && kept.shape(1) == heads && counts.shape(0) == layers && counts.shape(1) == heads,
                    "kept slots and their counts must be by layer and KV head");
            require(kept.shape(2) <= INT32_MAX, "too many kept slots");
            const View from = view_of(p, source), to = view_of(p, target);
            nb::gil_scoped_release release;
            p.program->evict(from, to, kept.data(), int32_t(kept.shape(2)), counts.data());
        })
        .def("slots", [](PyProgram& p, const PyView& view, int32_t layer, int32_t head) {
            return p.program->slots(view_of(p, view), layer, head);
        })
        .def("read", [](PyProgram& p, const PyView& view, int32_t layer, int32_t head, bool keys, Floats2 out) {
            const View from = view_of(p, view);
            require(int64_t(out.shape(0)) == p.program->slots(from, layer, head) && int32_t(out.shape(1)) == p.program->head_size(),
                    "room for the slots has the wrong shape");
            nb::gil_scoped_release release;
            p.program->read(from, layer, head, keys, out.data());
        })
        .def("save", [](PyProgram& p, Array<int32_t> blocks, int32_t steps, MutableBytes2 out) {
            check_saved(blocks.size(), steps, out.shape(0), out.shape(1));
            nb::gil_scoped_release release;
            p.program->save(blocks.data(), int32_t(blocks.size()), steps, out.data());
        })
        .def("restore", [](PyProgram& p, Array<int32_t> blocks, int32_t steps, Bytes2 data) {
            check_saved(blocks.size(), steps, data.shape(0), data.shape(1));
            nb::gil_scoped_release release;
            p.program->restore(blocks.data(), int32_t(blocks.size()), steps, data.data());
        })
        .def_prop_ro("times", [](const PyProgram& p) {
            const Times t = p.program->times();
            return std::make_tuple(t.matrices, t.attention, t.rest);
        })
        .def_prop_ro("phases", [](const PyProgram& p) { return p.program->phases(); })
        .def_prop_ro("logits_width", [](const PyProgram& p) { return p.program->logits_width(); })
        .def_prop_ro("isa", [](const PyProgram& p) { return std::string(p.program->isa()); });
}

// What Python is told of the core; with bindings_sampler.cpp and bindings_scoring.cpp the only files that know it. Every range
// is checked below; here arrays become pointers and errors become exceptions.
#include "bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "pack.h"
#include "program.h"

namespace nb = nanobind;
using namespace kvik;

namespace {

template <typename T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = Array<uint8_t>;
using MutableBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Doubles = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids2 = nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Copies = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool ok, const std::string& what) {
    if (!ok) throw std::invalid_argument(what);
}

std::vector<std::string> available() {
    std::vector<std::string> names;
    if (amx_kernels()) names.emplace_back("amx");
    if (avx512_kernels()) names.emplace_back("avx512");
    if (avx2_kernels()) names.emplace_back("avx2");
    names.emplace_back("portable");
    return names;
}

}  // namespace

const Kernels& kernels_named(std::string name) {
    if (name.empty() || name == "auto") {
        const char* forced = std::getenv("KVIK_ISA");
        name = forced && *forced ? forced : available().front();
    }
    if (name == "amx" && amx_kernels()) return *amx_kernels();
    if (name == "avx512" && avx512_kernels()) return *avx512_kernels();
    if (name == "avx2" && avx2_kernels()) return *avx2_kernels();
    if (name == "portable") return portable_kernels();
    std::string known;
    for (const std::string& n : available()) known += (known.empty() ? "" : ", ") + n;
    throw std::invalid_argument("KVIK_ISA: no instruction set " + name + " here; this machine and build have " + known);
}

namespace {

// Far above any model, far below where sizes overflow.
void check_sizes(int64_t n, int64_t k) { require(n > 0 && k > 0 && n <= 1 << 26 && k <= 1 << 26, "matrix sizes must be in [1, 2^26]"); }

Layout layout_of(int32_t layout) {
    require(layout >= 0 && layout < kLayouts, "unknown layout");
    return Layout(layout);
}

Matrix matrix_of(const Bytes& data, int32_t layout, int32_t n, int32_t k) {
    check_sizes(n, k);
    Matrix m{layout_of(layout), data.data(), n, k};
    require(data.size() == m.bytes(), "packed bytes do not fit the matrix");
    return m;
}

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

Activation activation_of(int32_t activation) {
    require(activation >= 0 && activation < kActivations, "unknown activation");
    return Activation(activation);
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

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Bytes per second the pool's threads read together from `mib` MiB of memory, best of `repeats`.
double measure_bandwidth(Pool& pool, const Kernels& kernels, int32_t mib, int32_t repeats) {
    constexpr size_t kPiece = 256 * 1024;
    struct Job {
        std::vector<uint8_t> data;
        const Kernels& kernels;
        std::vector<float> sums;
    } job{std::vector<uint8_t>(size_t(mib) << 20, 1), kernels, std::vector<float>(size_t(pool.threads()) * 16)};
    const uint32_t tiles = uint32_t(job.data.size() / kPiece);
    double best = 0;
    for (int32_t r = 0; r < repeats; ++r) {
        const double t = seconds();
        pool.run({tiles},
                 [](void* context, uint32_t, uint32_t tile, uint32_t thread) {
                     Job& j = *static_cast<Job*>(context);
                     j.sums[size_t(thread) * 16] += j.kernels.read_all(j.data.data() + size_t(tile) * kPiece, kPiece);
                 },
                 [](void*, uint32_t) {}, &job);
        best = std::max(best, double(job.data.size()) / (seconds() - t));
    }
    return best;
}

}  // namespace

NB_MODULE(_native, m) {
    m.attr("KV_BLOCK_TOKENS") = kBlockTokens;

    m.def("isa_available", &available);
    m.def("isa_selected", [] { return std::string(kernels_named("").name); });
    m.def("packed_bytes", [](int32_t layout, int32_t n, int32_t k) {
        check_sizes(n, k);
        return packed_bytes(layout_of(layout), n, k);
    });
    m.def(
        "exact_layout",
        [](int32_t type) -> std::optional<int32_t> {
            if (source_block(Source(type)).elements == 0) return std::nullopt;
            return int32_t(exact_layout(Source(type)));
        });
    m.def(
        "pack",
        [](int32_t type, Bytes source, int32_t n, int32_t k, int32_t permuted_heads, int32_t layout, MutableBytes target,
           int32_t threads) {
            const Layout l = layout_of(layout);
            nb::gil_scoped_release release;
            const PackResult r = pack(Source(type), source.data(), source.size(), n, k, permuted_heads, l, target.data(),
                                      target.size(), threads);
            return std::make_tuple(r.bad_row, r.largest_error);
        });
    m.def("unpack", [](int32_t layout, Bytes packed, int32_t k, Floats2 out) {
        // out [n][k padded to 32]
        const Matrix w = matrix_of(packed, layout, int32_t(out.shape(0)), k);
        require(int32_t(out.shape(1)) == w.groups() * kGroup, "rows of the result must be padded to 32");
        nb::gil_scoped_release release;
        for (int32_t r = 0; r < w.n; ++r) portable_kernels().embed(w, r, out.data() + size_t(r) * out.shape(1));
    });
    m.def("checksum", [](Bytes data) {
        nb::gil_scoped_release release;
        return portable_kernels().checksum(data.data(), data.size());
    });
    // One linear by itself, for tests: out [rows][n padded to 16] = x [rows][k padded to 32] @ packed.T
    m.def(
        "matmul", [](const std::string& isa, int32_t layout, Bytes packed, int32_t n, int32_t k, Floats2 x, Floats2 out, bool fine) {
            const Kernels& kernels = kernels_named(isa);
            const Matrix w = matrix_of(packed, layout, n, k);
            const int32_t rows = int32_t(x.shape(0)), ld = w.groups() * kGroup, g = w.groups();
            require(int32_t(x.shape(1)) == ld && int32_t(out.shape(0)) == rows && int32_t(out.shape(1)) == w.row_blocks() * kRows,
                    "shapes do not fit");
            const size_t size = size_t(rows) * size_t(ld), groups = size_t(rows) * size_t(g);
            std::vector<int8_t> q(size), f(size);
            std::vector<float> scale(groups), sum(groups);
            std::vector<int32_t> isum(groups), fsum(groups), half(groups), fhalf(groups);
            std::vector<uint16_t> b(size), bf(size);
            for (size_t r = 0; r < size_t(rows); ++r) {
                const size_t at = r * size_t(ld), group = r * size_t(g);
                kernels.quantize(x.data() + at, ld,
                                 {q.data() + at, fine ? f.data() + at : nullptr, scale.data() + group, sum.data() + group,
                                  isum.data() + group, fsum.data() + group, half.data() + group, fhalf.data() + group});
                kernels.round_bf16(x.data() + at, ld, b.data() + at, fine ? bf.data() + at : nullptr);
            }
            const Activations a{x.data(), ld, q.data(), fine ? f.data() : nullptr, scale.data(), sum.data(), isum.data(), fsum.data(),
                                half.data(), fhalf.data(), b.data(), fine ? bf.data() : nullptr};
            kernels.matmul(w, a, rows, 0, w.row_blocks(), out.data(), w.row_blocks() * kRows, false);
        });

    // An activation by itself, for tests: out = activation(x), both [1][a multiple of 32]
    m.def("activate", [](const std::string& isa, int32_t activation, Floats2 x, Floats2 out) {
        require(x.shape(0) == 1 && out.shape(0) == 1 && x.shape(1) == out.shape(1) && x.shape(1) % kGroup == 0, "shapes do not fit");
        kernels_named(isa).activate(activation_of(activation), x.data(), nullptr, int32_t(x.shape(1)), out.data());
    });

    nb::class_<Pool>(m, "Pool")
        .def("__init__", [](Pool* self, int32_t threads) {
            require(threads >= 1 && threads <= 256, "threads must be in [1, 256]");
            new (self) Pool(uint32_t(threads));
        })
        .def_prop_ro("threads", &Pool::threads)
        .def("measure_bandwidth", [](Pool& self, int32_t mib, int32_t repeats) {
            require(mib >= 1 && mib <= 4096 && repeats >= 1, "mib must be in [1, 4096]");
            const Kernels& kernels = kernels_named("");
            nb::gil_scoped_release release;
            return measure_bandwidth(self, kernels, mib, repeats);
        });

    bind_sampler(m);
    bind_scoring(m);

    nb::class_<PyProgram>(m, "Program")
        .def("__init__",
             [](PyProgram* self, nb::object pool, const std::string& isa, int32_t max_rows, const std::vector<int32_t>& groups,
                int32_t heads, int32_t kv_heads, int32_t head_size, int32_t kv_type, MutableBytes kv, int32_t num_blocks) {
                 require(kv_type == 0 || kv_type == 1, "unknown KV format");
                 require(num_blocks > 0 && kv_heads > 0 && head_size > 0, "sizes must be positive");
                 require(int64_t(groups.size()) * kv_heads <= 1 << 20 && head_size <= kMaxHeadSize, "too many layers and heads");
                 const size_t layers = size_t(std::count(groups.begin(), groups.end(), 0));
                 const size_t bytes = size_t(num_blocks) * layers * size_t(kv_heads) * 2 * size_t(head_size) *
                                      kBlockTokens * kv_element(KV(kv_type));
                 require(kv.size() == bytes, "cache bytes do not fit its blocks");
                 auto program = std::make_unique<Program>(nb::cast<Pool&>(pool), kernels_named(isa), max_rows, groups, heads,
                                                          kv_heads, head_size, KV(kv_type), kv.data(), num_blocks);
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
        .def("run", [](PyProgram& p, Array<int32_t> tokens, Array<int32_t> positions, Array<int32_t> slots, Array<int32_t> spans,
                       Array<int32_t> blocks, Array<int32_t> block_spans, Array<int32_t> logit_rows, Copies copies,
                       Array<int32_t> reduce_rows, Array<int32_t> targets, Floats2 logits, Doubles logsumexp, Floats target_logits,
                       Ids2 top_ids, Floats2 top_logits) {
            require(positions.size() == tokens.size() && slots.size() == tokens.size(), "tokens, positions and slots differ in length");
            require(spans.size() >= 2 && block_spans.size() == (spans.size() - 1) * size_t(p.program->groups()) + 1, "spans do not match");
            require(block_spans.data()[block_spans.size() - 1] == int64_t(blocks.size()), "block spans do not cover the blocks");
            require(copies.shape(1) == 3, "copies must be [C, 3]");
            require(logits.shape(0) >= logit_rows.size() && int32_t(logits.shape(1)) == p.program->logits_width(),
                    "logits array has the wrong shape");
            const size_t reduced = reduce_rows.size();
            require(targets.size() == reduced && logsumexp.size() >= reduced && target_logits.size() >= reduced &&
                        top_ids.shape(0) >= reduced && top_logits.shape(0) >= reduced && top_ids.shape(1) == top_logits.shape(1),
                    "reduced rows and their arrays differ in length");
            require(top_ids.shape(1) <= INT32_MAX, "more best tokens than there are");
            const PassView pass{tokens.data(), positions.data(), slots.data(), int32_t(tokens.size()), spans.data(),
                                int32_t(spans.size()) - 1, blocks.data(), block_spans.data(), logit_rows.data(),
                                int32_t(logit_rows.size()), logits.data(), copies.data(), int32_t(copies.shape(0)),
                                reduce_rows.data(), targets.data(), int32_t(reduced), int32_t(top_ids.shape(1)), logsumexp.data(),
                                target_logits.data(), top_ids.data(), top_logits.data()};
            nb::gil_scoped_release release;
            p.program->run(pass);
        })
        .def_prop_ro("times", [](const PyProgram& p) {
            const Times t = p.program->times();
            return std::make_tuple(t.matrices, t.attention, t.rest);
        })
        .def_prop_ro("phases", [](const PyProgram& p) { return p.program->phases(); })
        .def_prop_ro("logits_width", [](const PyProgram& p) { return p.program->logits_width(); })
        .def_prop_ro("isa", [](const PyProgram& p) { return std::string(p.program->isa()); });
}

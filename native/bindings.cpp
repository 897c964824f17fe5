// The only file that knows Python. Every range is checked below it; here arrays become pointers and errors become exceptions.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "pack.h"
#include "pool.h"
#include "program.h"
#include "sampler.h"

namespace nb = nanobind;
using namespace kvik;

namespace {

template <typename T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = Array<uint8_t>;
using MutableBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
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

// "" and "auto": KVIK_ISA where it is set, else the best this processor has.
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

// ---- sampler ---------------------------------------------------------------------------------------------------------
namespace {

template <class T, size_t Dims>
using SamplerArray = nb::ndarray<const T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
template <class T, size_t Dims>
using SamplerOutput = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;

void sampler_require(bool condition, const char* message) {
    if (!condition) throw nb::value_error(message);
}

using Logits = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;

// The array itself: a converted one would not outlive this call, and its pointers do.
template <class T>
SamplerArray<T, 1> edit_array(nb::handle item) {
    SamplerArray<T, 1> array;
    sampler_require(nb::try_cast(item, array, false), "sampler: an edit's array must be contiguous int32, float32 or uint32");
    return array;
}

// A list of ids, each in [0, vocabulary); None is an empty one.
Ids ids_of(nb::handle item, size_t vocabulary) {
    if (item.is_none()) return {};
    const auto ids = edit_array<int32_t>(item);
    const int32_t* data = ids.data();
    int32_t low = 0, high = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
        low = std::min(low, data[i]);
        high = std::max(high, data[i]);
    }
    sampler_require(low >= 0 && size_t(high) < vocabulary && ids.size() <= size_t(kMaxVocabulary) * 2,
                    "sampler: a token id of an edit is outside the vocabulary");
    return {data, int32_t(ids.size())};
}

// What goes with a list of ids, one each.
template <class T>
const T* beside(nb::handle item, const Ids& ids) {
    if (!ids.size) return nullptr;
    sampler_require(!item.is_none(), "sampler: ids of an edit without their values");
    const auto values = edit_array<T>(item);
    sampler_require(values.size() == size_t(ids.size), "sampler: ids and values of an edit differ in length");
    if constexpr (std::is_same_v<T, float>)
        for (size_t i = 0; i < values.size(); ++i)
            sampler_require(std::isfinite(values.data()[i]), "sampler: a value of an edit is not finite");
    return values.data();
}

// An Edits of kvik.decoding.edits, or None. Its arrays are kept by it, and it by the caller's list.
RowEdits edits_of(nb::handle item, size_t vocabulary) {
    RowEdits e;
    if (item.is_none()) return e;
    const auto parts = nb::cast<nb::tuple>(item);
    sampler_require(parts.size() == 13, "sampler: edits have 13 parts");
    e.bias_ids = ids_of(parts[0], vocabulary);
    e.biases = beside<float>(parts[1], e.bias_ids);
    e.banned = ids_of(parts[2], vocabulary);
    if (!parts[3].is_none()) {
        const auto mask = edit_array<uint32_t>(parts[3]);
        sampler_require(mask.size() == (vocabulary + 31) / 32, "sampler: a mask has one bit a token");
        e.mask = mask.data();
    }
    e.seen = ids_of(parts[4], vocabulary);
    e.repetition = nb::cast<float>(parts[5]);
    e.counted = ids_of(parts[6], vocabulary);
    e.counts = beside<int32_t>(parts[7], e.counted);
    e.presence = nb::cast<float>(parts[8]);
    e.frequency = nb::cast<float>(parts[9]);
    sampler_require(e.repetition > 0.0f && std::isfinite(e.repetition) && std::isfinite(e.presence) && std::isfinite(e.frequency),
                    "sampler: a penalty is out of range");
    e.dry_ids = ids_of(parts[10], vocabulary);
    e.dry_penalties = beside<float>(parts[11], e.dry_ids);
    e.repeated = ids_of(parts[12], vocabulary);
    return e;
}

std::vector<RowEdits> all_edits(const Logits& logits, const nb::list& edits) {
    const size_t vocabulary = logits.shape(1);
    sampler_require(vocabulary >= 1 && vocabulary <= size_t(kMaxVocabulary), "sampler: vocabulary must be in [1, 2^20]");
    sampler_require(vocabulary == 1 || logits.stride(1) == 1, "sampler: a row of logits must be contiguous");
    sampler_require(edits.size() == logits.shape(0), "sampler: edits must have one entry a row");
    std::vector<RowEdits> made;
    made.reserve(edits.size());
    for (nb::handle item : edits) made.push_back(edits_of(item, vocabulary));
    return made;
}

// Rows one by one, or spread over the pool's threads.
template <class Work>
void each_row(Pool* pool, size_t rows, Work& work) {
    if (!pool || pool->threads() == 1 || rows == 1) {
        for (size_t r = 0; r < rows; ++r) work(r);
        return;
    }
    struct Job {
        Work& work;
        std::mutex mutex;
        std::exception_ptr failed;
    } job{work, {}, nullptr};
    pool->run({uint32_t(rows)},
              [](void* context, uint32_t, uint32_t tile, uint32_t) {
                  Job& j = *static_cast<Job*>(context);
                  try {
                      j.work(tile);
                  } catch (...) {  // no exception leaves a thread of the pool
                      const std::lock_guard lock(j.mutex);
                      j.failed = std::current_exception();
                  }
              },
              [](void*, uint32_t) {}, &job);
    if (job.failed) std::rethrow_exception(job.failed);
}

SampleScratch& scratch_here() {
    thread_local SampleScratch scratch;  // memory kept between steps; holds nothing that a result depends on
    return scratch;
}

SampleRequest request_of(const double* real, const uint64_t* whole, size_t most, const RowEdits& edits) {
    const auto in = [](double value, double low, double high) { return value >= low && value <= high; };  // NaN fails
    sampler_require(real[0] >= 0.0 && in(real[1], 0.0, 1.0) && in(real[2], 0.0, 1.0) && real[3] > 0.0 && in(real[3], 0.0, 1.0),
                    "sampler: temperature must be at least 0, top_p and min_p in [0, 1], typical_p in (0, 1]");
    sampler_require(in(real[4], 0.0, 1.0) && in(real[5], 0.0, 1.0) && in(real[6], 0.0, 1e6) && in(real[7], 0.0, 1.0) &&
                        in(real[8], 0.0, 0.5),
                    "sampler: cutoffs and xtc_probability must be in [0, 1], top_n_sigma at least 0, xtc_threshold in [0, 0.5]");
    sampler_require(whole[1] <= UINT32_MAX && whole[2] <= UINT32_MAX && whole[3] <= UINT32_MAX,
                    "sampler: sample, position and top_k must be below 2^32");
    sampler_require(whole[4] <= most && whole[5] <= 1, "sampler: more logprobs than their array has room for");
    return {real[0], real[1], real[2], real[3], real[4], real[5], real[6], real[7], real[8], whole[0], uint32_t(whole[1]),
            uint32_t(whole[2]), uint32_t(whole[3]), int32_t(whole[4]), whole[5] == 1, edits};
}

// One row of logits per request; the arguments are those of src/kvik/_native.pyi.
void sample_rows(Logits logits, SamplerArray<double, 2> reals, SamplerArray<uint64_t, 2> integers, nb::list edits,
                 SamplerOutput<uint8_t, 1> outcomes, SamplerOutput<int32_t, 1> tokens, SamplerOutput<double, 1> logprobs,
                 SamplerOutput<int32_t, 1> counts, SamplerOutput<int32_t, 2> top_ids, SamplerOutput<double, 2> top_logprobs,
                 bool in_place, Pool* pool, const std::string& isa) {
    const size_t rows = logits.shape(0), vocabulary = logits.shape(1), most = top_ids.shape(1);
    const std::vector<RowEdits> row_edits = all_edits(logits, edits);
    sampler_require(!in_place || rows < 2 || size_t(std::abs(logits.stride(0))) >= vocabulary, "sampler: rows overlap");
    sampler_require(reals.shape(0) == rows && reals.shape(1) == 9, "sampler: reals must be [rows, 9]");
    sampler_require(integers.shape(0) == rows && integers.shape(1) == 6, "sampler: integers must be [rows, 6]");
    sampler_require(outcomes.shape(0) == rows && tokens.shape(0) == rows && logprobs.shape(0) == rows &&
                        counts.shape(0) == rows && top_ids.shape(0) == rows && top_logprobs.shape(0) == rows &&
                        top_logprobs.shape(1) == most,
                    "sampler: an output does not have one entry a row");
    std::vector<SampleRequest> requests;
    requests.reserve(rows);
    for (size_t r = 0; r < rows; ++r) requests.push_back(request_of(reals.data() + r * 9, integers.data() + r * 6, most, row_edits[r]));
    const SamplerKernels& kernels = *kernels_named(isa).sampler;
    nb::gil_scoped_release release;
    auto work = [&](size_t r) {
        SampleResult result{};
        result.top_ids = top_ids.data() + r * most;
        result.top_logprobs = top_logprobs.data() + r * most;
        sample_row(kernels, logits.data() + int64_t(r) * logits.stride(0), int32_t(vocabulary), requests[r], in_place,
                   scratch_here(), result);
        outcomes.data()[r] = uint8_t(result.outcome);
        tokens.data()[r] = result.token;
        logprobs.data()[r] = result.logprob;
        counts.data()[r] = result.top_count;
    };
    each_row(pool, rows, work);
}

void best_rows(Logits logits, nb::list edits, SamplerOutput<int32_t, 2> ids, SamplerOutput<float, 2> logprobs,
               SamplerOutput<int32_t, 1> found, Pool* pool, const std::string& isa) {
    const size_t rows = logits.shape(0), count = ids.shape(1);
    const std::vector<RowEdits> row_edits = all_edits(logits, edits);
    sampler_require(count >= 1 && count <= size_t(kMaxVocabulary), "sampler: count must be in [1, 2^20]");
    sampler_require(ids.shape(0) == rows && logprobs.shape(0) == rows && found.shape(0) == rows && logprobs.shape(1) == count,
                    "sampler: an output does not have one entry a row");
    const SamplerKernels& kernels = *kernels_named(isa).sampler;
    nb::gil_scoped_release release;
    auto work = [&](size_t r) {
        found.data()[r] = best_of_row(kernels, logits.data() + int64_t(r) * logits.stride(0), int32_t(logits.shape(1)), row_edits[r],
                                      int32_t(count), scratch_here(), ids.data() + r * count, logprobs.data() + r * count);
    };
    each_row(pool, rows, work);
}

void bind_sampler(nb::module_& m) {
    m.attr("SAMPLE_DRAWN") = int(Outcome::drawn);
    m.attr("SAMPLE_NO_TOKEN") = int(Outcome::no_token);
    m.attr("SAMPLE_NOT_FINITE") = int(Outcome::not_finite);
    m.def("sample_rows", &sample_rows, nb::arg("logits"), nb::arg("reals"), nb::arg("integers"), nb::arg("edits"),
          nb::arg("outcomes"), nb::arg("tokens"), nb::arg("logprobs"), nb::arg("counts"), nb::arg("top_ids"),
          nb::arg("top_logprobs"), nb::arg("in_place") = false, nb::arg("pool") = nb::none(), nb::arg("isa") = "");
    m.def("best_rows", &best_rows, nb::arg("logits"), nb::arg("edits"), nb::arg("ids"), nb::arg("logprobs"), nb::arg("found"),
          nb::arg("pool") = nb::none(), nb::arg("isa") = "");
}

}  // namespace
// ---- end of sampler --------------------------------------------------------------------------------------------------

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
        .def("logits", [](PyProgram& p, const PyRowOp& in, const PyMatrix& head, bool fine) {
            const auto& [data, layout, n, k] = head;
            p.program->logits(row_op_of(p, in), matrix_of(p.keep(data), layout, n, k), fine);
        })
        .def("run", [](PyProgram& p, Array<int32_t> tokens, Array<int32_t> positions, Array<int32_t> slots, Array<int32_t> spans,
                       Array<int32_t> blocks, Array<int32_t> block_spans, Array<int32_t> logit_rows, Copies copies, Floats2 logits) {
            require(positions.size() == tokens.size() && slots.size() == tokens.size(), "tokens, positions and slots differ in length");
            require(spans.size() >= 2 && block_spans.size() == (spans.size() - 1) * size_t(p.program->groups()) + 1, "spans do not match");
            require(block_spans.data()[block_spans.size() - 1] == int64_t(blocks.size()), "block spans do not cover the blocks");
            require(copies.shape(1) == 3, "copies must be [C, 3]");
            require(logits.shape(0) >= logit_rows.size() && int32_t(logits.shape(1)) == p.program->logits_width(),
                    "logits array has the wrong shape");
            const PassView pass{tokens.data(), positions.data(), slots.data(), int32_t(tokens.size()), spans.data(),
                                int32_t(spans.size()) - 1, blocks.data(), block_spans.data(), logit_rows.data(),
                                int32_t(logit_rows.size()), logits.data(), copies.data(), int32_t(copies.shape(0))};
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

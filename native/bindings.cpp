// What Python is told of the core; with the other bindings_*.cpp the only files that know it. Every range is checked below;
// here arrays become pointers and errors become exceptions.
#include "bindings.h"

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

#include "bindings_arrays.h"
#include "pack.h"

using namespace kvik;

namespace {

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

    bind_cache(m);
    bind_sampler(m);
    bind_scoring(m);
    bind_program(m);
}

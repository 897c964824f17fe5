// What Python is told of the cache's kernels by themselves, for tests and measurements: one layer and KV head of one sequence.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "bindings_arrays.h"

using namespace kvik;

namespace {

using Sums = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using PyShape = std::tuple<int32_t, int32_t, int32_t>;  // formats of keys and values, tokens

PageShape shape_of(const PyShape& shape, int32_t head_size) {
    const auto [k, v, tokens] = shape;
    require(k >= 0 && k < kKVFormats && v >= 0 && v < kKVFormats, "unknown KV format");
    require(tokens == 16 || tokens == 32 || tokens == 64 || tokens == kMaxGroupTokens, "tokens of a page: 16, 32, 64 or 128");
    require(head_size > 0 && head_size % 16 == 0 && head_size <= kMaxHeadSize, "head size: a multiple of 16 up to 256");
    return {KV(k), KV(v), tokens, head_size};
}

// A unit's cache with what its pointers point to; every block lies in the memory, or is -1 where nobody looks.
struct UnitCache {
    const Kernels& kernels;
    MutableBytes memory;
    std::vector<int32_t> blocks, packed_blocks;
    Cache cache;

    int32_t slots() const { return int32_t(blocks.size()) * kBlockTokens; }
    void check_slot(int32_t slot) const { require(slot >= 0 && slot < slots(), "slot outside the blocks"); }
};

void check_blocks(const MutableBytes& memory, const std::vector<int32_t>& blocks, const PageShape& s) {
    for (const int32_t b : blocks)
        require(b >= -1 && (b < 0 || size_t(b) * kAddressBytes + s.share_bytes() <= memory.size()), "block outside the memory");
}

std::vector<int32_t> list_of(const Array<int32_t>& x) { return {x.data(), x.data() + x.size()}; }

void attend(const UnitCache& u, const Floats2& q, const std::optional<Floats2>& sink_q, const Array<int32_t>& slots, int32_t group,
            int32_t window, int32_t sinks, float scale, int32_t tile, int32_t shares, const Floats2& out, const std::optional<Sums>& sums,
            int32_t observed_first, int32_t observed_end) {
    const int32_t d = u.cache.full.head_size, rows = int32_t(slots.size());
    require(rows > 0 && group > 0 && group <= kMaxQueries, "rows and group must be positive");
    require(int32_t(q.shape(0)) == rows && int32_t(q.shape(1)) == group * d && out.shape(0) == q.shape(0) && out.shape(1) == q.shape(1),
            "q and out must be [rows, group * D]");
    require(sinks >= 0 && window >= 0 && (sinks == 0 || (sink_q && sink_q->shape(0) == q.shape(0) && sink_q->shape(1) == q.shape(1))),
            "sinks need sink_q like q");
    require(tile >= 1 && tile * group <= kMaxQueries && shares >= 1, "a tile has at most 64 queries");
    for (int32_t r = 0; r < rows; ++r) {
        u.check_slot(slots.data()[r] - u.cache.shift);
        require(slots.data()[r] == slots.data()[0] + r, "rows are consecutive");
        require(!sums || size_t(slots.data()[r] - u.cache.shift) < sums->size(), "sums are fewer than the slots");
    }
    require(!sums || shares == 1, "an observed tile is not shared out");
    const size_t stride = size_t(state_stride(d));
    static thread_local std::vector<float> scratch, state, partials, observed;
    scratch.resize(attend_scratch(d));
    state.resize(size_t(kMaxQueries) * stride);
    for (int32_t first = 0; first < rows; first += tile) {
        const int32_t count = std::min(tile, rows - first), queries = count * group;
        Queries a{};
        a.q = q.data() + size_t(first) * q.shape(1);
        a.sink_q = sinks ? sink_q->data() + size_t(first) * q.shape(1) : nullptr;
        a.ld = int32_t(q.shape(1));
        a.rows = count;
        a.group = group;
        a.slots = slots.data() + first;
        a.window = window;
        a.sinks = sinks;
        a.scale = scale;
        a.scratch = scratch.data();
        a.state = state.data();
        const int32_t slot = a.slots[0] - u.cache.shift;
        const Partitions partitions = partitions_of(slot, slot + count - 1, window, sinks);
        const int32_t spans = partitions.spans();
        if (sums) {
            a.sums = sums->data();
            a.observed_first = std::clamp(observed_first - first, 0, count);
            a.observed_end = std::clamp(observed_end - first, a.observed_first, count);
            observed.resize(std::max(observed.size(), attend_observed(queries, partitions.count())));
            a.observed = observed.data();
        }
        u.kernels.attend_reset(state.data(), queries, d);
        const size_t partial = size_t(queries) * stride;
        if (shares > 1) partials.assign(size_t(spans) * partial, NAN);
        for (int32_t i = 0; i < shares; ++i) {
            a.first_span = spans * i / shares;
            a.last_span = spans * (i + 1) / shares;
            if (shares > 1) a.partials = partials.data() + size_t(a.first_span) * partial;
            u.kernels.attend(a, u.cache);
        }
        if (shares > 1)
            for (size_t n = 0; n < size_t(spans); ++n)
                u.kernels.attend_join(state.data(), partials.data() + n * partial, queries, d);
        u.kernels.attend_finish(state.data(), count, group, d, out.data() + size_t(first) * out.shape(1), int32_t(out.shape(1)));
    }
}

}  // namespace

void bind_cache(nb::module_& m) {
    m.def("hadamard", [](const std::string& isa, Floats2 x) {
        require(x.shape(1) % 16 == 0 && x.shape(1) > 0 && x.shape(1) <= kMaxHeadSize, "head size: a multiple of 16 up to 256");
        kernels_named(isa).hadamard(x.data(), int32_t(x.shape(0)), int32_t(x.shape(1)));
    });
    m.def("page_bytes", [](const PyShape& shape, int32_t head_size) { return shape_of(shape, head_size).share_bytes(); });
    m.def("pack_page", [](const std::string& isa, const PyShape& shape, Floats2 k, Floats2 v, MutableBytes out) {
        const PageShape s = shape_of(shape, int32_t(k.shape(1)));
        require(v.shape(1) == k.shape(1) && int32_t(k.shape(0)) == s.tokens && int32_t(v.shape(0)) == s.tokens, "k and v must be [tokens, D]");
        require(out.size() == s.share_bytes(), "bytes do not fit the page");
        kernels_named(isa).pack_page(s, out.data(), k.data(), v.data());
    });
    nb::class_<UnitCache>(m, "UnitCache")
        .def("__init__",
             [](UnitCache* self, const std::string& isa, MutableBytes memory, int32_t head_size, const PyShape& full,
                Array<int32_t> blocks, std::optional<PyShape> packed, std::optional<Array<int32_t>> packed_blocks, int32_t shift,
                int32_t keep) {
                 require(packed.has_value() == packed_blocks.has_value(), "a packed format needs its blocks");
                 require(shift >= 0 && keep >= 0 && keep % kBlockTokens == 0, "keep must be a multiple of 16");
                 const PageShape f = shape_of(full, head_size), p = packed ? shape_of(*packed, head_size) : f;
                 require(!is_packed(f.k) && !is_packed(f.v) && f.tokens == kBlockTokens, "full blocks have full formats and 16 tokens");
                 new (self) UnitCache{kernels_named(isa), memory, list_of(blocks), {}, {}};
                 if (packed_blocks) self->packed_blocks = list_of(*packed_blocks);
                 check_blocks(memory, self->blocks, f);
                 check_blocks(memory, self->packed_blocks, p);
                 self->cache = {memory.data(), self->blocks.data(), packed ? self->packed_blocks.data() : nullptr, 0, 0, f, p, shift, keep};
             })
        .def("append", [](const UnitCache& u, int32_t slot, Floats2 k, Floats2 v) {
            require(k.shape(0) == v.shape(0) && int32_t(k.shape(1)) == u.cache.full.head_size && v.shape(1) == k.shape(1),
                    "k and v must be [rows, D]");
            for (size_t r = 0; r < k.shape(0); ++r) {
                u.check_slot(slot + int32_t(r));
                require(u.blocks[size_t(slot + int32_t(r)) / kBlockTokens] >= 0, "block is missing");
                u.kernels.append(u.cache, slot + int32_t(r), k.data() + r * k.shape(1), v.data() + r * k.shape(1));
            }
        })
        .def("pack_group", [](const UnitCache& u, int32_t group) {
            require(group >= 0 && size_t(group) < u.packed_blocks.size() && u.packed_blocks[size_t(group)] >= 0, "no such packed page");
            for (int32_t t = 0; t < u.cache.packed.tokens; t += kBlockTokens) {
                u.check_slot(group * u.cache.packed.tokens + t);
                require(u.blocks[size_t(group * u.cache.packed.tokens + t) / kBlockTokens] >= 0, "block is missing");
            }
            u.kernels.pack_group(u.cache, group);
        })
        .def("read_slot", [](const UnitCache& u, int32_t slot, int32_t reader, Floats k, Floats v) {
            u.check_slot(slot);
            require(int32_t(k.size()) == u.cache.full.head_size && v.size() == k.size(), "k and v must be [D]");
            u.kernels.read_slot(u.cache, slot, reader, k.data(), v.data());
        })
        .def("attend", attend, nb::arg("q"), nb::arg("sink_q").none(), nb::arg("slots"), nb::arg("group"), nb::arg("window"),
             nb::arg("sinks"), nb::arg("scale"), nb::arg("tile"), nb::arg("shares"), nb::arg("out"), nb::arg("sums").none(),
             nb::arg("observed_first"), nb::arg("observed_end"));
}

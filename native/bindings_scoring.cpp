// What Python is told of reductions: rows of logits to figures of each.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bindings.h"
#include "reduction.h"

namespace nb = nanobind;
using namespace kvik;

namespace {

using Rows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using Targets = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Output = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Output2 = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* message) {
    if (!condition) throw nb::value_error(message);
}

void check_rows(const Rows& logits, const Targets& targets) {
    require(logits.shape(1) >= 1 && logits.shape(1) <= 1 << 26, "scoring: vocabulary must be in [1, 2^26]");
    require(logits.shape(0) == 0 || logits.shape(1) == 1 || logits.stride(1) == 1, "scoring: a row of logits must be contiguous");
    require(targets.size() == logits.shape(0), "scoring: targets must have one entry a row");
    for (size_t r = 0; r < targets.size(); ++r)
        require(targets.data()[r] >= 0 && size_t(targets.data()[r]) < logits.shape(1), "scoring: a target is outside the vocabulary");
}

const float* row_of(const Rows& logits, size_t r) { return logits.data() + int64_t(r) * logits.stride(0); }

// The arguments of both are those of src/kvik/_native.pyi.
void reduce_logits(Pool* pool, Rows logits, Targets targets, Output<double> logsumexp, Output<float> target_logits,
                   Output2<int32_t> top_ids, Output2<float> top_logits, const std::string& isa) {
    check_rows(logits, targets);
    const size_t rows = logits.shape(0), top = top_ids.shape(1);
    require(logsumexp.size() == rows && target_logits.size() == rows && top_ids.shape(0) == rows && top_logits.shape(0) == rows,
            "scoring: an output does not have one entry a row");
    require(top <= logits.shape(1) && top_logits.shape(1) == top, "scoring: more best tokens than there are");
    const int32_t columns = int32_t(logits.shape(1));
    const ReductionKernels& kernels = *kernels_named(isa).reduction;
    nb::gil_scoped_release release;
    auto work = [&](size_t r) {
        const float* x = row_of(logits, r);
        std::vector<RowPart> parts(size_t(parts_of(columns)));
        std::vector<Candidate> best(top);
        std::vector<int32_t> places(kPartColumns);
        BestList list{best.data(), int32_t(top), 0};
        for (size_t i = 0; i < parts.size(); ++i) {
            const int32_t first = int32_t(i) * kPartColumns, n = std::min(kPartColumns, columns - first);
            parts[i] = kernels.reduce(x + first, n);
            if (top) offer_part(kernels, x + first, n, first, list, places.data());
        }
        logsumexp.data()[r] = join_parts(parts.data(), int32_t(parts.size()));
        target_logits.data()[r] = x[targets.data()[r]];
        if (!top) return;
        best.resize(size_t(list.count));
        write_best(best, int32_t(top), top_ids.data() + r * top, top_logits.data() + r * top);
    };
    each_row(pool, rows, work);
}

void compare_logits(Pool* pool, Rows base, Rows other, Targets targets, Output<double> kl, Output<double> base_logprob,
                    Output<double> other_logprob, Output<int32_t> base_best, Output<int32_t> other_best, const std::string& isa) {
    check_rows(base, targets);
    check_rows(other, targets);
    const size_t rows = base.shape(0);
    require(base.shape(1) == other.shape(1), "scoring: rows of two vocabularies cannot be compared");
    require(kl.size() == rows && base_logprob.size() == rows && other_logprob.size() == rows && base_best.size() == rows &&
                other_best.size() == rows,
            "scoring: an output does not have one entry a row");
    const int32_t columns = int32_t(base.shape(1));
    const ReductionKernels& kernels = *kernels_named(isa).reduction;
    nb::gil_scoped_release release;
    constexpr double kNothing = std::numeric_limits<double>::quiet_NaN();
    auto work = [&](size_t r) {
        Divergence d = kernels.diverge(row_of(base, r), row_of(other, r), columns, targets.data()[r]);
        const bool both = d.base_finite && d.other_finite;
        kl.data()[r] = both ? d.kl : kNothing;
        base_logprob.data()[r] = both ? d.base_logprob : kNothing;
        other_logprob.data()[r] = both ? d.other_logprob : kNothing;
        base_best.data()[r] = d.base_finite ? d.base_best : -1;
        other_best.data()[r] = d.other_finite ? d.other_best : -1;
    };
    each_row(pool, rows, work);
}

}  // namespace

void bind_scoring(nb::module_& m) {
    m.def("reduce_logits", &reduce_logits, nb::arg("pool").none(), nb::arg("logits"), nb::arg("targets"), nb::arg("logsumexp"),
          nb::arg("target_logits"), nb::arg("top_ids"), nb::arg("top_logits"), nb::arg("isa") = "");
    m.def("compare_logits", &compare_logits, nb::arg("pool").none(), nb::arg("base"), nb::arg("other"), nb::arg("targets"),
          nb::arg("kl"), nb::arg("base_logprob"), nb::arg("other_logprob"), nb::arg("base_best"), nb::arg("other_best"),
          nb::arg("isa") = "");
}

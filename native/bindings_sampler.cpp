// What Python is told of the sampler: rows of logits with their edits become pointers, checked, and the results arrays.
#include "bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "sampler.h"

namespace nb = nanobind;
using namespace kvik;

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

}  // namespace

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

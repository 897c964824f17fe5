// What is done to a row before temperature, and the best tokens of a row for beams.
#include <algorithm>

#include "sampler_row.h"

namespace kvik {
namespace {

using Undo = std::vector<std::pair<int32_t, float>>;

constexpr int64_t kFewEdits = 2048;  // so many touch fewer entries one by one than a pass over the row does

// A finite value stays finite, a removed token removed.
float bounded_edit(float old, float value) {
    if (old == kNone) return old;
    return std::min(std::max(value, kLowest), std::numeric_limits<float>::max());
}

template <class Change>
void change(float* x, Ids ids, Undo* undo, Change value) {
    for (int32_t i = 0; i < ids.size; ++i) {
        const int32_t token = ids.data[i];
        const float old = x[token];
        if (undo) undo->emplace_back(token, old);  // first: it may throw
        x[token] = value(old, i);
    }
}

void apply(const RowEdits& e, float* x, Undo* undo) {
    const auto removed = [](float, int32_t) { return kNone; };
    change(x, e.bias_ids, undo, [&](float old, int32_t i) { return bounded_edit(old, old + e.biases[i]); });
    change(x, e.banned, undo, removed);
    const float factor = e.repetition;
    change(x, e.seen, undo, [&](float old, int32_t) { return bounded_edit(old, old < 0.0f ? old * factor : old / factor); });
    if (e.presence != 0.0f)
        change(x, e.counted, undo, [&](float old, int32_t) { return bounded_edit(old, old - e.presence); });
    if (e.frequency != 0.0f)
        change(x, e.counted, undo, [&](float old, int32_t i) {
            const float penalty = float(e.counts[i]) * e.frequency;
            return bounded_edit(old, old - penalty);
        });
    change(x, e.dry_ids, undo, [&](float old, int32_t i) { return bounded_edit(old, old - e.dry_penalties[i]); });
    change(x, e.repeated, undo, removed);
}

// The maxima of the strips that the edits are in: looked for again only where the largest entry became less.
void refresh(const float* x, int32_t n, const Undo& undo, float* maxima) {
    for (const auto& [token, old] : undo) {
        const int32_t block = token / kStripBlock, lane = token % kLanesPerStrip;
        float& most = maxima[size_t(block) * kLanesPerStrip + size_t(lane)];
        if (x[token] >= most) {
            most = x[token];
        } else if (old >= most) {
            const int32_t end = std::min(n, (block + 1) * kStripBlock);
            most = kNone;
            for (int32_t at = block * kStripBlock + lane; at < end; at += kLanesPerStrip) most = std::max(most, x[at]);
        }
    }
}

}  // namespace

const float* edit_row(const SamplerKernels& kernels, const float* logits, int32_t n, const RowEdits& edits, bool in_place,
                      SampleScratch& scratch, float* top) {
    float* x = const_cast<float*>(logits);  // `in_place` says that the caller may write
    const bool copied = edits.mask || !in_place;
    if (copied) {
        scratch.row.resize(size_t(n));
        x = scratch.row.data();
        if (edits.mask)
            kernels.masked(logits, n, edits.mask, x);  // first, which changes nothing: a removed token stays removed
        else
            std::copy_n(logits, n, x);
    }
    apply(edits, x, &scratch.undo);
    if (edits.mask || edits.size() > kFewEdits) {
        bool suspect;
        *top = kernels.row_max(x, n, scratch.maxima.data(), &suspect);
    } else {
        refresh(x, n, scratch.undo, scratch.maxima.data());
        *top = *std::max_element(scratch.maxima.begin(), scratch.maxima.begin() + int64_t(strips_of(n)));
    }
    if (copied) scratch.undo.clear();
    return x;
}

void take_back(const float* logits, SampleScratch& scratch) {
    for (auto at = scratch.undo.rbegin(); at != scratch.undo.rend(); ++at) const_cast<float*>(logits)[at->first] = at->second;
    scratch.undo.clear();
}

int32_t best_of_row(const SamplerKernels& kernels, const float* logits, int32_t n, const RowEdits& edits, int32_t count,
                    SampleScratch& scratch, int32_t* ids, float* logprobs) {
    scratch.reserve(n);
    bool suspect = false;
    Row row{kernels, logits, n, 0.0f, 1.0, 0.0, scratch};
    row.top = kernels.row_max(logits, n, scratch.maxima.data(), &suspect);
    if (suspect && !finite_or_none(logits, n)) return -1;
    if (row.top == kNone) return 0;
    const double log_sum = exact_log(kernels.exp_sum(logits, n, row.top, 1.0f, kLowest));
    scratch.row.resize(size_t(n));
    float* x = scratch.row.data();
    kernels.log_probabilities(logits, n, double(row.top), log_sum, x);
    if (edits.mask) kernels.masked(x, n, edits.mask, x);
    apply(edits, x, nullptr);
    row.x = x;
    row.top = kernels.row_max(x, n, scratch.maxima.data(), &suspect);
    if (row.top == kNone) return 0;
    best_k(row, uint32_t(count));
    sort_best(row);
    const int32_t found = std::min(count, int32_t(scratch.ids.size()));
    for (int32_t i = 0; i < found; ++i) {
        ids[i] = scratch.ids[size_t(i)];
        logprobs[i] = x[ids[i]];
    }
    return found;
}

}  // namespace kvik

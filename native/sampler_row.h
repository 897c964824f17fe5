// What the sampler's files share: a row under way, and which of its tokens the filters left.
#pragma once

#include <bit>
#include <limits>

#include "sampler.h"
#include "sampler_math.h"

namespace kvik {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

struct Row {
    const SamplerKernels& kernels;
    const float* x;
    int32_t n;
    float top;           // the largest logit that remains
    double scale, best;  // scores are x * scale - best
    SampleScratch& scratch;
    double score(int32_t token) const { return double(x[token]) * scale - best; }
};

// Most filters keep a prefix of the order "falling logit, equal ones by rising id"; this is the last token of it.
struct Cut {
    float x = kLowest;
    int32_t id = std::numeric_limits<int32_t>::max();
    bool keeps(float value, int32_t token) const { return value > x || (value == x && token <= id); }
};

// What the filters left: scratch.ids, ascending, where `listed`, else the tokens of the cut.
struct Kept {
    Cut cut;
    bool listed = false;
};

inline size_t strips_of(int32_t n) { return size_t((n + kStripBlock - 1) / kStripBlock) * kLanesPerStrip; }

// scratch.ids becomes the k best tokens of the row, ascending by id. scratch.maxima must be this row's.
void best_k(const Row&, uint32_t k);
// scratch.ids sorted: falling logit, equal ones by rising id
void sort_best(const Row&);
// scratch.sums of the row at its scale, with bounds near which a nucleus may end
void set_sums(const Row&);
// top-k to XTC, in order
Kept filter(Row&, const SampleRequest&);
// Lists what is kept where it is not listed yet.
void list(const Row&, Kept&);
// The row after its edits, scratch.maxima and *top with it. In place where that is asked for, with scratch.undo to take it
// back, else in scratch.row.
const float* edit_row(const SamplerKernels&, const float* logits, int32_t n, const RowEdits&, bool in_place, SampleScratch&,
                      float* top);
void take_back(const float* logits, SampleScratch&);
// The row is as before at its end, whatever ends it.
struct Restored {
    const float* logits;
    SampleScratch& scratch;
    Restored(const float* row, SampleScratch& s) : logits(row), scratch(s) { scratch.undo.clear(); }
    Restored(const Restored&) = delete;
    Restored& operator=(const Restored&) = delete;
    ~Restored() { take_back(logits, scratch); }
};
bool finite_or_none(const float* x, int32_t n);

}  // namespace kvik

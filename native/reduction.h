// Rows of logits reduced to what scoring asks for: the logarithm of the sum of exponentials, the logit of one token, the best
// tokens; and two models' rows compared. A row is cut into parts of kPartColumns, each reduced by itself and joined in order,
// so that the bits do not depend on who computes which part, nor on when.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvik {

constexpr int32_t kPartColumns = 512;
inline int32_t parts_of(int32_t columns) { return (columns + kPartColumns - 1) / kPartColumns; }

// Of some columns of a row. sum: of e^(x - top); NaN where the part holds NaN or +infinity.
struct RowPart {
    float top, sum;
};

// One row of two models.
struct Divergence {
    double kl;                           // sum of p (log p - log q) in nats
    double base_logprob, other_logprob;  // of the target
    int32_t base_best, other_best;       // ties to the lower id
    bool base_finite, other_finite;      // without NaN and +infinity, and not -infinity alone; else no figure holds
};

struct ReductionKernels {
    // x [n], 1 <= n <= kPartColumns
    RowPart (*reduce)(const float* x, int32_t n);
    // Indices of x >= least, ascending; returns how many. out has room for n.
    int32_t (*above)(const float* x, int32_t n, float least, int32_t* out);
    Divergence (*diverge)(const float* base, const float* other, int32_t n, int32_t target);
};

// log of the sum of e^x over all parts; NaN where a part holds what is not finite, or nothing is above -infinity.
double join_parts(const RowPart* parts, int32_t count);

// A token with its logit as one number: the larger, the better; equal logits by lower id.
using Candidate = uint64_t;
Candidate candidate_of(float logit, int32_t id);
float logit_of(Candidate);
int32_t id_of(Candidate);

// The best `most` of what was offered; a heap whose least lies in front. candidates has room for `most`.
struct BestList {
    Candidate* candidates;
    int32_t most, count;
    float least() const;  // what is below it is not kept
    void offer(Candidate);
};
// x [n] are the logits of the tokens from `first` on. scratch: room for n.
void offer_part(const ReductionKernels&, const float* x, int32_t n, int32_t first, BestList&, int32_t* scratch);
// The best `most` of the candidates, falling, into ids and logits; -1 and -infinity behind them where they are fewer.
void write_best(std::vector<Candidate>& candidates, int32_t most, int32_t* ids, float* logits);

}  // namespace kvik

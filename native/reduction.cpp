#include "reduction.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

#include "sampler_math.h"

namespace kvik {

double join_parts(const RowPart* parts, int32_t count) {
    float top = -std::numeric_limits<float>::infinity();
    for (int32_t i = 0; i < count; ++i) {
        if (std::isnan(parts[i].sum)) return std::numeric_limits<double>::quiet_NaN();
        top = std::max(top, parts[i].top);
    }
    if (std::isinf(top)) return std::numeric_limits<double>::quiet_NaN();
    double sum = 0.0;
    for (int32_t i = 0; i < count; ++i)
        sum += double(parts[i].sum) * exact_exp(std::max(double(parts[i].top) - double(top), -700.0));
    return double(top) + exact_log(sum);
}

Candidate candidate_of(float logit, int32_t id) {
    const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);  // -0 is 0
    const uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return uint64_t(rising) << 32 | uint32_t(~id);
}

float logit_of(Candidate c) {
    const uint32_t rising = uint32_t(c >> 32);
    return std::bit_cast<float>(rising & 0x80000000u ? rising & 0x7fffffffu : ~rising);
}

int32_t id_of(Candidate c) { return int32_t(~uint32_t(c)); }

float BestList::least() const {
    return count < most ? -std::numeric_limits<float>::infinity() : logit_of(candidates[0]);
}

void BestList::offer(Candidate c) {
    if (count == most) {
        if (c < candidates[0]) return;
        std::pop_heap(candidates, candidates + count--, std::greater<>());
    }
    candidates[count++] = c;
    std::push_heap(candidates, candidates + count, std::greater<>());
}

void offer_part(const ReductionKernels& kernels, const float* x, int32_t n, int32_t first, BestList& list, int32_t* scratch) {
    const int32_t found = kernels.above(x, n, list.least(), scratch);
    for (int32_t i = 0; i < found; ++i) list.offer(candidate_of(x[scratch[i]], first + scratch[i]));
}

void write_best(std::vector<Candidate>& candidates, int32_t most, int32_t* ids, float* logits) {
    const int32_t count = int32_t(std::min(candidates.size(), size_t(most)));
    std::partial_sort(candidates.begin(), candidates.begin() + count, candidates.end(), std::greater<>());
    for (int32_t i = 0; i < most; ++i) {
        ids[i] = i < count ? id_of(candidates[size_t(i)]) : -1;
        logits[i] = i < count ? logit_of(candidates[size_t(i)]) : -std::numeric_limits<float>::infinity();
    }
}

}  // namespace kvik
